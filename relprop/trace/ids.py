"""Token ids on their way through a model: copied, padded, cut, turned or hashed, they still say where they came from.

Models look up other tensors than the ones they are given: time first, in another integer type, padded to full windows,
shifted to the right for a decoder, or hashed. What is looked up is the input all the same, so the relevance of each
entry belongs to the token that it was made of.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor

from ..ops import lookup

_ORIGIN = "_relprop_ids"
NOWHERE = -1

_WRITERS = frozenset({"__setitem__", "masked_fill_", "copy_", "fill_"})
_FILLING = frozenset({"where", "masked_fill", "masked_scatter", "clamp", "clamp_min", "clamp_max", "index_fill"})
_ARITHMETIC = frozenset({
    "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__", "remainder", "__mod__",
    "fmod", "floor_divide", "__floordiv__", "div", "bitwise_xor", "__xor__", "bitwise_and", "__and__"})
_OTHERWISE = frozenset({"new_tensor", "one_hot", "max", "min", "amax", "amin", "maximum", "minimum", "topk", "sort",
                        "msort", "kthvalue", "median", "mode", "cummax", "cummin", "index_add", "scatter_add"})
"""Functions among those that move data that give other numbers than ids."""


@dataclass(frozen=True, eq=False)
class Origin:
    """What an integer tensor is made of: the ids called `name`, of a `shape`.

    `places` has the entry of the ids, flat, that each of its own is made of, `NOWHERE` where there is none; `start`
    what it would hold if other ids were read.
    """

    name: str
    shape: Size
    places: Tensor
    start: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether each entry is of the token at the same place."""
        every = torch.arange(self.shape.numel(), device=self.places.device).view(self.shape)
        return self.places.shape == self.shape and torch.equal(self.places, every)

    def moved(self, run: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor] | None = None) -> Origin:
        """That of a tensor made by `run`; `values` does it to ids, if that is something else."""
        start = None if self.start is None else (values or run)(self.start)
        return replace(self, places=run(self.places), start=start)


class Ids:
    """Follows the explained token ids through calls that the explained relevance does not pass.

    Args: ids: by name, as the model is given them. starts: gives for ids of a name what would be read instead.
    """

    def __init__(self, ids: Mapping[str, Tensor], starts: Mapping[str, Callable[[Tensor], Tensor]] = {}) -> None:
        self._storages = {t.untyped_storage().data_ptr(): (_stored(name, t, starts.get(name)), t.dtype)
                          for name, t in ids.items()}

    def origin(self, t: Any) -> Origin | None:
        """Where the entries of a tensor came from, None if it is not made of ids."""
        if not isinstance(t, Tensor) or t.is_floating_point() or t.dtype == torch.bool or t.is_complex():
            return None
        found = getattr(t, _ORIGIN, None)
        if found is None and not torch._C._functorch.is_batchedtensor(t):  # one of torch.vmap has no storage
            stored, dtype = self._storages.get(_place(t), (None, None))
            if stored is not None and dtype == t.dtype:
                return stored.moved(lambda whole: whole.as_strided(t.shape, t.stride(), t.storage_offset()))
        return found if found is not None and bool((found.places != NOWHERE).any()) else None

    def follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Notes of what the output of a call is made, if it is made of ids."""
        name = getattr(func, "__name__", "")
        if name in _WRITERS and args:
            self._written(func, args, kwargs)
            return
        for place, one in enumerate(output if isinstance(output, (tuple, list)) else (output,)):
            if isinstance(one, Tensor) and not one.is_floating_point() and one.dtype != torch.bool:
                found = self._made(name, func, args, kwargs, one, place if one is not output else None)
                if found is not None and found.places.shape == one.shape:
                    setattr(one, _ORIGIN, found)

    def _made(self, name: str, func: Any, args: Any, kwargs: Any, output: Tensor, place: int | None) -> Origin | None:
        known = [self.origin(a) for a in args]
        listed = args and isinstance(args[0], (tuple, list))
        if listed:
            known = [self.origin(a) for a in args[0]]
        found = next((one for one in known if one is not None), None)
        if found is None:
            return None
        if name in _ARITHMETIC or name in _FILLING:
            return self._entrywise(name, func, args, kwargs, known, output)
        kind = getattr(lookup(func), "kind", "")
        if kind != "move" or name in _OTHERWISE or (known[0] is None and not listed):
            return None

        def run(which: str) -> Callable[[Tensor], Tensor]:
            def once(_: Tensor) -> Tensor:
                made = func(*_replaced(args, known, which), **_padding(name, kwargs, which))
                return made if place is None else made[place]
            return once

        return found.moved(run("places"), run("start"))

    def _entrywise(self, name: str, func: Any, args: Any, kwargs: Any, known: list[Origin | None],
                   output: Tensor) -> Origin | None:
        """Of a call that leaves entries where they are: a hash, or some of them filled with something else."""
        found = next((o for o in known if o is not None and o.places.shape == output.shape), None)
        if found is None:
            return None
        places = found.places
        if name in _FILLING:
            of_ids = next(a for a, o in zip(args, known) if o is found)
            places = places.where(output == of_ids, NOWHERE)
        for other in known:  # several tokens make one hash: it counts for the first that is one
            if other is not None and other.places.shape == output.shape:
                places = places.where(places != NOWHERE, other.places)
        start = None if found.start is None else func(*_replaced(args, known, "start"), **kwargs)
        return replace(found, places=places, start=start)

    def _written(self, func: Any, args: Any, kwargs: Any) -> None:
        """Of a tensor that ids, or something else in the place of ids, have been written into."""
        target, value = args[0], args[-1] if len(args) > 1 else None
        into, of_value = self.origin(target), self.origin(value)
        if not isinstance(target, Tensor) or (into is None and of_value is None) or target.is_floating_point():
            return
        if into is None:
            nothing = torch.full(target.shape, NOWHERE, device=target.device)
            start = None if of_value.start is None else target.clone()
            into = replace(of_value, places=nothing, start=start)
        written = []
        for which, whole in (("places", into.places), ("start", into.start)):
            if whole is not None:
                whole = whole.clone()
                constant = NOWHERE if which == "places" else value
                func(whole, *args[1:-1], constant if of_value is None else getattr(of_value, which), **kwargs)
            written.append(whole)
        setattr(target, _ORIGIN, replace(into, places=written[0], start=written[1]))


def _place(t: Tensor) -> int | None:
    """Where the data of a tensor lies; None of what has none of its own, as under `torch.vmap`."""
    try:
        return t.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def _stored(name: str, t: Tensor, start: Callable[[Tensor], Tensor] | None) -> Origin:
    """The origin of a whole storage, one-dimensional, for whatever view of it is met."""
    size = t.untyped_storage().nbytes() // t.element_size()
    at = torch.arange(size, device=t.device).as_strided(t.shape, t.stride(), t.storage_offset()).flatten()
    places = torch.full((size,), NOWHERE, device=t.device)
    places[at] = torch.arange(t.numel(), device=t.device)
    values = None if start is None else t.new_zeros(size).index_copy_(0, at, start(t).to(t.dtype).flatten())
    return Origin(name, t.shape, places, values)


def _replaced(args: Any, known: list[Origin | None], which: str) -> list[Any]:
    """The arguments with ids replaced by what their origin says of them, and numbers beside them by nowhere."""
    def one(value: Any, origin: Origin | None) -> Any:
        if origin is not None and getattr(origin, which) is not None:
            return getattr(origin, which)
        return torch.full_like(value, NOWHERE) if listed and which == "places" else value

    listed = isinstance(args[0], (tuple, list))
    members = args[0] if listed else args
    made = [one(value, origin) for value, origin in zip(members, known, strict=True)]
    return [made, *args[1:]] if listed else made


def _padding(name: str, kwargs: Any, which: str) -> Any:
    """The options of a call; what is padded with comes from nowhere."""
    return {**kwargs, "value": NOWHERE} if name == "pad" and which == "places" else kwargs


def gathered(relevance: Tensor, origin: Origin) -> Tensor:
    """Relevance (..., D) of what was looked up, at the tokens that it came from, (B, T, D)."""
    flat, places = relevance.reshape(-1, relevance.shape[-1]), origin.places.flatten()
    kept = places != NOWHERE
    whole = flat.new_zeros(origin.shape.numel(), flat.shape[-1])
    return whole.index_add_(0, places[kept], flat[kept]).reshape(*origin.shape, -1)


def elsewhere(relevance: Tensor, origin: Origin) -> Tensor:
    """What of the relevance (..., D) is of entries that came from nowhere, such as padding of the model's own."""
    return relevance.masked_fill((origin.places != NOWHERE)[..., None], 0)
