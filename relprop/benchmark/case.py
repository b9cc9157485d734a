"""One method's maps of a few rows, with all that a metric may ask about them; what is run once serves every metric."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .. import units
from ..check import imputation, perturbation, sanity
from ..check.perturbation import Course, Readout
from ..check.removal import Removal, removal
from ..data.alignment import Truth
from ..errors import Undefined
from ..still import settled
from ..subject import Subject
from ..target import Choice, Reading, Target, Targets
from ..tokens import Batch, ImageUnits

BY = ("token", "word", "patch")


@dataclass(frozen=True)
class Options:
    """What holds for all methods: `baseline` of `check.removal`; `by`: "token" or "word", what is removed of a text, or
    "patch", so that maps of pixels are summed over patches before they meet a mask; `share` of the words a rationale
    takes; `seed` of everything drawn; `batch_size` rows at once; `ends`: how many of the first and last units the
    curves of a perturbation are read at, besides tenths."""

    baseline: str | int | None = None
    by: str | None = None
    share: float | None = None
    seed: int = 0
    batch_size: int = 32
    ends: int = 0

    def __post_init__(self) -> None:
        if self.by is not None and self.by not in BY:
            raise ValueError(f"by is one of {', '.join(BY)}, not {self.by!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.ends < 0:
            raise ValueError(f"ends must not be negative, got {self.ends}")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of the data as the model takes them, what is asked of them and what it says, and what should matter."""

    readout: Readout  # subject, batch and fixed targets
    start: Tensor  # what the readout reads of the whole inputs, (B, 3)
    truths: list[Truth]

    @property
    def subject(self) -> Subject:
        return self.readout.subject

    @property
    def batch(self) -> Batch:
        return self.readout.batch

    @property
    def targets(self) -> Targets:
        return self.readout.targets

    def take(self, rows: list[int]) -> Rows:
        """These rows, in this order."""
        readout = replace(self.readout, batch=self.batch.take(rows), targets=self.targets.take(rows))
        return Rows(readout, self.start[rows], [self.truths[row] for row in rows])


@dataclass(frozen=True, eq=False)
class Case:
    """Maps that say something, (B, T) or (B, Y, X), of these rows.

    `run` makes the map of other inputs or targets by the same method: (batch, targets) -> maps, NaN for a row that has
    none.
    """

    rows: Rows
    relevance: Tensor
    run: Callable[[Batch, Targets], Tensor]
    options: Options = Options()

    @cached_property
    def removal(self) -> Removal:
        return self._removal(self.options.baseline)

    @cached_property
    def courses(self) -> tuple[Course, Course]:
        """Most and least relevant first, under the baseline that was asked for."""
        return self._courses(self.removal)

    @cached_property
    def inserted(self) -> Course:
        """Least relevant first, for the insertion game: of pictures under a blur."""
        if not self.pictures or self.options.baseline is not None:
            return self.courses[1]
        return self._courses(self._removal("blur"))[1]

    @cached_property
    def imputed(self) -> tuple[Course, Course]:
        """Most and least relevant first, pixels imputed."""
        return self._courses(imputation.imputed(self.rows.subject, self.rows.batch, seed=self.options.seed))

    @property
    def pictures(self) -> bool:
        return isinstance(self.rows.batch.units, ImageUnits)

    @cached_property
    def placed(self) -> list[Tensor]:
        """For each row the relevance of what can be marked: words, tokens, or pixels."""
        relevance = self.relevance.detach().cpu()
        if self.pictures and self.options.by == "patch":
            groups = units.groups(self.rows.batch)
            relevance = units.spread(units.pooled(relevance, groups), groups)
        return [truth.units(row) for truth, row in zip(self.rows.truths, relevance, strict=True)]

    @cached_property
    def cascade(self) -> Tensor:
        """Rank correlation with the maps of a model that is randomised from the output down, (S, B)."""
        return sanity.cascading(self.rows.subject, self.rows.batch, self.relevance, self.again, seed=self.options.seed)

    @cached_property
    def alone(self) -> Tensor:
        """The same with one stage randomised at a time, (S, B)."""
        return sanity.independent(self.rows.subject, self.rows.batch, self.relevance, self.again,
                                  seed=self.options.seed)

    def again(self) -> Tensor:
        """The maps of the same inputs and targets, by the model as it is now."""
        return self.run(self.rows.batch, self.rows.targets)

    @cached_property
    def other(self) -> Tensor:
        """The maps of the class, or token, that comes next to the target.

        Raises: Undefined for a model with a single logit; ValueError for a target that is no class or token.
        """
        return self.run(self.rows.batch, replace(self.rows.targets, targets=tuple(self._runners_up())))

    def _runners_up(self) -> list[Target]:
        subject, batch, targets = self.rows.subject, self.rows.batch, self.rows.targets
        with settled(subject.model), torch.no_grad():
            output = subject.forward(batch)
        found = []
        for row, target in enumerate(targets.targets):
            if not isinstance(target, Choice):
                raise ValueError(f"a {type(target).__name__} has no class next to it; explain a class or token")
            reading = Reading(output, batch, targets.vocabulary, torch.tensor([row]))
            z = target.choices(reading)[0].clone()
            if len(z) < 2:
                raise Undefined("a model with a single logit has no other class to explain")
            z[target.column(reading)] = -torch.inf
            found.append(target.other(int(z.argmax())))
        return found

    def _removal(self, baseline: str | int | None) -> Removal:
        by = None if self.options.by == "patch" else self.options.by
        return removal(self.rows.subject, self.rows.batch, baseline=baseline, by=by)

    def _courses(self, out: Removal) -> tuple[Course, Course]:
        return perturbation.courses(self.rows.readout, out, self.relevance, self.rows.start, seed=self.options.seed,
                                    ends=self.options.ends)
