"""What the strongest heads attend to: patterns of the first example on both sides, as a figure and for pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..result import Effects
from ..result.number import printed
from ..result.study import Study
from . import color
from .page import png
from .sheet import BODY, SMALL, TINY, TITLE, Sheet, sheet, shortened, visible
from .words import spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy import ndarray

SCALE = "Purples"  # matplotlib's name; weights have no sign
SIDES = ("base", "counterfactual")
_WIDTH, _MARGIN, _HEAD, _NAME, _LABEL = 7.4, 0.3, 0.62, 0.42, 0.62  # inches
_CELL, _ROOM = 15, 76  # of a page's pattern, in pixels: a cell, and what labels take
_PAGE = 8.25  # points of a page's labels


def patterns(effects: Effects) -> Figure:
    """The patterns of the strongest heads as a figure: a column each, base above counterfactual; a row of a pattern is
    the token that attends, a column what it attends to.

    Raises: ValueError where there are none.
    """
    heads = effects.about.get("patterns", [])
    if not heads:
        raise ValueError("these effects have no attention patterns: they are kept of heads, on texts of at most 64 "
                         "tokens")
    across = max(2, len(heads))
    wide = (_WIDTH - 2 * _MARGIN) / across
    size = wide - _LABEL - 0.12
    tall = _NAME + size + _LABEL
    page = sheet(_WIDTH, _HEAD + 2 * tall)
    room = 72 * (_WIDTH - 2 * _MARGIN)
    title = f"{effects.about.get('model', 'effects')}: what the strongest heads attend to"
    page.write(_MARGIN, 0.14, shortened(title, room, TITLE, True), size=TITLE, weight="bold")
    page.write(_MARGIN, 0.34, shortened(scale(), room, SMALL), size=SMALL, color=color.FAINT)
    for column, head in enumerate(heads):
        for row, side in enumerate(SIDES):
            part = page.part(_MARGIN + column * wide, _HEAD + row * tall, wide)
            part.write(0, 0, shortened(f"{head['head']}, {side}", 72 * wide - 6, BODY, True), size=BODY, weight="bold")
            part.write(0, 0.13, f"up to {printed(end(head), 2)}", size=TINY, color=color.FAINT)
            _map(part, weights(head, side), head["tokens"][row], size, end(head))
    return page.figure


def scale() -> str:
    """What colours mean, in words."""
    return "rows attend to columns, example 0; from white, 0, to dark, the strongest of the head on both sides"


def end(head: dict) -> float:
    """Where the colours of a head end: its largest weight on either side."""
    return max(float(weights(head, side).max()) for side in SIDES)


def weights(head: dict, side: str) -> Tensor:
    """A pattern, (T, T)."""
    return torch.as_tensor(head[side], dtype=torch.float64)


def pages(of: Effects | Study) -> list[dict]:
    """What a page shows of each head: labels with their places in pixels, and cells as a picture's data address."""
    found = []
    for head in of.about.get("patterns", []):
        both = [_page(weights(head, side), tokens, side, end(head)) for side, tokens in zip(SIDES, head["tokens"])]
        found.append({"head": head["head"], "sides": both, "last": _last(head), "end": printed(end(head), 2)})
    return found


def _page(values: Tensor, tokens: list[str], side: str, end: float) -> dict:
    labels = [(_ROOM + _CELL * (place + 0.5), shortened(visible(spelled(token)), 0.75 * _ROOM - 8, _PAGE))
              for place, token in enumerate(tokens)]
    return {"side": side, "labels": labels, "pixels": png(painted(values, end)), "size": _CELL * len(tokens),
            "room": _ROOM}


def _last(head: dict) -> list[dict]:
    """What the last token attends to most, on both sides."""
    said = []
    for side, tokens in zip(SIDES, head["tokens"]):
        row = weights(head, side)[-1]
        top = row.topk(min(3, len(row)))
        said.append({"side": side, "token": spelled(tokens[-1]),
                     "to": [(spelled(tokens[at]), f"{value:.2f}") for value, at in zip(top.values.tolist(),
                                                                               top.indices.tolist())]})
    return said


def painted(values: Tensor, end: float) -> ndarray:
    """Weights as colours, the darkest for `end`, uint8 (T, T, 3)."""
    from matplotlib import colormaps
    from numpy import asarray

    return asarray(colormaps[SCALE]((values / end).clamp(0, 1).numpy(), bytes=True))[..., :3]


def _map(part: Sheet, values: Tensor, tokens: list[str], size: float, end: float) -> None:
    axes = part.axes(_LABEL, 0.26, size, size)
    axes.imshow(values.numpy(), cmap=SCALE, vmin=0, vmax=end, interpolation="nearest", aspect="auto")
    every = -(-len(tokens) // max(1, int(size / 0.085)))
    shown = [shortened(visible(spelled(token)), 72 * _LABEL - 6, TINY) for token in tokens[::every]]
    for set_ticks, turn in ((axes.set_yticks, {}), (axes.set_xticks, {"rotation": 90})):
        for tick in set_ticks(range(0, len(tokens), every), shown, fontsize=TINY, **turn):
            tick.label1.set_parse_math(False)


__all__ = ["pages", "painted", "patterns", "scale"]
