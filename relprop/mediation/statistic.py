"""Means over examples of many mediators at once, with intervals, p-values and a correction for their number.

References: E. S. Edgington, "Randomization Tests"; B. Phipson and G. Smyth, "Permutation P-values Should Never Be
Zero", SAGMB 9(1), 2010; Y. Benjamini and Y. Hochberg, "Controlling the False Discovery Rate", JRSS B 57(1), 1995.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..check.statistics import LEVEL, RESAMPLES
from ..result.effects import Summary

CHUNK = 512  # mediators at once: RESAMPLES x CHUNK numbers


def summary(effects: Tensor, *, groups: Sequence[object] | None = None, resamples: int = RESAMPLES, seed: int = 0
            ) -> Summary:
    """Mean over the examples, 95 % interval by the percentile bootstrap, p-value of "the mean is zero" by flipping
    signs, and the same corrected for the number of mediators by Benjamini and Hochberg.

    The same examples are drawn, and the same signs flipped, for every mediator. With one example, or one group of
    examples, there is a mean alone.

    Args: effects: of each mediator on each example, (M, B). groups: of each example, B of them, where examples of the
        same group are not independent, such as templates with the same profession: whole groups are drawn, and the
        signs of whole groups flipped. None: each example is a group of its own.
    """
    mean = effects.mean(1)
    number = numbered(groups, effects.shape[1])
    if int(number.max()) < 1:
        return Summary(mean)
    low, high = intervals(effects, number, resamples=resamples, seed=seed)
    p = sign_flip(effects, number, resamples=resamples, seed=seed)
    return Summary(mean, low, high, p, benjamini_hochberg(p))


def numbered(groups: Sequence[object] | None, count: int) -> Tensor:
    """The number of each example's group, (B,), in the order in which groups come; of None, which is in no group with
    others, a number of its own.

    >>> numbered(["a", None, "a", None], 4)
    tensor([0, 1, 0, 2])
    """
    keys = range(count) if groups is None else [place if one is None else ("group", one)
                                                for place, one in enumerate(groups)]
    known: dict[object, int] = {}
    return torch.tensor([known.setdefault(key, len(known)) for key in keys])


def intervals(effects: Tensor, number: Tensor | None = None, *, resamples: int = RESAMPLES, seed: int = 0
              ) -> tuple[Tensor, Tensor]:
    """Low and high end, (M,) each, of the interval of the mean over examples, sum_g w_g S_g / sum_g w_g N_g with w_g
    how often group g was drawn, S_g the sum and N_g the number of its examples; see
    `relprop.check.statistics.grouped_interval`.

    Args: number: of each example's group, (B,); None: each is one.
    """
    import numpy as np

    number = numbered(None, effects.shape[1]) if number is None else number
    G, counts = int(number.max()) + 1, torch.bincount(number).double()
    drawn = np.random.default_rng(seed).multinomial(G, np.full(G, 1 / G), size=resamples)
    weights = torch.from_numpy(drawn).double()  # (resamples, G)
    weights = weights / (weights @ counts)[:, None]
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found = [torch.quantile(weights @ part.T, ends, dim=0) for part in _sums(effects, number).split(CHUNK)]
    low, high = torch.cat(found, 1)
    return low, high


def sign_flip(effects: Tensor, number: Tensor | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Two-sided p-value of "the mean is zero", (M,): the share of sign flips whose mean is as far from zero, of all
    2^G of the G groups where these are no more than `resamples`, else of so many at random and the effects as they are.

    Args: number: of each example's group, (B,); None: each is one.

    >>> sign_flip(torch.ones(1, 4))  # 2 of the 16 ways
    tensor([0.1250], dtype=torch.float64)
    >>> sign_flip(torch.ones(1, 4), torch.tensor([0, 0, 1, 1]))  # 2 of the 4 ways
    tensor([0.5000], dtype=torch.float64)
    """
    sums = _sums(effects, numbered(None, effects.shape[1]) if number is None else number)
    G = sums.shape[1]
    exact = 2 ** G <= resamples
    if exact:
        signs = torch.tensor([[1 - 2 * (way >> bit & 1) for bit in range(G)] for way in range(2 ** G)]).double()
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(0, 2, (resamples, G), generator=generator).double()
    found = []
    for part in sums.split(CHUNK):
        observed = part.sum(1).abs()
        as_far = (signs @ part.T).abs() >= observed * (1 - 1e-12)  # sums in another order round otherwise
        count = as_far.sum(0).double()
        found.append(count / len(signs) if exact else (count + 1) / (len(signs) + 1))
    return torch.cat(found)


def _sums(effects: Tensor, number: Tensor) -> Tensor:
    """Of each group of examples, float64 on the CPU, (M, G)."""
    effects = effects.double().cpu()
    return effects.new_zeros(len(effects), int(number.max()) + 1).index_add_(1, number, effects)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """P-values corrected so that of those below a level, at most that share is expected to be false, (M,).

    q_(i) = min_{j >= i} p_(j) M / j with p_(1) <= ... <= p_(M); as of scipy, whose import takes longer than this.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.04, 0.02]))
    tensor([0.0300, 0.0400, 0.0300])
    """
    ranked, order = p.sort()
    q = ranked * len(p) / torch.arange(1, len(p) + 1)
    return torch.empty_like(p).index_copy_(0, order, q.flip(0).cummin(0).values.flip(0))
