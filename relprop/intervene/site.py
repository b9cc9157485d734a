"""Where: sites, the spots that they mean in a model, and what positions are counted by."""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import family
from ..address import ALL, Address, Spans, located
from ..anatomy import Anatomy, anatomy
from ..trace import Tap
from ..trace.intervention import PATTERN, captured
from .inputs import picked

_SITE = re.compile(r"(?P<place>[^\[\]@]*)(?:\[(?P<coordinate>\d+|\*)\])?(?P<position>@.*)?")


@dataclass(frozen=True)
class Site:
    """A place in a model, or a pattern of places: an address, with `coordinate` one entry of the vector there; `ALL`
    with `coordinates`: each.
    """

    address: Address
    coordinate: int | None = None
    coordinates: bool = False

    @staticmethod
    def parse(text: str | Site | Address) -> Site:
        """The site that `text` means.

        >>> str(Site.parse("L5.mlp[17]@-1")), str(Site.parse("L*.attn.H*.pattern"))
        ('L5.mlp[17]@-1', 'L*.attn.H*.pattern')

        Raises: ValueError for a text that is none.
        """
        if isinstance(text, (Site, Address)):
            return text if isinstance(text, Site) else Site(text)
        found = _SITE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{text!r} is no site; write an address such as L5.attn.H3@-1, or L5.mlp[17] for one "
                             "coordinate of the vector there")
        site = Site(Address.parse(found["place"] + (found["position"] or "")))
        if found["coordinate"] is None:
            return site
        if site.address.unit or site.address.inner:
            raise ValueError(f"{text!r}: a coordinate is of a whole part; write L5[17], L5.attn[17], L5.mlp[17]")
        coordinate = ALL if found["coordinate"] == "*" else int(found["coordinate"])
        return replace(site, coordinate=coordinate, coordinates=True)

    def __str__(self) -> str:
        place, at, position = str(self.address).partition("@")
        coordinate = f"[{'*' if self.coordinate is ALL else self.coordinate}]" if self.coordinates else ""
        return f"{place}{coordinate}{at}{position}"


@dataclass(frozen=True)
class Spot:
    """What is reached for a site: the tap, of whose vectors it is part `unit` of `units` equal ones; `units` None: each
    entry is one. Of an attention pattern each head is a spot.
    """

    site: Site
    tap: Tap
    unit: int = 0
    units: int | None = 1


def parts(model: nn.Module, args: tuple, kwargs: dict) -> Anatomy:
    """The anatomy of `model` by the first row of this input, in which heads cannot be taken for rows."""
    return anatomy(model, *picked(args, kwargs, [0]))


def spots(known: Anatomy, site: Site, widths: Mapping[Tap, int] | None = None) -> list[Spot]:
    """Every spot that a site means.

    Args: widths: of the vectors at taps, for sites of all coordinates.
    Raises: ValueError for a place that the model does not have.
    """
    return [spot for address, tap in known.resolve(site.address)
            for spot in _spots(known, replace(site, address=address), tap, widths or {})]


def _spots(known: Anatomy, site: Site, tap: Tap, widths: Mapping[Tap, int]) -> Iterator[Spot]:
    address = site.address
    if site.coordinates:
        for index in range(widths.get(tap, 0)) if site.coordinate is ALL else [site.coordinate]:
            yield Spot(replace(site, coordinate=index), tap, index, None)
    elif tap.side == PATTERN:
        heads = known.units(address)
        for head in range(heads) if address.unit is None else [address.index]:
            yield Spot(site, tap, head, heads)
    elif address.unit == "H":
        yield Spot(site, tap, address.index, known.units(address))
    else:
        yield Spot(site, tap, address.index, None) if address.unit else Spot(site, tap)


@dataclass(frozen=True, eq=False)
class Places:
    """What the positions of addresses are counted by: names of spans, and of pictures the number of tokens before the
    patches; see `relprop.address.located`.
    """

    spans: Spans | None = None
    prefix: int | None = None

    def at(self, position: int | str, real: Tensor) -> Tensor:
        """Which positions an address means, bool (R, P); it counts over the `real` ones, (R, P), that are no padding.

        Raises: ValueError for a position that a row does not have.
        """
        found = torch.zeros_like(real)
        for row, own in enumerate(real):
            places = own.nonzero().flatten()
            chosen = located(position, len(places), row=row, prefix=self.prefix, spans=self.spans)
            found[row, places[chosen]] = True
        return found

    @staticmethod
    def of(model: nn.Module, spans: Spans | None = None) -> Places:
        """Of this model, with these names."""
        facts = family.facts(model)
        # a module of timm's or torchvision's says nothing of its modality
        patched = facts.modality == "image" or facts.patch is not None or facts.prefix_tokens > 0
        return Places(spans, facts.prefix_tokens if patched else None)


def resolved(model: nn.Module, known: Anatomy, site: Site, args: Any, kwargs: Any) -> list[Spot]:
    """Every spot that a site means. For all coordinates, whose number that tells, one more forward pass is made."""
    if not site.coordinates or site.coordinate is not None:
        return spots(known, site)
    taps = [tap for _, tap in known.resolve(site.address)]
    with torch.no_grad():
        _, values = captured(model, taps, lambda: model(*args, **kwargs))
    return spots(known, site, {tap: value.shape[-1] for tap, value in values.items()})
