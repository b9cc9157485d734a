"""Relevant parts of a linear map of many outputs, such as the logits of a vocabulary, of which few are asked for."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.split import Split

WIDE = 8
"""Outputs an input, from which on a map waits to be asked."""


@dataclass(eq=False)
class Late:
    """rel of y = x W + b that is computed where it is asked for.

    `part`: rel of x, (S, ..., D); `total`: y, (..., V).
    """

    call: Split
    part: Tensor
    weight: Tensor
    bias: Tensor | None
    total: Tensor
    found: Tensor | None = None

    @staticmethod
    def fits(call: Split, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """Whether it is worth while to wait, for a call of `F.linear`."""
        wide = call.whole and weight.dim() == 2 and weight.shape[0] >= WIDE * weight.shape[1]
        return wide and call.rel(weight) is None and input.dim() > 1

    @staticmethod
    def of(call: Split, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Late:
        """What a call of `F.linear` will give."""
        return Late(call, call.rel(input), weight, bias, call.output)

    def dense(self) -> Tensor:
        """All of it, (S, ..., V)."""
        if self.found is None:
            self.found = self._image(self.part, self.weight, self.bias, self.total)
        return self.found

    def at(self, index: Any, total: Tensor) -> Late | Tensor:
        """rel of `total` = y[index]: waiting still, if all outputs are kept."""
        if self.found is not None:
            return torch.vmap(lambda part: part[index])(self.found)
        at = index if isinstance(index, tuple) else (index,)
        if None not in at and Ellipsis not in at and not any(_masks(one) for one in at):
            leading, last = at[:self.total.dim() - 1], at[self.total.dim() - 1:]
            if not last or last == (slice(None),):
                part = torch.vmap(lambda part: part[leading])(self.part)
                return replace(self, part=part, total=total)
        return self._picked(index, total)

    def _picked(self, index: Any, total: Tensor) -> Tensor:
        """Some outputs of some rows: the smallest product of matrices that has them all."""
        places = torch.arange(self.total.numel(), device=total.device).view(self.total.shape)[index]
        rows, row = (places // self.total.shape[-1]).unique(return_inverse=True)
        columns, column = (places % self.total.shape[-1]).unique(return_inverse=True)
        part = self.part.flatten(1, -2)[:, rows]  # (S, R, D)
        bias = None if self.bias is None else self.bias[columns]
        found = self._image(part, self.weight[columns], bias, self.total.flatten(0, -2)[rows][:, columns])
        return found[:, row, column]

    def _image(self, part: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
        rel = F.linear(part, weight)
        return rel if bias is None else rel + self.call.constant(rel, total - bias, bias)


def _masks(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool
