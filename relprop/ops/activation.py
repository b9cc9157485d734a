"""Elementwise functions: one input, one output, no parameters.

References: Bach et al. 2015, section 2.6 (activations pass relevance); Achtibat et al. 2024, eq. 11 (identity rule).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..numerics import ratio
from .call import Call, Unary, dependent
from .journal import ACTIVATION


def identity(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Relevance passes the function unchanged: R_x = R_y, so g_x = g f(x) / x (Achtibat et al. 2024, eq. 11).

    Strictly conservative where f(0) = 0; otherwise see `offset`.
    """
    return g * ratio(y, x)


def gradient(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Marker: the plain gradient f'(x), a Taylor expansion at x without its constant. Not conservative."""
    raise NotImplementedError("the machine runs this rule as the plain gradient")


def hold(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Marker: the output is a constant, and takes part in later products as one."""
    raise NotImplementedError("the machine runs this rule by cutting the graph")


class Identity(Function):
    """y = run(x) under the identity rule, fused: the factor f(x) / x is kept in place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], offset: float) -> Tensor:
        y = run(x)
        y = y.clone() if y is x or y._is_view() else y
        ctx.save_for_backward(ratio(y - offset if offset else y, x))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * ctx.saved_tensors[0], None, None


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
    if offset is None:
        with torch.no_grad():
            offset = float(run(torch.zeros(1, dtype=x.dtype, device=x.device)))
        offset = offset if math.isfinite(offset) else 0.0
    y = Identity.apply(x, run, offset)
    if offset:
        call.constant(offset, y, ACTIVATION)
    return y


def elementwise(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.gelu`, `F.silu`, `torch.tanh`, `torch.pow` ... in or out of place."""
    if any(dependent(value) for value in (*args, *kwargs.values())):  # pow(x, y), clamp(x, max=y): not elementwise
        inputs = [input, *[value for value in args if dependent(value)]]
        return call.booked(ACTIVATION, inputs, lambda x, *rest: call.func(x, *rest, *args[len(rest):], **kwargs))
    kwargs.pop("inplace", None) if kwargs.get("inplace") else None
    return apply(call, input, lambda x: call.func(x, *args, **kwargs))
