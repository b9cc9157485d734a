"""Controls: maps that know nothing of the model. A method that does not beat them has found nothing.

Noise, the first of them, is the method "random" of `relprop.baselines`.

Reference of the centre prior: P. Dabkowski and Y. Gal, "Real Time Image Saliency for Black Box Classifiers", NIPS 2017
(section 5, the centre box).
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import units
from ..tokens import Batch, TextUnits

WIDTH = 0.25  # of the centre prior's Gaussian, as a part of the side


def centre_prior(batch: Batch) -> Tensor:
    """Relevance by place alone: a Gaussian around the middle of the picture, or of a row's own tokens.

    R = exp(-|u|^2 / (2 w^2)), u the distance from the middle in sides, w = 0.25. Returns: a map, (B, Y, X) or (B, T),
    zero on what is no unit.
    """
    inside = units.groups(batch) >= 0
    if inside.ndim == 3:
        y, x = (_bell(side) for side in inside.shape[1:])
        return torch.where(inside, y[:, None] * x, 0.0)
    lines = torch.zeros(inside.shape)
    for row, own in enumerate(inside):
        lines[row, own] = _bell(int(own.sum()))
    return lines


def token_frequency(batch: Batch, counts: Counter[str]) -> Tensor:
    """Relevance by rarity alone: the surprise of each token among the texts of the data.

    R_t = -log((1 + n_t) / (1 + sum n)). Returns: a map, (B, T), zero on special tokens and padding.

    Args: counts: of each token as it is spelled, over the data; see `counted`.
    Raises: ValueError for what is not text.
    """
    if not isinstance(batch.units, TextUnits):
        raise ValueError("tokens have a frequency, and this input is no text; leave this control out")
    total = 1 + counts.total()
    lines = [[-math.log((1 + counts[token]) / total) for token in row] for row in batch.units.tokens]
    return torch.where(units.groups(batch) >= 0, torch.tensor(lines, dtype=torch.float64).float(), 0.0)


def counted(texts: Iterable[TextUnits]) -> Counter[str]:
    """How often each token occurs, special tokens and padding left out."""
    counts: Counter[str] = Counter()
    for one in texts:
        for tokens, special, padding in zip(one.tokens, one.special, one.padding, strict=True):
            counts.update(token for token, *outside in zip(tokens, special, padding, strict=True) if not any(outside))
    return counts


def reversed_map(relevance: Tensor) -> Tensor:
    """The map of a method with every sign turned: what is best becomes worst."""
    return -relevance


def _bell(count: int) -> Tensor:
    """A Gaussian over `count` places from -0.5 to 0.5."""
    at = (torch.arange(count) + 0.5) / count - 0.5
    return torch.exp(-(at**2) / (2 * WIDTH**2))
