"""Several maps of one input side by side, each with its ledger and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..result import Curve, Relevance
from ..result.number import printed
from ..tokens import ImageUnits, TextUnits
from . import color, maps, panel
from .figure import INNER, MARGIN, WIDTH, chosen, heading, subheading
from .sheet import BODY, SMALL, TITLE, Sheet, sheet, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy import ndarray

BAND = 4
"""Maps beside each other; more go beneath."""
_COLUMN, _GAP = 2.15, 0.2  # inches: from column to column, between what stands beneath each other
_HEAD, _TITLE = 0.5, 0.36


def grid(
    relevances: Sequence[Relevance],
    row: int | None = None,
    *,
    checks: Sequence[Curve | None] | None = None,
    shared: bool | None = None,
) -> Figure:
    """Maps of the same input, by several methods or for several targets, each with its ledger and ablation curves.

    Maps in different units cannot share a scale as they are (rollout is not in logits). So maps of one method share
    one, ends at the largest |R| of all; else each has its own, ends at its own max |R|. Either way the scale is
    printed.

    Args: row: one row of the batch; None: all, beneath each other. checks: instead of each result's own `curve`.
        shared: one scale for all, or one for each; None: as said above.
    Raises: ValueError for no map, for maps that are not of the same inputs, or whose units differ where `shared` is
        asked for.
    """
    relevances = list(relevances)
    checks = list(checks) if checks is not None else [relevance.curve for relevance in relevances]
    same_inputs(relevances, checks)
    blocks = [_Grid(relevances, each, checks, together(relevances, shared)) for each in chosen(relevances[0], row)]
    page = sheet(max(block.width for block in blocks), sum(block.height for block in blocks) + MARGIN)
    y = MARGIN / 2
    for block in blocks:
        block.draw(page.part(MARGIN, y, block.width - 2 * MARGIN))
        y += block.height
    return page.figure


def together(relevances: Sequence[Relevance], shared: bool | None) -> bool:
    """Whether maps share a scale.

    Raises: ValueError if they are asked to, but differ in unit.
    """
    units = sorted({relevance.unit or "unit of the target" for relevance in relevances})
    if shared and len(units) > 1:
        raise ValueError(f"maps in {' and '.join(units)} cannot share a scale; leave `shared` out")
    return len(units) == 1 and len({relevance.method for relevance in relevances}) == 1 if shared is None else shared


def ends(relevances: Sequence[Relevance], row: int, shared: bool) -> list[float]:
    """Where the scale of each map ends."""
    own = [color.limit(color.shown(relevance, row)) for relevance in relevances]
    return [max(own)] * len(own) if shared else own


def scales(relevances: Sequence[Relevance], shared: bool) -> str:
    """What a reader must know of the colours before comparing them; nothing for one map."""
    if len(relevances) == 1:
        return ""
    return "one colour scale for all maps" if shared else "each map on a colour scale of its own, ends at its max |R|"


def titles(relevances: Sequence[Relevance], row: int) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """What all maps have in common, and what tells them apart: a title and a line beneath, for all and for each."""
    one_target = len({(heading(relevance, row)) for relevance in relevances}) == 1
    one_method = len({subheading(relevance) for relevance in relevances}) == 1
    first = relevances[0]
    if one_method and not one_target:
        return (first.method, first.conservation), [_target(relevance, row) for relevance in relevances]
    if one_target:
        each = [(relevance.method, relevance.conservation) for relevance in relevances]
        return (
            heading(first, row),
            f"by {len(relevances)} methods" if len(relevances) > 1 else subheading(first),
        ), each
    each = [
        (f"{relevance.method}: {relevance.target[row]}", f"value {printed(relevance.value[row].item())}")
        for relevance in relevances
    ]
    return (f"{len(relevances)} maps of one input", ""), each


def _target(relevance: Relevance, row: int) -> tuple[str, str]:
    return f"target {relevance.target[row]}", f"value {printed(relevance.value[row].item())}"


@dataclass(frozen=True)
class _Grid:
    """One input with all its maps on a sheet."""

    relevances: list[Relevance]
    row: int
    checks: list[Curve | None]
    shared: bool

    @property
    def pictures(self) -> bool:
        return isinstance(self.relevances[0].units, ImageUnits)

    @property
    def bands(self) -> list[range]:
        across = BAND if self.pictures else 3
        return [
            range(start, min(start + across, len(self.relevances))) for start in range(0, len(self.relevances), across)
        ]

    @property
    def width(self) -> float:
        return 2 * MARGIN + (1 + min(len(self.relevances), BAND)) * _COLUMN + 0.55 if self.pictures else WIDTH

    @property
    def height(self) -> float:
        if self.pictures:
            return _HEAD + sum(_TITLE + self._tall + self._beneath(band) for band in self.bands)
        texts = sum(maps.text_height(relevance, self.row, INNER) + 0.4 for relevance in self.relevances)
        return _HEAD + texts + sum(_TITLE + self._beneath(band) for band in self.bands)

    @property
    def _tall(self) -> float:
        return maps.picture_height(self.relevances[0]) + 0.38

    def _beneath(self, band: range) -> float:
        return self._books(band) + max(panel.check_height(self.checks[i]) for i in band) + _GAP + 0.05

    def _books(self, band: range) -> float:
        return max(panel.ledger_height(self.relevances[i].ledger, self.row) for i in band)

    def draw(self, part: Sheet) -> None:
        (title, under), each = titles(self.relevances, self.row)
        told = " · ".join(filter(None, [under, scales(self.relevances, self.shared)]))
        room = part.width - (0 if self.pictures else maps.BAR + 0.5)  # beside the colour scale
        if title == heading(self.relevances[0], self.row):
            title = heading(self.relevances[0], self.row, room)  # keeps the value
        part.write(0, 0, shortened(title, room * 72, TITLE, True), size=TITLE, weight="bold")
        part.write(0, 0.2, told, size=BODY, color=color.FAINT)
        found = ends(self.relevances, self.row, self.shared)
        draw = self._draw_pictures if self.pictures else self._draw_texts
        draw(part.part(0, _HEAD, part.width), each, found)

    def _draw_pictures(self, part: Sheet, each: list[tuple[str, str]], found: list[float]) -> None:
        unit = None if self.shared else "max |R|"
        above = _TITLE - maps.LABEL
        for band in self.bands:
            maps.draw_picture(part.part(0, above, _COLUMN), self.relevances[0].units.images[self.row].numpy(), "input")
            for place, i in enumerate(band, start=1):
                beside = part.part(place * _COLUMN, 0, maps.SIDE)
                _name(beside, each[i])
                maps.draw_picture(beside.part(0, above, _COLUMN), self._painted(i, found[i]))
                beside.write(0, _TITLE + self._tall - 0.33, self._scale(i), size=SMALL - 0.5, color=color.FAINT)
            bar = part.part(len(band) * _COLUMN + maps.SIDE + 0.1, _TITLE, 0.1)
            maps.draw_bar(bar, max(found), height=self._tall - 0.38, unit=unit)
            self._draw_beneath(part.part(_COLUMN, _TITLE + self._tall, _COLUMN), band)
            part = part.part(0, _TITLE + self._tall + self._beneath(band), part.width)

    def _draw_texts(self, part: Sheet, each: list[tuple[str, str]], found: list[float]) -> None:
        unit = None if self.shared else "max |R|"
        maps.draw_bar(part.part(INNER - maps.BAR - 0.25, 0.05 - _HEAD, maps.BAR), max(found), unit=unit)
        for i, relevance in enumerate(self.relevances):
            part.write(0, 0, shortened(each[i][0], 0.6 * INNER * 72, BODY, True), weight="bold")
            part.write(INNER, 0, self._scale(i), size=SMALL, color=color.FAINT, ha="right")
            maps.draw_text(part.part(0, 0.18, INNER), relevance, self.row, found[i])
            part = part.part(0, maps.text_height(relevance, self.row, INNER) + 0.4, INNER)
        for band in self.bands:
            across = INNER / max(len(band), 2)
            for place, i in enumerate(band):
                _name(part.part(place * across, 0, across - 0.2), each[i])
            self._draw_beneath(part.part(0, _TITLE, across), band)
            part = part.part(0, _TITLE + self._beneath(band), INNER)

    def _draw_beneath(self, part: Sheet, band: range) -> None:
        """Ledgers and checks of a band, the first in this part, the others in columns of its width."""
        one_target = len({heading(relevance, self.row) for relevance in self.relevances}) == 1
        there = [i for i in range(len(self.checks)) if self.checks[i] is not None]
        axis = panel.curve_ends([self.checks[i].row(self.row) for i in there]) if there and one_target else None
        below = self._books(band) + _GAP
        for place, i in enumerate(band):
            at = part.part(place * part.width, 0, part.width - 0.2)
            panel.draw_ledger(at, self.relevances[i].ledger, self.row, compact=True)
            at = at.part(0, below, at.width)
            panel.draw_check(
                at, self.checks[i], self.row, compact=True, ends=axis, legend=i == there[0] if there else False
            )

    def _painted(self, i: int, end: float) -> ndarray:
        return color.paint(self.relevances[i].map[self.row], end)

    def _scale(self, i: int) -> str:
        return color.scale(self.relevances[i], color.limit(color.shown(self.relevances[i], self.row)))


def _name(part: Sheet, title: tuple[str, str]) -> None:
    part.write(0, 0, shortened(title[0], part.width * 72, BODY, True), weight="bold")
    part.write(0, 0.16, shortened(title[1], part.width * 72, SMALL), size=SMALL, color=color.FAINT)


def same_inputs(relevances: list[Relevance], checks: list[Curve | None]) -> None:
    """Raises: ValueError unless there are maps, all of the same inputs, and a check or None for each."""
    if not relevances:
        raise ValueError("a grid needs at least one map, got none")
    if len(checks) != len(relevances):
        raise ValueError(
            f"{len(checks)} checks for {len(relevances)} maps; give one for each, None where there is none"
        )
    first = relevances[0]
    if not isinstance(first.units, ImageUnits | TextUnits):
        raise ValueError(
            "a grid shows maps of images or of text; draw maps of plain tensors one by one with view.figure"
        )
    for other in relevances[1:]:
        if other.units != first.units:
            raise ValueError(
                f"maps side by side must be of the same inputs; that by {other.method} is of other inputs "
                f"than that by {first.method}"
            )
