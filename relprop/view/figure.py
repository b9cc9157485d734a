"""One result as a matplotlib figure: its map, its ledger and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..result import Curve, Relevance
from ..result.number import printed
from ..tokens import ImageUnits, TextUnits
from . import color, maps, panel
from .sheet import BODY, TITLE, Sheet, extent, sheet, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, MARGIN = 7.4, 0.3  # inches
INNER = WIDTH - 2 * MARGIN
ROWS = 16
"""Most rows of one figure."""
_HEAD, _GAP, _FOOT = 0.5, 0.24, 0.15
_LEDGER, _ALONE = 3.5, 4.6  # width of a ledger with a check beside it, and without


def figure(relevance: Relevance, row: int | None = None, *, check: Curve | None = None) -> Figure:
    """A result as a figure: each row's map (words on colour, or picture, overlay and map), its ledger, and its check.

    Colours are zero-centred, with symmetric ends at max |R|, which is printed; nothing is rescaled or clipped. Of a
    text, the ends are those of the words; special tokens stand apart in grey.

    Args: row: one row of the batch; None: all, beneath each other. check: instead of `relevance.curve`.
    Raises: ValueError for a row that is not there, or more than `ROWS` rows.
    """
    check = check or relevance.curve
    blocks = [_Block(relevance, each, check) for each in chosen(relevance, row)]
    page = sheet(WIDTH, sum(block.height for block in blocks) + MARGIN)
    y = MARGIN / 2
    for block in blocks:
        block.draw(page.part(MARGIN, y, INNER))
        y += block.height
    return page.figure


def image(relevance: Relevance, row: int = 0, *, check: Curve | None = None) -> Figure:
    """`figure` of one picture.

    Raises: ValueError if the input is no image.
    """
    if not isinstance(relevance.units, ImageUnits):
        raise ValueError("this is no map of an image; use view.figure, which draws any map")
    return figure(relevance, row, check=check)


def text(relevance: Relevance, row: int = 0, *, check: Curve | None = None) -> Figure:
    """`figure` of one text.

    Raises: ValueError if the input is no text.
    """
    if not isinstance(relevance.units, TextUnits):
        raise ValueError("this is no map of a text; use view.figure, which draws any map")
    return figure(relevance, row, check=check)


def heading(relevance: Relevance, row: int, width: float | None = None) -> str:
    """What was explained: the target's name, cut short if it does not fit into this many inches, and its value."""
    value = f" · value {printed(relevance.value[row].item())}"
    name = f"target {relevance.target[row]}"
    if width is not None:
        name = shortened(name, width * 72 - extent(value, TITLE, True), TITLE, True)
    return name + value


def subheading(relevance: Relevance) -> str:
    """How it was explained."""
    return f"{relevance.method} · {relevance.conservation}"


def chosen(relevance: Relevance, row: int | None, most: int = ROWS) -> Sequence[int]:
    """The rows to draw.

    Raises: ValueError for a row that is not there, or for more than `most`.
    """
    if row is None:
        if relevance.rows > most:
            raise ValueError(
                f"{relevance.rows} rows are too many for one figure (at most {most}); "
                "draw one with row=..., or save as .html"
            )
        return range(relevance.rows)
    if not -relevance.rows <= row < relevance.rows:
        raise ValueError(f"no row {row}; there are {relevance.rows}")
    return [range(relevance.rows)[row]]


@dataclass(frozen=True)
class _Block:
    """One row of a result."""

    relevance: Relevance
    row: int
    check: Curve | None

    @property
    def height(self) -> float:
        beneath = max(panel.ledger_height(self.relevance.ledger, self.row), panel.check_height(self.check))
        return _HEAD + maps.height(self.relevance, self.row, INNER) + _GAP + beneath + _FOOT

    def draw(self, part: Sheet) -> None:
        relevance, row = self.relevance, self.row
        beside = maps.BAR + 0.5 if isinstance(relevance.units, TextUnits) else 0.0  # the colour scale
        part.write(0, 0, heading(relevance, row, INNER - beside), size=TITLE, weight="bold")
        part.write(0, 0.2, subheading(relevance), size=BODY, color=color.FAINT)
        maps.draw(part.part(0, _HEAD, INNER), relevance, row)
        y = _HEAD + maps.height(relevance, row, INNER) + _GAP
        wide = _ALONE if self.check is None else _LEDGER
        panel.draw_ledger(part.part(0, y, wide), relevance.ledger, row)
        panel.draw_check(part.part(_LEDGER + 0.25, y, INNER - _LEDGER - 0.25), self.check, row)
