"""Few mediators that do together what all do: chosen one by one, and what they are more than the sum of their parts.

    >>> import relprop
    >>> found = subset("reviews-bert", "A wonderful film.", "A terrible film.", "POSITIVE", at="L*.attn.H*", k=3)
    >>> len(found.chosen), found.effects.shape == (3, 1)
    (3, True)

Reference: Vig et al. 2020 (Causal mediation analysis for interpreting neural NLP), sections 4 and 5. Their released
code changes every chosen neuron a layer too late, and changes wrong ones where a candidate is chosen already; here a
neuron is where it was found.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import shard
from ..address import Spans
from ..crew import Crew
from ..intervene import Spot
from ..result.effects import SCALES, Effects
from ..subject import Subject
from .counterpart import Align
from .finding import Subset, Subsets
from .measurement import Measurement, check_defined, grouped, progress
from .record import config, measured
from .scene import scene
from .task import At, Report, Task, ready, task

WHAT = "choice of mediators"
HOW = ("greedy", "top-k")
TOWARD = ("total", "up", "down")


def subset(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object = None,
           outcome: object = None, *, at: At = "L*.attn.H*", how: str = "greedy", k: int = 10, toward: str = "total",
           among: int | None = None, scale: str = "difference", keep: Tensor | None = None, spans: Spans | None = None,
           align: Align | str | None = None, prompt_only: bool = False, out: str | PathLike | None = None,
           batch_size: int | None = None, show_progress: bool = False) -> Subset:
    """At most k of the mediators that change the outcome most together.

    Args:
        base, counterfactual, outcome: as of `effects`.
        at: the mediators to choose among, as of `effects`: heads, neurons, sets of places.
        how: "top-k", those of the largest mean effects alone; "greedy", at each step the one with which the mean
            effect of the set is largest.
        toward: what is a large effect: one of the sign of the mean "total" effect, "up" or "down".
        among: for "greedy", try only so many that have the largest effects alone; None: all.
        out: a folder that outcomes are written to as the search goes, a folder in it for each step; a call with the
            same arguments goes on where one was stopped, and with a larger k it adds to what is there. Processes share
            the work as of `effects`.
        scale, keep, spans, align, prompt_only, batch_size: as of `effects`.
    Cost: that of `effects`, and for "greedy" that many times k.
    Raises: ValueError as of `effects`, and for an unknown `how` or `toward`; Undefined as of `effects`.
    """
    choice = _Choice(how, k, toward, among, scale)
    asked = task(subject, base, counterfactual, outcome, keep=keep, spans=spans, align=align, prompt_only=prompt_only,
                 batch_size=batch_size)
    return _by_group(asked, at, choice, lambda mediators: {"": mediators}, out, show_progress)[""]


def subsets(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object = None,
            outcome: object = None, *, at: At = "L*.attn.H*", how: str = "greedy", k: int = 10, toward: str = "total",
            among: int | None = None, scale: str = "difference", keep: Tensor | None = None, spans: Spans | None = None,
            align: Align | str | None = None, prompt_only: bool = False, out: str | PathLike | None = None,
            batch_size: int | None = None, show_progress: bool = False) -> Subsets:
    """`subset` within each layer, by layer: "L0", "L1", ..., and of what is in none, such as the embedding, "". It is a
    mapping that can be drawn and saved.

    Raises: ValueError as of `subset`, and for a mediator that has places in several layers.

    >>> found = subsets("reviews-bert", "A wonderful film.", "A terrible film.", "POSITIVE", at="L*.attn.H*", k=1)
    >>> list(found)[:2], len(found["L0"].chosen)
    (['L0', 'L1'], 1)
    """
    choice = _Choice(how, k, toward, among, scale)
    asked = task(subject, base, counterfactual, outcome, keep=keep, spans=spans, align=align, prompt_only=prompt_only,
                 batch_size=batch_size)
    return Subsets(_by_group(asked, at, choice, _layers, out, show_progress))


@dataclass(frozen=True)
class _Choice:
    """How mediators are chosen; checks it."""

    how: str
    k: int
    toward: str
    among: int | None
    scale: str

    def __post_init__(self) -> None:
        if self.how not in HOW or self.toward not in TOWARD or self.scale not in SCALES:
            raise ValueError(f"mediators are chosen by {' or '.join(HOW)}, toward {', '.join(TOWARD)}, on the scale "
                             f"{' or '.join(SCALES)}; not {self.how!r}, {self.toward!r}, {self.scale!r}")
        if self.k < 1 or self.among is not None and self.among < 1:
            raise ValueError(f"k is {self.k} and among {self.among}; give at least 1")


def _by_group(asked: Task, at: At, choice: _Choice, groups: Callable[[Mapping[str, list[Spot]]], dict[
        str, dict[str, list[Spot]]]], out: str | PathLike | None, shown: bool) -> dict[str, Subset]:
    """The subset of each group of the mediators; a group without a name is alone, and has the folder for itself."""
    with ready(asked.subject.model):
        mediators = asked.mediators(at)
        found = groups(mediators)
        folder = lambda name: None if out is None else Path(out) / (name or "none") if len(found) > 1 else Path(out)
        if out is not None and len(found) > 1:
            _settled(Path(out), Measurement(asked, mediators), choice)
        total = sum(_steps(choice, len(one)) for one in found.values()) * len(asked.pieces) * len(asked.pairs)
        with progress(total, shown and os.environ.get("RANK", "0") == "0") as report:
            return {name: _chosen(asked, one, choice, folder(name), report) for name, one in found.items()}


def _settled(folder: Path, work: Measurement, choice: _Choice) -> None:
    """The folder made ready for this choice of any number of mediators.

    Raises: ValueError for a folder that holds something else.
    """
    crew = Crew.gathered(work.task.subject)
    about = {**config(work), "choice": {name: value for name, value in vars(choice).items() if name != "k"}}
    if crew.rank == 0:
        shard.settle(folder, about, what=WHAT)
    crew.wait()
    if crew.rank:
        shard.settle(folder, about, what=WHAT)


def _layers(mediators: Mapping[str, list[Spot]]) -> dict[str, dict[str, list[Spot]]]:
    found: dict[str, dict[str, list[Spot]]] = {}
    for name, spots in mediators.items():
        layers = {spot.site.address.layer for spot in spots}
        if len(layers) > 1:
            raise ValueError(f"{name} has places in {len(layers)} layers, so that it is in no layer; take subset(...)")
        layer = layers.pop()
        found.setdefault("" if layer is None else f"L{layer}", {})[name] = spots
    return found


def _steps(choice: _Choice, count: int) -> int:
    """How many sets are run."""
    k, tried = min(choice.k, count), min(choice.among or count, count)
    return count + 1 + (k if choice.how == "top-k" else sum(max(1, tried - i) for i in range(k)))


def _chosen(task: Task, mediators: dict[str, list[Spot]], choice: _Choice, out: Path | None, report: Report) -> Subset:
    names = tuple(mediators)
    if out is not None:
        _settled(out, Measurement(task, mediators), choice)
    run = partial(_joint, task, mediators, choice.scale, out, report)
    every = [list(range(len(names)))] if len(names) > 1 else []
    found, total = run("alone", [[one] for one in range(len(names))] + every, checked=True)
    alone, whole = found[:len(names)], found[-1]
    sign = {"up": 1, "down": -1, "total": 1 if float(total.mean()) >= 0 else -1}[choice.toward]
    ranked = (alone.mean(1) * sign).argsort(descending=True, stable=True).tolist()
    k = min(choice.k, len(names))
    if choice.how == "top-k":
        order, (joint, _) = ranked[:k], run(f"top-{k}", [ranked[:count] for count in range(1, k + 1)])
    else:
        order, joint = _greedy(lambda step, sets: run(f"greedy-{step:03d}", sets)[0], ranked[:choice.among], k, sign)
    return Subset(choice.how, tuple(names[one] for one in order), joint, names, alone, whole, total, choice.scale,
                  task.name, {**task.told, **scene(task), **grouped(task)})


def _joint(task: Task, mediators: Mapping[str, list[Spot]], scale: str, out: Path | None, report: Report, step: str,
           sets: Sequence[Sequence[int]], *, checked: bool = False) -> tuple[Tensor, Tensor]:
    """The effects of sets of mediators, by number, changed together, (S, B), and the total effect, (B,).

    Args: step: what the folder of these is called.
    """
    names = list(mediators)
    joined = {f"{len(chosen)} with {names[chosen[-1]]}": list(dict.fromkeys(
        spot for one in chosen for spot in mediators[names[one]])) for chosen in sets}
    found = measured(Measurement(task, joined), None if out is None else out / step, report=report)
    if checked:
        check_defined(task, found, scale)
    effects = Effects(tuple(joined), found["base"], found["counterfactual"], found["indirect_outcome"], None, None,
                      scale, task.outcome.name(task.subject))
    return effects.indirect, effects.total


def _greedy(run: Callable[[int, list[list[int]]], Tensor], candidates: Sequence[int], k: int, sign: int
            ) -> tuple[list[int], Tensor]:
    """The order in which mediators are taken, and the effects, (k, B), of the growing set."""
    order, joint = [], []
    for step in range(min(k, len(candidates))):
        left = [one for one in candidates if one not in order]
        tried = run(step + 1, [[*order, one] for one in left])
        best = int((tried.mean(1) * sign).argmax())
        order.append(left[best])
        joint.append(tried[best])
    return order, torch.stack(joint)
