"""Maps drawn on a sheet: words, pictures and plain tensors on one colour scale, with the scale beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..result import Picture, Relevance
from ..result.number import signed
from ..tokens import ImageUnits, TextUnits
from . import color, words
from .sheet import SMALL, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy import ndarray
    from torch import Tensor

SIDE = 1.95  # inches: of a picture
LABEL = 0.17  # the line above a picture
BAR = 1.6  # a colour scale that lies
_APART = 1.2  # before the special tokens
_BENEATH = 0.12  # above pictures beside a text
_FEW = 128  # entries that are drawn as bars


def height(relevance: Relevance, row: int, width: float) -> float:
    """Inches that `draw` takes at this width."""
    if isinstance(relevance.units, TextUnits):
        return text_height(relevance, row, width)
    if isinstance(relevance.units, ImageUnits):
        return LABEL + picture_height(relevance)
    return LABEL + (1.1 if relevance.map.ndim == 2 else 1.9)


def draw(part: Sheet, relevance: Relevance, row: int) -> None:
    """The map of one row over the width of the part; a text's colour scale stands above its top, on the right."""
    if isinstance(relevance.units, TextUnits):
        end = color.limit(color.shown(relevance, row))
        draw_text(part, relevance, row, end)
        part.write(part.width, -0.5, color.scale(relevance, end), size=SMALL, color=color.FAINT, ha="right")
        draw_bar(part.part(part.width - BAR - 0.2, -0.34, BAR), end)
    elif isinstance(relevance.units, ImageUnits):
        _draw_pictures(part, relevance, row)
    else:
        _draw_tensor(part, relevance, row)


def text_height(relevance: Relevance, row: int, width: float) -> float:
    """Inches that `draw_text` takes at this width."""
    end = color.limit(color.shown(relevance, row))
    found = words.text_lines(relevance, row, width * 72, end)
    apart = words.aside_lines(relevance, row, (width - _APART) * 72)
    tall = (len(found) * words.PITCH + sum(len(told) for _, told in apart) * words.SMALL_PITCH) / 72
    tall += 0.06 * len(apart)
    return tall + sum(LABEL + _tall(one.image, width) + _BENEATH for one in color.beside(relevance, row))


def draw_text(part: Sheet, relevance: Relevance, row: int, end: float) -> None:
    """Words on the colours of a scale with this end, beneath them what stands apart and the pictures beside the text,
    their patches on the colours of the words.
    """
    found = words.text_lines(relevance, row, part.width * 72, end)
    tall = len(found) * words.PITCH / 72
    words.draw(_points(part, tall), found, end)
    for name, apart in words.aside_lines(relevance, row, (part.width - _APART) * 72):
        part.write(0, tall + 0.1, name, size=SMALL, color=color.FAINT)
        beneath = part.part(_APART, tall + 0.06, part.width - _APART)
        words.draw_specials(_points(beneath, len(apart) * words.SMALL_PITCH / 72), apart)
        tall += 0.06 + len(apart) * words.SMALL_PITCH / 72
    for one in color.beside(relevance, row):
        _draw_beside(part.part(0, tall + _BENEATH, part.width), one, end)
        tall += LABEL + _tall(one.image, part.width) + _BENEATH


def draw_bar(part: Sheet, end: float, *, height: float | None = None, unit: str | None = None) -> None:
    """The colour scale with its ends, in the unit of the map or as `unit` writes them; upright if it has a height."""
    steps = torch.linspace(-1, 1, 256)[None] if height is None else torch.linspace(1, -1, 256)[:, None]
    axes = part.axes(0, 0, *((part.width, 0.09) if height is None else (0.09, height)))
    axes.imshow(color.paint(steps, 1.0), aspect="auto", extent=(-1, 1, -1, 1))
    ends = [signed(-end), "0", signed(end)] if unit is None else ["−" + unit, "0", "+" + unit]
    ends = ends if end else ["", "all zero", ""]
    if height is None:
        axes.set_xticks([-1, 0, 1], ends)
        axes.set_yticks([])
    else:
        axes.set_yticks([-1, 0, 1], ends)
        axes.yaxis.tick_right()
        axes.set_xticks([])


def picture_height(relevance: Relevance) -> float:
    """Inches of a picture, its label not counted; tall ones are drawn smaller."""
    Y, X = relevance.units.size
    return SIDE * min(Y / X, 1.6)


def draw_picture(part: Sheet, pixels: ndarray, label: str = "") -> None:
    """Pixels (Y, X, 3), none of them blurred or cut, beneath a label."""
    part.write(0, 0, label, size=SMALL, color=color.FAINT)
    axes = part.axes(0, LABEL, SIDE, SIDE * min(pixels.shape[0] / pixels.shape[1], 1.6))
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xticks=[], yticks=[], anchor="NW")


def _draw_beside(part: Sheet, one: Picture, end: float) -> None:
    """A picture beside a text and its maps, next to each other."""
    side = (part.width - 3 * _BENEATH) / 4
    for place, (label, pixels) in enumerate(color.panels(one, end)):
        at = part.part(place * (side + _BENEATH), 0, side)
        at.write(0, 0, label, size=SMALL, color=color.FAINT)
        axes = at.axes(0, LABEL, side, _tall(one.image, part.width))
        axes.imshow(pixels, interpolation="nearest")
        axes.set(xticks=[], yticks=[], anchor="NW")


def _tall(image: Tensor, width: float) -> float:
    """Inches of a picture beside a text, uint8 (Y, X, 3), four of which share a width; tall ones are drawn smaller."""
    return (width - 3 * _BENEATH) / 4 * min(image.shape[0] / image.shape[1], 1.6)


def _draw_pictures(part: Sheet, relevance: Relevance, row: int) -> None:
    picture, values = relevance.units.images[row], relevance.map[row]
    end = color.limit(values)
    draw_picture(part, picture.numpy(), "input")
    across = SIDE + 0.12
    draw_picture(part.part(across, 0, SIDE), color.overlay(picture, values, end), "overlay")
    beside = part.part(2 * across, 0, SIDE)
    draw_picture(beside, color.paint(values, end), f"relevance, {color.scale(relevance, end)}")
    draw_bar(beside.part(across, LABEL, 0.1), end, height=picture_height(relevance))


def _draw_tensor(part: Sheet, relevance: Relevance, row: int) -> None:
    """Entries of a plain tensor: bars where they are few, else a map."""
    values = color.shown(relevance, row)
    end, tall = color.limit(values), height(relevance, row, part.width) - LABEL
    summed = ", summed over leading axes" if relevance.map.ndim > 3 else ""
    part.write(0, 0, f"relevance{summed}, {color.scale(relevance, end)}", size=SMALL, color=color.FAINT)
    if len(values) == 1 and values.numel() <= _FEW:
        _draw_entries(part.axes(0.45, LABEL, part.width - 0.45, tall), values[0].tolist(), end)
        return
    axes = part.axes(0, LABEL, part.width - 0.75, tall)
    axes.imshow(color.paint(values, end), aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    draw_bar(part.part(part.width - 0.63, LABEL, 0.1), end, height=tall)


def _draw_entries(axes: Axes, values: list[float], end: float) -> None:
    room = 1.08 * end or 1.0
    axes.bar(range(len(values)), values, color=[color.sign(value) for value in values], width=0.8)
    axes.axhline(0, color=color.FAINT, linewidth=0.6)
    axes.set(xlim=(-0.7, len(values) - 0.3), ylim=(-room, room))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.locator_params(axis="y", nbins=5)


def _points(part: Sheet, height: float) -> Axes:
    """Axes over the width of the part whose unit is the point, y downwards."""
    axes = part.axes(0, 0, part.width, height, frame=False)
    axes.set(xlim=(0, part.width * 72), ylim=(height * 72, 0))
    return axes
