"""Where relevant parts are kept: with the tensors that they are parts of, also when the model writes into these."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .late import Late
from .live import Live

REL, _WRITTEN = "_relprop_rel", "_relprop_written"


class Slot:
    """Relevant parts by tensor, (S, ...) for S sources. Of a tensor that was written into, a view has what stands there
    now.
    """

    def __init__(self, sources: int) -> None:
        self.sources = sources

    def holds(self, x: Any) -> bool:
        """Whether a source reaches x."""
        return isinstance(x, Tensor) and (hasattr(x, REL) or (x._base is not None and hasattr(x._base, _WRITTEN)))

    def rel(self, x: Any) -> Tensor | None:
        """The relevant part of x, None if no source reaches it."""
        if not isinstance(x, Tensor):
            return None
        base = x._base
        if base is not None and hasattr(base, _WRITTEN):
            return self._region(base, x)
        found = getattr(x, REL, None)
        return found.dense() if isinstance(found, (Late, Live)) else found

    def live(self, x: Any) -> Live | None:
        """The relevant part of x as its rows that are not zero, None where they are most of them."""
        if not isinstance(x, Tensor) or not hasattr(x, REL) or hasattr(x, _WRITTEN):
            return None
        found = getattr(x, REL)
        if isinstance(found, Live):
            return found
        if isinstance(found, Late) or (x._base is not None and hasattr(x._base, _WRITTEN)):
            return None
        return Live.of(found)

    def late(self, x: Tensor) -> Late | None:
        """The relevant part of x if it has not been computed yet."""
        found = getattr(x, REL, None)
        return found if isinstance(found, Late) else None

    def put(self, x: Tensor, rel: Tensor | Late | Live) -> None:
        """Keeps the relevant part of x, which is a new tensor."""
        setattr(x, REL, rel)

    def ensure(self, x: Tensor) -> None:
        """Makes room for the relevant part of x to be written into."""
        self.write(x, self.rel(x))

    def write(self, x: Tensor, rel: Tensor | None) -> None:
        """The model has written into x, or is about to: its relevant part, and what other views of it see."""
        base = x if x._base is None else x._base
        if not hasattr(base, _WRITTEN):
            whole = _laid(base, self.sources)
            before = self.rel(base)
            if before is not None:
                whole.copy_(before)
            setattr(base, REL, whole)
            setattr(base, _WRITTEN, True)
        region = self._region(base, x)
        if rel is not None and rel is not region:
            region.copy_(rel)
        if x is not base:
            setattr(x, REL, region)

    def _region(self, base: Tensor, x: Tensor) -> Tensor:
        whole = getattr(base, REL)
        if x is base:
            return whole
        offset = x.storage_offset() - base.storage_offset()
        strides = (whole.stride(0), *x.stride())
        return whole.as_strided((self.sources, *x.shape), strides, whole.storage_offset() + offset)


def _laid(x: Tensor, sources: int) -> Tensor:
    """Zeros (S, ...) that lie in memory as x does."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.new_zeros(sources * extent).as_strided((sources, *x.shape), (extent, *x.stride()))


def hooked_activation(mode: Any, path: str, module: nn.Module, offset: float) -> list[Any]:
    """Modules win over functions: an activation module is one op, however many calls it makes.

    Args: mode: `follows(x)` says whether that input matters, `activate` takes what came out.
    """
    waiting: list[Tensor | None] = []

    def before(module: nn.Module, args: Any) -> Any:
        x = args[0] if args else None
        seen = mode.follows(x)
        waiting.append(x if seen else None)
        return (x.detach(), *args[1:]) if seen else None

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        x = waiting.pop()
        return None if x is None or not isinstance(output, Tensor) else mode.activate(path, module, x, output, offset)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


