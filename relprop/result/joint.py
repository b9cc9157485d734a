"""Parts of a batch, explained one after the other, as one result."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..tokens import Units
from .ledger import Ledger
from .picture import Picture
from .relevance import Relevance


def joined(parts: Sequence[Relevance], units: Units) -> Relevance:
    """The parts as one result of all their rows, whose units are `units`."""
    books = None if parts[0].ledger is None else _stacked_ledgers([part.ledger for part in parts])
    return replace(parts[0], map=torch.cat([part.map for part in parts]), units=units, ledger=books,
                   value=torch.cat([part.value for part in parts]),
                   target=[name for part in parts for name in part.target],
                   inputs=_cat([part.inputs for part in parts]), latents=_cat([part.latents for part in parts]),
                   positions=_positions(parts), forwards=sum(part.forwards for part in parts),
                   backwards=sum(part.backwards for part in parts), pictures=_pictures(parts))


def _positions(parts: Sequence[Relevance]) -> Tensor | None:
    """The map of positions; a part without any, beside others that have, is zero."""
    if all(part.positions is None for part in parts):
        return None
    return torch.cat([torch.zeros_like(part.map) if part.positions is None else part.positions for part in parts])


def _pictures(parts: Sequence[Relevance]) -> tuple[Picture, ...]:
    """The pictures of all parts, by their row in the whole."""
    starts = accumulate([0, *(part.rows for part in parts)])
    return tuple(replace(one, row=start + one.row) for start, part in zip(starts, parts) for one in part.pictures)


def _cat(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _stacked_ledgers(books: Sequence[Ledger]) -> Ledger:
    names = sorted({name for ledger in books for name in ledger.absorbed})
    absorbed = {name: torch.cat([b.absorbed.get(name, torch.zeros_like(b.value)) for b in books]) for name in names}
    layers = _cat([b.layers for b in books]) if books[0].layers else None
    parts = _cat([b.parts for b in books]) if all(b.parts for b in books) else None
    return Ledger(torch.cat([b.value for b in books]), torch.cat([b.input for b in books]), absorbed, layers, parts)
