"""A forward pass kept with its graph: what attentions read, head by head, and the linear maps that made it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import lookup
from .interception import Tap
from .operands import Reading


@dataclass(frozen=True, eq=False)
class Called:
    """A linear map as it was called, and what it gave."""

    func: Callable[..., Any]
    args: tuple
    output: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """What it read: the first floating tensor that is no parameter."""
        return next(a for a in self.args if isinstance(a, Tensor) and a.is_floating_point()
                    and not isinstance(a, nn.Parameter))

    @property
    def weight(self) -> Tensor | None:
        """Its matrix W of y = x W + b, (entries read, entries given); None where that cannot be told."""
        tensors = [a for a in self.args if isinstance(a, Tensor)]
        if self.func in (F.linear, torch._C._nn.linear) and len(tensors) > 1:
            return tensors[1].detach().T
        if getattr(self.func, "__name__", "") == "addmm" and len(tensors) == 3:  # a bias first, then x, then W
            return tensors[2].detach()
        if len(tensors) == 2 and tensors[1].dim() == 2 and isinstance(tensors[1], nn.Parameter):
            return tensors[1].detach()  # x @ W
        return None


class Watching(Reading):
    """An editor that knows which call is being `made`, and which linear maps were called since it was told to `watch`:
    `before` has those by the tap of the pattern of the attention that came next.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.made: Called | None = None
        self.before: dict[Tap, list[Called]] = {}
        self._since: list[Called] = []
        super().__init__(*args, **options)

    def watch(self) -> None:
        """Forgets the linear maps so far."""
        self._since = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = "" if self.asleep else getattr(lookup(func), "kind", "")
        if kind not in ("linear", "matmul"):
            return super().__torch_function__(func, types, args, kwargs)
        self.made = Called(func, (*args, *(kwargs or {}).values()))
        output = super().__torch_function__(func, types, args, kwargs)
        if kind == "linear" and isinstance(output, Tensor) and output.requires_grad:
            self._since.append(Called(func, (*args, *(kwargs or {}).values()), output))
        return output

    def _next(self) -> Tap:
        tap = super()._next()
        self.before[tap], self._since = self._since, []
        return tap


__all__ = ["Called", "Watching"]
