"""The one colour scale of every view: diverging, zero in the middle, symmetric, safe for the colour-blind.

Red and blue of ColorBrewer's RdBu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..result import Picture, Relevance
from ..result.number import printed
from ..tokens import TextUnits

if TYPE_CHECKING:
    from numpy import ndarray

SCALE = "RdBu_r"  # matplotlib's name
POSITIVE, NEGATIVE = "#b2182b", "#2166ac"  # near its ends
MOST_FIRST, LEAST_FIRST, CHANCE = (
    "#5e3c99",
    "#e66101",
    "#8c8c8c",
)  # of ablation curves; from PuOr, so that no sign is meant
_STRONGEST = 0.75  # opacity of the strongest tint
_RED, _BLUE = (",".join(str(int(ink[at:at + 2], 16)) for at in (1, 3, 5)) for ink in (POSITIVE, NEGATIVE))
INK, FAINT, LINE = "#1a1a1a", "#6b6b6b", "#c4c4c4"


def sign(value: float) -> str:
    """The colour of relevance of this sign."""
    return NEGATIVE if value < 0 else POSITIVE


def limit(values: Tensor | list[float]) -> float:
    """Where a scale of these values ends on both sides: max |R|. Zero for a map that is all zero."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.abs().max()) if values.numel() else 0.0


def shown(relevance: Relevance, row: int) -> Tensor:
    """What the colours of a row show: the words of a text, without special tokens, and the patches of pictures beside
    it; pixels; the entries of a tensor.

    Entries are a matrix: a vector is one line, and axes before the last two are summed.
    """
    if isinstance(relevance.units, TextUnits):
        words = torch.tensor([value for _, value in relevance.words(row)])
        return torch.cat([words, *(one.patches().flatten() for one in beside(relevance, row))])
    values = relevance.map[row]
    if values.ndim == 2:
        return values
    return values[None] if values.ndim < 2 else values.flatten(0, -3).sum(0)


def beside(relevance: Relevance, row: int) -> list[Picture]:
    """The pictures beside the text of a row."""
    row = range(relevance.rows)[row]
    return [one for one in relevance.pictures if one.row == row]


def scale(relevance: Relevance, end: float) -> str:
    """The scale in words, so that no picture is normalised in silence."""
    if end == 0:
        return "all zero"
    return f"max |R| = {printed(end, 3)} ({relevance.unit or 'unit of the target'})"


def share(values: Tensor | float, end: float) -> Tensor:
    """Values over the end of the scale, in [-1, 1]; zero if the scale has no extent."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return (values / end).clamp(-1, 1) if end else torch.zeros_like(values)


def paint(values: Tensor, end: float) -> ndarray:
    """Values as colours of the scale, uint8 (..., 3)."""
    from matplotlib import colormaps
    from numpy import asarray

    return asarray(colormaps[SCALE]((share(values, end).numpy() + 1) / 2, bytes=True))[..., :3]


def tint(value: float, end: float) -> str:
    """A value as a background of a page, which can be read on light and on dark."""
    strength = _STRONGEST * float(share(value, end))
    return f"rgba({_RED if strength >= 0 else _BLUE},{abs(strength):.3f})"


def panels(one: Picture, end: float) -> list[tuple[str, ndarray]]:
    """A picture beside a text, its patches on the colours of the words, whose scale has this end, and its patches and
    pixels on scales of their own, ends at their max |R|: a label and pixels, uint8 (Y, X, 3), each.
    """
    patches, own = limit(one.patches()), limit(one.map)
    told = lambda what, most: f"{what}, max |R| {printed(most, 3)}" if most else f"{what}, all zero"
    return [("picture", one.image.numpy()), ("patches, words' scale", _over_patches(one, end)),
            (told("patches", patches), _over_patches(one, patches)), (told("pixels", own), paint(one.map, own))]


def _over_patches(one: Picture, end: float) -> ndarray:
    """A picture in grey, each patch covered by the colour of what it has in all."""
    values = torch.cat([one.patches().flatten(), torch.zeros(1)])
    return overlay(one.image, values[one.cells].double(), end)


def overlay(picture: Tensor, values: Tensor, end: float) -> ndarray:
    """A picture in grey, each pixel covered by the colour of its sign to the share |R| / end, uint8 (Y, X, 3)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = 110 + 0.55 * (picture.double() @ weights)  # lighter and flatter, so that colours stand out
    strength = share(values, end).abs()[..., None]
    ends = torch.tensor(
        [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (NEGATIVE, POSITIVE)], dtype=torch.float64
    )
    color = ends[(values >= 0).long()]
    return (strength * color + (1 - strength) * grey[..., None]).round().clamp(0, 255).byte().numpy()


def on(values: float, end: float) -> str:
    """The colour of text on the colour of a value: white on dark."""
    return "white" if abs(float(share(values, end))) > 0.65 else INK
