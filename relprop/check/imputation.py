"""Pixels taken out of a picture by drawing what is left smoothly over the gap, so that the gap's shape is not a clue.

Reference: Y. Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .. import rows, units
from ..subject import Subject
from ..tokens import Batch, ImageUnits
from .removal import Removal, chance, entries

NEIGHBOURS = {(0, 1): 1 / 6, (0, -1): 1 / 6, (1, 0): 1 / 6, (-1, 0): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12,
              (-1, 1): 1 / 12, (-1, -1): 1 / 12}  # weights of Rong et al. 2022, section 4.2
NOISE = 0.01  # standard deviation, as a part of the picture's range


def imputed(subject: Subject, batch: Batch, *, seed: int = 0) -> Removal:
    """Units of pictures taken out by noisy linear imputation.

    Each missing pixel is the weighted mean of its eight neighbours, known and missing ones, plus noise: x_i = sum_j
    w_ij x_j, w = 1/6 beside and 1/12 across (Rong et al. 2022, eq. 7), rescaled to one at the edge; a sparse linear
    system a picture, solved by scipy. A picture of which nothing is left becomes its own mean. Cost: a solve of as many
    unknowns as there are missing pixels, for every changed picture.

    Args: seed: of the noise, which depends on it and the row's own picture.
    Raises: ValueError for what is no picture.
    """
    source = rows.leaf(batch)[1]
    if source.ndim != 4 and not isinstance(batch.units, ImageUnits):
        raise ValueError("imputation draws missing pixels from their neighbours, and this input is no picture; "
                         "choose a baseline")
    groups = units.groups(batch)
    span = (source.amax((1, 2, 3)) - source.amin((1, 2, 3))).cpu()
    drawn = [torch.randn(source.shape[1:], generator=chance(batch, groups, row, seed + 3)) for row in range(batch.rows)]
    noise = (torch.stack(drawn) * NOISE * span.view(-1, 1, 1, 1)).to(source)

    def without(which: Tensor, gone: Tensor) -> Batch:
        missing = entries(gone, groups.to(source.device)[which])  # (R, Y, X)
        filled = [linear(picture, hole) for picture, hole in zip(source[which], missing, strict=True)]
        changed = torch.where(missing[:, None], torch.stack(filled) + noise[which], source[which])
        return rows.put(batch.take(which), changed)

    return Removal(groups, groups.flatten(1).amax(1) + 1, "noisy linear imputation", without)


def linear(picture: Tensor, missing: Tensor) -> Tensor:
    """A picture (C, Y, X) with its missing pixels (Y, X) drawn from their neighbours, without noise.

    >>> ramp = torch.arange(5.0).expand(1, 5, 5)
    >>> hole = torch.zeros(5, 5, dtype=torch.bool)
    >>> hole[1:4, 1:4] = True
    >>> bool(torch.allclose(linear(ramp, hole), ramp))
    True
    """
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import splu

    if not missing.any():
        return picture
    if missing.all():
        return picture.mean((1, 2), keepdim=True).expand_as(picture)
    numbers = torch.full(missing.shape, -1)
    numbers[missing.cpu()] = torch.arange(int(missing.sum()))
    own, neighbours, weights = _edges(numbers)
    known = neighbours < 0
    flat = picture.detach().double().cpu().flatten(1)  # (C, Y X)
    given = torch.zeros(len(flat), int(missing.sum()), dtype=torch.float64)
    given.index_add_(1, own[known], flat[:, -1 - neighbours[known]] * weights[known])
    diagonal = torch.arange(given.shape[1])
    at = torch.cat([own[~known], diagonal]).numpy(), torch.cat([neighbours[~known], diagonal]).numpy()
    values = torch.cat([-weights[~known], torch.ones(len(diagonal), dtype=torch.float64)]).numpy()
    system = splu(coo_array((values, at)).tocsc(), permc_spec="MMD_AT_PLUS_A")
    solved = torch.from_numpy(system.solve(given.T.contiguous().numpy())).T  # (C, M)
    filled = picture.detach().clone()
    filled[:, missing] = solved.to(filled)
    return filled


def _edges(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every missing pixel and neighbour: the pixel's number, the neighbour's (-1 - its place where it is known),
    and its weight, rescaled so that those of a pixel sum to one."""
    Y, X = numbers.shape
    y, x = (numbers >= 0).nonzero().T
    own = numbers[y, x]
    parts = []
    for (down, right), weight in NEIGHBOURS.items():
        inside = (0 <= y + down) & (y + down < Y) & (0 <= x + right) & (x + right < X)
        place = (y + down)[inside] * X + (x + right)[inside]
        number = numbers.flatten()[place]
        share = torch.full(place.shape, weight, dtype=torch.float64)
        parts.append((own[inside], torch.where(number < 0, -1 - place, number), share))
    who, neighbours, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    total = torch.zeros(len(own), dtype=torch.float64).index_add_(0, who, weights)
    return who, neighbours, weights / total[who]
