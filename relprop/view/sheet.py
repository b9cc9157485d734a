"""A figure measured in inches from its top left corner, on which nothing is ever read as mathematics or LaTeX."""

from __future__ import annotations

import unicodedata
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from .color import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE, BODY, SMALL, TINY = 10.0, 8.0, 7.0, 5.5  # points
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Arial Unicode MS",
    "Hiragino Sans",
    "Microsoft YaHei",
)  # the first has Latin, Greek, Cyrillic, Hebrew and Arabic and comes with matplotlib
DPI = 200


@dataclass(frozen=True)
class Sheet:
    """A figure, or a part of one, that is drawn on from its own top left corner; all in inches."""

    figure: Figure
    width: float
    left: float = 0.0
    top: float = 0.0

    def part(self, x: float, y: float, width: float) -> Sheet:
        """The part with its top left corner at (x, y)."""
        return replace(self, left=self.left + x, top=self.top + y, width=width)

    def axes(self, x: float, y: float, width: float, height: float, *, frame: bool = True) -> Axes:
        """Axes with their top left corner at (x, y), y downwards, all in inches."""
        across, down = self.figure.get_size_inches()
        x, y = self.left + x, self.top + y
        axes = self.figure.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))
        axes.tick_params(labelsize=SMALL, length=2, width=0.6, pad=2, colors=INK)
        for spine in axes.spines.values():
            spine.set(linewidth=0.6, color=FAINT)
        if not frame:
            axes.set_axis_off()
        return axes

    def write(self, x: float, y: float, text: str, *, size: float = BODY, color: str = INK, **style: Any) -> None:
        """Text with the top of its line at (x, y)."""
        across, down = self.figure.get_size_inches()
        self.figure.text(
            (self.left + x) / across,
            1 - (self.top + y) / down,
            visible(text),
            fontsize=size,
            color=color,
            fontfamily=families(),
            parse_math=False,
            **{"va": "top", **style},
        )


def sheet(width: float, height: float) -> Sheet:
    """An empty figure, apart from pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return Sheet(figure, width)


@cache
def families() -> list[str]:
    """The fonts of `FONTS` that are installed."""
    from matplotlib.font_manager import fontManager

    there = set(fontManager.get_font_names())
    return [name for name in FONTS if name in there]


@cache
def _ruler() -> Any:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(8, 8, 72 * 8)  # fine, so that hinting does not round widths


@cache
def extent(text: str, size: float, bold: bool = False) -> float:
    """Width of a text in points."""
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family=families(), size=size, weight="bold" if bold else "normal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters no font has: drawing says so too
        return _ruler().get_text_width_height_descent(text, font, False)[0] / 8


def visible(text: str) -> str:
    """A text on one line: newlines, tabs and other control characters as signs that can be seen."""
    signs = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(
        signs.get(letter, "\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") else letter) for letter in text
    )


def shortened(text: str, width: float, size: float, bold: bool = False) -> str:
    """The text, or as much of its beginning as fits into this many points, with an ellipsis."""
    text = visible(text)
    if extent(text, size, bold) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if extent(text[:middle] + "…", size, bold) <= width else (low, middle - 1)
    return text[:low] + "…"
