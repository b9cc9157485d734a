"""Relevant parts of which many rows are zero, such as all positions before a source: only the others are kept."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

LEAST = 1 << 16
"""Entries of a part from which on it is worth while to look for rows of zeros."""
MOST = 0.85
"""Live rows up to which they are kept apart."""


@dataclass(eq=False)
class Live:
    """The rows of a part (S, ..., D) that are not zero: `values`, (N, D), at the places `index`, (N,), of S x M."""

    values: Tensor
    index: Tensor
    shape: Size
    whole: Tensor | None = None

    @staticmethod
    def of(rel: Tensor) -> Live | None:
        """The live rows of a part, None if they are most of them."""
        if rel.numel() < LEAST or rel.dim() < 3:
            return None
        flat = rel.reshape(-1, rel.shape[-1])
        few = flat[:, ::max(1, flat.shape[1] // 4)]
        if int((few != 0).any(1).sum()) > MOST * len(flat):
            return None
        index = torch.linalg.vector_norm(flat, 1, dim=1).nonzero().squeeze(1)
        return None if len(index) > MOST * len(flat) else Live(flat[index], index, rel.shape, rel)

    def dense(self) -> Tensor:
        """The whole part, (S, ..., D)."""
        if self.whole is None:
            flat = self.values.new_zeros(self.shape[:-1].numel(), self.shape[-1])
            self.whole = flat.index_copy_(0, self.index, self.values).view(self.shape)
        return self.whole

    def rows(self, total: Tensor) -> Tensor:
        """The rows of a total, (..., D), that go with the live ones, (N, D)."""
        flat = total.reshape(-1, total.shape[-1])
        return flat[self.index % len(flat)]

    def with_values(self, values: Tensor, total: Tensor) -> Live:
        """Other values at the same rows, of a total of the same rows."""
        return Live(values, self.index, Size((self.shape[0], *total.shape)))

    def reshaped(self, shape: Size) -> Live:
        """The same rows of a total that is seen in another shape, (..., D)."""
        return replace(self, shape=Size((self.shape[0], *shape)), whole=None)

    def plus(self, other: Live) -> Live:
        """The sum of two parts of one shape."""
        if torch.equal(self.index, other.index):
            return Live(self.values + other.values, self.index, self.shape)
        alive = torch.zeros(self.shape[:-1].numel(), dtype=torch.bool, device=self.index.device)
        alive[self.index] = alive[other.index] = True
        index, place = alive.nonzero().squeeze(1), alive.cumsum(0) - 1
        values = self.values.new_zeros(len(index), self.shape[-1])
        values[place[self.index]] = self.values
        return Live(values.index_add_(0, place[other.index], other.values), index, self.shape)
