"""Scores of nodes: what a node changes by when it is ablated, times what the metric changes by per unit of it.

S(u) = sum of d_u . dm/da_u over the positions that count (Nanda 2023; Kramar et al. 2024, AtP*, eq. 4). It is the sum
of the scores of the edges that leave u. What is counted at a position comes from the same passes as the whole.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..approximation.place import Place, places
from ..approximation.run import Query, Run, Slopes
from ..composite import Composite
from ..intervene import Site, parts
from ..tokens import Batch
from ..trace import Tap, intercepted
from .ablated import Values, ablated
from .record import graphed
from .task import Prepared

ROWS = 32
"""Rows that are run together."""


class Estimation(Run):
    """The estimates of some rows of a task as they are made; `gone` are the values that take the place of the clean
    ones, where they are no other run's and not zero.
    """

    def __init__(self, task: Prepared, known: Any, wanted: list[str | Site], *, ablation: str, gone: Values | None,
                 moved: bool = False, side: int = 0) -> None:
        self.gone = gone
        batches = (task.clean, task.corrupted)

        def read(side: int) -> Callable[[Any, Tensor], Tensor]:
            def answer(output: Any, index: Tensor) -> Tensor:
                with torch._C.DisableTorchFunction():  # rules are of the model's calls, not of the metric's
                    return task.value(output, index.tolist(), side=side)

            return answer

        other = batches[1 - side] if ablation == "resample" else None
        query = Query(batches[side], other, read(side), there=None if other is None else read(1 - side))
        super().__init__(task.model, known, [query], lambda answers: answers[0], wanted, positions=task.places,
                         moved=moved)

    def _change(self, which: int, tap: Tap) -> Tensor:
        if self.gone is None:
            return super()._change(which, tap)
        return self.gone[tap] - self.now[which][tap]

    def _moved(self, which: int, point: float, taps: list[Tap]) -> tuple[dict[Tap, Tensor], Batch | None]:
        """Along the inputs it is the embedding that moves, of patches as well, as it does for edges."""
        embed = self.known.embed
        if not self.moved or embed is None:
            return super()._moved(which, point, taps)
        return {embed: self._as_the_model_has_it(which, embed, point * self._change(which, embed))}, None


Estimate = Callable[[Callable[..., Estimation]], tuple[Estimation, Slopes]]
"""From a maker of estimations of some rows to the one whose values count and the slopes there."""


def scores(task: Prepared, level: Any, ablation: str, estimate: Estimate, *, moved: bool = False,
           batch_size: int | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """The score of each node of a level, a mean over rows, and the metric's means on "clean" and, where they were run,
    "corrupted" inputs.
    """
    first = task.clean.take([0])
    known = parts(task.model, first.args, first.kwargs)
    wanted = _wanted(task, known, level)
    gone = None
    if ablation not in ("resample", "zero"):
        taps = [place.tap for site in wanted for place in places(known, site)]
        gone = ablated(task, taps + ([known.embed] if moved else []), ablation)
    total: Tensor | float = 0.0
    metric = torch.zeros(2, dtype=torch.float64)
    with graphed(task):
        for rows in torch.arange(task.rows).split(batch_size or ROWS):
            some = task.take(rows)
            mine = gone and {tap: value[rows.to(value.device)] for tap, value in gone.items()}
            run, slopes = estimate(partial(Estimation, some, known, wanted, ablation=ablation, gone=mine, moved=moved))
            total = total + run.scored(slopes, prompt_only=False).double().sum(0)
            metric = metric + torch.stack([one.double().sum() for one in run.outcomes()])
            found = run.places
    names = [place.address(number) for place in found for number in range(place.count)]
    order = sorted(range(len(names)), key=[_order(place) for place in found for _ in range(place.count)].__getitem__)
    values = (total / task.rows).tolist()
    means = (metric / task.rows).tolist()
    known_means = {name: mean for name, mean in zip(("clean", "corrupted"), means) if mean == mean}
    return {names[i]: values[i] for i in order}, known_means if len(known_means) == 2 else {}


def at_clean(make: Callable[..., Estimation]) -> tuple[Estimation, Slopes]:
    """The gradient at the clean inputs."""
    run = make()
    return run, run.gradients()


def by_rules(rules: Composite, make: Callable[..., Estimation]) -> tuple[Estimation, Slopes]:
    """Relevance per unit at the clean inputs: the gradient of a pass under the rules. Rows whose metric depends on
    nothing have none of it.
    """
    run = make()
    with intercepted(run.model, rules):
        return run, run.gradients()


def on_the_way(points: Tensor, make: Callable[..., Estimation]) -> tuple[Estimation, Slopes]:
    """The mean gradient at places from clean to corrupted, of the inputs or of each tap in turn."""
    run = make()
    return run, run.integrated(points, torch.full_like(points, 1 / len(points)))


def at_both(make: Callable[..., Estimation]) -> tuple[Estimation, Slopes]:
    """The mean of the gradients at the clean and at the corrupted inputs."""
    run = make()
    slopes, others = run.gradients(), make(side=1).gradients()
    return run, [{tap: (g + there[tap]) / 2 for tap, g in here.items()} for here, there in zip(slopes, others)]


def _wanted(task: Prepared, known: Any, level: Any) -> list[Site]:
    """The sites of a level that the model has."""
    found, missing = [], None
    for pattern in task.patterns(level):
        site = Site.parse(pattern)
        try:
            list(places(known, site))
        except ValueError as cause:
            if not isinstance(level, str):
                raise
            missing = cause
        else:
            found.append(site)
    if not found:
        raise ValueError(f"{task.subject.name} has no {level}: {missing}") from missing
    return found


def _order(place: Place) -> tuple[int, str]:
    address = place.site.address
    return -1 if address.layer is None else address.layer, address.part


__all__ = ["Estimate", "Estimation", "at_both", "at_clean", "by_rules", "on_the_way", "scores"]
