"""Mediators of a model that are alike and lie beside each other, without an object for each."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..intervene import ALL, Parts, Site
from ..trace import Tap


@dataclass(frozen=True, eq=False)
class Place:
    """Mediators at one tap, alike: units of its vectors, of which there are `units` (None: each entry is one); `index`
    one of them, or None for all `count`.
    """

    site: Site
    tap: Tap
    units: int | None
    index: int | None
    count: int

    def address(self, number: int) -> str:
        """The site of the mediator of this number, as a text."""
        if self.site.coordinates and self.index is None:
            return str(replace(self.site, coordinate=number))
        if self.site.address.unit and self.index is None:
            return str(replace(self.site, address=replace(self.site.address, index=number)))
        return str(self.site)


def places(known: Parts, site: Site) -> Iterator[Place]:
    """Mediators that a site means, those of one tap together; a count of -1 is told by the width of its vectors."""
    address = site.address
    many = address.unit is not None and address.index is ALL
    one = replace(address, index=0) if many else address
    for found, tap in known.places(replace(one, unit=None, index=None) if site.pattern else one):
        layer = None if found.layer is None else known.anatomy.layers[found.layer]
        here = replace(site, address=replace(found, unit=address.unit, index=address.index))
        if site.pattern:
            if found.layer not in known.patterns:
                raise ValueError(f"{site}: no attention pattern was seen in layer {found.layer}")
            here = replace(here, address=replace(here.address, unit="H"))
            yield Place(here, known.patterns[found.layer], layer.heads, address.index, 1 if address.index is not None
                        else layer.heads)
        elif site.coordinates:
            index = site.coordinate
            yield Place(here, tap, None, index, -1 if index is None else 1)
        elif address.unit == "H":
            yield Place(here, tap, layer.heads, address.index, layer.heads if many else 1)
        elif address.unit is not None:
            yield Place(here, tap, None, address.index, layer.neurons if many else 1)
        else:
            yield Place(here, tap, 1, None, 1)
