"""Constants that are added, such as biases: which part of them goes with the relevant part of what they are added to.

References: Murdoch et al. 2018 (Beyond word importance: contextual decomposition to extract interactions from LSTMs),
Singh et al. 2019 (Hierarchical interpretations for neural network predictions), Hsu et al. 2024 (CD-T).
"""

import torch
from torch import Tensor


def proportional(rel: Tensor, irrel: Tensor, constant: Tensor, *, eps: float | None = None) -> Tensor:
    """b |r| / (|r| + |i|), entry by entry (Singh et al. 2019, eq. 4; Hsu et al. 2024, section 3).

    Nothing of b is relevant where r is zero, and all of it where i is. The published code adds `eps` = 1e-8 to the
    denominator, by which rel and irrel do not sum to the total; None: as small as keeps it off zero.

    Args: rel, irrel: (S, ...), the parts that b is added to. constant: b, broadcasts to them.
    """
    eps = torch.finfo(rel.dtype).tiny if eps is None else eps
    size = rel.abs()
    whole = irrel.abs().add_(size).add_(eps)
    return size.div_(whole).mul_(constant)


def aside(rel: Tensor, irrel: Tensor, constant: Tensor) -> Tensor:
    """0: constants are irrelevant (Murdoch et al. 2018, section 3.2.3, without their bias terms)."""
    return torch.zeros_like(rel)


def unclashed(rel: Tensor, total: Tensor) -> Tensor:
    """`normalize` of the published rule: where rel and irrel have opposite signs, the larger takes all (Hsu et al.
    2024, their code).

    r i < 0: (r, i) -> (r + i, 0) if |r| >= |i|, else (0, r + i); continuous, keeps the sum. With x = r + i that is x
    held between 0 and r. Args: rel: (S, ...). total: x, (...).
    """
    return torch.clamp(total, min=rel.clamp(max=0), max=rel.clamp(min=0))
