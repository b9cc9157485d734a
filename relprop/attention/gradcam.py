"""GradCAM of attention: a layer's pattern, each head weighed by its mean gradient.

Reference: H. Chefer, S. Gur, L. Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, which
compares with it, after R. Selvaraju et al., "Grad-CAM", ICCV 2017. Departures from their code: a map in which every
entry is clipped is zero and not NaN, and padding is not counted unless asked for, so that a map does not depend on what
else was in the batch.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..asked import Asked
from ..pattern import Attended, attend
from ..result import Relevance
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, TextUnits
from .readout import mapped, own, read_from
from .rollout import check_square

OVER = ("row", "map")


def gradcam(weights: Tensor, slope: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """The positive part of a pattern's heads, each weighed by its mean gradient.

    R_{ts} = (mean_h w_h A_{hts})+, w_h = sum_{ts} c_{ts} dy/dA_{hts}. Not conservative.

    Args: weights, slope: A and dy/dA, (B, H, T, S). counted: c, which entries the mean is over, (B, T, S), sums to
        one; None: all alike.
    Returns: (B, T, S), never negative, unit of the target.
    """
    heads = slope.mean((2, 3)) if counted is None else torch.einsum("bhts,bts->bh", slope, counted)
    return torch.einsum("bhts,bh->bts", weights, heads / weights.shape[1]).clamp(min=0)


def attention_gradcam(subject: Subject, batch: Batch, targets: Targets, *, layer: int = -1, over: str | None = None,
                      normalize: bool = True, padding: bool = False) -> Relevance:
    """`gradcam` of one layer, in the row of the class token or of the position that predicts: a baseline of Chefer et
    al. 2021.

    Cost: one forward, and a backward that ends at that layer.

    Args: layer: the last by default. over: what the mean gradient, and the range, are taken over: "row", what the row
        that is read gives the tokens or patches; "map", all that tokens give tokens; None: as in the code, "row" for
        images and "map" for texts. normalize: to least 0 and largest 1 over the same. padding: count padding as well in
        a "map" of texts, as the code does; maps then depend on how long the other texts of the batch are.
    Returns: map (B, T) for text, zero at the position that is read, or (B, Y, X), each patch's share divided evenly
        over its pixels. Never negative; all zero where no head speaks for the target. No unit, or the target's without
        `normalize`.
    Raises: ValueError where there is no attention to read, or for an option that does not exist.
    """
    if over not in (*OVER, None):
        raise ValueError(f"no mean over {over!r}; there are {', '.join(OVER)}")
    over = over or ("map" if isinstance(batch.units, TextUnits) else "row")
    asked = Asked(targets, batch)
    found = attend(subject.model, batch.args, batch.kwargs, asked, layers=slice(layer, layer + 1 or None))
    check_square([pattern.weights for pattern in found.patterns], batch.rows)
    shares = _shares(found, batch, over, normalize, padding)
    return mapped(subject, batch, shares, value=found.value, names=asked.names, method="attention-gradcam",
                  forwards=found.forwards, backwards=1, unit="none" if normalize else "unit of the target", layer=layer,
                  over=over, normalize=normalize, padding=padding)


def _shares(found: Attended, batch: Batch, over: str, normalize: bool, padding: bool) -> Tensor:
    """What the positions that are read give each position, (B, S)."""
    weights, slope = (t.to(torch.promote_types(t.dtype, torch.float32))
                      for t in (found.patterns[0].weights, found.patterns[0].slope))
    read = read_from(found, batch).to(weights)  # (B, T)
    counted = _counted(read, batch, over, padding)
    there = counted > 0
    weights, slope = (t.masked_fill(~there[:, None], 0) for t in (weights, slope))  # NaN in rows of padding, perhaps
    given = gradcam(weights, slope, counted=counted)  # (B, T, S)
    if over == "map" and normalize:
        given = _ranged(given, there)
    shares = torch.einsum("bt,bts->bs", read, given)
    if over == "row" and normalize:
        shares = _ranged(shares, there.any(1))
    if not isinstance(batch.units, TextUnits):
        return shares
    return shares.masked_fill(~batch.real(shares.shape[1]).to(shares.device) | (read > 0.5), 0)


def _counted(read: Tensor, batch: Batch, over: str, padding: bool) -> Tensor:
    """Shares of the entries that the mean gradient is taken over, (B, T, S), sum to one."""
    if over == "row":
        counted = read[:, :, None] * own(batch, read.shape[1]).to(read)[:, None]
    else:
        real = batch.real(read.shape[1]).to(read.device) | padding
        counted = (real[:, :, None] & real[:, None]).to(read)
    return counted / counted.sum((1, 2), keepdim=True)


def _ranged(given: Tensor, there: Tensor) -> Tensor:
    """(x - least) / (largest - least) over what is there in each row of the batch; zero elsewhere, or if all are alike.
    """
    dims = tuple(range(1, given.dim()))
    low = given.masked_fill(~there, torch.inf).amin(dims, keepdim=True)
    width = given.masked_fill(~there, -torch.inf).amax(dims, keepdim=True) - low
    return torch.where(there & (width > 0), (given - low) / torch.where(width > 0, width, 1), 0)
