"""Denominators kept off zero, sums in enough precision, and one tolerance per dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = {torch.float64: 1e-18, torch.float32: 1e-9, torch.bfloat16: 1e-9, torch.float16: 1e-6}
"""Default stabilizer of each dtype: far below any activation that matters, and 1 / eps is finite."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def stabilize(z: Tensor, eps: float | None = None) -> Tensor:
    """`z` moved away from zero by `eps`, in the direction of its own sign; zero counts as positive.

    z + eps sign(z), sign(0) = +1, sign(-0.0) = -1 (Bach et al. 2015, eq. 58, the epsilon rule). Shape and dtype of
    `z`; None takes the dtype's own `EPS`.
    """
    eps = EPS[z.dtype] if eps is None else eps
    if not eps:
        return z
    return torch.copysign(torch.tensor(eps, dtype=z.dtype, device=z.device), z).add_(z)


LOW = (torch.bfloat16, torch.float16)
"""Dtypes that models are run in and relevance is not: of these, relevance is carried in float32."""


def widened(t: Tensor) -> Tensor:
    """`t` in float32 if it is in less, else `t` itself."""
    return t.float() if t.dtype in LOW else t


def narrowed(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """`t` in a dtype of the model, for a product of matrices, and what the product is to be multiplied by.

    float16 ends at 65504, and below 6e-5 it is coarse: what goes in is brought to 1 at its largest first.
    """
    if dtype not in LOW or t.dtype == dtype:
        return t, 1.0
    if dtype != torch.float16 or not t.numel():
        return t.to(dtype), 1.0
    size = t.abs().amax()
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)
    return (t / size).to(dtype), size


def through(run: Callable[[Tensor], Tensor], t: Tensor, dtype: torch.dtype) -> Tensor:
    """run(t), a product of matrices of this dtype, of a `t` that may be in more; linear in it, and as exact as t is
    carried: in float32 at least.
    """
    t, size = narrowed(t, dtype)
    y = widened(run(t))
    return y * size if isinstance(size, Tensor) else y


def tolerance(dtype: torch.dtype) -> float:
    """How far the books of a run in `dtype` may be from balance, relative to the largest entry.

    Raises: ValueError if `dtype` is not a floating type that models run in.
    """
    try:
        return _TOLERANCE[dtype]
    except KeyError:
        raise ValueError(f"no tolerance for {dtype}; run the model in float64, float32, bfloat16 or float16") from None


def relevance_of(x: Tensor, per_unit: Tensor) -> Tensor:
    """Relevance of a tensor from its value and its relevance per unit: x * per_unit, entry by entry.

    Zero counts as the stabilizer on both sides of the bargain: rules that give relevance to inputs that are exactly
    zero (z-box, w-square, flat) divide by `stabilize(x)`, and here it is multiplied back in, so that nothing is lost.
    """
    return stabilize(x.to(per_unit.dtype)) * per_unit


def ratio(y: Tensor, x: Tensor) -> Tensor:
    """y / x where x is not zero, 0 where both are: the factor of a function that is zero at zero, unstabilized."""
    return (y / x).nan_to_num_(0.0)
