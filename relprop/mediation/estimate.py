"""Which mediators are worth an exact run: all are ranked by a first-order estimate, and the ranking is tested."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..approximation import METHODS, Estimates, Query, agreement, estimated
from ..errors import Undefined
from ..intervene import Spot
from .counterpart import counterpart, take
from .memory import Found, out_of_memory
from .outcome import Question
from .stage import read
from .task import Task, spanned

VERIFIED = 20  # mediators that are recomputed where nothing else is said


@dataclass(frozen=True, eq=False)
class Ranking:
    """Mediators by their estimated mean effect, `mean` (M,). `first` are the numbers of the `verified` largest, and
    `drawn` those of as many of the rest, at random: how well the estimate ranks cannot be told from the first alone.
    """

    method: str
    mediators: tuple[str, ...]
    mean: Tensor
    first: list[int]
    drawn: list[int]

    @property
    def chosen(self) -> list[str]:
        """The mediators that are to be recomputed, those of the first before those drawn."""
        return [self.mediators[one] for one in (*self.first, *self.drawn)]

    def split(self, found: Found) -> Found:
        """What was found of the first alone."""
        k = len(self.first)
        return {name: value[..., :k, :] if value.dim() > 1 else value for name, value in found.items()}

    def told(self, exact: Tensor) -> dict:
        """What is reported, as plain data: the estimate of every mediator, and its agreement with the exact mean
        effects, (M',), of those `chosen`: correlations of Pearson and Spearman, None where undefined, and the recall at
        k, the share of the k largest of them that the estimate has among its k largest.
        """
        said = {"method": self.method, "count": len(self.mediators), "verified": len(self.first),
                "drawn": len(self.drawn), "mean": dict(zip(self.mediators, self.mean.tolist(), strict=True))}
        if len(exact) > 1:
            k = len(self.first) if self.drawn else min(10, len(exact))
            found = agreement(self.mean[[*self.first, *self.drawn]], exact, k=k)
            plain = lambda value: value if isfinite(value) else None
            said |= {"pearson": plain(found.pearson), "spearman": plain(found.spearman), "recall": found.recall,
                     "k": found.k}
        return said


def checked_estimate(estimate: str | None, verify: int | None, kinds: tuple[str, ...]) -> int:
    """How many mediators to recompute.

    Raises: ValueError for an unknown method, a number below one or without a method, or no indirect effect asked for.
    """
    if estimate is None:
        if verify is not None:
            raise ValueError(f"verify={verify} recomputes the first of a ranking; give estimate=, one of "
                             f"{', '.join(METHODS)}")
        return 0
    if estimate not in METHODS:
        raise ValueError(f"an estimate is one of {', '.join(METHODS)}, not {estimate!r}")
    if "indirect" not in kinds:
        raise ValueError('estimates are of indirect effects; ask for them, kind=["total", "indirect"]')
    verify = VERIFIED if verify is None else verify
    if verify < 1:
        raise ValueError(f"verify is {verify}; give at least 1")
    return verify


def ranking(task: Task, mediators: Mapping[str, list[Spot]], method: str, *, verify: int, scale: str, seed: int
            ) -> Ranking:
    """Every mediator ranked; the estimate of a set is the sum over its places, as to first order it is.

    Raises: Undefined if the estimate is zero everywhere, as of a divergence from the base run, flat there; ValueError
        for aligned inputs of an encoder with a decoder, whose positions are not all the encoder's.
    """
    if task.align is not None and "decoder_input_ids" in task.base.kwargs:
        raise ValueError(f"{method} does not estimate effects of aligned inputs in an encoder with a decoder; take "
                         "estimate=None, or pairs of as many tokens")
    sites = list(dict.fromkeys(str(spot.site) for spots in mediators.values() for spot in spots))
    found = _halving(len(task.pieces[0]), lambda size: estimated(task.subject.model, queries(task), lambda answers:
        task.outcome.value([one.double() for one in answers]), at=sites, method=method, prompt_only=task.prompt_only,
        spans=spanned(task.spans, task.rows), batch_size=size))
    values = found.values.double() / (found.base.double()[:, None] if scale == "ratio" else 1)
    place = {address: number for number, address in enumerate(found.addresses)}
    mean = values.mean(0)
    each = torch.stack([mean[[place[name] for name in dict.fromkeys(str(spot.site) for spot in spots)]].sum()
                        for spots in mediators.values()])
    size = max(float(one.abs().max()) for one in (found.base, found.counterfactual))
    if not bool((found.values.abs() > 4 * torch.finfo(task.subject.dtype).eps * size).any()):
        raise Undefined(f"the outcome has no slope at the base, so that {method} estimates every effect as zero; take "
                        "estimate=None, or 'integrated-gradients'")
    order = each.abs().argsort(descending=True, stable=True).tolist()
    rest = order[verify:]
    picked = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:verify].tolist()
    return Ranking(method, tuple(mediators), each, order[:verify], [rest[one] for one in picked])


def queries(task: Task) -> list[Query]:
    """The questions of a task's outcome, as the estimates ask them."""
    pairs = [tuple(one.take(task.rows) for one in pair) for pair in task.pairs]
    lists = take(task.align, task.rows)
    return [Query(base.batch, other.batch, _answer(base), None if lists is None else counterpart(base, other, lists).at,
                  base.prompt, _answer(other)) for base, other in pairs]


def _halving(size: int, run: Callable[[int], Estimates]) -> Estimates:
    """What `run` gives with so many rows at once, half as many where memory runs out."""
    while True:
        try:
            return run(size)
        except Exception as error:
            if size == 1 or not out_of_memory(error):
                raise
        size //= 2


def _answer(question: Question) -> Callable[[Any, Tensor], Tensor]:
    def answer(output: Any, rows: Tensor) -> Tensor:
        return read(question, output, None if question.at is None else question.at[rows], rows=rows.tolist())

    return answer
