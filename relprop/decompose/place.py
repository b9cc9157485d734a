"""Places in a model as the shadow meets them: a tap, the part of its vectors, and positions. Marks and looks there."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..address import INPUTS, Address, Spans
from ..anatomy import Anatomy
from ..intervene import Intervention, Site
from ..intervene.change import Shapes, split
from ..intervene.site import Places, spots
from ..result.decomposition import Part
from ..trace import Tap
from ..trace.layout import Layout
from ..trace.shadow import KEY, QUERY, VALUE, Mark

_SIDES = {"q": QUERY, "k": KEY, "v": VALUE}


@dataclass(frozen=True, eq=False)
class Place:
    """Part `unit` of `units` equal ones (None: each entry is one) of the vectors at a tap, at the positions `where`,
    bool (R, P); None: all.
    """

    tap: Tap
    unit: int = 0
    units: int | None = 1
    where: Tensor | None = None


@dataclass
class Placing:
    """From addresses to places, for one batch of a model."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    known: Anatomy
    spans: Spans | None = None
    _shapes: dict[Tap, Layout | None] = field(default_factory=dict)
    _counts: dict[Tap, int] = field(default_factory=dict)
    _rows: dict[Tap, int] = field(default_factory=dict)

    @cached_property
    def rows(self) -> int:
        """How many rows the batch has."""
        return Shapes(self.model, self.args, self.kwargs, []).rows

    @cached_property
    def length(self) -> int:
        """How many positions the stream before the first layer has."""
        return self.count(next(self.places("L*.in"))[1].tap)

    @cached_property
    def _places(self) -> Places:
        return Places.of(self.model, self.spans)

    def places(self, written: str | Address | Site) -> Iterator[tuple[str, Place]]:
        """Every place that an address or pattern means, by its text; q, k and v of a head are its vectors, as they
        meet.

        Raises: ValueError for what is no address, or not in the model.
        """
        site = written if isinstance(written, Site) else (
            Site(written) if isinstance(written, Address) else Site.parse(written))
        address = site.address
        if address.inner == "pattern":
            raise ValueError(f"{address}: a pattern has no relevant part of its own; give a head, L5.attn.H3, or its "
                             "queries, L5.attn.H3.q")
        if address.inner in INPUTS:
            found = self._operands(address)
        else:
            found = ((str(spot.site), Place(spot.tap, spot.unit, spot.units)) for spot in spots(self.known, site))
        for name, place in found:
            yield name, place if address.position is None else replace(place, where=self._at(place, address))

    def _operands(self, address: Address) -> Iterator[tuple[str, Place]]:
        side = _SIDES[address.inner]
        for one, tap in self.known.resolve(replace(address, inner="pattern")):
            place = Place(replace(tap, side=side), one.index, self.known.units(one))
            yield str(replace(one, inner=address.inner)), place

    def _at(self, place: Place, address: Address) -> Tensor:
        count = self.count(place.tap)
        real = self._shaped.real(self._rows[place.tap], count, Site(address))
        return self._places.at(address.position, real)

    @cached_property
    def _shaped(self) -> Shapes:
        return Shapes(self.model, self.args, self.kwargs, [])

    def count(self, tap: Tap) -> int:
        """How many positions the tensor at a tap has."""
        if tap not in self._counts:
            self.learn([tap])
        return self._counts[tap]

    def learn(self, taps: list[Tap]) -> None:
        """Finds out how tensors at taps are laid out, by a forward pass for those not known yet."""
        missing = [tap for tap in taps if tap not in self._counts]
        operands = [tap for tap in missing if tap.side in _SIDES.values()]
        inside = [tap for tap in missing if tap not in operands]
        for tap in operands:
            self._counts[tap], self._rows[tap] = self.length, self.rows
        if inside:
            shapes = Shapes(self.model, self.args, self.kwargs, inside)
            for tap in inside:
                self._shapes[tap] = shapes.layout(tap)
                self._rows[tap], self._counts[tap] = self.canonical(tap, shapes.values[tap]).shape[:2]

    def canonical(self, tap: Tap, x: Tensor, *, leading: bool = False) -> Tensor:
        """A tensor at a tap as (R, P, C), or its parts as (S, R, P, C) if the sources are `leading`."""
        first = int(leading)
        if tap.side in _SIDES.values():
            x = x if x.dim() == 4 + first else x.unflatten(first, (self.rows, -1))
            return x.transpose(first + 1, first + 2).flatten(first + 2)  # (B, H, T, K) to (B, T, H K)
        layout = self._shapes[tap]
        if layout is None:
            return x.reshape(*x.shape[:first], 1, -1, x.shape[-1])
        if layout.dims == 2:
            return x.unflatten(first, (-1, layout.factor))
        x = x.movedim(layout.axis + first, first)
        return x if layout.dims == 3 else x.flatten(first + 1, -2)

    def restored(self, tap: Tap, value: Tensor, like: Tensor) -> Tensor:
        """What `canonical` made of parts, (S, R, P, C), as the parts of a tensor that is laid out as `like`."""
        layout = self._shapes[tap]
        if layout is None or layout.dims == 2:
            return value.reshape(value.shape[0], *like.shape)
        if layout.dims == 3:
            return value.movedim(1, layout.axis + 1)
        return value.reshape(value.shape[0], *like.shape)

    # -- marks and looks -----------------------------------------------------------------------------------------

    def mark(self, tap: Tap, chosen: list[tuple[int, Place]], sources: int, one: Intervention,
             there: Tensor | None) -> Mark:
        """Sets sources at a tap: rel := x - what the intervention would put there, irrel := the rest.

        Args: chosen: which source has which place. there: the tensor at the tap in the run that the intervention refers
            to, (R, P, C).
        """
        count = chosen[0][1].units
        both = {}
        for source, place in chosen:
            both[source, place.unit] = _either(both.get((source, place.unit), place.where), place.where)
        source, unit = (torch.tensor(list(found)) for found in zip(*both))

        def set_sources(x: Tensor, rel: Tensor | None) -> Tensor:
            now = split(self.canonical(tap, x), count).movedim(2, 0)  # (U, R, P, W)
            other = None if there is None else split(there, count).movedim(2, 0).to(now)
            kept = now - one.value(now, other)
            parts = x.new_zeros(sources, *x.shape) if rel is None else rel
            parts = self.canonical(tap, parts, leading=True).clone(memory_format=torch.contiguous_format)
            whole = split(parts, count)  # (S, R, P, U, W), a view
            placed = kept[unit]  # (E, R, P, W)
            if any(where is not None for where in both.values()):
                masks = torch.stack([torch.ones(now.shape[1:3], dtype=torch.bool) if where is None else where
                                     for where in both.values()]).to(x.device)
                placed = torch.where(masks[..., None], placed, whole[source, :, :, unit])
            whole[source, :, :, unit] = placed
            return self.restored(tap, parts, x)

        return set_sources

    def look(self, wanted: Mapping[str, Place], found: dict[str, Part], *, canonical: bool = False,
             ) -> Callable[[Tensor, Tensor | None], None]:
        """Keeps what is relevant at places of one tap in `found`; `canonical`: of tensors that are so already."""
        tap = next(iter(wanted.values())).tap

        def keep(x: Tensor, rel: Tensor | None) -> None:
            total = x if canonical else self.canonical(tap, x)
            parts = None if rel is None else self.canonical(tap, rel, leading=True)
            heads = (x.shape[1] if x.dim() == 4 else len(x) // self.rows) if tap.side in _SIDES.values() else None
            for name, place in wanted.items():
                place = place if heads is None else replace(place, unit=place.unit * heads // place.units, units=heads)
                own = _picked(total, place)
                found[name] = Part(own.new_zeros(0, *own.shape) if parts is None else _picked(parts, place), own)

        return keep


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a | b


def _picked(x: Tensor, place: Place) -> Tensor:
    """The vectors of a place, (..., R, P, W), at its positions; each row has as many."""
    x = split(x, place.units)[..., place.unit, :]
    if place.where is None:
        return x.clone()
    counts = place.where.sum(1)
    if len(counts.unique()) > 1:
        raise ValueError("rows differ in how many positions are asked for; ask for the whole, without @, or one row at "
                         "a time")
    return torch.stack([x[..., row, where.to(x.device), :] for row, where in enumerate(place.where)], -3)

