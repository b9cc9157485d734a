"""What a propagation method should do better than: gradients, perturbation, and chance. Each method that Captum has is
Captum's; what is here says what its units and baselines are, and what it costs.
"""
from __future__ import annotations

from collections.abc import Callable

from ..result import Relevance
from .chance import random
from .gradient import gradient, input_x_gradient, saliency, smoothgrad
from .path import deeplift, gradient_shap, integrated_gradients, layer_integrated_gradients
from .perturbation import feature_ablation, kernel_shap, lime, occlusion

__all__ = [
    "METHODS", "OF_SEVERAL", "deeplift", "feature_ablation", "gradient", "gradient_shap", "input_x_gradient",
    "integrated_gradients", "kernel_shap", "layer_integrated_gradients", "lime", "occlusion", "random", "saliency",
    "smoothgrad",
]  # fmt: skip

OF_SEVERAL = ("input-x-gradient", "feature-ablation", "occlusion", "kernel-shap", "lime", "random")
"""Methods whose maps are of all inputs at once, where pictures stand beside a text."""
METHODS: dict[str, Callable[..., Relevance]] = {
    "gradient": gradient,
    "saliency": saliency,
    "input-x-gradient": input_x_gradient,
    "integrated-gradients": integrated_gradients,
    "layer-integrated-gradients": layer_integrated_gradients,
    "smoothgrad": smoothgrad,
    "gradient-shap": gradient_shap,
    "deeplift": deeplift,
    "occlusion": occlusion,
    "feature-ablation": feature_ablation,
    "kernel-shap": kernel_shap,
    "lime": lime,
    "random": random,
}
