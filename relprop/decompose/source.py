"""Sources of a decomposition: sets of places whose values are relevant, as a user writes them and the model has them.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import rows, units
from ..address import Address
from ..latents import own
from ..tokens import Batch, ImageUnits, TextUnits
from ..trace import Tap
from .place import Place, Placing

KINDS = ("tokens", "words", "patches", "heads", "heads at positions", "mlps")


@dataclass(frozen=True, eq=False)
class Source:
    """Places that are decomposed together, under a name."""

    name: str
    places: tuple[Place, ...]

    @property
    def taps(self) -> frozenset[Tap]:
        """Where they are set."""
        return frozenset(place.tap for place in self.places)


def sources(placing: Placing, written: object, batch: Batch | None = None) -> list[Source]:
    """The sources that a user writes: a kind of them, an address or a pattern of addresses, each place by itself, a
    list of these, or a mapping from names to sets that are decomposed together.

    Raises: ValueError for what is none of these, or means no place in the model.
    """
    if isinstance(written, Mapping):
        found = [Source(name, tuple(_places(placing, one))) for name, one in written.items()]
    elif isinstance(written, (str, Address)):
        found = _by_word(placing, written, batch) if written in KINDS else _each(placing, written)
    elif isinstance(written, Sequence):
        found = [one for item in written for one in (
            _each(placing, item) if isinstance(item, (str, Address)) else [_together(placing, item)])]
    else:
        raise TypeError(f"sources are an address, a list of them, a mapping from names to addresses, or one of "
                        f"{', '.join(KINDS)}; got {type(written).__name__}")
    if not found:
        raise ValueError(f"{written!r} means no source; give at least one address, such as L0.attn.H1@-1")
    return found


def _together(placing: Placing, item: Sequence[str]) -> Source:
    return Source(" + ".join(map(str, item)), tuple(_places(placing, item)))


def _each(placing: Placing, written: str | Address) -> list[Source]:
    return [Source(name, (place,)) for name, place in placing.places(written)]


def _places(placing: Placing, written: object) -> Iterator[Place]:
    for one in (written,) if isinstance(written, (str, Address)) else written:
        yield from (place for _, place in placing.places(one))


def _by_word(placing: Placing, kind: str, batch: Batch | None) -> list[Source]:
    if kind == "heads":
        return _each(placing, "L*.attn.H*")
    if kind == "mlps":
        return _each(placing, "L*.mlp")
    if kind == "heads at positions":
        length = placing.length
        return [Source(f"{name}@{at}", (replace(place, where=_only(placing, at)),))
                for at in range(length) for name, place in placing.places("L*.attn.H*")]
    if batch is None:
        raise ValueError(f"{kind} are known of what a subject prepares; give addresses such as L0.in@3")
    return split_input(placing, batch, kind)


def split_input(placing: Placing, batch: Batch, kind: str, *, level: int = 0) -> list[Source]:
    """One source for each token, word or patch, at the stream before layer `level`; padding, and what is no unit of a
    row, is of none.

    Raises: ValueError for words of what is no text and patches of what is no picture, and where the stream has other
        positions than the input has units.
    """
    place = next(placing.places(Address("in", level)))[1]
    wheres = unit_positions(batch, kind, placing.count(place.tap))
    named = kind[:-1] if kind != "patches" else "patch"
    return [Source(f"{named} {number}", (replace(place, where=where),)) for number, where in enumerate(wheres)]


def unit_positions(batch: Batch, kind: str, length: int) -> Iterator[Tensor]:
    """Which positions of a stream of this length belong to each unit, bool (B, P)."""
    if kind == "patches":
        if not pictured(batch):
            raise ValueError("only a picture has patches; give tokens, words or addresses")
        before = length - patches(batch, length)[1]  # class and register tokens
        numbers = torch.arange(length).sub(before).clamp_min(-1).expand(batch.rows, -1)
    elif kind == "words":
        if not isinstance(batch.units, TextUnits):
            raise ValueError("only text has words; give tokens, patches or addresses")
        numbers = units.groups(batch, by="word")
    else:
        real = own(batch, length)
        numbers = torch.where(real, torch.arange(length), -1)
    if numbers.shape[1] != length:
        raise ValueError(f"the input has {numbers.shape[1]} positions and the stream {length}; give addresses, L0.in@3")
    return (numbers == number for number in range(int(numbers.max()) + 1))


def pictured(batch: Batch) -> bool:
    """Whether the input is pictures."""
    return isinstance(batch.units, ImageUnits) or rows.leaf(batch)[1].dim() == 4


def patches(batch: Batch, length: int) -> tuple[Tensor, int]:
    """The number of the patch of each pixel, (Y, X), and how many patches there are, in a stream of this length.

    Raises: ValueError if the stream has fewer positions than the picture has patches.
    """
    size = tuple(rows.leaf(batch)[1].shape[-2:])
    known = batch.units if isinstance(batch.units, ImageUnits) else None
    grid = known.grid if known is not None and known.grid else units.grid(size, length)
    if grid[0] * grid[1] > length:
        raise ValueError(f"a stream of {length} positions does not have the {grid[0]} x {grid[1]} patches of the "
                         "picture; give addresses, such as L0.in@3")
    return units.patches(size, patch=known and known.patch, grid=grid), grid[0] * grid[1]


def _only(placing: Placing, at: int) -> Tensor:
    where = torch.zeros(placing.rows, placing.length, dtype=torch.bool)
    where[:, at] = True
    return where

