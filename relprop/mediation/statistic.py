"""Means over examples of many mediators at once, with intervals, p-values and a correction for their number.

References: E. S. Edgington, "Randomization Tests"; B. Phipson and G. Smyth, "Permutation P-values Should Never Be
Zero", SAGMB 9(1), 2010; Y. Benjamini and Y. Hochberg, "Controlling the False Discovery Rate", JRSS B 57(1), 1995.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..check.statistics import LEVEL, RESAMPLES
from ..result.effects import Summary

CHUNK = 512  # mediators at once: RESAMPLES x CHUNK numbers


def summary(effects: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Mean over the examples, 95 % interval by the percentile bootstrap, p-value of "the mean is zero" by flipping
    signs, and the same corrected for the number of mediators by Benjamini and Hochberg.

    The same examples are drawn, and the same signs flipped, for every mediator. With one example there is a mean alone.

    Args: effects: of each mediator on each example, (M, B).
    """
    mean = effects.mean(1)
    if effects.shape[1] < 2:
        return Summary(mean)
    low, high = intervals(effects, resamples=resamples, seed=seed)
    p = sign_flip(effects, resamples=resamples, seed=seed)
    return Summary(mean, low, high, p, benjamini_hochberg(p))


def intervals(effects: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Low and high end, (M,) each, of the interval of the mean over examples; see `relprop.check.statistics.interval`.
    """
    import numpy as np

    B = effects.shape[1]
    drawn = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), size=resamples)
    weights = torch.from_numpy(drawn).double() / B  # (resamples, B)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found = [torch.quantile(weights @ part.double().cpu().T, ends, dim=0) for part in effects.split(CHUNK)]
    low, high = torch.cat(found, 1)
    return low, high


def sign_flip(effects: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Two-sided p-value of "the mean is zero", (M,): the share of sign flips whose mean is as far from zero, of all
    2^B where these are no more than `resamples`, else of so many at random and the effects as they are.

    >>> sign_flip(torch.ones(1, 4))  # 2 of the 16 ways
    tensor([0.1250], dtype=torch.float64)
    """
    M, B = effects.shape
    exact = 2 ** B <= resamples
    if exact:
        signs = torch.tensor([[1 - 2 * (way >> bit & 1) for bit in range(B)] for way in range(2 ** B)]).double()
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(0, 2, (resamples, B), generator=generator).double()
    found = []
    for part in effects.double().cpu().split(CHUNK):
        observed = part.sum(1).abs()
        as_far = (signs @ part.T).abs() >= observed * (1 - 1e-12)  # sums in another order round otherwise
        count = as_far.sum(0).double()
        found.append(count / len(signs) if exact else (count + 1) / (len(signs) + 1))
    return torch.cat(found)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """P-values corrected so that of those below a level, at most that share is expected to be false, (M,).

    q_(i) = min_{j >= i} p_(j) M / j with p_(1) <= ... <= p_(M); as of scipy, whose import takes longer than this.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.04, 0.02]))
    tensor([0.0300, 0.0400, 0.0300])
    """
    ranked, order = p.sort()
    q = ranked * len(p) / torch.arange(1, len(p) + 1)
    return torch.empty_like(p).index_copy_(0, order, q.flip(0).cummin(0).values.flip(0))
