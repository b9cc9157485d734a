"""Entrywise products and quotients: gates, layer scale, rotary positions, divisions by a scale.

References: Achtibat et al. 2024 (AttnLRP, eq. 15: the uniform rule), Ali et al. 2022 (XAI for transformers: a factor
held constant), Shrikumar et al. 2016 (Not just a black box).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..numerics import LOW
from .call import Binary, Call, Plain, dependent, wide
from .journal import NORM, PRODUCT
from .matmul import Parts, crossed, split_bilinear
from .split import Split, difference, led


def uniform(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """R_a = R_b = R / 2: half of the relevance to each factor (Achtibat et al. 2024, eq. 15). Strictly conservative."""
    return b * g / 2, a * g / 2


def hold_gate(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """R_b = R, R_a = 0: all relevance to the second factor, the first being the gate (Ali et al. 2022; CP-LRP).

    Strictly conservative.
    The machine takes as the gate the factor that an activation made; where neither or both are, it is `uniform`.
    """
    return torch.zeros_like(a), a * g


def gradient(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """R_a = R_b = R: all relevance to both factors, so that it doubles (gradient x input, Shrikumar et al. 2016).

    Not conservative.
    """
    return b * g, a * g


class Halved(Function):
    """y = a b under the uniform rule, fused: the relevance per unit of y is halved once for both factors."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, run: Any) -> Tensor:
        ctx.save_for_backward(a, b)
        return wide(ctx, run(a, b))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        half = g * 0.5
        g_b = half * a
        return half.mul_(b).sum_to_size(a.shape), g_b.sum_to_size(b.shape), None


def mul(call: Call, input: Any, other: Any) -> Tensor:
    """`torch.mul`, `*`, `*=`: linear in one dependent factor, shared by two."""
    if not (dependent(input) and dependent(other)):
        return _by_constant(call, input, other)
    rule = call.rule
    if rule is gradient:
        return call.booked(PRODUCT, [input, other], lambda a, b: call.func(a, b))
    if rule is hold_gate:
        gates = [getattr(factor, GATE, False) for factor in (input, other)]
        if gates[0] != gates[1]:
            return call.func(input.detach(), other) if gates[0] else call.func(input, other.detach())
        rule = uniform
    if rule is uniform:
        if input.dtype == other.dtype:
            return Halved.apply(input, other, call.func)
        dtype = torch.result_type(input, other)
        return call.retrace(lambda: torch.mul(input.to(dtype), other.to(dtype)))
    a, b = torch.broadcast_tensors(input, other)
    return Binary.apply(a, b, torch.mul, rule, call.journal, PRODUCT)


def _by_constant(call: Call, input: Any, other: Any) -> Tensor:
    """A product with a constant, such as a norm's weight; of tensors of a low dtype, with the way back in float32."""
    if call.writes or torch.result_type(input, other) not in LOW:
        return call.func(input, other)
    first = dependent(input)
    x, constant = (input, other) if first else (other, input)
    shape = x.shape

    def run(x: Tensor) -> Tensor:
        return call.func(x, constant) if first else call.func(constant, x)

    return Plain.apply(run, lambda g: ((g * constant).sum_to_size(shape),), x)


def outer(call: Call, input: Tensor, vec2: Tensor) -> Tensor:
    """`torch.outer`: the product of all pairs."""
    return call.retrace(lambda: torch.mul(input.unsqueeze(1), vec2))


def cosine(call: Call, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """`F.cosine_similarity`: sum_i (x1_i / |x1|) (x2_i / |x2|), a product of vectors whose lengths are held as those of
    a norm are; each has what the rule of products gives it. Under `uniform` R_1i = R_2i = R x1_i x2_i / (2 x1 . x2).
    """
    return call.retrace(lambda: (_unit(x1, dim, eps) * _unit(x2, dim, eps)).sum(dim))


def _unit(x: Tensor, dim: int, eps: float) -> Tensor:
    return x / torch.linalg.vector_norm(x, 2, dim, keepdim=True).clamp_min(eps)


GATE = "_relprop_gate"
"""Name of the mark that the output of an activation carries through data movement, so that a gate is known as one."""


def div(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    """`torch.div`, `/`: the divisor is a scale and is held; under `gradient` it is not."""
    if rounding_mode is not None:
        return call.func(input, other, rounding_mode=rounding_mode)
    if not dependent(other):
        return call.func(input, other)
    if call.rule is gradient:
        moving = [x for x in (input, other) if dependent(x)]
        return call.booked(NORM, moving, lambda *xs: call.func(*(xs if len(xs) == 2 else (input, *xs))))
    return call.func(input, other.detach())


def rdiv(call: Call, input: Any, other: Any) -> Tensor:
    """`1 / x` as torch calls it: the operands the other way round."""
    if not dependent(input):
        return call.func(input, other)
    if call.rule is gradient:
        return call.booked(NORM, [input], lambda x: call.func(x, other))
    return call.func(input.detach(), other)


# -- forward, by the rules of `matmul` -------------------------------------------------------------------------------

def _dims(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def by_difference(a: Parts, b: Parts, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What a product or quotient loses with the relevant parts: all cross terms, and what the divisor loses."""
    return crossed(a, b, run)


def split_mul(call: Split, input: Any, other: Any) -> Tensor | None:
    """`torch.mul`, `*`, forward."""
    dims = max(_dims(input), _dims(other))

    def run(a: Any, b: Any) -> Tensor:
        return torch.mul(led(a, dims) if _dims(a) > _dims(input) else a, led(b, dims) if _dims(b) > _dims(other) else b)

    return split_bilinear(call, input, other, run)


def split_div(call: Split, input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor | None:
    """`torch.div`, `/`, forward: the divisor is a scale, and is that of the total, but for `by_difference`."""
    if call.rule is by_difference:
        return difference(call, input, other, **({"rounding_mode": rounding_mode} if rounding_mode else {}))
    rel = call.rel(input)
    if rel is None or rounding_mode is not None:
        return None
    return led(rel, max(_dims(input), _dims(other))) / other


def split_rdiv(call: Split, input: Any, other: Any) -> Tensor | None:
    """`1 / x`, forward: a scale, not split, but for `by_difference`."""
    return difference(call, input, other) if call.rule is by_difference else None
