"""CD-T: nodes scored by contextual decomposition, from the output back to the input (Hsu et al. 2024).

Each node is a source: what stands there less what the ablation puts there is relevant. Round 0 scores all nodes by what
they make up of the metric, and keeps a few; each later round scores them by what they make up of the nodes kept in the
round before, until those are in the first layer. The circuit is all that was kept.

A score of the circuit is that of round 0, with the sign of all methods: the change of the metric if the node's clean
value is replaced, which is minus what the node makes up. Cost: a round is a forward pass with a shadow for each 64
nodes x rows, each about 0.2 to 0.9 plain forwards of 64 rows; batched exact ablation of the same nodes costs about the
same and is exact, attribution patching three passes in all.

Reference: A. Hsu et al., "Efficient automated circuit discovery in transformers using contextual decomposition", ICLR
2025 (arXiv 2407.00886), and its code, github.com/adelaidehsu/CD_Circuit.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import division
from ..address import INPUTS, Address
from ..data import Pairs
from ..decompose import Run, Source
from ..division import Division
from ..intervene import Intervention, Resample, Zero
from ..intervene.inputs import arguments
from ..mediation import KL
from ..mediation.task import ready
from ..result import Circuit
from ..result.decomposition import Part
from ..subject import Subject
from ..target import logits
from . import evaluation
from .ablated import ablated
from .task import Prepared, Task, check_ablation, posed

SCORES = ("dot", "l1")
NORMALIZED = ("magnitude", "net", "signed")
THROUGH = ("output", *INPUTS)
METRIC = ("relevant", "difference")

Level = str | Sequence[str]


@dataclass(frozen=True)
class Round:
    """One round: what nodes were scored against (nothing: the metric), every node's score, and those kept, best first.

    A score is what the node makes up: of the metric, in its unit; of targets as `Search.score` says.
    """

    targets: tuple[str, ...]
    scores: dict[str, float]
    kept: tuple[str, ...]


def cdt(prepared: Prepared, *, level: Level = "heads", ablation: str = "mean by position",
        batch_size: int | None = None, discover: bool = False, rules: str | Division = "cdt", keep: int = 2,
        rounds: int | None = None, score: str = "dot", normalize: str | None = "magnitude",
        through: str | Sequence[str] = "output", metric: str = "relevant") -> Circuit:
    """Every node with what it makes up of the metric, and with `discover` the circuit that the rounds find kept.

    Args:
        discover: search back from the output; else only round 0 is run, and all nodes are kept.
        rules: of `relprop.division`; "cdt" is the published one. keep: nodes kept in a round (2 in the original).
        rounds: at most so many; None: until all that a round keeps is in the first layer.
        score: of a node against targets, "dot", <rel, z - mean z> (the original's for IOI), or "l1", mean |rel| /
            (mean |rel| + mean |irrel|). normalize: scores against targets over those of a layer: "magnitude", the sum
            of |score| (docstring), "net", |sum| (greater-than), "signed", the sum (IOI: a layer of negative sum turns
            round), None. through: what of a target counts: "output", its value, or "q", "k", "v", one or several.
        metric: "relevant", the metric of the relevant logits (the original's), or "difference", what it loses without
            them, for metrics of which that says nothing, as KL.
    Raises: ValueError for an unknown choice, or a level without nodes.
    """
    search = Search(prepared, level, ablation, division.get(rules), keep, score, normalize, _several(through), metric,
                    batch_size)
    with ready(prepared.model):
        found = search.rounds(rounds) if discover else [search.first()]
    kept = [name for one in found for name in one.kept] if discover else None
    about = {"rules": search.rules.describe(), "forwards": search.run.forwards}
    if discover:
        about |= {"keep": keep, "score": score, "normalize": normalize, "through": list(search.through),
                  "rounds": [{"targets": list(one.targets), "kept": list(one.kept)} for one in found]}
    return Circuit.of({name: -value for name, value in found[0].scores.items()},
                      level=level if isinstance(level, str) else "nodes", method="cdt", kept=kept, about=about)


class Search:
    """A search for a task's circuit; arguments as of `cdt`."""

    def __init__(self, prepared: Prepared, level: Level, ablation: str, rules: Division, keep: int = 2,
                 score: str = "dot", normalize: str | None = "magnitude", through: Sequence[str] = ("output",),
                 metric: str = "relevant", chunk: int | None = None) -> None:
        _check(keep, score, normalize, through, metric)
        self.prepared, self.rules, self.keep, self.score = prepared, rules, keep, score
        self.normalize, self.through, self.metric, self.ablation = normalize, tuple(through), metric, ablation
        batch = prepared.clean
        one: Intervention = Zero() if ablation == "zero" else Resample(prepared.corrupted)
        self.run = Run(prepared.model, batch.args, batch.kwargs, rules, one, prepared.task.spans, chunk=chunk)
        names = list(prepared.nodes(level))
        self.sources = [Source(name, tuple(place for _, place in self.run.placing.places(name))) for name in names]
        taps = [tap for source in self.sources for tap in source.taps]
        if ablation != "zero":
            self.run.there |= ablated(prepared, taps, check_ablation(ablation))
        self._means: dict[str, Tensor] = {}

    def first(self) -> Round:
        """Round 0: what each node makes up of the metric, mean over the rows."""
        scores = self._of_metric().mean(1)
        return self._round((), scores)

    def rounds(self, most: int | None = None) -> list[Round]:
        """All rounds, until the nodes kept are in the first layer, `most` of them have been made, or a round finds
        nothing that reaches its targets.
        """
        found = [self.first()]
        while (most is None or len(found) < most) and any(_layer(name) for name in found[-1].kept):
            following = self.against(found[-1].kept)
            if not following.kept or following.kept == found[-1].kept:
                break
            found.append(following)
        return found

    def against(self, targets: Sequence[str]) -> Round:
        """A round: what each node makes up of these nodes."""
        looks = {f"{target} {inner}": place for target in targets for inner in self.through
                 for _, place in self.run.placing.places(_inside(target, inner))}
        parts = self.run.of(self.sources, None, looks).at
        raw = sum(self._one(name, part) for name, part in parts.items())
        raw[[source.name in targets for source in self.sources]] = 0  # a target makes up itself
        return self._round(tuple(targets), by_layer(raw, [_layer(source.name) for source in self.sources],
                                                    self.normalize))

    def _round(self, targets: tuple[str, ...], scores: Tensor) -> Round:
        named = dict(zip([source.name for source in self.sources], scores.tolist(), strict=True))
        best = sorted(named, key=named.get, reverse=True)[:self.keep]
        return Round(targets, named, tuple(name for name in best if named[name] != 0))

    def _one(self, name: str, part: Part) -> Tensor:
        """The score of every source against one target, (S,)."""
        if self.score == "l1":
            return l1(part)
        return dot(part, self._mean(name, part))

    def _mean(self, name: str, part: Part) -> Tensor:
        """What the ablation has at a target, (B, P, W)."""
        if self.ablation == "zero":
            return torch.zeros_like(part.total)
        if name not in self._means:
            self._means[name] = self._reference(name)
        return self._means[name]

    def _reference(self, name: str) -> Tensor:
        target, _, inner = name.rpartition(" ")
        (_, place), = self.run.placing.places(_inside(target, inner))
        if inner == "output":
            found: dict[str, Part] = {}
            value = ablated(self.prepared, [place.tap], self.ablation)[place.tap]
            self.run.placing.look({name: place}, found, canonical=True)(value, None)
            return found[name].total
        batch = self.prepared.corrupted if self.ablation == "resample" else self.prepared.reference
        args, kwargs = arguments(batch)
        rules = replace(self.rules, whole=True)
        other = Run(self.prepared.model, args, kwargs, rules, spans=self.run.spans, known=self.run.known)
        total = other.of([replace(self.sources[0], places=())], None, {name: place}).at[name].total
        return total if self.ablation == "resample" else total.mean(0, keepdim=True)

    def _of_metric(self) -> Tensor:
        """What each node makes up of the metric, (S, B)."""
        prepared, question = self.prepared, self.prepared.questions[0]
        if self.metric == "difference" or question.at is None or isinstance(prepared.outcome, KL):
            return self.run.of(self.sources, prepared.value).rel
        rows = torch.arange(prepared.rows)

        def answered(output: Any) -> Tensor:
            z = logits(output)
            z = z[rows[:, None].to(z.device), question.at.to(z.device)]  # (B, P, V)
            return z if question.tokens is None else z[..., question.tokens.to(z.device)]

        def measured(rel: Tensor) -> Tensor:
            return torch.stack([prepared.outcome.value([question.answer(one, rows)]) for one in rel])

        return self.run.of(self.sources, answered, finish=measured).rel


def pruned(subject: str | Subject | nn.Module | tuple, task: Task | Pairs | str | Prepared, circuit: Circuit, *,
           protected: Collection[str] = (), ablation: str | None = None, batch_size: int | None = None,
           down: bool = False) -> Circuit:
    """The circuit without the nodes that it does better without: again and again the one whose loss raises the metric
    most, until none does (Hsu et al. 2024, their code).

    Args: protected: nodes that stay. ablation: None: that of the circuit. down: the task's metric is to be low.
    Cost: a pass of the whole model for each node and each node lost.
    """
    prepared = posed(subject, task)
    items, ablation = evaluation.common([circuit], ablation)
    kept, sign = list(circuit), -1 if down else 1
    (best,), _, _ = evaluation.run(prepared, [kept], items, ablation, batch_size)
    best = sign * float(best.mean())
    while droppable := [item for item in kept if item not in protected]:
        without = [[one for one in kept if one != item] for item in droppable]
        found = sign * evaluation.run(prepared, without, items, ablation, batch_size)[0].mean(1)
        if not float(found.max()) > best:
            break
        best, kept = float(found.max()), without[int(found.argmax())]
    return circuit.keep(kept)


# -- scores ------------------------------------------------------------------------------------------------------------

def dot(part: Part, mean: Tensor) -> Tensor:
    """<rel, z - mean z> at a target, mean over rows and summed over positions, (S,). Args: mean: (B or 1, P, W)."""
    return (part.rel * (part.total - mean)).sum((-1, -2)).mean(1)


def l1(part: Part) -> Tensor:
    """mean |rel| / (mean |rel| + mean |irrel|), means over rows and entries, summed over a target's positions, (S,)."""
    rel, irrel = (t.abs().mean((1, 3)) for t in (part.rel, part.irrel))  # (S, P)
    return (rel / (rel + irrel).clamp_min(torch.finfo(rel.dtype).tiny)).sum(1)


def by_layer(scores: Tensor, layers: Sequence[int], how: str | None) -> Tensor:
    """Scores over those of their layer, of `NORMALIZED`; where that is nothing, over -1e-8, as in the original's code.

    >>> by_layer(torch.tensor([1.0, -3.0, 2.0]), [0, 0, 1], "magnitude").tolist()
    [0.25, -0.75, 1.0]
    """
    if how is None:
        return scores
    index = torch.tensor(layers)
    total = scores.new_zeros(int(index.max()) + 1).index_add_(0, index, scores.abs() if how == "magnitude" else scores)
    total = total.abs() if how == "net" else total
    return scores / torch.where(total == 0, -1e-8, total)[index]


def _layer(name: str) -> int:
    return Address.parse(name).layer or 0


def _inside(target: str, inner: str) -> Address:
    address = Address.parse(target)
    return address if inner == "output" else replace(address, inner=inner)


def _several(through: str | Sequence[str]) -> tuple[str, ...]:
    return (through,) if isinstance(through, str) else tuple(through)


def _check(keep: int, score: str, normalize: str | None, through: Sequence[str], metric: str) -> None:
    if keep < 1:
        raise ValueError(f"a round keeps at least one node, not {keep}")
    choices: list[tuple[str, Collection[Any], Sequence[Any]]] = [
        ("score", SCORES, [score]), ("normalize", (*NORMALIZED, None), [normalize]), ("through", THROUGH, through),
        ("metric", METRIC, [metric])]
    for name, known, given in choices:
        wrong = [one for one in given if one not in known]
        if wrong or not given:
            raise ValueError(f"{name} is of {', '.join(map(str, known))}, got {wrong[0] if wrong else 'nothing'!r}")


__all__ = ["METRIC", "NORMALIZED", "SCORES", "THROUGH", "Round", "Search", "by_layer", "cdt", "dot", "l1", "pruned"]
