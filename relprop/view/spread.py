"""How far a mean over examples may be off: 1.96 standard errors, of whole groups where examples hang together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def spread(values: Tensor, about: Mapping) -> Tensor:
    """Half of the 95 % interval of the mean over the last axis, (..., B) to (...), by the normal approximation.

    With d_g the sum over group g of the differences from the mean, 1.96 sqrt(G / (G - 1) sum_g d_g^2) / B; without
    groups that is 1.96 standard errors. Zero of a single example, or group.

    Args: about: of effects; "grouped" is the number of each example's group, (B,), where there are any.

    >>> values = torch.tensor([1.0, 3.0, 5.0])
    >>> bool((spread(values, {}) - 1.96 * values.std() / 3**0.5).abs() < 1e-6), float(spread(values[:1], {}))
    (True, 0.0)
    """
    count = values.shape[-1]
    number = torch.tensor(about.get("grouped") or range(count))
    groups = int(number.max()) + 1
    if groups < 2:
        return values.new_zeros(values.shape[:-1])
    apart = values - values.mean(-1, keepdim=True)
    sums = apart.new_zeros(*apart.shape[:-1], groups).index_add_(-1, number, apart)
    return 1.96 * (groups / (groups - 1) * (sums**2).sum(-1)).sqrt() / count


__all__ = ["spread"]
