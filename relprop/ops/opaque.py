"""Linear maps that are known by what they do: quantised layers, layers with adapters, kernels of other libraries.

Their weights are packed, or in several places, or out of reach. That a layer is x W + b is found out by trying; W is
then what it makes of the unit vectors, when a rule asks for it and no longer, so that it takes the memory of one layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..numerics import through, widened
from . import linear as maps
from .call import Call, wide
from .journal import BIAS, QUANTIZED, Journal
from .linear import Affine

ROWS = 8
"""Rows that a layer is tried with."""
CLOSE = 0.05
"""How far from linear a layer may be: activations that are rounded to 8 bits are, by about a hundredth."""


@dataclass(frozen=True, eq=False)
class Opaque:
    """A map y = x W + b, (..., D) to (..., E), of which `run` is all that is known; `bias` is what it makes of zero.

    Args: shape, dtype, device: of x.
    """

    run: Callable[[Tensor], Tensor]
    bias: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    outputs: int = 0

    @classmethod
    def of(cls, run: Callable[[Tensor], Tensor], x: Tensor, bias: Tensor) -> "Opaque":
        return cls(run, bias if bool((bias != 0).any()) else None, x.shape, x.dtype, x.device)

    def widened(self) -> Affine:
        """The map with its weight, (E, D). Cost: a forward pass of D rows."""
        width = self.shape[-1]
        with torch.no_grad():
            unit = torch.eye(width, dtype=self.dtype, device=self.device)
            image = self.run(_filled(unit, self.shape)).reshape(width, -1)
            W = (image if self.bias is None else image - self.bias).T.contiguous()
        return Affine(F.linear, lambda s, W: s @ W, W, self.bias, 0).widened()


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, also of weights that are packed in fewer bits, which torch's other products do not know."""
    if type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return maps.linear(call, input, weight, bias)

    def run(x: Tensor) -> Tensor:
        return call.func(x, weight, bias)

    return run_opaque(call, input, run, Opaque(run, bias, input.shape, input.dtype, input.device))


class Jacobian(Function):
    """y = run(x), an opaque map under LRP-0: the bias takes its part, and what is lost because the map is not quite
    linear is booked as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], map: Opaque, journal: Journal | None,
                own: bool) -> Tensor:
        y = run(x)
        ctx.save_for_backward(x)
        ctx.y, ctx.map, ctx.journal, ctx.own = y.detach(), map, journal, own
        return wide(ctx, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, = ctx.saved_tensors
        g_x = _by_itself(ctx.map.run, x, g) if ctx.own else ctx.map.widened().adjoint(g)
        if ctx.journal is not None:
            dot, bias = ctx.journal.dot, ctx.map.bias
            taken = 0 if bias is None else dot(g, bias)
            ctx.journal.book(BIAS, taken) if bias is not None else None
            ctx.journal.book(QUANTIZED, dot(g, ctx.y) - dot(g_x, x) - taken)
        return g_x, None, None, None, None


def _by_itself(run: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """The layer's own vector-Jacobian product."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        x = x.detach().requires_grad_()
        y = run(x.clone())  # which the layer may write into
        return through(lambda g: torch.autograd.grad(y, x, g)[0], g, y.dtype)


def run_opaque(call: Call, x: Tensor, run: Callable[[Tensor], Tensor], map: Opaque, *, own: bool = False) -> Tensor:
    """The map under the call's rule. `own`: it has a vector-Jacobian product of its own, which LRP-0 then takes."""
    if call.rule is maps.zero:
        return Jacobian.apply(x, run, map, call.journal, own)
    return maps.run_affine(call, x, run, map)


def _filled(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows (N, D) with as many axes as a tensor of this shape has."""
    return rows.reshape(*(1,) * (len(shape) - 2), *rows.shape)


@torch.no_grad()
def offset(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """b, (E,), if run(x) is x W + b for each row by itself, as far as some rows of x tell; else None."""
    shape, x = x.shape, x.detach().reshape(-1, x.shape[-1])[:ROWS]

    def of(rows: Tensor) -> Tensor:
        return run(_filled(rows, shape)).reshape(len(rows), -1)

    if not bool(x.any()):
        return None
    other = x.flip(-1) + x.roll(1, 0)
    b, y, z = (widened(of(rows)) for rows in (torch.zeros_like(x[:1]), x, other))
    size = max(float((y - b).norm()), float((z - b).norm()))
    if not torch.isfinite(y).all() or not size:
        return None
    gaps = ((of(2 * x) - b) - 2 * (y - b), (of(-x) - b) + (y - b), of(x - other) - b - (y - z), of(x[:1]) - y[:1])
    return b[0].to(x.dtype) if all(float(gap.norm()) <= CLOSE * size for gap in gaps) else None


@torch.no_grad()
def heeds(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> bool:
    """Whether y = run(x) depends on what x is, and not on its shape and dtype alone."""
    return not torch.equal(run(1.5 * x.detach() + 0.25), y)
