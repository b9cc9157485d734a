"""Maps from attention patterns: what the heads looked at, alone, or weighed by gradients and relevance."""
from __future__ import annotations

from collections.abc import Callable

from ..result import Relevance
from . import chefer, generic
from .chefer import RULES, full_lrp, lrp_rollout, partial_lrp, transformer_attribution
from .flow import attention_flow, maximum_flow
from .generic import aggregate, generic_attention
from .gradcam import attention_gradcam, gradcam
from .readout import readout
from .rollout import FUSIONS, attention_rollout, raw_attention, rollout
from .weighted import lengths, value_weighted_attention

METHODS: dict[str, Callable[..., Relevance]] = {
    "rollout": attention_rollout, "raw-attention": raw_attention, "attention-gradcam": attention_gradcam,
    "value-weighted-attention": value_weighted_attention, "attention-flow": attention_flow,
    **chefer.METHODS, **generic.METHODS}

__all__ = ["FUSIONS", "METHODS", "RULES", "aggregate", "attention_flow", "attention_gradcam", "attention_rollout",
           "full_lrp", "generic_attention", "gradcam", "lengths", "lrp_rollout", "maximum_flow", "partial_lrp",
           "raw_attention", "readout", "rollout", "transformer_attribution", "value_weighted_attention"]
