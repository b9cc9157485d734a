"""Constants that are added, such as biases: which part of them goes with the relevant part of what they are added to.

References: Murdoch et al. 2018 (Beyond word importance: contextual decomposition to extract interactions from LSTMs),
Singh et al. 2019 (Hierarchical interpretations for neural network predictions), Hsu et al. 2024 (CD-T).
"""

import torch
from torch import Tensor

NOISE = 64
"""Irrelevant parts of up to so many units of the last place of a row's largest entry are rounding and count as zero."""


def proportional(rel: Tensor, total: Tensor, constant: Tensor, *, eps: float | None = None) -> Tensor:
    """b |r| / (|r| + |i|), entry by entry (Singh et al. 2019, eq. 4; Hsu et al. 2024, section 3).

    Nothing of b is relevant where r is zero, and all of it where i is. The published code adds `eps` = 1e-8 to the
    denominator, by which rel and irrel do not sum to the total; None: as small as keeps it off zero, with rounding of i
    left out, which would take much of b where r passes zero.

    Args: rel: r, (S, ..., D). total: r + i, (..., D) or with the sources in front. constant: b, broadcasts to them.
    """
    size, rest = rel.abs(), (total - rel).abs_()
    if eps is None:
        largest = total.abs().nan_to_num_(posinf=0).amax(-1, keepdim=True)  # what is masked is -inf
        rest.sub_(largest.mul_(NOISE * torch.finfo(rel.dtype).eps)).clamp_(min=0)
    rest.add_(size).add_(torch.finfo(rel.dtype).tiny if eps is None else eps)
    return size.div_(rest).mul_(constant)


def aside(rel: Tensor, total: Tensor, constant: Tensor) -> Tensor:
    """0: constants are irrelevant (Murdoch et al. 2018, section 3.2.3, without their bias terms)."""
    return torch.zeros_like(rel)


def unclashed(rel: Tensor, total: Tensor) -> Tensor:
    """`normalize` of the published rule: where rel and irrel have opposite signs, the larger takes all (Hsu et al.
    2024, their code).

    r i < 0: (r, i) -> (r + i, 0) if |r| >= |i|, else (0, r + i); continuous, keeps the sum. With x = r + i that is x
    held between 0 and r. Args: rel: (S, ...). total: x, (...).
    """
    return torch.clamp(total, min=rel.clamp(max=0), max=rel.clamp(min=0))
