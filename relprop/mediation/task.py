"""What is asked: pairs of inputs, an outcome, and how they are run; pieces of the pairs are made ready one by one."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..address import Address, Spans
from ..intervene import Places, Site, Spot, parts, resolved
from ..load import load
from ..still import settled
from ..subject import Subject
from ..tokens import Batch
from .experiment import Experiment, check_pair, experiment
from .outcome import Outcome, Question
from .outcome import outcome as outcome_of
from .sweep import Mediator

PIECE = 8  # pairs that are run together; the copies of them fill a batch
Place = str | Site | Address
At = Place | Sequence[Place] | Mapping[str, Place | Sequence[Place]]
Report = Callable[[int], None]
Found = dict[str, Tensor]  # outcomes of some rows, the last axis, by name


@dataclass(frozen=True, eq=False)
class Task:
    """Pairs of inputs and what is asked of them. `rows` are those of the pairs that count."""

    subject: Subject
    base: Batch
    counterfactual: Batch
    outcome: Outcome
    pairs: list[tuple[Question, Question]]
    rows: Tensor
    spans: Spans | None = None
    prompt_only: bool = False
    batch_size: int | None = None

    @property
    def pieces(self) -> tuple[Tensor, ...]:
        """Rows that are run together."""
        return self.rows.split(PIECE if self.batch_size is None else max(1, self.batch_size // 4))

    def mediators(self, at: At) -> dict[str, list[Spot]]:
        """See `mediators_of`."""
        return mediators_of(self.subject, self.base, at)

    def experiment(self, rows: Tensor, spots: Sequence[Spot], *, natural: bool = True, both: bool = False
                   ) -> Experiment:
        """These rows made ready; see `experiment`."""
        return experiment(self.subject, self.outcome, [tuple(one.take(rows) for one in pair) for pair in self.pairs],
                          list(dict.fromkeys(spots)), natural=natural, both=both, batch_size=self.batch_size,
                          prompt_only=self.prompt_only, places=placed(self.subject, self.spans, rows))

    def by_piece(self, run: Callable[[Tensor], Found]) -> Found:
        """What `run` gives for rows, (..., R) by name, of all pieces, (..., B); where memory runs out, of half a piece
        and then of the other.
        """
        return joined([halved(run, rows) for rows in self.pieces])

    def indirect(self, sets: Sequence[Mediator], report: Report | None = None) -> Found:
        """The outcome of the "base" and the "counterfactual", (B,), and "indirect", of the base with each set of places
        as in the counterfactual, (S, B).
        """
        def run(rows: Tensor) -> Found:
            one = self.experiment(rows, [spot for mediator in sets for spot in mediator])
            return {"base": one.base, "counterfactual": one.counterfactual, "indirect": one.indirect(sets, report)}

        return self.by_piece(run)


def task(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object, outcome: object, *,
         keep: Tensor | None = None, spans: Spans | None = None, prompt_only: bool = False,
         batch_size: int | None = None) -> Task:
    """What a caller asks, checked.

    Args: keep: which of the pairs count, bool (B,); None: all.
    Raises: ValueError for inputs that are no pairs, for no pair, or a batch of no row.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    subject = subject if isinstance(subject, Subject) else load(*subject) if isinstance(subject, tuple) \
        else Subject.from_module(subject) if isinstance(subject, nn.Module) else load(subject)
    base, counterfactual = subject.prepare(base), subject.prepare(counterfactual)
    check_pair(base, counterfactual)
    asked = outcome_of(outcome)
    rows = torch.arange(base.rows)
    if keep is not None:
        chosen = torch.as_tensor(keep)
        if chosen.dtype != torch.bool or chosen.shape != rows.shape or not chosen.any():
            raise ValueError(f"keep= says which of the {base.rows} pairs count, one bool each and at least one true; "
                             f"got {chosen.dtype} of shape {tuple(chosen.shape)}, {int(chosen.sum())} of them true")
        rows = rows[chosen]
    with ready(subject.model):
        pairs = asked.pairs(subject, base, counterfactual)
    return Task(subject, base, counterfactual, asked, pairs, rows, spans, prompt_only, batch_size)


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """The model as it is run: without gradients or chance."""
    with torch.no_grad(), settled(model):
        yield


def halved(run: Callable[[Tensor], Found], rows: Tensor) -> Found:
    """What `run` gives for these rows; of half of them and then of the others where memory runs out."""
    try:
        return run(rows)
    except (torch.OutOfMemoryError, MemoryError):
        if len(rows) == 1:
            raise
    half = len(rows) // 2
    return joined([halved(run, rows[:half]), halved(run, rows[half:])])


def joined(found: Sequence[Found]) -> Found:
    """What was found of some rows after the other, as one."""
    return {name: torch.cat([one[name] for one in found], -1) for name in found[0]}


def mediators_of(subject: Subject, batch: Batch, at: At) -> dict[str, list[Spot]]:
    """Each mediator by name: the places that are changed together. Cost: two or three forward passes of one row."""
    one = batch.take([0])
    known = parts(subject.model, one.args, one.kwargs)
    each = lambda site: resolved(subject.model, known, Site.parse(site), one.args, one.kwargs)
    if isinstance(at, Mapping):
        found = {name: [spot for site in several(sites) for spot in each(site)] for name, sites in at.items()}
    else:
        found = {}
        for spot in (spot for site in several(at) for spot in each(site)):
            found.setdefault(str(spot.site), []).append(spot)
    empty = [name for name, spots in found.items() if not spots]
    if empty or not found:
        raise ValueError(f"no place in the model for mediator {empty[0] if empty else at!r}")
    return found


def several(sites: object) -> list[Any]:
    """One site or several, as several."""
    return [sites] if isinstance(sites, (str, Site, Address)) else list(sites)


def placed(subject: Subject, spans: Spans | None, rows: Tensor) -> Places:
    """What positions are counted by in these rows."""
    return Places.of(subject.model, spanned(spans, rows))


def spanned(spans: Spans | None, rows: Tensor) -> Spans:
    """The spans of these rows."""
    return {name: [span[row] for row in rows.tolist()] if _by_row(span) else span for name, span in
            (spans or {}).items()}


def _by_row(span: Any) -> bool:
    return not isinstance(span, int) and bool(len(span)) and not isinstance(span[0], int)
