"""Maps from attention patterns alone: attention rollout and raw attention.

They know nothing of values, of MLPs, or of the target but where it is read: baselines, not explanations.

References: S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (rollout);
S. Jain and B. Wallace, "Attention is not Explanation", NAACL 2019 (raw attention, and why not);
J. Gildenblat, "Exploring Explainability for Vision Transformers", 2020 (head fusion and discarding).
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..pattern import NO_ATTENTION
from ..result import Relevance
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch
from ..trace import attention_patterns
from .readout import padding_of, read

FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda pattern: pattern.mean(1),
    "max": lambda pattern: pattern.amax(1),
    "min": lambda pattern: pattern.amin(1),
}


def rollout(patterns: list[Tensor], *, head_fusion: str = "mean", discard: float = 0.0, start_layer: int = 0,
            padding: Tensor | None = None) -> Tensor:
    """Share of each input position in each output position, if only attention and skip connections carried information.

    A_l = row-normalised (fused_l + I), rollout = A_L ... A_2 A_1 (Abnar and Zuidema 2020, section 3, the skip
    connection as I). Head fusion and `discard` are Gildenblat's: the smallest entries of each fused pattern are set to
    zero. Departures from his code: each row of a batch has its own threshold, the first entry is not spared, and each
    row is divided by its own sum, where his divides each column by the sum of the row of its number, which are all one
    but after discarding or fusion by max or min. Conserves: each row sums to one.

    Args: patterns: one a layer, in order, (B, H, T, T). head_fusion: "mean", "max" or "min" over heads.
        discard: share of a row's entries to drop, in [0, 1). start_layer: first layer to count. padding: True at
        padding, (B, T).
    Returns: (B, T, S), rows are output positions, float32 at least. Columns of padding are zero (but for padding
        itself).
    Raises: ValueError for no pattern, patterns that do not follow each other, or an unknown option.
    """
    check_fusion(head_fusion)
    if not 0 <= discard < 1:
        raise ValueError(f"discard is a share in [0, 1), got {discard}")
    check_square(patterns)
    total = None
    for pattern in layers_from(patterns, start_layer):
        mixed = with_skip(over_heads(pattern, head_fusion, padding), discard, padding)
        total = mixed if total is None else mixed @ total
    return total


def check_fusion(head_fusion: str) -> None:
    """Raises ValueError for a head fusion that does not exist."""
    if head_fusion not in FUSIONS:
        raise ValueError(f"no head fusion {head_fusion!r}; there are {', '.join(FUSIONS)}")


def layers_from(patterns: list[Tensor], start_layer: int) -> list[Tensor]:
    """The patterns from this layer on. Raises: ValueError if there is no such layer."""
    if not 0 <= start_layer < len(patterns):
        raise ValueError(f"start_layer {start_layer} is not one of the {len(patterns)} layers")
    return patterns[start_layer:]


def check_square(patterns: list[Tensor], rows: int | None = None) -> None:
    """Raises ValueError unless there are patterns, and all of one number of rows (`rows`, where known), (T, T)."""
    if not patterns:
        raise ValueError(NO_ATTENTION)
    shapes = {(pattern.shape[0], *pattern.shape[2:]) for pattern in patterns}
    if len(shapes) > 1 or patterns[0].shape[-1] != patterns[0].shape[-2] or rows not in (None, patterns[0].shape[0]):
        found = ", ".join(str(tuple(pattern.shape)) for pattern in patterns)
        raise ValueError(f"attention cannot be followed from layer to layer through patterns of shape {found}; "
                         "expected (B, H, T, T) with one T: no windows, no merging of tokens, no cross-attention; "
                         "take generic-attention for several inputs")


def over_heads(pattern: Tensor, head_fusion: str, padding: Tensor | None) -> Tensor:
    """The pattern over heads, (B, T, S), zero in rows and columns of padding (where a fused kernel may leave NaN)."""
    fused = FUSIONS[head_fusion](pattern.detach().to(torch.promote_types(pattern.dtype, torch.float32)))
    if padding is None:
        return fused
    return fused.masked_fill(padding[:, :, None] | padding[:, None, :], 0)


def with_skip(fused: Tensor, discard: float = 0.0, padding: Tensor | None = None) -> Tensor:
    """One layer's mixing of positions with its skip connection, (B, T, S); rows sum to one."""
    if discard:
        there = torch.ones(fused.shape[:2], dtype=torch.bool, device=fused.device) if padding is None else ~padding
        real = there[:, :, None] & there[:, None, :]  # (B, T, S)
        fused = torch.stack([_discarded(*row, discard) for row in zip(fused, real, strict=True)])
    mixed = fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
    return mixed / mixed.sum(-1, keepdim=True)


def _discarded(fused: Tensor, real: Tensor, discard: float) -> Tensor:
    """One row's pattern without its smallest entries, (T, S). Only `real` ones count, else padding is what goes."""
    entries = fused[real]
    dropped = entries.argsort(stable=True)[:int(discard * len(entries))]
    return torch.zeros_like(fused).masked_scatter(real, entries.index_fill(0, dropped, 0))


def attention_rollout(subject: Subject, batch: Batch, targets: Targets, *, head_fusion: str = "mean",
                      discard: float = 0.0, start_layer: int = 0) -> Relevance:
    """`rollout`, read where the target is read: the class token's row, the predicting position's, or a mean of rows.

    Unit: share of attention, which sums to one before special tokens are dropped; the target decides only which rows
    are read (see `readout`). Not conservative. Cost: two forwards, one of them with a backward through what follows
    the last layer.

    Args: as `rollout`.
    Returns: map (B, T) for text, or (B, Y, X), each patch's share divided evenly over its pixels, prefix tokens left
        out.
    Raises: ValueError where there is no attention to follow.
    """
    options = {"head_fusion": head_fusion, "discard": discard, "start_layer": start_layer}
    with settled(subject.model):
        output, patterns = attention_patterns(subject.model, batch.args, batch.kwargs)
        padding = padding_of(batch, patterns)
        flow = rollout(patterns, padding=padding, **options)
        return read(subject, batch, targets.fixed(output, batch), flow, padding, {"method": "rollout", **options})


def raw_attention(subject: Subject, batch: Batch, targets: Targets, *, layer: int = -1,
                  head_fusion: str = "mean") -> Relevance:
    """The pattern of one layer, over heads, read where the target is read: what attention heat maps usually show.

    R_s = mean_h A^{layer}_{h, t, s} (Jain and Wallace 2019 study why this need not explain). Unit: share of attention.
    Not conservative. Cost: as `attention_rollout`.

    Args: layer: the last by default. head_fusion: "mean", "max" or "min".
    Returns: map as of `attention_rollout`.
    Raises: ValueError where there is no attention to read, or no such layer.
    """
    check_fusion(head_fusion)
    with settled(subject.model):
        output, patterns = attention_patterns(subject.model, batch.args, batch.kwargs)
        check_square(patterns)
        if not -len(patterns) <= layer < len(patterns):
            raise ValueError(f"layer {layer} is not one of the {len(patterns)} layers")
        padding = padding_of(batch, patterns)
        pattern = over_heads(patterns[layer], head_fusion, padding)
        options = {"method": "raw-attention", "layer": layer, "head_fusion": head_fusion}
        return read(subject, batch, targets.fixed(output, batch), pattern, padding, options)
