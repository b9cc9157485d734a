"""Where what a part writes is read again as it was written: a forward pass followed along its sums.

The residual stream is a sum, so each module that reads it reads what was written before as a term, unchanged. Followed
is what is only added to, cast or reshaped; anything else that is made of it is another value.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import lookup
from .interception import Tap
from .intervention import Change, Editor, edited

_WRITES = "_relprop_writes"
_ADDS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
_KEEPS = frozenset("""view reshape flatten unflatten squeeze unsqueeze contiguous clone to type type_as float double
    half bfloat16 detach alias view_as reshape_as transpose permute movedim swapaxes""".split())


@dataclass(frozen=True, eq=False)
class Reading:
    """The nth run of a module, which holds no other, on a sum that has these writes among its terms."""

    path: str
    nth: int
    writes: frozenset[Tap]
    read: Tensor
    made: Tensor


class Follower(Editor):
    """Changes nothing, and follows what is written at taps: the value there or, of a tap on what a linear map reads,
    the map's output. `weights` has of each tap the map, (C, D), or None for the value itself.
    """

    def __init__(self, changes: dict[Tap, Change]) -> None:
        super().__init__({tap: self._noticed(tap) for tap in changes})
        self.readings: list[Reading] = []
        self.weights: dict[Tap, Tensor | None] = {}
        self._leaves: list[tuple[str, int, Tensor | None]] = []
        self._entered: Counter[str] = Counter()

    def _noticed(self, tap: Tap) -> Change:
        def change(value: Tensor) -> None:
            if tap.side == "output" or tap.kind is None:
                self.weights[tap] = None
                setattr(value, _WRITES, _writes(value) | {tap})

        return change

    def _edited(self, func: Any, kind: str, args: Any, kwargs: Any) -> Any:
        path = self.path[-1]
        tap = Tap(path, kind, "input", self._counts.get((path, kind, "input"), 0))
        output = super()._edited(func, kind, args, kwargs)
        weight = _weight(func, args, kwargs) if tap in self.changes else None
        if weight is not None:
            self.weights[tap] = weight
            setattr(output, _WRITES, _writes(output) | {tap})
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if isinstance(output, Tensor):
            self._follow(func, [a for a in args if isinstance(a, Tensor)], output, kwargs or {})
        return output

    def _follow(self, func: Any, terms: list[Tensor], output: Tensor, options: dict[str, Any]) -> None:
        name = getattr(func, "__name__", "")
        if lookup(func) is None:  # not a call of its own: those inside it were followed
            return
        if name in _ADDS and "alpha" not in options:
            kept = frozenset().union(*(_writes(term) for term in terms if term.shape == output.shape))
        elif name in _KEEPS and output.numel() == terms[0].numel() and output.shape[-1:] == terms[0].shape[-1:]:
            kept = _writes(terms[0])
        elif name == "dropout" and torch.equal(output, terms[0]):
            kept = _writes(terms[0])
        elif any(output is term for term in terms) and name not in _KEEPS:  # written over
            output.__dict__.pop(_WRITES, None)
            return
        else:
            return
        setattr(output, _WRITES, kept | _writes(output))

    def enter(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = super().enter(path, args, kwargs)
        read = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        self._leaves.append((path, self._entered[path], read if read is not None and _writes(read) else None))
        self._entered[path] += 1
        return args, kwargs

    def leave(self, path: str, output: Any) -> Any:
        where, nth, read = self._leaves.pop()
        if read is not None and isinstance(output, Tensor) and output.shape == read.shape and output is not read:
            self.readings.append(Reading(where, nth, _writes(read), read.detach().clone(), output.detach().clone()))
        return super().leave(path, output)


def _writes(x: Tensor) -> frozenset[Tap]:
    return getattr(x, _WRITES, frozenset())


def _weight(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The matrix (C, D) of a linear map x W + b; None for a call that is not plainly one."""
    name = getattr(func, "__name__", "")
    if name == "linear" and len(args) > 1:
        return args[1].detach().T
    if name == "addmm" and len(args) > 2 and not kwargs:
        return args[2].detach()
    if name in ("matmul", "mm", "__matmul__") and len(args) == 2 and args[1].dim() == 2:
        return args[1].detach()
    return None


@torch.no_grad()
def readings(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], taps: Sequence[Tap]
             ) -> tuple[list[Reading], dict[Tap, Tensor | None]]:
    """The modules that read what is written at taps as a term of a sum, in order, and how each tap is written: by a
    linear map, (C, D), or as it is, None; a tap that is neither is missing. Cost: a forward pass.
    """
    with edited(model, dict.fromkeys(taps), kind=Follower) as follower:
        model(*args, **kwargs)
    single = {path for path, module in model.named_modules() if next(module.children(), None) is None}
    return [one for one in follower.readings if one.path in single], follower.weights
