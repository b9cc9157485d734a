"""Pairs of inputs and an outcome, ready for any set of mediators to be tried on."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.alignment import own_tokens, tokenised
from ..intervene import Intervention, Places, Resample, Spot
from ..intervene.inputs import real_of
from ..rows import leaf
from ..subject import Subject
from ..tokens import Batch, TextUnits
from ..trace import Tap
from .counterpart import Across, Counterpart, Lists, Taken, counterpart
from .outcome import Outcome, Question
from .stage import Stage, stage, staged_apart, staged_like
from .sweep import Mediator, sweep

TAKEN = Resample(None)  # the value of the other input's run, whatever it is
NOWHERE = Places()


@dataclass(frozen=True, eq=False)
class Experiment:
    """A base and a counterfactual for each row, run and ready to be run again with mediators changed.

    `stages` holds, for each question of the outcome, the base's and the counterfactual's. `batch_size` rows are run at
    once, None: as many as there is room for; with `prompt_only` mediators change at positions of the prompt alone.
    `between` has for each question which position of the counterfactual stands for each one of the base; where it is
    empty, the same one does.
    """

    subject: Subject
    outcome: Outcome
    stages: list[tuple[Stage, Stage]]
    batch_size: int | None = None
    prompt_only: bool = False
    places: Places = NOWHERE
    between: list[Counterpart] = field(default_factory=list)

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
        return self._value([self._taking(which, mediators, report) for which in range(len(self.stages))])

    def direct(self, mediators: Sequence[Mediator], report: Callable[[int], None] | None = None) -> Tensor:
        """Outcome of the counterfactual with each mediator as in the base, (M, B).

        Raises: ValueError where positions of the base have one counterpart together.
        """
        return self._value([self._taking(which, mediators, report, back=True) for which in range(len(self.stages))])

    def controlled(self, mediators: Sequence[Mediator], one: Intervention, there: dict[Tap, Tensor],
                   report: Callable[[int], None] | None = None) -> Tensor:
        """Outcomes of the base and of the counterfactual with each mediator at a given value, (2, M, B).

        Args: there: of an intervention that refers to other inputs, the values in their run, (R, P, C) by tap.
        """
        run = lambda which, side: self._sweep(self.stages[which][side], mediators, one, there,
                                              self.placed(which, back=side == 1), report)
        return torch.stack([self._value([run(which, side) for which in range(len(self.stages))]) for side in (0, 1)])

    def taken(self, which: int, *, back: bool = False) -> Intervention:
        """What takes the value of the counterfactual's run in the base's, or `back`, in the question of this number."""
        base, other = self.stages[which]
        if not self.between:
            return TAKEN
        if back:
            return Taken(self.between[which].back().shifted(other.offset, base.offset))
        return Taken(self.between[which].shifted(base.offset, other.offset))

    def placed(self, which: int, *, back: bool = False) -> Places:
        """What positions of the base are counted by, or `back`, those of the counterfactual that stand for them."""
        if not self.between or not back:
            return self.places
        between, question = self.between[which], self.stages[which][0].question
        own = real_of(question.batch.kwargs, *between.at.shape) if question.prompt is None else question.prompt
        return Across(spans=self.places.spans, prefix=self.places.prefix, between=between, base=own)

    def _taking(self, which: int, mediators: Sequence[Mediator], report: Callable[[int], None] | None, *,
                back: bool = False) -> Tensor:
        here, there = self.stages[which][::-1 if back else 1]
        taps = {spot.tap for mediator in mediators for spot in mediator}
        return self._sweep(here, mediators, self.taken(which, back=back), {tap: there.there(tap) for tap in taps},
                           self.placed(which, back=back), report)

    def _sweep(self, here: Stage, mediators: Sequence[Mediator], one: Intervention, there: dict[Tap, Tensor],
               places: Places, report: Callable[[int], None] | None) -> Tensor:
        return sweep(here, mediators, one, there, batch_size=self.batch_size, prompt_only=self.prompt_only,
                     places=places, report=report)

    def _value(self, answers: list[Tensor]) -> Tensor:
        return self.outcome.value([one.double().cpu() for one in answers])


def experiment(subject: Subject, outcome: Outcome, pairs: Sequence[tuple[Question, Question]], spots: Sequence[Spot],
               *, natural: bool = True, both: bool = True, batch_size: int | None = None, prompt_only: bool = False,
               places: Places = NOWHERE, align: Lists | None = None) -> Experiment:
    """The inputs of these questions made ready for mediators among `spots`.

    Args: natural: mediators only ever take the value of the other input. both: the counterfactual's run is changed
        too, as for direct effects. align: for each row the position of the counterfactual for each one of the base, -1
        for none, of the prompts without padding; None: the same.
    Cost: for each question four to seven forward passes.
    """
    taps = list(dict.fromkeys(spot.tap for spot in spots))
    between = [] if align is None else [counterpart(base, other, align) for base, other in pairs]
    stages = []
    for which, (base, other) in enumerate(pairs):
        since = _since(base, other, spots, places, between[which] if between else None, natural=natural)
        first = stage(subject.model, base, taps, since=since)
        stages.append((first, (staged_apart if between else staged_like)(first, other, light=not both)))
    return Experiment(subject, outcome, stages, batch_size, prompt_only, places, between)


def _since(base: Question, other: Question, spots: Sequence[Spot], places: Places, between: Counterpart | None, *,
           natural: bool) -> int:
    """The first position at which anything can be changed."""
    ids, more = (one.batch.kwargs.get("input_ids") for one in (base, other))
    if ids is None or more is None or base.prompt is None:
        return 0
    if between is None:
        differs = ids != more
    else:
        at = between.at.to(ids.device)
        differs = (at != torch.arange(at.shape[1], device=at.device)) | (ids != more.gather(1, at.clamp_min(0)))
    first = differs.any(0).nonzero().flatten().tolist()
    since = first[0] if natural and first else 0
    wanted = {spot.site.address.position for spot in spots}
    if None in wanted:
        return since
    return max(since, min(int(places.at(one, base.prompt).any(0).nonzero()[0]) for one in wanted))


def check_pair(base: Batch, counterfactual: Batch, *, aligned: bool = False) -> None:
    """Raises: ValueError for inputs that cannot be base and counterfactual of each other: other numbers of rows, rows
    that are equal, rows of different length that are not `aligned`.
    """
    if base.rows != counterfactual.rows:
        raise ValueError(f"{base.rows} bases and {counterfactual.rows} counterfactuals; give one for each")
    texts = isinstance(base.units, TextUnits) and isinstance(counterfactual.units, TextUnits)
    if texts and not aligned:
        _check_lengths(base, counterfactual)
    a, b = leaf(base)[1], leaf(counterfactual)[1]
    if a.shape != b.shape and not aligned:
        raise ValueError(f"base of shape {tuple(a.shape)} and counterfactual of shape {tuple(b.shape)}; make them "
                         "equal")
    same = [] if a.shape != b.shape else (a == b).flatten(1).all(1).nonzero().flatten().tolist()
    if same:
        said = f", {' | '.join(own_tokens(base, same[0]))}" if texts else ""
        raise ValueError(f"row {same[0]}: base and counterfactual are equal{said}, so that nothing has an effect; "
                         "change in the counterfactual what the effect is of, or leave the pair out")


def _check_lengths(base: Batch, counterfactual: Batch) -> None:
    counts = [(~torch.tensor(one.units.padding)).sum(1) for one in (base, counterfactual)]
    differ = (counts[0] != counts[1]).nonzero().flatten().tolist()
    if differ:
        raise ValueError(f"{tokenised(base, counterfactual, differ[0])}; positions of one are not those of the other. "
                         "Choose words of as many tokens, or give align=, the position in the counterfactual for each "
                         "one of the base, -1 for none")


__all__ = ["Experiment", "check_pair", "experiment"]
