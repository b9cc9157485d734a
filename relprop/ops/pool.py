"""Sums, means and pools: linear in their input with constant weights, or the choice of one entry.

References: Bach et al. 2015 (On pixel-wise explanations).
"""

from typing import Any

from torch import Tensor

from ..numerics import stabilize
from .call import Call, Unary
from .journal import STABILIZER
from .split import Split, difference, moved


def zero(y: Tensor, g: Tensor) -> Tensor:
    """R_i = w_i x_i R / z, gradient x input (Bach et al. 2015, eq. 56). Strictly conservative.

    The machine runs it as the plain gradient.
    """
    return g


def epsilon(y: Tensor, g: Tensor, *, eps: float = 1e-6) -> Tensor:
    """R_i = w_i x_i R / (z + eps sign z) (Bach et al. 2015, eq. 58). Conserves up to the stabilizer.

    Returns: relevance per unit of z that goes on to the entries, by the gradient of the pool.
    """
    return g * y / stabilize(y, eps)


def pool(call: Call, *args: Any, **kwargs: Any) -> Any:
    """`torch.mean`, `torch.sum`, `F.avg_pool2d`, `F.max_pool2d` ... under the call's rule, if it has one."""
    y = call.func(*args, **kwargs)
    if call.rule in (None, zero) or not isinstance(y, Tensor) or not y.requires_grad:
        return y
    return Unary.apply(y, Tensor.clone, lambda _, y, g: call.rule(y, g), call.journal, STABILIZER)


_CHOOSING = ("max_pool", "logcumsumexp", "grid_sampl")


def split_pool(call: Split, *args: Any, **kwargs: Any) -> Any:
    """Means, sums and resizing, forward: linear. The choice of one entry: by difference."""
    if any(part in getattr(call.func, "__name__", "") for part in _CHOOSING):
        return difference(call, *args, **kwargs)
    return moved(call, *args, **kwargs)
