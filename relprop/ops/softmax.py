"""Softmax, in attention and elsewhere.

References: Achtibat et al. 2024 (AttnLRP, eq. 13), Ali et al. 2022 (XAI for transformers, AH-rule), Chefer et al. 2021
(Transformer interpretability beyond attention visualization).
"""

from typing import Any

import torch
from torch import Tensor

from ..numerics import stabilize
from .call import Call, Unary
from .journal import SOFTMAX


def taylor(x: Tensor, y: Tensor, g: Tensor, *, dim: int = -1) -> Tensor:
    """R_x = x (R - y sum R): the Taylor expansion of the softmax at x (Achtibat et al. 2024, eq. 13).

    In relevance per unit it is the plain gradient y (g - sum y g). The expansion's constant absorbs the rest, which
    the ledger books under "softmax": not conservative.
    """
    return y * (g - (y * g).sum(dim, keepdim=True))


def hold(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """R_x = 0: the pattern is a constant and passes nothing to the scores (Ali et al. 2022, AH-rule; CP-LRP).

    Strictly conservative: the values then receive all relevance of the attention.
    """
    return torch.zeros_like(x)


def identity(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """R_x = R_y, entry by entry (Chefer et al. 2021, for every unary op). Conserves where no score is exactly zero.

    A masked score, -inf, has y = 0 and receives nothing.
    """
    return (y * g).div_(stabilize(x))


def apply(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.softmax`, `torch.softmax`, `F.log_softmax` under the call's rule."""
    def run(scores: Tensor) -> Tensor:
        return call.func(scores, *args, **kwargs)

    if call.rule is hold:
        return run(x).detach()
    if call.rule is taylor:
        return call.booked(SOFTMAX, [x], run)
    return Unary.apply(x, run, call.rule, call.journal, SOFTMAX)


def softmax(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Binds the argument that torch calls `input` or `self`."""
    return apply(call, input, *args, **kwargs)
