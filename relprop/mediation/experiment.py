"""Pairs of inputs and an outcome, ready for any set of mediators to be tried on."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..intervene import Intervention, Places, Resample, Spot
from ..rows import leaf
from ..subject import Subject
from ..tokens import Batch, TextUnits
from ..trace import Tap
from .outcome import Outcome, Question
from .stage import Stage, stage, staged_like
from .sweep import Mediator, sweep

TAKEN = Resample(None)  # the value of the other input's run, whatever it is
NOWHERE = Places()


@dataclass(frozen=True, eq=False)
class Experiment:
    """A base and a counterfactual for each row, run and ready to be run again with mediators changed.

    `stages` holds, for each question of the outcome, the base's and the counterfactual's. `batch_size` rows are run at
    once, None: as many as there is room for; with `prompt_only` mediators change at positions of the prompt alone.
    """

    subject: Subject
    outcome: Outcome
    stages: list[tuple[Stage, Stage]]
    batch_size: int | None = None
    prompt_only: bool = False
    places: Places = NOWHERE

    @property
    def base(self) -> Tensor:
        """Outcome of the base, (B,)."""
        return self._value([base.plain for base, _ in self.stages])

    @property
    def counterfactual(self) -> Tensor:
        """Outcome of the counterfactual, (B,)."""
        return self._value([other.plain for _, other in self.stages])

    def indirect(self, mediators: Sequence[Mediator], report: Callable[[int], None] | None = None) -> Tensor:
        """Outcome of the base with each mediator as in the counterfactual, (M, B)."""
        return self._value([self._sweep(base, other, mediators, report) for base, other in self.stages])

    def direct(self, mediators: Sequence[Mediator], report: Callable[[int], None] | None = None) -> Tensor:
        """Outcome of the counterfactual with each mediator as in the base, (M, B)."""
        return self._value([self._sweep(other, base, mediators, report) for base, other in self.stages])

    def controlled(self, mediators: Sequence[Mediator], one: Intervention, there: dict[Tap, Tensor],
                   report: Callable[[int], None] | None = None) -> Tensor:
        """Outcomes of the base and of the counterfactual with each mediator at a given value, (2, M, B).

        Args: there: of an intervention that refers to other inputs, the values in their run, (R, P, C) by tap.
        """
        run = partial(sweep, batch_size=self.batch_size, prompt_only=self.prompt_only, places=self.places,
                      report=report)
        return torch.stack([self._value([run(pair[side], mediators, one, there) for pair in self.stages])
                            for side in (0, 1)])

    def _sweep(self, here: Stage, there: Stage, mediators: Sequence[Mediator],
               report: Callable[[int], None] | None) -> Tensor:
        taps = {spot.tap for mediator in mediators for spot in mediator}
        return sweep(here, mediators, TAKEN, {tap: there.there(tap) for tap in taps}, batch_size=self.batch_size,
                     prompt_only=self.prompt_only, places=self.places,
                      report=report)

    def _value(self, answers: list[Tensor]) -> Tensor:
        return self.outcome.value([one.double().cpu() for one in answers])


def experiment(subject: Subject, outcome: Outcome, pairs: Sequence[tuple[Question, Question]], spots: Sequence[Spot],
               *, natural: bool = True, both: bool = True, batch_size: int | None = None, prompt_only: bool = False,
               places: Places = NOWHERE) -> Experiment:
    """The inputs of these questions made ready for mediators among `spots`.

    Args: natural: mediators only ever take the value of the other input. both: the counterfactual's run is changed
        too, as for direct effects.
    Cost: for each question four to seven forward passes.
    """
    taps = list(dict.fromkeys(spot.tap for spot in spots))
    stages = []
    for base, other in pairs:
        first = stage(subject.model, base, taps, since=_since(base, other, spots, places, natural=natural))
        stages.append((first, staged_like(first, other, light=not both)))
    return Experiment(subject, outcome, stages, batch_size, prompt_only, places)


def _since(base: Question, other: Question, spots: Sequence[Spot], places: Places, *, natural: bool) -> int:
    """The first position at which anything can be changed."""
    ids, more = (one.batch.kwargs.get("input_ids") for one in (base, other))
    if ids is None or more is None or base.prompt is None:
        return 0
    differs = (ids != more).any(0).nonzero().flatten().tolist()
    since = differs[0] if natural and differs else 0
    wanted = {spot.site.address.position for spot in spots}
    if None in wanted:
        return since
    return max(since, min(int(places.at(one, base.prompt).any(0).nonzero()[0]) for one in wanted))


def check_pair(base: Batch, counterfactual: Batch) -> None:
    """Raises: ValueError for inputs that cannot be base and counterfactual of each other: other numbers of rows, rows
    that are equal, rows of different length.
    """
    if base.rows != counterfactual.rows:
        raise ValueError(f"{base.rows} bases and {counterfactual.rows} counterfactuals; give one for each")
    if isinstance(base.units, TextUnits) and isinstance(counterfactual.units, TextUnits):
        for row in range(base.rows):
            one, other = ([token for token, gone in zip(units.tokens[row], units.padding[row]) if not gone]
                          for units in (base.units, counterfactual.units))
            if len(one) != len(other):
                raise ValueError(f"row {row}: the base has {len(one)} tokens, {one}, and the counterfactual "
                                 f"{len(other)}, {other}; positions of one are not those of the other. Choose words "
                                 "of as many tokens")
    a, b = leaf(base)[1], leaf(counterfactual)[1]
    if a.shape != b.shape:
        raise ValueError(f"base of shape {tuple(a.shape)} and counterfactual of shape {tuple(b.shape)}; make them "
                         "equal")
    same = (a == b).flatten(1).all(1).nonzero().flatten().tolist()
    if same:
        raise ValueError(f"row {same[0]}: base and counterfactual are equal, so that nothing has an effect")


__all__ = ["Experiment", "check_pair", "experiment"]
