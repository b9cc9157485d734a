"""What is asked: pairs of inputs, an outcome, and how they are run; pieces of the pairs are made ready one by one."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..address import Address, Spans
from ..anatomy import Anatomy
from ..intervene import Places, Site, Spot, parts, resolved
from ..load import load
from ..still import settled
from ..subject import Subject
from ..tokens import Batch
from ..trace.intervention import PATTERN
from .counterpart import Align, Lists, lists_of, take
from .experiment import Experiment, check_pair, experiment
from .given import Given, named, told
from .memory import PIECE
from .outcome import Outcome, Question
from .outcome import outcome as outcome_of

Place = str | Site | Address
At = Place | Sequence[Place] | Mapping[str, Place | Sequence[Place]]
Report = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Task:
    """Pairs of inputs and what is asked of them. `rows` are those of the pairs that count, `groups` their groups. Where
    base and counterfactual differ in their number of tokens, `align` has for each pair the position of the
    counterfactual for each one of the base, -1 for none, padding not counted.
    """

    subject: Subject
    base: Batch
    counterfactual: Batch
    outcome: Outcome
    pairs: list[tuple[Question, Question]]
    rows: Tensor
    spans: Spans | None = None
    prompt_only: bool = False
    batch_size: int | None = None
    align: Lists | None = None
    groups: tuple[object, ...] | None = None
    data: str | None = None
    words: Sequence[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """What the outcome is called in reports."""
        return named(self.outcome.name(self.subject), self.words)

    @property
    def told(self) -> dict[str, str]:
        """What reports say of the model and the data."""
        return {"model": self.subject.name, **({} if self.data is None else told(self.data, self.words))}

    @property
    def pieces(self) -> tuple[Tensor, ...]:
        """Rows that are run together."""
        return self.rows.split(PIECE if self.batch_size is None else max(1, self.batch_size // 4))

    def mediators(self, at: At, *, taken: bool = True) -> dict[str, list[Spot]]:
        """See `mediators_of`.

        Args: taken: whether they take values of the other input.
        Raises: ValueError for attention patterns of inputs of different length, whose columns are other positions.
        """
        found = mediators_of(self.subject, self.base, at)
        if taken and self.align is not None:
            swapped = [name for name, spots in found.items() if any(one.tap.side == PATTERN for one in spots)]
            if swapped:
                raise ValueError(f"{swapped[0]}: attention patterns of inputs of different length cannot be aligned, "
                                 "since a row of one is no distribution over the positions of the other; take heads "
                                 "as mediators, such as L*.attn.H*, or pairs of as many tokens")
        return found

    def experiment(self, rows: Tensor, spots: Sequence[Spot], *, natural: bool = True, both: bool = False
                   ) -> Experiment:
        """These rows made ready; see `experiment`."""
        return experiment(self.subject, self.outcome, [tuple(one.take(rows) for one in pair) for pair in self.pairs],
                          list(dict.fromkeys(spots)), natural=natural, both=both, batch_size=self.batch_size,
                          prompt_only=self.prompt_only, places=placed(self.subject, self.spans, rows),
                          align=take(self.align, rows))


def task(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object, outcome: object, *,
         keep: Tensor | None = None, spans: Spans | None = None, align: Align | str | None = None,
         groups: Sequence[object] | None = None, prompt_only: bool = False, batch_size: int | None = None) -> Task:
    """What a caller asks, checked.

    Args: keep: which of the pairs count, bool (B,); None: all.
    Raises: ValueError for inputs that are no pairs, for no pair, or a batch of no row.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    subject = subject if isinstance(subject, Subject) else load(*subject) if isinstance(subject, tuple) \
        else Subject.from_module(subject) if isinstance(subject, nn.Module) else load(subject)
    given = Given(base, counterfactual, outcome, spans, align, groups).opened(subject)
    base, counterfactual = subject.prepare(given.base), subject.prepare(given.counterfactual)
    check_pair(base, counterfactual, aligned=given.align is not None)
    lists = None if given.align is None else lists_of(given.align, base, counterfactual)
    asked, rows = outcome_of(given.outcome), _kept(keep, base.rows)
    grouped = _grouped(given.groups, base.rows, rows)
    with ready(subject.model):
        pairs = asked.pairs(subject, base, counterfactual)
    return Task(subject, base, counterfactual, asked, pairs, rows, given.spans, prompt_only, batch_size, lists, grouped,
                given.data, given.words)


def _grouped(groups: Sequence[object] | None, count: int, rows: Tensor) -> tuple[object, ...] | None:
    """The groups of the pairs that count, as plain labels."""
    if groups is None:
        return None
    labels = groups.tolist() if hasattr(groups, "tolist") else list(groups)  # entries of a tensor are no labels
    if len(labels) != count:
        raise ValueError(f"{len(labels)} groups for {count} pairs; give one for each, None for a pair that is in none")
    return tuple(labels[row] for row in rows.tolist())


def _kept(keep: Tensor | None, count: int) -> Tensor:
    """Which pairs count."""
    rows = torch.arange(count)
    if keep is None:
        return rows
    chosen = torch.as_tensor(keep)
    if chosen.dtype != torch.bool or chosen.shape != rows.shape or not chosen.any():
        raise ValueError(f"keep= says which of the {count} pairs count, one bool each and at least one true; got "
                         f"{chosen.dtype} of shape {tuple(chosen.shape)}, {int(chosen.sum())} of them true")
    return rows[chosen]


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """The model as it is run: without gradients or chance."""
    with torch.no_grad(), settled(model):
        yield


def mediators_of(subject: Subject, batch: Batch, at: At) -> dict[str, list[Spot]]:
    """Each mediator by name: the places that are changed together. Cost: two or three forward passes of one row."""
    one = batch.take([0])
    known = parts(subject.model, one.args, one.kwargs)
    each = lambda site: _resolved(subject, known, site, one)
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


def _resolved(subject: Subject, known: Anatomy, site: Place, one: Batch) -> list[Spot]:
    parsed = Site.parse(site)
    try:
        return resolved(subject.model, known, parsed, one.args, one.kwargs)
    except ValueError as cause:
        raise ValueError(f"mediator {parsed} is no place of {subject.name}: {cause}") from cause


def several(sites: object) -> list[Any]:
    """One site or several, as several."""
    if isinstance(sites, (str, Site, Address)):
        return [sites]
    if not isinstance(sites, Iterable):
        raise TypeError(f"places are sites or patterns of sites, such as 'L*.attn.H*', a list of them, or a mapping of "
                        f"names to them; not {type(sites).__name__}")
    return list(sites)


def placed(subject: Subject, spans: Spans | None, rows: Tensor) -> Places:
    """What positions are counted by in these rows."""
    return Places.of(subject.model, spanned(spans, rows))


def spanned(spans: Spans | None, rows: Tensor) -> Spans:
    """The spans of these rows."""
    return {name: [span[row] for row in rows.tolist()] if _by_row(span) else span for name, span in
            (spans or {}).items()}


def _by_row(span: Any) -> bool:
    return not isinstance(span, int) and bool(len(span)) and not isinstance(span[0], int)
