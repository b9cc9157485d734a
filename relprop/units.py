"""Where the units of a map lie: a number for every token or pixel, and sums over and shares within the units.

A unit is what is ranked and taken out: a token or a word of a text, a patch of an image, a position or feature of a
plain tensor.
"""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import rows
from .tokens import Batch, ImageUnits, TextUnits

CELLS = 8  # a side, where a picture's patches are not known
BY = ("token", "word")


def groups(batch: Batch, *, by: str | None = None) -> Tensor:
    """Number of the unit that each entry of a map belongs to; -1 for what is no unit (special tokens, padding, a cut
    edge).

    Args: by: "token" (the default) or "word", for text.
    Returns: int64, (B, T) for text, (B, Y, X) for pictures, (B, T) or (B, F) for plain tensors; numbered from 0 in
        each row. For text with pictures (B, T + P), the patches of a row's pictures behind its tokens, as
        `Relevance.ranked`.
    Raises: ValueError for an unknown `by`, or "word" for what is not text.
    """
    if by is not None and by not in BY:
        raise ValueError(f"units are taken by {' or '.join(BY)}, not by {by!r}")
    if isinstance(batch.units, TextUnits):
        found = _words(batch.units) if by == "word" else _tokens(batch.units)
        if batch.pictures is None:
            return found
        every = batch.runs // batch.rows  # all sequences of a row have its pictures
        counts = batch.pictures.counts
        return _behind(found, {row // every: count for row, count in counts.items() if row % every == 0})
    if by == "word":
        raise ValueError("only text has words; leave `by` out")
    if batch.pictures is not None:  # the model sees otherwise than they are
        return torch.stack([lattice.pixels(tuple(image.shape[:2]))
                            for lattice, image in zip(batch.pictures.lattices, batch.pictures.images, strict=True)])
    value = rows.leaf(batch)[1]
    if isinstance(batch.units, ImageUnits):
        known = batch.units
        return patches(known.size, patch=known.patch, grid=known.grid).expand(batch.rows, -1, -1)
    if value.ndim == 4:  # (B, C, Y, X)
        return patches(tuple(value.shape[-2:])).expand(batch.rows, -1, -1)
    if value.ndim not in (2, 3):
        raise ValueError(f"a tensor of shape {tuple(value.shape)} has no known units; expected (B, F), (B, T, D) or "
                         "(B, C, Y, X)")
    return torch.arange(value.shape[1]).expand(batch.rows, -1)


def patches(size: tuple[int, int], *, patch: tuple[int, int] | None = None,
            grid: tuple[int, int] | None = None) -> Tensor:
    """Number of the patch of each pixel, row by row; -1 beyond the last whole patch.

    Args: size: (Y, X). patch, grid: pixels of a patch, patches of a picture; without them cells of about an eighth of
        each side.

    >>> patches((4, 4), patch=(2, 2))[0]
    tensor([0, 0, 1, 1])
    """
    if patch is None:
        patch = tuple(math.ceil(side / count) for side, count in zip(size, grid or (CELLS, CELLS), strict=True))
        grid = grid or tuple(math.ceil(side / part) for side, part in zip(size, patch, strict=True))
    grid = grid or tuple(side // part for side, part in zip(size, patch, strict=True))
    y, x = (torch.arange(side) // part for side, part in zip(size, patch, strict=True))
    inside = (y < grid[0])[:, None] & (x < grid[1])  # (Y, X)
    return torch.where(inside, y[:, None] * grid[1] + x, -1)


def grid(size: tuple[int, int], length: int) -> tuple[int, int]:
    """The finest grid of whole square patches that has at most `length` of them, for models whose patches are unknown,
    or else the one of exactly `length` square patches whose last are cut, as where convolutions scale a picture down.

    Args: size: (Y, X). length: positions of the model, prefix tokens among them.
    Raises: ValueError if not even the whole picture is such a patch.

    >>> grid((24, 24), 17), grid((800, 1066), 850)
    ((4, 4), (25, 34))
    """
    sides = range(1, min(size) + 1)
    grids = [(-(-size[0] // side), -(-size[1] // side)) for side in sides]
    whole = (grid for grid, side in zip(grids, sides, strict=True) if not (size[0] % side or size[1] % side))
    finest = next((grid for grid in whole if math.prod(grid) <= length), None)
    exact = next((grid for grid in grids if math.prod(grid) == length), None)
    if finest is not None and (exact is None or math.prod(finest) == length):
        return finest
    if exact is not None:
        return exact
    raise ValueError(f"a picture of {size[0]} x {size[1]} pixels cannot be cut into at most {length} square patches")


def spread(values: Tensor, groups: Tensor) -> Tensor:
    """Each unit's value divided evenly over its entries, so that sums over units hold; zero where there is no unit.

    Args: values: (B, U). groups: of `groups`, (B, ...).
    Returns: a map, shape of `groups`.
    """
    flat = groups.flatten(1).to(values.device)  # (B, M)
    inside = flat >= 0
    sizes = torch.zeros_like(values).scatter_add_(1, flat.clamp(min=0), inside.to(values.dtype))
    shares = values / sizes.clamp(min=1)
    return shares.gather(1, flat.clamp(min=0)).where(inside, 0).view(groups.shape)


def pooled(relevance: Tensor, groups: Tensor) -> Tensor:
    """Sum of a map over each unit, (B, U); units that a row does not have are zero.

    Args: relevance: a map, shape of `groups`. groups: of `groups`, (B, ...).
    """
    flat = groups.flatten(1).to(relevance.device)
    inside = flat >= 0
    sums = torch.zeros(len(flat), int(flat.max()) + 1, dtype=relevance.dtype, device=relevance.device)
    return sums.scatter_add_(1, flat.clamp(min=0), relevance.flatten(1).where(inside, 0))


def _behind(found: Tensor, counts: Mapping[int, int]) -> Tensor:
    """Units of a text, (B, T), and behind them so many more of each row, (B, T + P)."""
    more = torch.full((len(found), max(counts.values(), default=0)), -1)
    for row, count in counts.items():
        more[row, :count] = torch.arange(count) + int(found[row].max()) + 1
    return torch.cat([found, more], 1)


def _tokens(units: TextUnits) -> Tensor:
    removable = ~(torch.tensor(units.special) | torch.tensor(units.padding))  # (B, T)
    return torch.where(removable, removable.cumsum(1) - 1, -1)


def _words(units: TextUnits) -> Tensor:
    numbers = torch.tensor([[-1 if word is None else word for word in row] for row in units.word_ids])
    return torch.where(_tokens(units) >= 0, numbers, -1)  # a special token in the text has a word
