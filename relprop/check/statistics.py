"""Orders, areas, p-values and intervals: what turns curves into a statement about a map. Plain functions of tensors.

References: R. Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers", ICML 2024;
B. Phipson and G. Smyth, "Permutation P-values Should Never Be Zero", SAGMB 9(1), 2010.
"""
from __future__ import annotations

import torch
from torch import Tensor

LEVEL = 0.95  # of an interval
RESAMPLES = 9999  # of a bootstrap


def order(relevance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Units from most to least relevant, ties in random order.

    Random, because units are numbered by their place: ties left as they are would rank by place, and a map that says
    nothing could score by it.

    Args: relevance: of each unit, (U,), any unit. generator: of the ties; one permutation is drawn whether there are
        ties or not.
    Returns: indices of the units, int64, (U,).
    Raises: ValueError for a map that holds NaN or inf, is empty, or is constant over more than one unit: nothing to
        rank.

    >>> order(torch.tensor([0.1, 3.0, -2.0]))
    tensor([1, 0, 2])
    """
    if relevance.ndim != 1 or relevance.numel() == 0:
        raise ValueError(f"expected the relevance of one row's units, (U,) with U > 0, got {tuple(relevance.shape)}")
    if not relevance.isfinite().all():
        raise ValueError("the map holds NaN or inf, so its units cannot be ranked")
    if len(relevance) > 1 and (relevance == relevance[0]).all():
        raise ValueError(f"the map is {relevance[0].item():g} on all {len(relevance)} units: there is nothing to rank")
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
