"""Attention weighed by its values: how long the vectors are that positions really give each other.

References: G. Kobayashi, T. Kuribayashi, S. Yokoi, K. Inui, "Attention is Not Only a Weight: Analyzing Transformers
with Vector Norms", EMNLP 2020; S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020
(rollout, and the skip connection in it).
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import NO_ATTENTION
from ..result import Relevance
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch
from ..trace import Mixing, mixings
from .readout import padding_of, read
from .rollout import check_square, rollout

CHUNK = 1 << 22
"""Entries of patterns that are weighed at a time: 32 MiB."""


@torch.no_grad()
def lengths(mixing: Mixing) -> Tensor:
    """How long the vector is that each position gives each other one: || sum_h A_{hts} f_h(x_s) ||, (B, T, S).

    f_h(x_s) = v_{hs} W_O^h: what the output projection makes of the value of a head, observed as the linear map that
    follows (Kobayashi et al. 2020, eq. 3 and section 3.2: heads are summed before the norm). Its biases belong to no
    position and are left out. Unit: of the model's states. Not conservative: vectors may cancel.

    Cost: H projections, and T S H H multiplications; behind a gate, which depends on the position, S projections.
    """
    if mixing.gated or mixing.weights.shape[-1] != mixing.weights.shape[-2]:
        return torch.linalg.vector_norm(_vectors(mixing), dim=-1)
    heads = torch.eye(mixing.weights.shape[1], dtype=mixing.values.dtype, device=mixing.values.device)
    # the value of a position is put where its mix would be, so that one projection does for all positions
    given = torch.stack([mixing.output(mixing.values * head[:, None, None]) for head in heads], 2)  # (B, S, H, D)
    given = given.to(_wide(given))
    products = given @ given.mT  # (B, S, H, H): with A, all that the norm needs
    found = [_norms(weights.to(products), products) for weights in mixing.weights.split(_at_once(mixing), 2)]
    return torch.cat(found, 1).to(torch.promote_types(mixing.weights.dtype, torch.float32))


def _norms(weights: Tensor, products: Tensor) -> Tensor:
    """sqrt(sum_{hg} A_{hts} A_{gts} f_hs f_gs), (B, T, S), from A (B, H, T, S) and the products of f (B, S, H, H)."""
    by_source = weights.permute(0, 3, 2, 1)  # (B, S, T, H)
    squares = ((by_source @ products) * by_source).sum(-1)
    return squares.clamp(min=0).sqrt().mT


def _wide(t: Tensor) -> torch.dtype:
    """float64, where heads that cancel leave the most, or the best that the device has."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def _at_once(mixing: Mixing) -> int:
    """How many query positions are weighed at a time."""
    return max(1, CHUNK // mixing.weights[:, :, 0].numel())


def _vectors(mixing: Mixing) -> Tensor:
    """The vectors themselves, (B, T, S, D), by one run for each s."""
    weights, values = mixing.weights, mixing.values
    by_source = [mixing.output(weights[..., s, None] * values[:, :, s, None]) for s in range(weights.shape[-1])]
    return torch.stack(by_source, 2).to(torch.promote_types(weights.dtype, torch.float32))


def value_weighted_attention(subject: Subject, batch: Batch, targets: Targets, *, layer: int = -1,
                             rolled: bool = False, start_layer: int = 0) -> Relevance:
    """Attention of one layer weighed by its values, `lengths` with rows that sum to one, read where the target is read.

    R_s = ||sum_h A_{hts} f_h(x_s)|| / sum_s' ||sum_h A_{hts'} f_h(x_s')||. Knows what the heads pass on, which the
    pattern does not, but nothing of the target. Unit: share of attention. Not conservative. Cost: two forwards, one of
    them with a backward through what follows the last layer, and a projection a head.

    Args: layer: the last by default. rolled: through all layers instead, as `rollout` of these shares, with the skip
        connection as half of each. start_layer: first layer to count, if rolled.
    Returns: map as of `attention_rollout`.
    Raises: ValueError where there is no attention to read, no such layer, or an output that is not linear in the
        values.
    """
    with settled(subject.model):
        output, found = mixings(subject.model, batch.args, batch.kwargs)
        if not found:
            raise ValueError(NO_ATTENTION)
        patterns = [mixing.weights for mixing in found]
        check_square(patterns)
        if not -len(found) <= layer < len(found):
            raise ValueError(f"layer {layer} is not one of the {len(found)} layers")
        padding = padding_of(batch, patterns)
        if rolled:
            shares = rollout([_shares(mixing, padding)[:, None] for mixing in found], padding=padding,
                             start_layer=start_layer)
        else:
            shares = _shares(found[layer], padding)
        options = {"rolled": True, "start_layer": start_layer} if rolled else {"layer": layer}
        return read(subject, batch, targets.fixed(output, batch), shares, padding,
                    {"method": "value-weighted-attention", **options})


def _shares(mixing: Mixing, padding: Tensor | None) -> Tensor:
    """`lengths` without padding, (B, T, S); rows sum to one, or to zero where nothing is given."""
    found = lengths(mixing)
    if padding is not None:
        found = found.masked_fill(padding[:, :, None] | padding[:, None], 0)
    total = found.sum(-1, keepdim=True)
    return found / torch.where(total > 0, total, 1)
