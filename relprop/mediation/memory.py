"""Work that is done in parts, and in halves of them where memory runs out."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..memory import out_of_memory

PIECE = 8  # rows that are run together where nothing else is said; the copies of them fill a batch
Found = dict[str, Tensor]
"""Numbers of some rows, the last axis, by name."""


def halved(run: Callable[[Tensor], Found], rows: Tensor) -> Found:
    """What `run` gives for these rows; of half of them and then of the others where memory runs out."""
    try:
        return run(rows)
    except Exception as error:
        if len(rows) == 1 or not out_of_memory(error):
            raise
    half = len(rows) // 2
    return joined([halved(run, rows[:half]), halved(run, rows[half:])])


def joined(found: Sequence[Found]) -> Found:
    """What was found of some rows after the other, as one."""
    return {name: torch.cat([one[name] for one in found], -1) for name in found[0]}


def by_piece(run: Callable[[Tensor], Found], pieces: Sequence[Tensor]) -> Found:
    """What `run` gives for the rows of each piece, (..., R) by name, of all, (..., B); `halved` where memory runs out.
    """
    return joined([halved(run, rows) for rows in pieces])


__all__ = ["PIECE", "Found", "by_piece", "halved", "joined", "out_of_memory"]
