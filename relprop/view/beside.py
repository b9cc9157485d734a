"""Numbers of ours beside those that a paper published, as a page; and a metric along a number, as curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..result import Table
from .color import FAINT, INK
from .sheet import BODY, SMALL, TITLE, sheet, shortened
from .template import template

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_WIDE, _TALL, _LEGEND, _MARGIN, _HEAD = 4.2, 2.9, 1.9, 0.2, 0.5  # inches


def beside(frame: DataFrame, *, title: str, here: str, reference: str, source: str, apart: str, table: str | None = None
           ) -> str:
    """A whole HTML document.

    Args: frame: by method and (column, "here" or "paper"), NaN where there is no number. here: what was measured.
        reference, source, apart: the paper, where its numbers were read, what is done otherwise. table: link to all
        that was measured.
    """
    columns = {column: list(frame[column].columns) for column, _ in frame.columns}
    lines = [(name, [(who, _said(value)) for (_, who), value in row.items()]) for name, row in frame.iterrows()]
    return template("beside.html").render(
        title=title, here=here, reference=reference, source=source, apart=apart, columns=columns, lines=lines,
        table=table, cited=any("paper" in who for who in columns.values()))


def series(table: Table, places: Mapping[str, float], *, title: str, along: str, up: str) -> Figure:
    """The means of metrics as a curve a method, with their 95 % intervals; the controls are faint.

    Args: places: of each metric, its place on the horizontal axis. title, along, up: of the figure and its axes.
    """
    from matplotlib import colormaps

    names = [*table.methods, *table.controls]
    page = sheet(2 * _MARGIN + 0.45 + _WIDE + _LEGEND, _HEAD + _TALL + 0.55)
    page.write(_MARGIN, 0.16, shortened(title, 72 * (_WIDE + _LEGEND), TITLE, True), size=TITLE, weight="bold")
    axes = page.axes(_MARGIN + 0.45, _HEAD, _WIDE, _TALL)
    inks = colormaps["tab10"].colors
    for number, name in enumerate(names):
        control = name in table.controls
        known = [(place, table.cell(metric, name)) for metric, place in places.items()
                 if table.cell(metric, name).mean is not None]
        style = {"color": FAINT if control else inks[number % len(inks)], "linewidth": 1.0 if control else 1.4,
                 "linestyle": ("--", ":", "-.", (0, (5, 1, 1, 1)))[number % 4] if control else "-"}
        across = [place for place, _ in known]
        axes.plot(across, [cell.mean for _, cell in known], label=name, marker=None if control else "o",
                  markersize=2.6, **style)
        spans = [cell for _, cell in known if cell.low is not None]
        if not control and len(spans) == len(known):
            axes.fill_between(across, [cell.low for cell in spans], [cell.high for cell in spans],
                              color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel(along, fontsize=BODY, color=INK)
    axes.set_ylabel(up, fontsize=BODY, color=INK)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=SMALL, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return page.figure


def _said(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:#.4g}".replace("-", "−")  # 79.70 as the paper has it
