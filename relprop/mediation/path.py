"""Path-specific effects: what passes from a sender to a receiver, other paths held.

The base is run with the sender as in the counterfactual and everything that is `held` as in the base; what the receiver
then is, it is made to be in a second run of the base, in which nothing else is touched. The outcome of that run against
the base's is the effect of the path. References: Pearl 2001 (Direct and indirect effects), section 4; Goldowsky-Dill et
al. 2023 (Localizing model behavior with path patching).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import torch
from torch import Tensor, nn

from ..address import Spans
from ..intervene import Group, Spot, split
from ..result.effects import SCALES
from ..subject import Subject
from ..trace import Tap
from ..trace.intervention import PATTERN
from .counterpart import Align
from .experiment import TAKEN, Experiment
from .finding import Effects
from .measurement import digest, result
from .memory import Found
from .record import measured
from .statistic import RESAMPLES
from .sweep import Mediator, grouped, sweep
from .task import At, Place, Report, Task, ready, several, task

HELD = ("L*.attn.H*", "L*.mlp")
END = "outcome"


def path_effects(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object = None,
                 outcome: object = None, *, sender: At, receiver: At | None, held: Place | Sequence[Place] = HELD,
                 scale: str = "difference", keep: Tensor | None = None, spans: Spans | None = None,
                 align: Align | str | None = None, groups: Sequence[object] | None = None, prompt_only: bool = False,
                 out: str | PathLike | None = None, batch_size: int | None = None, resamples: int = RESAMPLES,
                 seed: int = 0, show_progress: bool = False) -> Effects:
    """Indirect effects that pass from each sender to each receiver, and from there on any way.

    A held place does not pass on what comes from the sender. With the default, all heads and MLPs, the path is the
    direct one, along the residual stream; with `held=()` it is every path from the sender to the receiver. Of what is
    held, the layer's part that the sender is in, or that the receiver is in, holds nothing up.

    Args:
        base, counterfactual, outcome: as of `effects`.
        sender, receiver: places, as `at` of `effects`; each sender is paired with each receiver. A receiver of None is
            the outcome itself: what no held place passes on, as by the residual stream alone.
        held: sites that keep their value of the base; of the default, those that the model has.
        scale, keep, spans, align, groups, prompt_only, out, batch_size, resamples, seed, show_progress: as of
            `effects`.
    Returns: effects of kinds "total" and "indirect", of mediators named "L0.attn.H1 -> L1.mlp", "L1.mlp -> outcome".
    Cost: for each sender one run, and one for each receiver.
    Raises: ValueError and Undefined as of `effects`.

    >>> pair = "A wonderful film.", "A terrible film."
    >>> found = path_effects("reviews-bert", *pair, "POSITIVE", sender="embed", receiver=["L0.mlp", "L1.attn.H*"])
    >>> found.mediators[:2]
    ('embed -> L0.mlp', 'embed -> L1.attn.H0')
    """
    if scale not in SCALES:
        raise ValueError(f"effects are on the scale {' or '.join(SCALES)}, not {scale!r}")
    asked = task(subject, base, counterfactual, outcome, keep=keep, spans=spans, align=align, groups=groups,
                 prompt_only=prompt_only, batch_size=batch_size)
    with ready(asked.subject.model):
        senders = asked.mediators(sender)
        receivers = {END: []} if receiver is None else asked.mediators(receiver, taken=False)
        places = _held(asked, held)
        paths = Paths(asked, senders, receivers, places)
        found = measured(paths, out, show_progress=show_progress)
    return result(asked, paths.names, found, scale=scale, resamples=resamples, seed=seed,
                  about={"held": [str(place) for place in several(held)]})


def _held(asked: Task, held: Place | Sequence[Place]) -> list[Spot]:
    """Every place that is held. A model of attention alone has no MLP that could be."""
    found = []
    for one in several(held):
        try:
            found += [spot for spots in asked.mediators([one], taken=False).values() for spot in spots]
        except ValueError:
            if held is not HELD:
                raise
    return found


@dataclass(frozen=True, eq=False)
class Paths:
    """The outcomes that effects of paths from each sender to each receiver are made of, as of `Measurement`."""

    task: Task
    senders: Mapping[str, list[Spot]]
    receivers: Mapping[str, list[Spot]]
    held: list[Spot]

    each = property(lambda self: len(self.task.pairs))
    leading = property(lambda self: {"indirect_outcome": ()})

    @property
    def names(self) -> tuple[str, ...]:
        """Of the paths."""
        return tuple(f"{one} -> {other}" for one in self.senders for other in self.receivers)

    @property
    def step(self) -> int:
        """Paths of one sender, which are measured together."""
        return len(self.receivers)

    def part(self, start: int, stop: int) -> Paths:
        """Those of some of the senders alone."""
        some = list(self.senders.items())[start // self.step:stop // self.step]
        return replace(self, senders=dict(some))

    def config(self) -> dict:
        """What the outcomes depend on, beside the task: plain data."""
        sites = [[str(spot.site) for spot in spots] for spots in (*self.senders.values(), *self.receivers.values(),
                                                                  self.held)]
        return {"paths": {"count": len(self.names), "names": digest(repr((list(self.names), sites)).encode())}}

    def experiment(self, rows: Tensor) -> Experiment:
        """These rows made ready for all paths."""
        many = (*self.senders.values(), *self.receivers.values(), self.held)
        return self.task.experiment(rows, [spot for spots in many for spot in spots], both=False)

    def of_experiment(self, one: Experiment, report: Report | None = None) -> Found:
        """Of the rows that it is of: "base" and "counterfactual", (R,), and "indirect_outcome", (M, R)."""
        paths = _Paths(one, list(self.receivers.values()), self.held, report or (lambda count: None))
        found = torch.cat([paths.outcomes(sender) for sender in self.senders.values()])
        return {"base": one.base, "counterfactual": one.counterfactual, "indirect_outcome": found}


@dataclass(frozen=True, eq=False)
class _Paths:
    """The paths of an experiment to these receivers; an empty one is the outcome."""

    one: Experiment
    receivers: list[Mediator]
    held: list[Spot]
    report: Report

    def outcomes(self, sender: Mediator) -> Tensor:
        """Of the base with each receiver as the sender alone makes it, (R, B)."""
        answers = [self._answers(sender, which) for which in range(len(self.one.stages))]
        return self.one.outcome.value([answer.double().cpu() for answer in answers])

    def _answers(self, sender: Mediator, which: int) -> Tensor:
        base = self.one.stages[which][0]
        if self.receivers == [[]]:
            answer, _ = self._sent(sender, which, [], self._holding(sender, self.held))
            self.report(1)
            return answer
        there = {tap: base.there(tap).clone() for receiver in self.receivers for tap in _taps(receiver)}
        for receivers, held in self._together():
            spots = [spot for receiver in receivers for spot in receiver if spot.tap not in _taps(sender)]
            _, kept = self._sent(sender, which, spots, self._holding(sender, held))
            for (tap, units), (unit, value) in kept.items():
                split(there[tap], units)[:, :, unit] = value.movedim(0, 2).to(there[tap])
        return sweep(base, self.receivers, TAKEN, there, batch_size=self.one.batch_size,
                     prompt_only=self.one.prompt_only, places=self.one.places, report=self.report)

    def _sent(self, sender: Mediator, which: int, spots: list[Spot], held: list[Spot]
              ) -> tuple[Tensor, dict[tuple[Tap, int | None], tuple[Tensor, Tensor]]]:
        """What the base answers with the sender as in the other run and these places held, (1, B, ...), and the values
        at spots, (N, R, P, W), with their units, (N,); a spot that is held is read before it is.
        """
        base, other = self.one.stages[which]
        kept: dict[tuple[Tap, int | None], tuple[Tensor, Tensor]] = {}
        put = lambda spots, stage, one: grouped(base, [spots], one, {tap: stage.there(tap) for tap in _taps(spots)},
                                                self.one.places, self.one.prompt_only) if spots else {}
        groups: dict[Tap, list[Group]] = {}
        for found in (put(sender, other, self.one.taken(which)), _readers(spots, kept), put(held, base, TAKEN)):
            for tap, many in found.items():
                groups.setdefault(tap, []).extend(many)
        return base.answers(1, groups).cpu(), kept

    def _holding(self, sender: Mediator, held: list[Spot]) -> list[Spot]:
        """Of what is held, what does not stop the sender itself."""
        own = {_part(spot) for spot in sender}
        return [spot for spot in held if _part(spot) not in own]

    def _together(self) -> list[tuple[list[Mediator], list[Spot]]]:
        """Receivers that can be read in one run, and what is held in it: not what stands before them in their own part.
        """
        found: dict[frozenset[Spot], list[Mediator]] = {}
        for receiver in self.receivers:
            own, taps = {_part(spot) for spot in receiver}, _taps(receiver)
            free = frozenset(spot for spot in self.held if _part(spot) in own and
                             (spot.tap not in taps or spot.tap.side == PATTERN))
            found.setdefault(free, []).append(receiver)
        return [(receivers, [spot for spot in self.held if spot not in free]) for free, receivers in found.items()]


def _part(spot: Spot) -> tuple:
    return spot.site.address.layer, spot.site.address.part


def _taps(mediator: Mediator) -> set[Tap]:
    return {spot.tap for spot in mediator}


def _readers(spots: Sequence[Spot], kept: dict[tuple[Tap, int | None], tuple[Tensor, Tensor]]
             ) -> Mapping[Tap, list[Group]]:
    """Groups that change nothing and keep the values of spots, by tap and number of units."""
    units: dict[tuple[Tap, int | None], list[int]] = {}
    for spot in spots:
        units.setdefault((spot.tap, spot.units), []).append(spot.unit)
    groups: dict[Tap, list[Group]] = {}
    for key, many in units.items():
        unit = torch.tensor(list(dict.fromkeys(many)))
        groups.setdefault(key[0], []).append(Group(torch.zeros_like(unit), unit, key[1], _reader(key, unit, kept)))
    return groups


def _reader(key: tuple[Tap, int | None], unit: Tensor, kept: dict[tuple[Tap, int | None], tuple[Tensor, Tensor]]
            ) -> Callable[[Tensor], Tensor]:
    def read(now: Tensor) -> Tensor:
        kept[key] = unit, now.clone()
        return now

    return read
