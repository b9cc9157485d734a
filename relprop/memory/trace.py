"""The memory that a run takes and gives back, tensor by tensor, and what it would be for a larger input."""
from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Trace(TorchDispatchMode):
    """What is taken (bytes) and given back (negative) during a `with` block, in order. What was there before is left
    out. `marks`: how many of these had been when `mark` was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.marks: list[int] = []
        self._held: dict[int, weakref.ref] = {}
        self._new: int | None = None
        self._aliases: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in self._aliases:  # views, and ops that write into what is there, make nothing new
            self._aliases[func] = all(one.alias_info is not None for one in func._schema.returns)
        if func is torch.ops.aten.index_put.default and self._new == args[0].untyped_storage()._cdata:
            self._moved(args[0], output)
        elif not self._aliases[func]:
            for t in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(t, Tensor):
                    self._made(t)
        return output

    def _made(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self._held and storage.nbytes() and t.device.type != "meta":
            self._hold(storage)
            self._new = storage._cdata
            self.sizes.append(storage.nbytes())

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: weakref.ref) -> None:
            del self._held[key]
            self.sizes.append(-size)

        self._held[key] = weakref.ref(storage, freed)

    def _moved(self, old: Tensor, new: Tensor) -> None:
        """Autograd writes the gradient of an index into new zeros in place, unless it is watched: then into a copy."""
        self._held.pop(old.untyped_storage()._cdata)
        self._hold(new.untyped_storage())

    def mark(self) -> None:
        """Notes that the run has come to some point."""
        self.marks.append(len(self.sizes))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._held.clear()  # and the calls with it


@contextmanager
def traced() -> Iterator[Trace]:
    """A `with` block whose memory is traced; cycles of objects, which are cleared at any time, wait for its end."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with Trace() as trace:
            yield trace
    finally:
        if collects:
            gc.enable()


def levels(sizes: Sequence[float], marks: Sequence[int]) -> tuple[float, float]:
    """The most that is held at once, and the most at one of the marks."""
    held = highest = 0.0
    at = {0: 0.0}
    for number, size in enumerate(sizes, 1):
        held += size
        highest = max(highest, held)
        at[number] = held
    return highest, max((at[mark] for mark in marks), default=0.0)


def grown(small: float, large: float, lengths: tuple[int, int], length: int) -> float:
    """A size at another length, from those at two: a + b T, or, where it grows faster, a T + b T^2.

    >>> grown(30, 50, (10, 20), 100), grown(200, 800, (10, 20), 100)
    (210.0, 20000.0)
    """
    (first, second), least = lengths, min(abs(small), abs(large))
    squared = least > 0 and large / small > (second / first) ** 1.3
    a, b = (small / first, large / second) if squared else (small, large)
    slope = (b - a) / (second - first)
    value = a + slope * (length - first)
    return value * length if squared else value
