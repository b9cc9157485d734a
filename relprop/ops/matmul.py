"""Products of two matrices: linear in one operand where the other is a constant, bilinear where both depend on x.

References: Achtibat et al. 2024 (AttnLRP, eqs. 14 and 15), Shrikumar et al. 2016 (Not just a black box).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..numerics import stabilize
from .call import Binary, Call, dependent, scaled
from .journal import PRODUCT


def uniform(a: Tensor, b: Tensor, y: Tensor, g: Tensor, vjp: Callable[[Tensor], tuple[Tensor, Tensor]],
            ) -> tuple[Tensor, Tensor]:
    """Half of the relevance to each operand: R_a = a (dy/da)^T g / 2 (Achtibat et al. 2024, eq. 15, epsilon = 0).

    Strictly conservative. `vjp` gives the plain gradients of a and b for a gradient of y.
    """
    return vjp(g / 2)


def epsilon(a: Tensor, b: Tensor, y: Tensor, g: Tensor, vjp: Callable[[Tensor], tuple[Tensor, Tensor]], *,
            eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """R_a = a b R / (2 y + eps), the stabilized form (Achtibat et al. 2024, eq. 15). Conserves up to the stabilizer."""
    return vjp(g * y / stabilize(2 * y, eps))


def gradient(a: Tensor, b: Tensor, y: Tensor, g: Tensor, vjp: Callable[[Tensor], tuple[Tensor, Tensor]],
             ) -> tuple[Tensor, Tensor]:
    """R_a = a b R / y to both operands: all of y's relevance, so that it doubles (gradient x input, Shrikumar et al.
    2016). Not conservative.
    """
    return vjp(g)


def bilinear(call: Call, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """y = run(a, b), linear in each operand, under the call's rule."""
    if not (dependent(a) and dependent(b)):
        return run(a, b)
    if call.rule is uniform:
        return run(scaled(a, 0.5), scaled(b, 0.5))
    if call.rule is gradient:
        return call.booked(PRODUCT, [a, b], run)

    def rule(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        # out of sight of the interception, which would take the product for one of the model's
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            product = run(a, b)
        return call.rule(a, b, y, g, lambda s: torch.autograd.grad(product, (a, b), s))

    return Binary.apply(a, b, run, rule, call.journal, PRODUCT)


def matmul(call: Call, input: Tensor, other: Tensor | None = None, **names: Any) -> Tensor:
    """`torch.matmul`, `@`, `torch.bmm`, `torch.mm`, `torch.mv`, `torch.dot`."""
    other = next(iter(names.values())) if other is None else other
    return bilinear(call, input, other, lambda a, b: call.func(a, b))


def baddbmm(call: Call, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.baddbmm`: input beta + batch1 @ batch2 alpha, the scores of models that add a bias to them."""
    if dependent(input):
        return call.retrace(lambda: torch.mul(input, beta) + torch.mul(torch.bmm(batch1, batch2), alpha))
    y = bilinear(call, batch1, batch2, lambda a, b: call.func(input, a, b, beta=beta, alpha=alpha))
    by_difference = call.rule is not uniform and dependent(batch1) and dependent(batch2)  # the constant is in there
    if beta and not by_difference:
        call.constant(input * beta if beta != 1 else input, y, call.origin(input))
    return y


def einsum(call: Call, equation: str, *operands: Any) -> Tensor:
    """`torch.einsum` of any number of operands: the dependent ones share, the others are constants."""
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    places = [i for i, operand in enumerate(operands) if dependent(operand)]

    def run(*moving: Tensor) -> Tensor:
        filled = list(operands)
        for place, operand in zip(places, moving, strict=True):
            filled[place] = operand
        return call.func(equation, *filled)

    moving = [operands[i] for i in places]
    if len(moving) == 2:
        return bilinear(call, *moving, run)
    if call.rule is gradient and len(moving) > 1:
        return call.booked(PRODUCT, moving, run)
    return run(*(scaled(operand, 1 / len(moving)) for operand in moving))
