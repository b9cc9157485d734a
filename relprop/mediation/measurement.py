"""From a task and its mediators to outcomes, and from outcomes to effects."""
from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import Undefined
from ..intervene import Intervention, Spot, reference
from ..result.effects import KINDS, SCALES
from ..trace import Tap
from .experiment import Experiment
from .finding import Effects
from .memory import Found
from .scene import patterns, scene
from .statistic import numbered, summary
from .task import Report, Task


@dataclass(frozen=True, eq=False)
class Measurement:
    """The outcomes that effects of these kinds are made of. `there`: values that `fixed` refers to, (R, P, C)."""

    task: Task
    mediators: Mapping[str, list[Spot]]
    kinds: tuple[str, ...] = ("total", "indirect")
    fixed: Intervention | None = None
    there: dict[Tap, Tensor] = field(default_factory=dict)

    step = 1
    """Mediators that are measured together are a multiple of this."""

    @staticmethod
    def of(task: Task, mediators: Mapping[str, list[Spot]], kinds: tuple[str, ...], fixed: Intervention | None = None
           ) -> Measurement:
        """With the run that `fixed` refers to made."""
        taps = list(dict.fromkeys(spot.tap for spots in mediators.values() for spot in spots))
        there = {} if fixed is None else reference(task.subject.model, fixed, taps)
        return Measurement(task, mediators, kinds, fixed, there)

    @property
    def each(self) -> int:
        """How often a mediator is reported as done on the same pairs."""
        ways = ("indirect" in self.kinds) + ("direct" in self.kinds) + 2 * ("controlled" in self.kinds)
        return len(self.task.pairs) * ways

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is measured."""
        return tuple(self.mediators)

    @property
    def leading(self) -> dict[str, tuple[int, ...]]:
        """What is found of each mediator, by name, with the sizes of the axes before that of the mediators."""
        return {f"{kind}_outcome": (2,) if kind == "controlled" else () for kind in self.kinds if kind != "total"}

    def part(self, start: int, stop: int) -> Measurement:
        """Of some of the mediators alone."""
        return replace(self, mediators=dict(list(self.mediators.items())[start:stop]))

    def config(self) -> dict:
        """What the outcomes depend on, beside the task: plain data."""
        spots = [str(spot.site) for spots in self.mediators.values() for spot in spots]
        return {"mediators": {"count": len(self.names), "names": digest(repr((list(self.names), spots)).encode())},
                "kinds": list(self.kinds), "fixed": said(self.fixed)}

    def experiment(self, rows: Tensor) -> Experiment:
        """These rows made ready for all mediators."""
        return self.task.experiment(rows, [spot for spots in self.mediators.values() for spot in spots],
                                    natural=self.fixed is None, both="direct" in self.kinds or self.fixed is not None)

    def of_experiment(self, one: Experiment, report: Report | None = None) -> Found:
        """Of the rows that it is of: "base" and "counterfactual", (R,), and what the kinds need of each mediator,
        (M, R).
        """
        many = list(self.mediators.values())
        found = {"base": one.base, "counterfactual": one.counterfactual}
        if "indirect" in self.kinds:
            found["indirect_outcome"] = one.indirect(many, report)
        if "direct" in self.kinds:
            found["direct_outcome"] = one.direct(many, report)
        if self.fixed is not None:
            found["controlled_outcome"] = one.controlled(many, self.fixed, self.there, report)
        return found


def checked(kind: str | Sequence[str], scale: str, fixed: Intervention | None) -> tuple[str, ...]:
    """The kinds of effect that are asked for.

    Raises: ValueError for others, for a scale that there is not, or `fixed` where no kind needs it.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    unknown = [one for one in kinds if one not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds of effect are {', '.join(KINDS)}, not {', '.join(unknown) or 'none'}")
    if scale not in SCALES:
        raise ValueError(f"effects are on the scale {' or '.join(SCALES)}, not {scale!r}")
    if ("controlled" in kinds) != (fixed is not None):
        raise ValueError('controlled effects and fixed= go together; give kind=["controlled"], fixed=Zero()')
    return kinds


def result(task: Task, mediators: tuple[str, ...], found: Found, *, scale: str, resamples: int, seed: int,
           about: dict, summed: bool = True) -> Effects:
    """Outcomes as effects, with their summaries unless these are not `summed` up.

    Raises: Undefined as of `check_defined`.
    """
    check_defined(task, found, scale)
    names = ("indirect_outcome", "direct_outcome", "controlled_outcome")
    about = {**task.told, **scene(task), "prompt_only": task.prompt_only, **about, **grouped(task)}
    plain = Effects(mediators, found["base"], found["counterfactual"], *(found.get(name) for name in names), scale,
                    task.name, about=about)
    if not summed:
        return plain
    kind = next((one for one in ("indirect", "direct", "controlled") if one in plain.kinds), None)
    seen = patterns(task, plain.top(len(mediators), kind)) if kind else []
    return replace(plain, about={**about, **({"patterns": seen} if seen else {})},
                   summaries={kind: summary(plain.effect(kind), groups=task.groups, resamples=resamples, seed=seed)
                              for kind in plain.kinds})


def grouped(task: Task) -> dict:
    """How many groups of examples there are, and the number of each example's, as plain data; nothing without them."""
    if task.groups is None:
        return {}
    number = numbered(task.groups, len(task.groups)).tolist()
    return {"groups": max(number) + 1, "grouped": number}


def check_defined(task: Task, found: Found, scale: str) -> None:
    """Raises: Undefined for an outcome that is the same whatever is changed, or a ratio to zero."""
    base = found["base"]
    wild = [name for name, value in found.items() if not value.isfinite().all()]
    if wild:
        task.subject.check_weights()
        values = found[wild[0]]
        row = int((~values.isfinite()).flatten(0, -2).any(0).nonzero()[0]) if values.dim() > 1 else \
            int((~values.isfinite()).nonzero()[0])
        raise Undefined(f"the outcome, {task.outcome.name(task.subject)}, is no number in example {row} "
                        f"({wild[0].replace('_', ' ')}), so that effects on it are undefined; of a ratio whose "
                        "denominator vanishes take LogOdds, or Difference")
    largest = torch.stack([value.abs().flatten(0, -2).amax(0) if value.dim() > 1 else value.abs()
                           for value in found.values()]).amax(0)  # (B,), each pair's own, since ratios differ by powers
    rounding = 4 * torch.finfo(task.subject.dtype).eps * largest
    if all(bool(((value - base).abs() <= rounding).all()) for value in found.values()):
        raise Undefined(f"the outcome, {task.outcome.name(task.subject)}, is {float(base[0]):g} whatever is changed, "
                        "in the counterfactual too, so that no effect is defined; take another outcome, or a "
                        "counterfactual that changes it")
    zero = (base.abs() <= rounding).nonzero().flatten().tolist()
    if scale == "ratio" and zero:
        raise Undefined(f"the outcome of base {zero[0]} is zero, so that a ratio to it is undefined; take "
                        'scale="difference"')


def said(one: object) -> str:
    """What it is, without where it lies in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(one))


def digest(data: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(data).hexdigest()[:16]


@contextmanager
def progress(total: int, shown: bool) -> Iterator[Report]:
    """A bar over mediators, if it is wanted: what to call with the number of those done."""
    if not shown:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="mediators") as bar:
        yield bar.update
