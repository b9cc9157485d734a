"""A forward pass kept with its graph: what attentions read, head by head, and the linear maps that made it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import lookup
from .interception import Tap
from .operands import Reading


@dataclass(frozen=True, eq=False)
class Called:
    """A linear map as it was called, what it gave, and the tap of what it read."""

    func: Callable[..., Any]
    args: tuple
    output: Tensor | None = None
    tap: Tap | None = None

    @property
    def input(self) -> Tensor:
        """What it read: the first floating tensor that is no parameter."""
        return next(a for a in self.args if isinstance(a, Tensor) and a.is_floating_point()
                    and not isinstance(a, nn.Parameter))

    @cached_property
    def weight(self) -> Tensor | None:
        """Its matrix W of y = x W + b, (entries read, entries given); None where that cannot be told."""
        tensors = [a for a in self.args if isinstance(a, Tensor)]
        if self.func in (F.linear, torch._C._nn.linear) and len(tensors) > 1:
            return tensors[1].detach().T
        if getattr(self.func, "__name__", "") == "addmm" and len(tensors) == 3:  # a bias first, then x, then W
            return tensors[2].detach()
        if len(tensors) == 2 and _written_out(*tensors):
            return tensors[1].detach()  # x @ W
        return None

    @property
    def bias(self) -> Tensor | None:
        """Its b, beside a `weight` that is told; None where there is none."""
        tensors = [a for a in self.args if isinstance(a, Tensor)]
        if len(tensors) < 3:
            return None
        return tensors[0 if getattr(self.func, "__name__", "") == "addmm" else 2].detach()


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
        path, nth = self.path[-1], self._counts.get((self.path[-1], kind, "called"), 0)
        self._counts[path, kind, "called"] = nth + 1
        output = super().__torch_function__(func, types, args, kwargs)
        mapped = kind == "linear" or len(args) == 2 and _written_out(*args)
        if mapped and isinstance(output, Tensor) and output.requires_grad:
            self._since.append(Called(func, (*args, *(kwargs or {}).values()), output, Tap(path, kind, "input", nth)))
        return output

    def _next(self) -> Tap:
        tap = super()._next()
        self.before[tap], self._since = self._since, []
        return tap


def _written_out(x: Any, W: Any) -> bool:
    """Whether a product is a linear map: of x with a matrix that nothing of the input reaches."""
    return isinstance(x, Tensor) and isinstance(W, Tensor) and W.dim() == 2 and not W.requires_grad and W is not x


__all__ = ["Called", "Watching"]
