"""Mediators of a model that are alike and lie beside each other, without an object for each."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..address import ALL
from ..anatomy import Anatomy
from ..intervene import Site
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


def places(known: Anatomy, site: Site) -> Iterator[Place]:
    """Mediators that a site means, those of one tap together; a count of -1 is told by the width of its vectors.

    Raises: ValueError for a place that the model does not have.
    """
    address = site.address
    many = address.unit is not None and address.index is ALL
    for found, tap in known.resolve(replace(address, index=0) if many else address):
        here = replace(site, address=replace(found, index=address.index))
        if site.coordinates:
            yield Place(here, tap, None, site.coordinate, -1 if site.coordinate is ALL else 1)
        elif address.unit is None:
            yield Place(here, tap, 1, None, 1)
        else:
            count = known.units(found)
            yield Place(here, tap, count if address.unit == "H" else None, address.index, count if many else 1)
