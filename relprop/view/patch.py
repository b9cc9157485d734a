"""Effects of patches, laid over the picture they are of: the base of the first example, layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..result import Effects
from ..result.arrangement import Arrangement
from ..result.number import printed, signed
from ..tokens import ImageUnits, units
from . import color
from .sheet import BODY, SMALL, Sheet, shortened

if TYPE_CHECKING:
    from numpy import ndarray

ACROSS = 6  # pictures beside each other in a figure
_PATCH = re.compile(r"@p(\d+)")
_NAME, _GAP, _LINE = 0.36, 0.12, 0.3  # inches


def sides(effects: Effects) -> list[ImageUnits]:
    """The pictures of the first example, base and counterfactual; none of other inputs."""
    return [units(one) for one in effects.about.get("pictures", [])]


def over_patches(effects: Effects, board: Arrangement) -> bool:
    """Whether a board is of patches of a picture that is there."""
    return any(map(_PATCH.fullmatch, board.columns)) and any(one.grid and one.patch for one in sides(effects))


def panels(effects: Effects, board: Arrangement, kind: str) -> Iterator[tuple[str, str, ndarray]]:
    """Name, what is said beneath it, and pixels, uint8 (Y, X, 3): both sides of the first example, then a layer each,
    its patches' effects in that example over the base.
    """
    base, other = sides(effects)
    yield "base", "", base.images[0].numpy()
    yield "counterfactual", "", other.images[0].numpy()
    end, values = limit(effects, board, kind), effects.effect(kind)[:, 0]
    for row, name in enumerate(board.rows):
        own = [(board.columns[column], float(values[index]))
               for index, at, column in zip(board.index, board.row, board.column) if at == row]
        rest = ", ".join(f"{where} {signed(value)}" for where, value in own if not _PATCH.fullmatch(where))
        yield name, rest, color.overlay(base.images[0], spread(base, own), end)


def spread(picture: ImageUnits, own: list[tuple[str, float]]) -> Tensor:
    """Effects by patch as pixels, (Y, X); zero where no patch is changed."""
    values = torch.zeros(math.prod(picture.grid), dtype=torch.float64)
    for where, value in own:
        match = _PATCH.fullmatch(where)
        if match:
            values[int(match[1])] = value
    (Py, Px), (Y, X) = picture.patch, picture.size
    whole = values.view(picture.grid).repeat_interleave(Py, 0).repeat_interleave(Px, 1)
    return torch.nn.functional.pad(whole, (0, X - whole.shape[1], 0, Y - whole.shape[0]))


def limit(effects: Effects, board: Arrangement, kind: str) -> float:
    """Where the colours end: the strongest patch of the first example."""
    own = [index for index, column in zip(board.index, board.column) if _PATCH.fullmatch(board.columns[column])]
    return color.limit(effects.effect(kind)[own, 0])


def scale(effects: Effects, board: Arrangement, kind: str) -> str:
    """What colours mean, in words."""
    count, end = len(effects.base), limit(effects, board, kind)
    ends = "all zero" if end == 0 else f"red +, blue −, strongest at ±{printed(end, 3)}"
    return f"each patch for itself, over the base of example 0{f' of {count}' if count > 1 else ''}; {ends}"


def height(effects: Effects, board: Arrangement, width: float) -> float:
    """Inches that `draw` takes."""
    return _NAME + -(-(len(board.rows) + 2) // ACROSS) * (_side(effects, width)[1] + _LINE)


def draw(part: Sheet, effects: Effects, board: Arrangement, kind: str, width: float) -> None:
    """The pictures, several beside each other."""
    part.write(0, 0, shortened(f"{kind.capitalize()} effects: {board.title}", 72 * width, BODY, True), size=BODY,
               weight="bold")
    part.write(0, 0.16, shortened(scale(effects, board, kind), 72 * width, SMALL), size=SMALL, color=color.FAINT)
    wide, tall = _side(effects, width)
    for number, (name, rest, pixels) in enumerate(panels(effects, board, kind)):
        down, across = divmod(number, ACROSS)
        x, y = across * (wide + _GAP), _NAME + down * (tall + _LINE)
        part.write(x, y, shortened(f"{name}  {rest}".rstrip(), 72 * wide, SMALL), size=SMALL)
        axes = part.axes(x, y + 0.13, wide, tall)
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])


def _side(effects: Effects, width: float) -> tuple[float, float]:
    """Width and height of a picture in inches."""
    Y, X = sides(effects)[0].size
    wide = (width - _GAP * (ACROSS - 1)) / ACROSS
    return wide, wide * Y / X


__all__ = ["draw", "height", "over_patches", "panels", "scale", "sides"]
