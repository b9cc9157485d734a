"""Operators as modules without parameters, for what a forward would write as `+`, `*` and `@`."""
from __future__ import annotations

import torch
from torch import Tensor

from .ruled import Ruled


class Add(Ruled):
    """x + y, as at a skip connection, under the composite's rule for "add". A parameter as a term is a constant."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._ruled(torch.add, x, y)


class Mul(Ruled):
    """x y entry by entry, as at a gate, under the composite's rule for "mul".

    Where a composite holds gates, the gate is the factor that an activation made.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._ruled(torch.mul, x, y)


class MatMul(Ruled):
    """x @ y, as in attention written out, under the composite's rule for "matmul"."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._ruled(torch.matmul, x, y)
