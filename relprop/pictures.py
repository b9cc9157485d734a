"""The pictures that a batch has beside its texts, or that its pixels do not show as they are: as they were given, which
rows they are of, and where the entries of the model's pixels come from in them.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .origin import Origin

Cut = tuple[tuple[int, int] | None, int]
"""The patch that a model cuts pictures into, (Py, Px), None if not known; and entries of its pixels for each place."""
_NEAR = 1.25  # factor between counts that are taken for the same
FEW = 8  # cells along each side of a picture whose patches are not known


@dataclass(frozen=True)
class Lattice:
    """Where the model's patches lie on a picture: `rows` x `columns` of them, `height` x `width` pixels each, the first
    at (`top`, `left`). The sides need not be whole: a picture may have been resized before it was cut.
    """

    top: float
    left: float
    height: float
    width: float
    rows: int
    columns: int

    def cells(self, y: Tensor, x: Tensor) -> Tensor:
        """Number of the patch at each place, row by row; -1 beyond the last."""
        down, across = ((y - self.top) / self.height).floor(), ((x - self.left) / self.width).floor()
        inside = (down >= 0) & (down < self.rows) & (across >= 0) & (across < self.columns)
        return torch.where(inside, down * self.columns + across, -1).long()

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """Number of the patch of each pixel of a picture, (Y, X)."""
        y, x = (torch.arange(side) + 0.5 for side in size)
        return self.cells(y[:, None].expand(size), x[None].expand(size))


@dataclass(frozen=True, eq=False)
class Pictures:
    """`images` are the pictures, uint8 (Y, X, 3) of any sizes; `rows` the row of each, in rising order.

    `origins` says by the name of a pixel tensor where its entries come from. `packing` gives, for tensors whose first
    axis is not the rows of the batch (patches or tiles of all pictures one after the other), the row of each item.
    `lattices` are where the model's patches lie. `process` makes the model's tensors of other pictures of these sizes;
    it is of `whole`, the batch that these are rows of, by the numbers in `chosen`.
    """

    images: list[Tensor]
    rows: list[int]
    origins: dict[str, Origin]
    packing: dict[str, Tensor] = field(default_factory=dict)
    lattices: list[Lattice] = field(default_factory=list)
    process: Callable[[Sequence[Tensor]], Mapping[str, Tensor]] | None = None
    whole: Pictures | None = None
    chosen: Tensor | None = None

    @property
    def unseen(self) -> Pictures:
        """The same, but that no picture is known: what is left is whose the items of each tensor are."""
        return Pictures([], [], {}, self.packing)

    def items(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Of each tensor of `packing`, the items of these rows."""
        return {name: torch.cat([(of == row).nonzero().flatten() for row in rows])
                for name, of in self.packing.items()}

    def take(self, rows: Sequence[int]) -> Pictures:
        """The pictures of these rows, in this order; a row may come more than once."""
        rows = torch.as_tensor(rows).tolist()
        kept = [[number for number, row in enumerate(self.rows) if row == wanted] for wanted in rows]
        flat = [number for own in kept for number in own]
        items = self.items(rows)
        packing = {name: torch.cat([torch.full((int((of == row).sum()),), new) for new, row in enumerate(rows)])
                   for name, of in self.packing.items()}
        origins = {}
        for name, origin in self.origins.items():
            index = items.get(name, torch.tensor(rows, dtype=torch.long))
            taken, of = origin.take(index), packing.get(name, torch.arange(len(rows)))
            origins[name] = replace(taken, picture=_renumbered(taken.picture, of, kept))
        chosen = torch.tensor(rows, dtype=torch.long) if self.chosen is None else self.chosen[rows]
        return replace(self, images=[self.images[number] for number in flat], origins=origins, packing=packing,
                       rows=[new for new, own in enumerate(kept) for _ in own],
                       lattices=[self.lattices[number] for number in flat], whole=self.whole or self, chosen=chosen)

    def maps(self, relevance: Mapping[str, Tensor], rows: int) -> tuple[list[Tensor], Tensor]:
        """Relevance of the pixels as a map over each picture, (Y, X) float64, and what is of padding that belongs to no
        picture, (B,).

        Args: relevance: of the tensors that `origins` names; others are passed over. rows: B.
        """
        found = [torch.zeros(tuple(image.shape[:2]), dtype=torch.float64) for image in self.images]
        rest = torch.zeros(rows, dtype=torch.float64)
        for name, origin in self.origins.items():
            if name not in relevance:
                continue
            values = relevance[name].detach().to("cpu", torch.float64)
            for number, image in enumerate(self.images):
                found[number] += origin.spread(values, number, tuple(image.shape[:2]))
            of = self.packing.get(name, torch.arange(rows))
            rest.index_add_(0, of, values.masked_fill(origin.picture >= 0, 0).flatten(1).sum(1))
        return found, rest

    def cells(self, name: str) -> Tensor:
        """Number of the patch that each entry of a pixel tensor is in, counted over all pictures of its row, -1 for
        padding and beyond the patches.
        """
        origin = self.origins[name]
        found = torch.full(origin.picture.shape, -1)
        for number, start in enumerate(self.starts):
            own = origin.picture == number
            cells = self.lattices[number].cells(origin.y[own], origin.x[own])
            found[own] = torch.where(cells >= 0, cells + start, -1)
        return found

    @property
    def starts(self) -> list[int]:
        """The number of the first patch of each picture, counted in its row."""
        found, used = [], {}
        for row, lattice in zip(self.rows, self.lattices):
            found.append(used.get(row, 0))
            used[row] = found[-1] + lattice.rows * lattice.columns
        return found

    @property
    def counts(self) -> dict[int, int]:
        """Patches of each row that has pictures."""
        return {row: start + lattice.rows * lattice.columns
                for row, start, lattice in zip(self.rows, self.starts, self.lattices)}

    def filled(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The model's tensors where every picture is what `change` makes of it, uint8 (Y, X, 3) to the same.

        Raises: ValueError where only the tensors were given, so that it is not known how they are made.
        """
        whole = self.whole or self
        if whole.process is None:
            raise ValueError("pictures that were given as tensors are taken out patch by patch by the least of "
                             "baselines, 'zero'; give the pictures themselves for others")
        made = whole.process([change(image) for image in whole.images])
        if self.chosen is None:
            return {name: made[name] for name in self.origins}
        rows = self.chosen.tolist()
        items = whole.items(rows)
        return {name: made[name][items.get(name, self.chosen)] for name in self.origins}


def lattices(origins: Mapping[str, Origin], images: Sequence[Tensor], *, patch: tuple[int, int] | None,
             counts: Sequence[int | None], layers: int) -> list[Lattice]:
    """Where the model's patches lie on each picture: those of the finest resolution that it sees.

    Args: patch: (Py, Px) of what the model cuts, in its own pixels; None: cells of an eighth of each side. counts:
        positions that each picture has in the model's text, which says how many patches are merged into one; None:
        as many as there are patches. layers: entries of the pixels for each of their places (channels, frames).
    """
    found = []
    for number, image in enumerate(images):
        size = tuple(image.shape[:2])
        # the finest of several tensors, such as a picture in low and in high resolution
        parts = [[getattr(origin, name)[origin.picture == number] for name in ("y", "x", "height", "width")]
                 for origin in origins.values()]
        parts = [part for part in parts if len(part[0])]
        if not parts or patch is None:
            found.append(_eighths(size))
            continue
        y, x, height, width = max(parts, key=lambda part: len(part[0]))
        # of tiles and a whole picture beside them, most entries are of the tiles
        patches = len(y) / layers / math.prod(patch)
        merged = _merged(patches, counts[number])
        # of tiles and a whole picture beside them, most entries are of the tiles
        steps = (float(height.median()) * patch[0] * merged, float(width.median()) * patch[1] * merged)
        found.append(_laid((y, x), (float(height.median()), float(width.median())), steps, size, patches / merged**2))
    return found


def _merged(patches: float, positions: int | None) -> int:
    """How many patches a side are one position of the model's text."""
    if not positions:
        return 1
    return max(1, round(math.sqrt(patches / positions)))


def _laid(places: tuple[Tensor, Tensor], entry: tuple[float, float], patch: tuple[float, float], size: tuple[int, int],
          whole: float) -> Lattice:
    """Patches of about this size over the part of the picture that is seen; `whole` is how many there are if it is seen
    once.
    """
    lows = [max(0.0, float(place.min()) - step / 2) for place, step in zip(places, entry)]
    highs = [min(float(side), float(place.max()) + step / 2) for place, step, side in zip(places, entry, size)]
    about = [max(1.0, (high - low) / side) for low, high, side in zip(lows, highs, patch)]
    counts = _exact(round(whole), about) or tuple(map(round, about))
    counts = tuple(min(count, side) for count, side in zip(counts, size))  # no patch is smaller than a pixel
    return Lattice(*lows, *((high - low) / count for low, high, count in zip(lows, highs, counts)), *counts)


def _exact(whole: int, about: Sequence[float]) -> tuple[int, int] | None:
    """The rows and columns that make up so many patches and are nearest to these; None if none are near."""
    far = lambda rows: max(abs(math.log(rows / about[0])), abs(math.log(whole / rows / about[1])))
    pairs = [rows for rows in range(1, whole + 1) if whole % rows == 0]
    best = min(pairs, key=far, default=None)
    return (best, whole // best) if best is not None and far(best) < math.log(_NEAR) else None


def _eighths(size: tuple[int, int]) -> Lattice:
    counts = tuple(min(FEW, side) for side in size)
    return Lattice(0.0, 0.0, size[0] / counts[0], size[1] / counts[1], *counts)


def _renumbered(picture: Tensor, of: Tensor, kept: Sequence[Sequence[int]]) -> Tensor:
    """Numbers of pictures after rows were taken; `kept` are the numbers that each new row had."""
    found, start = torch.full_like(picture, -1), 0
    for row, own in enumerate(kept):
        at = (of == row).nonzero().flatten()
        before, after = picture[at], torch.full_like(picture[at], -1)
        for place, number in enumerate(own):
            after[before == number] = start + place
        found[at] = after
        start += len(own)
    return found


__all__ = ["Lattice", "Pictures", "lattices"]
