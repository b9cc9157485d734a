"""A benchmark as people see it: a forest plot for each metric, and a page with the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..result import Cell, Table
from ..result.number import amount, chance, printed, signed
from ..result.table import reasons
from .color import CHANCE, FAINT, INK, LINE, MOST_FIRST
from .sheet import BODY, SMALL, TITLE, Sheet, sheet, shortened
from .template import template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACROSS = 3  # panels beside each other
WAYS = {"higher": "higher is better", "lower": "lower is better", "zero": "zero is best"}
_LABELS, _PANEL, _LINE = 1.75, 1.95, 0.19  # inches: names of the methods, a panel, a line of it
_MARGIN, _HEAD, _NAME, _AXIS = 0.2, 0.55, 0.34, 0.34
_FACTS = ("data", "subject", "methods", "metrics")  # of the configuration, shown elsewhere on the page


def forest(table: Table) -> Figure:
    """A panel a metric: the mean of each method with its 95 % interval; the first method's mean goes through all."""
    names = [*table.methods, *table.controls]
    bands = [table.metrics[start:start + ACROSS] for start in range(0, len(table.metrics), ACROSS)]
    tall = _NAME + _LINE * len(names) + _AXIS
    width = 2 * _MARGIN + _LABELS + _PANEL * min(ACROSS, len(table.metrics))
    page = sheet(width, _HEAD + len(bands) * tall + _MARGIN)
    page.write(_MARGIN, 0.14, shortened(_title(table), 72 * (width - 2 * _MARGIN), TITLE, True), size=TITLE,
               weight="bold")
    page.write(_MARGIN, 0.34, shortened(_counted(table), 72 * (width - 2 * _MARGIN), SMALL), size=SMALL, color=FAINT)
    for number, band in enumerate(bands):
        part = page.part(_MARGIN, _HEAD + number * tall, width)
        _names(part, names, table.controls)
        for place, metric in enumerate(band):
            _panel(part.part(_LABELS + place * _PANEL, 0, _PANEL), table, metric, names)
    return page.figure


def report(table: Table) -> str:
    """A whole HTML document with every number of the table, what is missing and why, and how it was made."""
    return template("benchmark.html").render(
        title=_title(table), counted=_counted(table), metrics=[_heading(metric) for metric in table.metrics],
        lines=[_line(table, name) for name in [*table.methods, *table.controls]], first=table.methods[0],
        tests=[_tests(table, metric) for metric in table.metrics], costs=[_cost(cost) for cost in table.costs],
        missing=[(metric["name"], why, count) for metric in table.metrics for why, count in
                 reasons([cell for cell in table.cells if cell.metric == metric["name"]]).items()],
        skipped=list(table.about.get("skipped", {}).items()), facts=list(_facts(table.about)))


_MARKS = {"worse": " <", "better": " >", "": ""}  # than the first method, see `verdict`


def markdown(table: Table, names: Sequence[str]) -> str:
    """These metrics as a table of Markdown: means and half their intervals, "<" where the first method is better, ">"
    where it is worse, and what a map costs in plain forwards + backwards."""
    costs = table.cost["relative"]
    lines = [f"| method | {' | '.join(names)} | time |", f"|{' --- |' * (len(names) + 2)}"]
    for method in [*table.methods, *table.controls]:
        cells = [table.cell(name, method) for name in names]
        said = [f"{one.mean:.3f} ± {(one.high - one.low) / 2:.3f}{_MARKS[verdict(table, one)]}" for one in cells]
        lines.append(f"| `{method}` | {' | '.join(said)} | {f'{costs[method]:.1f}' if method in costs else ''} |")
    return "\n".join(lines)


def verdict(table: Table, cell: Cell) -> str:
    """Whether a method is "better" or "worse" than the first on a metric, its interval and corrected p-value agreeing,
    or "" where that is open."""
    if cell.difference is None or cell.p_holm is None or cell.difference_low is None or cell.p_holm > 0.05:
        return ""
    if cell.difference_low <= 0 <= cell.difference_high:
        return ""
    best = next(metric["best"] for metric in table.metrics if metric["name"] == cell.metric)
    gain = {"higher": cell.difference, "lower": -cell.difference,
            "zero": abs(table.cell(cell.metric, table.methods[0]).mean or 0.0) - abs(cell.mean or 0.0)}[best]
    return "better" if gain > 0 else "worse"


def _names(part: Sheet, names: Sequence[str], controls: Sequence[str]) -> None:
    for line, name in enumerate(names):
        part.write(0, _NAME + (line + 0.5) * _LINE, shortened(name, 72 * (_LABELS - 0.15), BODY), size=BODY,
                   color=FAINT if name in controls else INK, va="center")


def _panel(part: Sheet, table: Table, metric: dict[str, str], names: Sequence[str]) -> None:
    part.write(0, 0.02, shortened(metric["name"], 72 * (_PANEL - 0.2), BODY, True), size=BODY, weight="bold")
    part.write(0, 0.16, WAYS[metric["best"]], size=SMALL, color=FAINT)
    axes = part.axes(0, _NAME, _PANEL - 0.2, _LINE * len(names))
    first = table.cell(metric["name"], table.methods[0]).mean
    if first is not None:
        axes.axvline(first, color=LINE, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    for line, name in enumerate(names):
        cell = table.cell(metric["name"], name)
        if cell.mean is None:
            continue
        ink = CHANCE if name in table.controls else MOST_FIRST
        axes.plot([cell.mean], [line], "o", markersize=3.2, color=ink)
        if cell.low is not None:
            axes.plot([cell.low, cell.high], [line, line], color=ink, linewidth=1.1, solid_capstyle="butt")
    axes.set(ylim=(len(names) - 0.5, -0.5), yticks=[])
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.08)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _title(table: Table) -> str:
    subject, data = (table.about.get(name, {}).get("name", "?") for name in ("subject", "data"))
    return f"{subject} on {data}"


def _counted(table: Table) -> str:
    rows, skipped = table.about.get("rows", 0), sum(table.about.get("skipped", {}).values())
    groups = table.about.get("groups", rows)
    said = f"{rows} inputs" + (f" in {groups} independent groups" if groups != rows else "")
    return said + (f", {skipped} left out" if skipped else "") + "; means with 95 % intervals"


def _heading(metric: dict[str, str]) -> dict[str, str]:
    return {**metric, "way": WAYS[metric["best"]], "arrow": {"higher": "↑", "lower": "↓", "zero": "→0"}[metric["best"]]}


def _line(table: Table, name: str) -> dict:
    cells = [table.cell(metric["name"], name) for metric in table.metrics]
    return {"name": name, "control": name in table.controls, "first": name == table.methods[0], "cells": [
        {"mean": "–" if cell.mean is None else printed(cell.mean, 3), "verdict": verdict(table, cell),
         "span": "" if cell.low is None else f"{printed(cell.low, 3)} to {printed(cell.high, 3)}",
         "best": table.best(cell.metric) == name, "rows": cell.rows,
         "missing": "; ".join(f"{count} × {why}" for why, count in cell.undefined.items())} for cell in cells]}


def _tests(table: Table, metric: dict[str, str]) -> dict:
    cells = [table.cell(metric["name"], name) for name in [*table.methods[1:], *table.controls]]
    return {"metric": metric["name"], "lines": [
        {"name": cell.method, "difference": signed(cell.difference), "verdict": verdict(table, cell),
         "span": "" if cell.difference_low is None else
         f"{signed(cell.difference_low)} to {signed(cell.difference_high)}",
         "p": "" if cell.p_holm is None else chance(cell.p_holm)} for cell in cells if cell.difference is not None]}


def _cost(cost: object) -> dict[str, str]:
    return {"name": cost.method, **{name: amount(getattr(cost, name), 3)
                                    for name in ("forwards", "backwards", "seconds", "relative")}}


def _facts(about: dict, path: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in about.items():
        where = f"{path}{name}"
        if isinstance(value, dict):
            found += _facts(value, f"{where}.")
        elif path or name not in _FACTS:
            found.append((where, str(value)))
    return found
