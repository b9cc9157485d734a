"""Estimated effects as a value, and how well they agree with exact ones."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import Undefined
from .place import Place


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimated indirect effect of each of M mediators on each of B rows, `values` (B, M), unit of the outcome: what it
    would change by if the mediator alone took its value of the counterfactual run.

    `base` and `counterfactual` are the outcome of the two runs, (B,); their difference is the total effect.
    """

    method: str
    values: Tensor
    base: Tensor
    counterfactual: Tensor
    places: tuple[Place, ...]

    def __len__(self) -> int:
        return self.values.shape[1]

    @property
    def mean(self) -> Tensor:
        """Mean over rows, (M,)."""
        return self.values.mean(0)

    @property
    def addresses(self) -> list[str]:
        """Of every mediator, in order."""
        return [place.address(number) for place in self.places for number in range(place.count)]

    def address(self, mediator: int) -> str:
        """Of one mediator.

        Raises: IndexError for a number that there is not.
        """
        if not 0 <= mediator < len(self):
            raise IndexError(f"no mediator {mediator} of {len(self)}")
        ends = list(accumulate(place.count for place in self.places))
        which = bisect_right(ends, mediator)
        return self.places[which].address(mediator - ends[which] + self.places[which].count)

    def ranking(self, *, signed: bool = False) -> Tensor:
        """Numbers of the mediators from the largest mean effect to the smallest, by size or `signed`, (M,)."""
        mean = self.mean
        return (mean if signed else mean.abs()).argsort(descending=True, stable=True)

    def top(self, k: int, *, signed: bool = False) -> list[tuple[str, float]]:
        """Address and mean effect of the k first of the ranking."""
        return [(self.address(one), float(self.mean[one])) for one in self.ranking(signed=signed)[:k].tolist()]

    def agreement(self, exact: Mapping[str, float] | Tensor, *, k: int = 10) -> Agreement:
        """How well the means agree with exact effects, given by address, or of all mediators in order, (M,).

        Raises: ValueError for an address that is not among the mediators, or another number of effects.
        """
        if isinstance(exact, Tensor):
            return agreement(self.mean, exact, k=k)
        place = {address: number for number, address in enumerate(self.addresses)}
        unknown = next((address for address in exact if address not in place), None)
        if unknown is not None:
            raise ValueError(f"{unknown} is none of the {len(self)} mediators of the estimates")
        chosen = [place[address] for address in exact]
        return agreement(self.mean[chosen], torch.tensor(list(exact.values()), dtype=self.values.dtype), k=k)


@dataclass(frozen=True)
class Agreement:
    """Of estimates with exact effects over `count` mediators: the correlations of Pearson and Spearman (ties by their
    mean rank; NaN where either side is the same everywhere), and `recall`, the share of the k largest exact effects, by
    size, that are among the k largest estimates.
    """

    pearson: float
    spearman: float
    recall: float
    k: int
    count: int


def agreement(estimated: Tensor, exact: Tensor, *, k: int = 10) -> Agreement:
    """How well estimates agree with exact effects, both (M,).

    >>> agreement(torch.tensor([1.0, 2.0, -4.0]), torch.tensor([0.5, 1.0, -2.0]), k=1)
    Agreement(pearson=1.0, spearman=1.0, recall=1.0, k=1, count=3)

    Raises: ValueError for other shapes, or k below 1; Undefined for fewer than two mediators, or NaN or inf.
    """
    from scipy import stats

    if estimated.shape != exact.shape or estimated.dim() != 1 or k < 1:
        raise ValueError(f"estimates and exact effects of one number a mediator, and k of at least 1, not "
                         f"{tuple(estimated.shape)}, {tuple(exact.shape)} and {k}")
    if len(exact) < 2 or not (estimated.isfinite().all() and exact.isfinite().all()):
        raise Undefined(f"agreement is of at least two finite effects; there are {len(exact)}")
    a, b = (side.detach().cpu().double() for side in (estimated, exact))
    flat = bool((a == a[0]).all() or (b == b[0]).all())
    pearson, spearman = (torch.nan if flat else round(float(measure(a.numpy(), b.numpy()).statistic), 12)
                         for measure in (stats.pearsonr, stats.spearmanr))
    k = min(k, len(exact))
    both = set(a.abs().topk(k).indices.tolist()) & set(b.abs().topk(k).indices.tolist())
    return Agreement(pearson, spearman, len(both) / k, k, len(exact))
