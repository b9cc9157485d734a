"""The context manager: a model whose values are replaced while it runs."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..address import Address, Spans
from ..anatomy import Anatomy
from ..errors import RelpropError
from ..trace import Tap
from ..trace.intervention import Editor, edited
from .change import Group, Shapes, changed, units_of, values_at
from .inputs import arguments
from .site import Places, Site, Spot, parts, resolved
from .value import Hold, Intervention, Pattern


@contextmanager
def intervened(model: nn.Module, interventions: Mapping[str | Site | Address, Intervention], *,
               known: Anatomy | None = None, spans: Spans | None = None) -> Iterator[dict[str, int]]:
    """A `with` block in which the values at sites of `model` are replaced, in every forward pass.

    Sites are found by observing the first pass of the block, with its own input. The model is as before when the block
    ends, also after an exception.

    Args: interventions: by site, or pattern of sites, "L*.attn.H*"; several act together, in the order in which the
        model comes to them. known: the model's anatomy, where it is there already. spans: positions by name, for
            sites such as "L5@profession".
    Yields: how often each one was done, by site; counted when the block ends.
    Raises: ValueError for a text that is no site, a place that the model does not have, a position that a row does not
        have, or a value that does not fit; RelpropError at the end of the block if one was never done.
    """
    wanted = {Site.parse(site): one for site, one in interventions.items()}
    for site, one in wanted.items():
        if not isinstance(one, Intervention):
            raise TypeError(f"{site}: expected an intervention such as Zero() or Resample(inputs), not "
                            f"{type(one).__name__}")
    session = _Session(model, {_sited(site, one): one for site, one in wanted.items()}, known, Places.of(model, spans))
    done = {str(site): 0 for site in session.wanted}
    with edited(model, {}, begin=session.begin) as editor:
        try:
            yield done
        finally:
            for site, taps in session.taps.items():
                done[str(site)] = min(editor.fired.get(tap, 0) for tap in taps)
    never = [site for site, count in done.items() if not count]
    if never:
        raise RelpropError(f"nothing was done at {', '.join(never)}: the model never ran, or never came there")


def _sited(site: Site, one: Intervention) -> Site:
    return replace(site, address=replace(site.address, inner="pattern")) if isinstance(one, Pattern) else site


class _Session:
    """What an `intervened` block knows: the parts of the model, and the values of the runs that it refers to."""

    def __init__(self, model: nn.Module, wanted: dict[Site, Intervention], known: Anatomy | None, places: Places
                 ) -> None:
        self.model, self.wanted, self.known, self.places = model, wanted, known, places
        self.spots: dict[Site, list[Spot]] | None = None
        self.taps: dict[Site, list[Tap]] = {}
        self.values: dict[int, dict[Tap, Tensor]] = {}

    def begin(self, editor: Editor, args: Any, kwargs: Any) -> None:
        """Before a forward pass with these arguments: installs its changes."""
        if self.spots is None:
            found = self.known or parts(self.model, args, kwargs)
            self.spots = {site: resolved(self.model, found, site, args, kwargs) for site in self.wanted}
            self.taps = {site: list(dict.fromkeys(spot.tap for spot in spots)) for site, spots in self.spots.items()}
        shapes = Shapes(self.model, args, kwargs, list({tap for taps in self.taps.values() for tap in taps}))
        groups: dict[Tap, list[Group]] = {}
        for site, spots in self.spots.items():
            there = self._reference(self.wanted[site], args, kwargs)
            for tap in self.taps[site]:
                chosen = [spot for spot in spots if spot.tap == tap]
                groups.setdefault(tap, []).append(self._group(site, chosen, there.get(tap), shapes))
        editor.install({tap: changed(tap, shapes.layout(tap), 1, found) for tap, found in groups.items()})

    def _reference(self, one: Intervention, args: Any, kwargs: Any) -> dict[Tap, Tensor]:
        """The values at all taps in the run that an intervention refers to, (R, P, C) each."""
        own = isinstance(one, Hold) and one.source is None
        if one.source is None and not own:
            return {}
        if own or id(one.source) not in self.values:
            args, kwargs = (args, kwargs) if own else arguments(one.source)
            values = values_at(self.model, args, kwargs, list({tap for taps in self.taps.values() for tap in taps}))
            if own:
                return values
            self.values[id(one.source)] = values
        return self.values[id(one.source)]

    def _group(self, site: Site, spots: list[Spot], there: Tensor | None, shapes: Shapes) -> Group:
        one, units = self.wanted[site], spots[0].units
        unit = torch.tensor([spot.unit for spot in spots])
        other = None if there is None else units_of(there, units, unit, spots[0].tap)  # (N, R, P, W)

        def change(now: Tensor) -> Tensor:
            value = one.value(now, other if other is None else other.to(now))
            if site.address.position is None:
                return value
            chosen = self.places.at(site.address.position, shapes.real(now.shape[1], now.shape[2], site))
            return torch.where(chosen.to(now.device)[None, :, :, None], value, now)

        return Group(torch.zeros_like(unit), unit, units, change)
