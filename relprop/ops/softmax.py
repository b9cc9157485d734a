"""Softmax, in attention and elsewhere.

References: Achtibat et al. 2024 (AttnLRP, eq. 13), Ali et al. 2022 (XAI for transformers, AH-rule), Chefer et al. 2021
(Transformer interpretability beyond attention visualization), Edin et al. 2025 (GIM: improved interpretability for
large language models).
"""

from typing import Any

import torch
from torch import Tensor

from ..numerics import stabilize
from .call import MASKED, Call, Unary
from .journal import SOFTMAX
from .split import Rule, Split, each


def taylor(x: Tensor, y: Tensor, g: Tensor, *, dim: int = -1) -> Tensor:
    """R_x = x (R - y sum R): the Taylor expansion of the softmax at x (Achtibat et al. 2024, eq. 13).

    In relevance per unit it is the plain gradient y (g - sum y g). The expansion's constant absorbs the rest, which
    the ledger books under "softmax": not conservative.
    """
    return y * (g - (y * g).sum(dim, keepdim=True))


def tempered(x: Tensor, y: Tensor, g: Tensor, *, dim: int = -1, temperature: float = 2.0) -> Tensor:
    """R_i = x_i s_i (R_i / y_i - sum_j s_j R_j / y_j), s = softmax(x / temperature): the gradient of a softer pattern
    (Edin et al. 2025, temperature-adjusted gradients), which a saturated softmax does not stop. Not conservative.

    For scores whose effects hide each other: one key is so strong that no single other one seems to count.
    """
    s = (x / temperature).softmax(dim)
    return s * (g - (s * g).sum(dim, keepdim=True))


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

    def kept(scores: Tensor) -> Tensor:
        """Of a query that may look at nothing at all the pattern is NaN, which models fill with zeros afterwards."""
        scores = scores.view_as(scores)
        y = run(scores)
        if bool(y.detach().select(kwargs.get("dim", args[0] if args else -1), 0).isnan().any()):
            nothing = y.detach().isnan()
            scores.register_hook(lambda g: g.masked_fill(nothing, 0))
        return y

    if call.rule is hold:
        return run(x).detach()
    if call.rule is taylor:
        return call.booked(SOFTMAX, [x], kept)
    return Unary.apply(x, run, call.rule, call.journal, SOFTMAX)


def softmax(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Binds the argument that torch calls `input` or `self`."""
    return apply(call, input, *args, **kwargs)


# -- forward ---------------------------------------------------------------------------------------------------------

def pattern_held(rel: Tensor, x: Tensor, y: Tensor, run: Rule) -> None:
    """The pattern is that of the total, a constant: only values are split (Hsu et al. 2024, their code for BERT)."""
    return None


def pattern_difference(rel: Tensor, x: Tensor, y: Tensor, run: Rule) -> Tensor:
    """rel -> softmax(x) - softmax(x - rel)."""
    return y - run(x - rel)


def pattern_decomposed(rel: Tensor, x: Tensor, y: Tensor, run: Rule) -> Tensor:
    """rel -> softmax(rel + c), c the constants that were added to the scores, such as masks: the pattern that the
    relevant queries and keys make by themselves (Hsu et al. 2024, their code for GPT-2).

    It sums to one even where rel is zero, as before the source: values have no relevant part there, so nothing comes
    of it.

    Args: rel: of the scores, (S, ..., T, S'), with c in it. x, y: scores and pattern of the total.
    """
    return run(rel.masked_fill(x < MASKED, -torch.inf)).nan_to_num(0.0)  # a query that may look at nothing


def split_softmax(call: Split, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """`F.softmax`, `F.log_softmax`, forward."""
    def run(x: Tensor) -> Tensor:
        return each(lambda scores: call.func(scores, *args, **kwargs), x)

    rel = call.rel(input)
    if call.rule is pattern_decomposed and call.added(input) is not None:
        rel = rel + call.added(input)
    return call.rule(rel, input, call.output, run)
