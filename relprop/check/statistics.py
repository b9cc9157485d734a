"""Orders, areas, p-values and intervals: what turns curves into a statement about a map. Plain functions of tensors.

References: R. Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers", ICML 2024;
B. Phipson and G. Smyth, "Permutation P-values Should Never Be Zero", SAGMB 9(1), 2010; S. Holm, "A Simple Sequentially
Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6(2), 1979.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import Undefined

LEVEL = 0.95  # of an interval
RESAMPLES = 9999  # of a bootstrap


def told(relevance: Tensor) -> Tensor:
    """The map, if it says anything: the door of every measure of it.

    Raises: Undefined for a map that holds NaN or inf, is empty, or is constant over more than one unit: nothing to
        rank.

    >>> told(torch.zeros(3))
    Traceback (most recent call last):
    relprop.errors.Undefined: the map is 0 on all 3 units: there is nothing to rank
    """
    if not relevance.numel():
        raise Undefined("the map has no units: there is nothing to rank")
    if not relevance.isfinite().all():
        raise Undefined("the map holds NaN or inf, so its units cannot be ranked")
    first = relevance.flatten()[0]
    if relevance.numel() > 1 and (relevance == first).all():
        raise Undefined(f"the map is {first.item():g} on all {relevance.numel()} units: there is nothing to rank")
    return relevance


def order(relevance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Units from most to least relevant, ties in random order.

    Random, because units are numbered by their place: ties left as they are would rank by place, and a map that says
    nothing could score by it.

    Args: relevance: of each unit, (U,), any unit. generator: of the ties; one permutation is drawn whether there are
        ties or not.
    Returns: indices of the units, int64, (U,).
    Raises: Undefined as of `told`.

    >>> order(torch.tensor([0.1, 3.0, -2.0]))
    tensor([1, 0, 2])
    """
    if relevance.ndim != 1:
        raise ValueError(f"expected the relevance of one row's units, (U,), got {tuple(relevance.shape)}")
    told(relevance)
    shuffled = torch.randperm(len(relevance), generator=generator).to(relevance.device)
    return shuffled[relevance[shuffled].argsort(descending=True, stable=True)]


def area(fractions: Tensor, morf: Tensor, lerf: Tensor) -> Tensor:
    """Area between the curves, positive for a faithful map: mean over fractions of LeRF minus MoRF, by the trapezoid
    rule.

    int_0^1 (lerf(f) - morf(f)) df, the area of Achtibat et al. 2024 per unit of removed fraction instead of per
    number of steps, so that it has the target's unit and does not depend on the number of steps.

    Args: fractions: removed, rising from 0 to 1, (F,). morf, lerf: target after removing the most, or the least,
        relevant first, (..., F).
    Returns: areas, (...,), unit of the target.
    """
    return torch.trapezoid(lerf - morf, fractions.to(morf), dim=-1)


def p_value(observed: float, random: Tensor) -> float:
    """Chance that a random order does at least as well: (1 + #{random >= observed}) / (N + 1).

    The observed order counts among the permutations, so that the smallest value is 1 / (N + 1) and never zero (Phipson
    and Smyth 2010).

    Args: observed: statistic of the map. random: the same statistic of N random orders, (N,).

    >>> p_value(2.0, torch.tensor([0.1, -0.3, 2.5]))
    0.5
    """
    return (1 + int((random >= observed).sum())) / (random.numel() + 1)


def interval(values: Tensor, *, seed: int = 0) -> tuple[float, float] | None:
    """Interval (95 %) of the mean over the rows, by the percentile bootstrap; None for a single row, which has no
    spread.

    Percentiles, because BCa is undefined when all rows agree. With fewer than about ten rows it is too narrow.

    Args: values: one a row, (B,).
    """
    if values.numel() < 2:
        return None
    import numpy as np
    from scipy import stats

    found = stats.bootstrap((values.double().cpu().numpy(),), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES,
                            method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return float(found.low), float(found.high)


def grouped_interval(values: Tensor, groups: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0
                     ) -> tuple[float, float] | None:
    """Interval (95 %) of the mean over the rows, where rows of a group are not independent, such as passages of one
    text: whole groups are drawn, by the percentile bootstrap.

    mean* = sum_g S_g / sum_g N_g over the groups drawn, S_g the sum and N_g the number of a group's rows. With one row
    a group it is `interval`.

    Args: values: one a row, (B,). groups: of each row, B of them. resamples: of the bootstrap.
    Returns: low and high; None with fewer than two groups.
    """
    sums, counts = _sums(values, groups)
    if len(sums) < 2:
        return None
    import numpy as np
    from scipy import stats

    mean = lambda total, count, axis=-1: total.sum(axis) / count.sum(axis)
    found = stats.bootstrap((sums, counts), mean, paired=True, vectorized=True, confidence_level=LEVEL,
                            n_resamples=resamples, method="percentile", batch=1000,
                            rng=np.random.default_rng(seed)).confidence_interval
    return float(found.low), float(found.high)


def paired_p_value(differences: Tensor, groups: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0
                   ) -> float:
    """Two-sided p-value of "the mean difference is zero": signs of whole groups are flipped at random, or in all ways
    where there are no more than `resamples`.

    Args: differences: of two methods on the same rows, (B,). groups: of each row.
    Returns: p, at least 1 / (resamples + 1); 1 where there is no difference anywhere.
    Raises: Undefined with fewer than two groups.

    >>> paired_p_value(torch.ones(4), range(4))  # 2 of the 16 ways are as far from zero
    0.125
    """
    sums, _ = _sums(differences, groups)
    if len(sums) < 2:
        raise Undefined(f"a paired test needs two independent rows, there are {len(sums)}")
    if not sums.any():
        return 1.0
    import numpy as np
    from scipy import stats

    mean = lambda one, other, axis=-1: (one - other).mean(axis)
    return float(stats.permutation_test((sums, np.zeros_like(sums)), mean, permutation_type="samples", vectorized=True,
                                        n_resamples=resamples, batch=1000, rng=np.random.default_rng(seed)).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of one family, corrected so that the chance of any false one stays below the level (Holm 1979).

    p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)) with p_(1) <= ... <= p_(m). scipy corrects false discovery rates
    only.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, running = [0.0] * len(p_values), 0.0
    for done, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - done) * p_values[place]))
        corrected[place] = running
    return corrected


def _sums(values: Tensor, groups: Sequence[object]):
    """Sum and number of the rows of each group, NumPy float64, (G,) each, in the order in which groups come."""
    import numpy as np

    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    at = np.array([numbers[group] for group in groups], dtype=int)
    flat = values.detach().double().cpu().numpy()
    return np.bincount(at, flat, len(numbers)), np.bincount(at, minlength=len(numbers)).astype(float)
