"""A circuit from beginning to end: scored, narrowed, run alone, held against chance, and each part ablated in turn.

    >>> import torch, transformers
    >>> from relprop.circuit import Task
    >>> from relprop.circuit.study import study
    >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9, n_positions=8)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> task = Task("words", torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.tensor([[1, 4, 3], [3, 5, 1]]), metric=5)
    >>> found = study(model, task, method="random", size=2, randoms=5)
    >>> len(found.circuit), sorted(found.exact) == sorted(found.circuit)
    (2, True)

What the scores claim and what ablation finds are computed apart, and stand beside each other in the report.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import view
from ..mediation.scene import patterns, scene
from ..mediation.task import Task as Asking
from ..mediation.task import ready
from ..result import Circuit, Faithfulness
from ..result import study as result
from ..result.circuit import Item, owner
from ..subject import Subject
from ..view.save import checked as place
from ..view.save import drawn
from . import circuit as scored
from .evaluation import curve, faithfulness
from .run import outcomes
from .statistic import against_random, verdicts
from .task import Prepared, Task, posed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png", ".svg", ".pdf", ".json", ".csv", ".graphml", ".dot")
REACH = 0.95
"""Faithfulness that the circuit is to have, where no size is given."""
EACH, SPARSE = 200, 40
"""Items up to which every size is tried, and sizes that are tried of more."""
HEADS = 12
"""Heads of the circuit, at most, whose attention patterns are kept."""


class Study(result.Study):
    """`relprop.result.Study` with pictures, drawn from the numbers alone."""

    def show(self) -> Figure:
        """The circuit as a graph by layers, its faithfulness, and scores beside exact effects; see
        `relprop.view.wired`.
        """
        return view.wired(self)

    def save(self, path: str | PathLike) -> Path:
        """Writes the study as the suffix says: .html, a page that needs nothing else; .png, .svg, .pdf, a figure;
        .json, everything, for `Study.open`; .csv, the table; .graphml, .dot, the circuit as a graph.

        Raises: ValueError for another suffix; FileNotFoundError if the folder does not exist.
        """
        return drawn(self, checked(path), page=view.studied, data=super().save)


def study(subject: str | Subject | nn.Module | tuple, task: Task | str | Prepared, method: str = "cdt", *,
          level: str | Sequence[str] | None = None, ablation: str = "resample",
          options: Mapping[str, Any] | None = None, size: int | None = None, reach: float = REACH,
          absolute: bool = True, randoms: int = 200, tests: bool = False, batch_size: int | None = None,
          seed: int = 0, show_progress: bool = False) -> Study:
    """The circuit of a task, and what holds of it.

    Args:
        subject, task, method, level, ablation, options: as of `relprop.circuit`.
        size: how many items are kept, of the ranking. None: those that the method itself has chosen, as acdc does, and
            cdt with the option "discover"; of others as few of the ranking as have at least `reach` of faithfulness,
            or where no size that was tried has, all.
        absolute: rank by the size of the scores; see `Circuit.ranking`. randoms: circuits of equal size to hold it
            against; 0: none. tests: the hypothesis tests of Shi et al. 2024, too, which take long.
        batch_size: rows run at once. seed: of all that is drawn.
    Raises: ValueError for a size or a number of circuits that cannot be, for a circuit in which nothing is left, and
        as of `relprop.circuit`.
    """
    if randoms < 0 or not 0 < reach <= 1:
        raise ValueError(f"randoms is a number of circuits, 0 or more, and reach a share of what the whole model does, "
                         f"above 0 and up to 1; got {randoms} and {reach}")
    prepared = posed(subject, task, seed=seed)
    shared = {"batch_size": batch_size, "seed": seed}
    found = scored(prepared.subject, prepared, method, level=level, ablation=ablation, options=options,
                   show_progress=show_progress, **shared)
    over = curve(prepared.subject, prepared, found, fractions=_fractions(len(found.scores)), absolute=absolute,
                 ablation=ablation, **shared)
    kept = narrowed(found, over, size=size, reach=reach, absolute=absolute)
    alone = faithfulness(prepared.subject, prepared, kept, ablation=ablation, **shared)
    return Study(kept, over, alone, exact(prepared, kept, ablation, batch_size=batch_size),
                 _chance(prepared, kept, randoms, **shared), _tests(prepared, kept, tests, **shared),
                 _scene(prepared, kept))


def narrowed(found: Circuit, over: Faithfulness, *, size: int | None = None, reach: float = REACH,
             absolute: bool = True) -> Circuit:
    """The circuit of a size, or the one that the method has chosen, or the smallest on the curve that reaches so much
    faithfulness; pruned.

    Raises: ValueError for a size that leaves nothing out or nothing in.
    """
    count = len(found.scores)
    if size is not None and not 0 < size < count:
        raise ValueError(f"a circuit of {size} of {count} {found.noun} leaves nothing {'in' if size <= 0 else 'out'}; "
                         f"give a size from 1 to {count - 1}")
    if size is None and len(found) == count:
        enough = [share for share, reached in zip(over.fractions.tolist(), over.share.tolist()) if reached >= reach]
        size = round(min(enough, default=1.0) * count)
    kept = (found if size is None else found.top(size, absolute=absolute)).prune()
    if not len(kept):
        raise ValueError(f"of the {found.noun} that {found.method} ranks highest none is on a way from the input to "
                         "the logits, so that the circuit is empty; keep more of them")
    return kept


def exact(task: Prepared, found: Circuit, ablation: str, *, batch_size: int | None = None) -> dict[Item, float]:
    """Of each kept item, the change of the metric's mean when it alone is ablated in the whole model."""
    items, own = list(found.scores), list(found)
    if not own:
        return {}
    without = [frozenset(items) - {item} for item in own]
    values = outcomes(task, [*without, items], among=items, ablation=ablation, batch_size=batch_size).mean(1)
    return dict(zip(own, (values[:-1] - values[-1]).tolist()))


def checked(path: str | PathLike) -> Path:
    """The path, if a study can be saved there; raises as `relprop.view.save.checked`."""
    return place(path, SUFFIXES, refused="cannot write a circuit to {name}; it is written to {suffixes}")


def _fractions(count: int) -> Sequence[float] | str:
    """Sizes at which faithfulness is measured: each, or rising ever faster."""
    if count <= EACH:
        return "all"
    sizes = {0, *(round(math.exp(step / (SPARSE - 1) * math.log(count))) for step in range(SPARSE)), count}
    return [size / count for size in sorted(sizes)]


def _chance(task: Prepared, found: Circuit, count: int, **shared: Any) -> dict[str, Any] | None:
    if not count or not 0 < len(found) < len(found.scores):
        return None
    one = against_random(task.subject, task, found, count=count, **shared)
    return {"value": one.value, "beaten": one.beaten, "low": one.low, "high": one.high, "p": one.p, "count": count,
            "random": one.random.tolist()}


def _tests(task: Prepared, found: Circuit, wanted: bool, **shared: Any) -> list[dict] | None:
    if not wanted:
        return None
    frame = verdicts(task.subject, task, found, **shared)
    frame = frame.astype(object).where(frame.notna(), None)
    return frame.reset_index().to_dict("records")


def _scene(task: Prepared, found: Circuit) -> dict[str, Any]:
    """The first example, and what the strongest heads of the circuit attend to in it."""
    asking = Asking(task.subject, task.clean, task.corrupted, task.outcome, [task.questions], torch.arange(task.rows))
    with ready(task.model):
        seen = patterns(asking, strongest(found), most=HEADS)
    return {**scene(asking), **({"patterns": seen} if seen else {})}


def strongest(found: Circuit) -> list[str]:
    """The nodes of a circuit, that of the largest score first; of edges by the sum of those that touch them."""
    if not found.edges:
        return [node for node in found.ranking() if node in found.kept]
    weight: dict[str, float] = {}
    for u, v in found:
        for node in (u, owner(v)):
            weight[node] = weight.get(node, 0.0) + abs(found.edges[u, v])
    return sorted(weight, key=weight.get, reverse=True)


__all__ = ["REACH", "SUFFIXES", "Study", "checked", "exact", "narrowed", "strongest", "study"]
