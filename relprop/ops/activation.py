"""Elementwise functions: one input, one output, no parameters.

References: Bach et al. 2015 (On pixel-wise explanations), Achtibat et al. 2024 (AttnLRP, eq. 11), Shrikumar et al.
2016 (Not just a black box: gradient x input), Ali et al. 2022 (XAI for transformers).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..numerics import ratio, widened
from .call import Call, Unary, dependent, wide
from .journal import ACTIVATION
from .split import Split, each, led
from .split import difference as by_difference


def identity(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Relevance passes the function unchanged: R_x = R_y, so g_x = g f(x) / x (Achtibat et al. 2024, eq. 11).

    Strictly conservative where f(0) = 0; otherwise see `offset`.
    """
    return g * ratio(y, x)


def gradient(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Marker: the plain gradient, R_x = x f'(x) R_y / y, a Taylor expansion at x without its constant (gradient x
    input, Shrikumar et al. 2016). Not conservative.
    """
    raise NotImplementedError("the machine runs this rule as the plain gradient")


def hold(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Marker: the output is a constant, R_x = 0, and takes part in later products as one (Ali et al. 2022, the gate of
    CP-LRP). Not conservative by itself: where nothing else carries it, the relevance is lost.
    """
    raise NotImplementedError("the machine runs this rule by cutting the graph")


class Identity(Function):
    """y = run(x) under the identity rule, fused: the factor f(x) / x is kept in place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], offset: Tensor | float) -> Tensor:
        y = run(x)
        y = y.clone() if y is x or y._is_view() else y
        x, z = widened(x), y if x.dtype == widened(x).dtype else widened(run(widened(x)))  # what cancels at zero
        ctx.save_for_backward(ratio(z if _nothing(offset) else z - offset, x).to(y.dtype))
        return wide(ctx, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * ctx.saved_tensors[0], None, None


class Recomputed(Function):
    """The same for a function that is zero at zero and cheap beside the memory of its factor: x is kept, and the factor
    computed on the way back, in the place of the result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run = run
        return wide(ctx, run(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x = widened(ctx.saved_tensors[0])
        return ctx.run(x).div_(x).nan_to_num_(0.0).mul_(g), None


_RECOMPUTED = frozenset({"gelu", "silu", "mish"})
"""Functions of one kernel whose own derivative keeps x too, so that no model overwrites it."""


def _nothing(offset: Tensor | float) -> bool:
    return not isinstance(offset, Tensor) and not offset


def at_zero(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | float:
    """f(0), one number or, for exponents and bounds of their own, one an entry of x; 0 where it is not finite."""
    with torch.no_grad():
        value = run(torch.zeros(1, dtype=x.dtype, device=x.device))
        if value.numel() > 1:
            return run(torch.zeros_like(x)).nan_to_num_(0.0, 0.0, 0.0)
    return float(value) if math.isfinite(float(value)) else 0.0


def apply(call: Call, x: Tensor, run: Callable[[Tensor], Tensor], *, offset: float | None = None) -> Tensor:
    """y = run(x), elementwise, under the call's rule. `offset` is f(0) where it is known already.

    Where f(0) is not 0 (sigmoid, softplus, exp), f(0) is a constant that absorbs f(0) g, and the identity rule passes
    the rest: f(x) / x would be infinite at 0.
    """
    if call.rule is hold:
        return run(x).detach()
    if call.rule is gradient:
        return call.booked(ACTIVATION, [x], run)
    if call.rule is not identity:
        return Unary.apply(x, run, call.rule, call.journal, ACTIVATION)
    if getattr(call.func, "__name__", "") in _RECOMPUTED:
        return Recomputed.apply(x, run)
    offset = at_zero(run, x) if offset is None else offset
    if not _nothing(offset) and bool(x.isinf().any()):  # a masked score passes nothing on, and has no constant
        offset = torch.where(x.isinf(), run(x.detach()), offset)
    y = Identity.apply(x, run, offset)
    if not _nothing(offset):
        call.constant(offset, y, ACTIVATION)
    return y


def elementwise(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.gelu`, `F.silu`, `torch.tanh`, `torch.pow` ... in or out of place."""
    values = [input, *args, *kwargs.values()]
    if not dependent(input) or any(dependent(value) for value in values[1:]):  # pow(x, y), clamp(x, max=y)
        def run(*moving: Tensor) -> Tensor:
            source = iter(moving)
            first, *rest = [next(source) if dependent(value) else value for value in values]
            return call.func(first, *rest[:len(args)], **dict(zip(kwargs, rest[len(args):], strict=True)))

        return call.booked(ACTIVATION, [value for value in values if dependent(value)], run)
    kwargs.pop("inplace", None) if kwargs.get("inplace") else None
    return apply(call, input, lambda x: call.func(x, *args, **kwargs))


def prelu(call: Call, input: Tensor, weight: Tensor) -> Tensor:
    """`F.prelu`, whose slopes are a channel's own."""
    return apply(call, input, lambda x: call.func(x, weight), offset=0.0)


def glu(call: Call, input: Tensor, dim: int = -1) -> Tensor:
    """`F.glu`: a product with a gate, as separate calls."""
    def run() -> Tensor:
        passed, gate = input.chunk(2, dim)
        return torch.mul(passed, torch.sigmoid(gate))

    return call.retrace(run)


# -- forward ---------------------------------------------------------------------------------------------------------

def difference(rel: Tensor, x: Tensor, y: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """rel -> f(x) - f(x - rel): irrel passes alone, rel takes the rest (Hsu et al. 2024, section 3).

    Args: rel: of x, (S, ...). x, y: the total and f of it, (...). run: f, entry by entry.
    """
    return y - run(x - rel)


def shapley(rel: Tensor, x: Tensor, y: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """rel -> (f(rel) - f(0) + f(x) - f(x - rel)) / 2, the mean over both orders (Murdoch et al. 2018, section 3.2.2;
    Singh et al. 2019, eq. 8 for two parts). f(0) is a constant.
    """
    at_zero = run(torch.zeros_like(x))
    return (run(rel) - at_zero + y - run(x - rel)) / 2


def split_by(call: Split, rel: Tensor, x: Tensor, run: Callable[[Tensor], Tensor], offset: float | Tensor) -> Tensor:
    """The relevant part of y = run(x), elementwise, with its share of f(0), which is a constant."""
    part = call.rule(rel, x, call.output, run)
    if _nothing(offset):
        return part
    return part + call.constant(rel, x, torch.as_tensor(offset, dtype=x.dtype, device=x.device))


def split_elementwise(call: Split, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`F.gelu`, `F.silu`, `torch.tanh`, `torch.pow`, `torch.clamp` ..., forward."""
    rel = call.rel(input)
    kwargs = {name: False if name == "inplace" else value for name, value in kwargs.items()}
    if rel is None or any(call.rel(value) is not None for value in (*args, *kwargs.values())):
        return by_difference(call, input, *args, **kwargs)
    others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    rel = led(rel, max([input.dim(), *(other.dim() for other in others)]))

    def run(x: Tensor) -> Tensor:
        return call.func(x, *args, **kwargs)

    return split_by(call, rel, input, run, at_zero(run, input))


def split_prelu(call: Split, input: Tensor, weight: Tensor) -> Tensor:
    """`F.prelu`, forward."""
    def run(x: Tensor) -> Tensor:
        return each(lambda one: call.func(one, weight), x) if x.dim() > input.dim() else call.func(x, weight)

    return split_by(call, call.rel(input), input, run, 0.0)
