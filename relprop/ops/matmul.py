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
from .split import Split, difference, each, led


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


# -- forward ---------------------------------------------------------------------------------------------------------

Parts = tuple[Tensor, Tensor]
"""The relevant part of an operand, (S, ...), and its total, (...)."""


def inner(a: Parts, b: Parts, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """rel = rel_a rel_b: cross terms are irrelevant (Murdoch et al. 2018, section 3.2.1; Hsu et al. 2024 for the
    products in attention).
    """
    return run(a[0], b[0])


def crossed(a: Parts, b: Parts, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """rel = a b - irrel_a irrel_b: cross terms are relevant, as of an activation by difference."""
    return run(a[0], b[1]) + run(a[1] - a[0], b[0])


def halved(a: Parts, b: Parts, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """rel = rel_a rel_b + (rel_a irrel_b + irrel_a rel_b) / 2 = (rel_a b + a rel_b) / 2: the Shapley mean."""
    return (run(a[0], b[1]) + run(a[1], b[0])) / 2


def split_bilinear(call: Split, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """y = run(a, b), forward: linear in one operand that a source reaches, by the rule of the call in two."""
    rel_a, rel_b = call.rel(a), call.rel(b)
    if rel_a is None or rel_b is None:
        return run(a if rel_a is None else rel_a, b if rel_b is None else rel_b)
    return call.rule((rel_a, a), (rel_b, b), run)


def split_matmul(call: Split, input: Tensor, other: Tensor | None = None, **names: Any) -> Tensor | None:
    """`torch.matmul`, `@`, `torch.bmm` ..., forward."""
    other = next(iter(names.values())) if other is None else other
    func = {"__rmatmul__": lambda a, b: torch.matmul(b, a)}.get(getattr(call.func, "__name__", ""), torch.matmul)
    dims = max(input.dim(), other.dim())
    if min(input.dim(), other.dim()) < 2:
        return split_bilinear(call, input, other, lambda a, b: _by_source(call.func, a, b, input.dim(), other.dim()))

    def run(a: Tensor, b: Tensor) -> Tensor:
        a = led(a, dims) if a.dim() > input.dim() else a
        return func(a, led(b, dims) if b.dim() > other.dim() else b)

    return split_bilinear(call, input, other, run)


def _by_source(func: Callable[..., Tensor], a: Tensor, b: Tensor, *dims: int) -> Tensor:
    """func(a, b) for each source, of whichever operands have them in front."""
    moving = [t for t, dim in zip((a, b), dims, strict=True) if t.dim() > dim]

    def once(*parts: Tensor) -> Tensor:
        source = iter(parts)
        return func(*(next(source) if t.dim() > dim else t for t, dim in zip((a, b), dims, strict=True)))

    return each(once, *moving)


def split_baddbmm(call: Split, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1,
                  alpha: float = 1) -> Tensor:
    """`torch.baddbmm`, forward: as separate calls."""
    return call.retrace(lambda: torch.add(torch.mul(torch.bmm(batch1, batch2), alpha), input, alpha=beta))


def split_einsum(call: Split, equation: str, *operands: Any) -> Tensor | None:
    """`torch.einsum`, forward; of more than two operands that a source reaches, by difference."""
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    places = [place for place, operand in enumerate(operands) if call.rel(operand) is not None]
    if len(places) > 2:
        return difference(call, equation, *operands)
    a, b = (operands[places[0]], operands[places[-1]])

    def run(*parts: Tensor) -> Tensor:
        def once(*moving: Tensor) -> Tensor:
            filled, source = list(operands), iter(moving)
            for place, part, whole in zip(places, parts, (a, b)):
                filled[place] = next(source) if part.dim() > whole.dim() else part
            return call.func(equation, *filled)
        return each(once, *(part for part, whole in zip(parts, (a, b)) if part.dim() > whole.dim()))

    if len(places) == 1:
        return run(call.rel(a))
    return split_bilinear(call, a, b, run)
