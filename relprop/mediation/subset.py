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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..address import Spans
from ..intervene import Spot
from ..result.effects import SCALES, Effects
from ..subject import Subject
from .finding import Subset, Subsets
from .measurement import check_defined, progress
from .scene import scene
from .task import At, Found, Report, Task, ready, task

HOW = ("greedy", "top-k")
TOWARD = ("total", "up", "down")


def subset(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object, outcome: object = None, *,
           at: At = "L*.attn.H*", how: str = "greedy", k: int = 10, toward: str = "total", among: int | None = None,
           scale: str = "difference", keep: Tensor | None = None, spans: Spans | None = None,
           prompt_only: bool = False, batch_size: int | None = None, show_progress: bool = False) -> Subset:
    """At most k of the mediators that change the outcome most together.

    Args:
        at: the mediators to choose among, as of `effects`: heads, neurons, sets of places.
        how: "top-k", those of the largest mean effects alone; "greedy", at each step the one with which the mean
            effect of the set is largest.
        toward: what is a large effect: one of the sign of the mean "total" effect, "up" or "down".
        among: for "greedy", try only so many that have the largest effects alone; None: all.
        scale, keep, spans, prompt_only, batch_size: as of `effects`.
    Cost: that of `effects`, and for "greedy" that many times k.
    Raises: ValueError as of `effects`, and for an unknown `how` or `toward`; Undefined as of `effects`.
    """
    return _by_group(lambda mediators: {"": mediators}, subject, base, counterfactual, outcome, at,
                     _Choice(how, k, toward, among, scale), keep, spans, prompt_only, batch_size, show_progress)[""]


def subsets(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object, outcome: object = None, *,
            at: At = "L*.attn.H*", how: str = "greedy", k: int = 10, toward: str = "total", among: int | None = None,
            scale: str = "difference", keep: Tensor | None = None, spans: Spans | None = None,
            prompt_only: bool = False, batch_size: int | None = None, show_progress: bool = False
            ) -> Subsets:
    """`subset` within each layer, by layer: "L0", "L1", ..., and of what is in none, such as the embedding, "". It is a
    mapping that can be drawn and saved.

    Raises: ValueError as of `subset`, and for a mediator that has places in several layers.
    """
    return Subsets(_by_group(_layers, subject, base, counterfactual, outcome, at, _Choice(how, k, toward, among, scale),
                             keep, spans, prompt_only, batch_size, show_progress))


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


def _by_group(groups: Callable[[Mapping[str, list[Spot]]], dict[str, dict[str, list[Spot]]]], subject: object,
              base: object, counterfactual: object, outcome: object, at: At, choice: _Choice, keep: Tensor | None,
              spans: Spans | None, prompt_only: bool, batch_size: int | None, show_progress: bool
              ) -> dict[str, Subset]:
    asked = task(subject, base, counterfactual, outcome, keep=keep, spans=spans, prompt_only=prompt_only,
                 batch_size=batch_size)
    with ready(asked.subject.model):
        found = groups(asked.mediators(at))
        total = sum(_steps(choice, len(one)) for one in found.values()) * len(asked.pieces) * len(asked.pairs)
        with progress(total, show_progress) as report:
            return {name: _chosen(asked, one, choice, report) for name, one in found.items()}


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


def _chosen(task: Task, mediators: dict[str, list[Spot]], choice: _Choice, report: Report) -> Subset:
    names = tuple(mediators)
    every = list(dict.fromkeys(spot for spots in mediators.values() for spot in spots))
    found = task.indirect([*mediators.values(), every], report)
    check_defined(task, found, choice.scale)
    effects = _effects(found, choice.scale, task)
    alone, whole = effects.indirect[:-1], effects.indirect[-1]
    sign = {"up": 1, "down": -1, "total": 1 if float(effects.total.mean()) >= 0 else -1}[choice.toward]
    ranked = (alone.mean(1) * sign).argsort(descending=True, stable=True).tolist()
    k = min(choice.k, len(names))
    run = lambda sets: _effects(task.indirect([_union(mediators, names, one) for one in sets], report), choice.scale,
                                task).indirect
    if choice.how == "top-k":
        order, joint = ranked[:k], run([ranked[:count] for count in range(1, k + 1)])
    else:
        order, joint = _greedy(run, ranked[:choice.among], k, sign)
    return Subset(choice.how, tuple(names[one] for one in order), joint, names, alone, whole, effects.total,
                  choice.scale, task.outcome.name(task.subject), {"model": task.subject.name, **scene(task)})


def _greedy(run: Callable[[list[list[int]]], Tensor], candidates: Sequence[int], k: int, sign: int
            ) -> tuple[list[int], Tensor]:
    """The order in which mediators are taken, and the effects, (k, B), of the growing set."""
    order, joint = [], []
    for _ in range(min(k, len(candidates))):
        left = [one for one in candidates if one not in order]
        tried = run([[*order, one] for one in left])
        best = int((tried.mean(1) * sign).argmax())
        order.append(left[best])
        joint.append(tried[best])
    return order, torch.stack(joint)


def _union(mediators: Mapping[str, list[Spot]], names: Sequence[str], chosen: Sequence[int]) -> list[Spot]:
    """The places of several mediators, each once."""
    return list(dict.fromkeys(spot for one in chosen for spot in mediators[names[one]]))


def _effects(found: Found, scale: str, task: Task) -> Effects:
    names = tuple(map(str, range(len(found["indirect"]))))
    return Effects(names, found["base"], found["counterfactual"], found["indirect"], None, None, scale,
                   task.outcome.name(task.subject))
