"""What a benchmark found: a number with its interval for every metric and method, and what each method cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from . import archive
from .number import amount

if TYPE_CHECKING:
    from pandas import DataFrame

_KIND = "benchmark"


@dataclass(frozen=True)
class Cell:
    """One metric of one method: the mean over the rows that have a value, and the difference from the first method on
    the rows that both have.

    `low` and `high` are the 95 % interval of the mean, `difference_low` and `difference_high` that of the mean
    difference; `p_value` is of "no difference", `p_holm` corrected over the methods of the metric. None: not known.
    `undefined` counts rows without a value, by reason.
    """

    metric: str
    method: str
    mean: float | None
    low: float | None
    high: float | None
    rows: int
    undefined: dict[str, int] = field(default_factory=dict)
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Cost:
    """What a map of one row cost: forwards, backwards, seconds, and seconds over those of one forward and backward."""

    method: str
    forwards: float
    backwards: float
    seconds: float
    relative: float


@dataclass(frozen=True, eq=False)
class Table:
    """All cells, in the order of the metrics and, within, of the methods, the controls last.

    `metrics` are dicts of name, best ("higher", "lower" or "zero"), about and reference; `methods` and `controls` are
    names; `about` is the configuration and what was left out.
    """

    cells: tuple[Cell, ...]
    costs: tuple[Cost, ...]
    metrics: tuple[dict[str, str], ...]
    methods: tuple[str, ...]
    controls: tuple[str, ...]
    about: dict

    @property
    def table(self) -> DataFrame:
        """One row a metric and method: mean, interval, number of rows, difference from the first method, p-values."""
        from pandas import DataFrame

        lines = [{**asdict(cell), "undefined": sum(cell.undefined.values())} for cell in self.cells]
        best = {metric["name"]: metric["best"] for metric in self.metrics}
        frame = DataFrame(lines).assign(best=[best[cell.metric] for cell in self.cells])
        numbers = [name for name in asdict(self.cells[0]) if name not in ("metric", "method", "undefined")]
        return frame.astype(dict.fromkeys(numbers, float) | {"rows": int}).set_index(["metric", "method"])

    @property
    def cost(self) -> DataFrame:
        """One row a method: forwards, backwards, seconds and relative seconds of a map."""
        from pandas import DataFrame

        return DataFrame([asdict(cost) for cost in self.costs]).set_index("method")

    def cell(self, metric: str, method: str) -> Cell:
        """Raises: KeyError for a pair that is not in the table."""
        for cell in self.cells:
            if (cell.metric, cell.method) == (metric, method):
                return cell
        raise KeyError(f"no {metric!r} of {method!r} in this table")

    def best(self, metric: str) -> str | None:
        """The method, not counting controls, with the best mean; None where none has a value."""
        way = next(each["best"] for each in self.metrics if each["name"] == metric)
        rank = {"higher": lambda mean: -mean, "lower": lambda mean: mean, "zero": abs}[way]
        known = [cell for cell in self.cells
                 if cell.metric == metric and cell.mean is not None and cell.method in self.methods]
        return min(known, key=lambda cell: rank(cell.mean)).method if known else None

    def written(self, digits: int = 3) -> DataFrame:
        """The table to read: methods down, metrics across, "mean [low, high]"."""
        from pandas import DataFrame

        names = [metric["name"] for metric in self.metrics]
        return DataFrame([[said(self.cell(name, method), digits) for name in names]
                          for method in [*self.methods, *self.controls]],
                         index=[*self.methods, *self.controls], columns=names).rename_axis("method")

    def to_dict(self) -> dict:
        """JSON-able; `from_dict` is the way back."""
        tree = {"cells": [asdict(cell) for cell in self.cells], "costs": [asdict(cost) for cost in self.costs],
                "metrics": list(self.metrics), "methods": list(self.methods), "controls": list(self.controls),
                "about": self.about}
        return archive.sealed(_KIND, tree)

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=1)

    @classmethod
    def from_dict(cls, data: Mapping) -> Table:
        """The table that `to_dict` wrote. Raises: ValueError for what is none."""
        archive.check(data, _KIND)
        return cls(cells=tuple(Cell(**cell) for cell in data["cells"]),
                   costs=tuple(Cost(**cost) for cost in data["costs"]), metrics=tuple(data["metrics"]),
                   methods=tuple(data["methods"]), controls=tuple(data["controls"]), about=dict(data["about"]))


def said(cell: Cell, digits: int = 3) -> str:
    """A cell as text: "0.81 [0.79, 0.83]", or a dash where nothing could be measured.

    >>> said(Cell("m", "a", 0.8123, 0.79, 0.831, 40)), said(Cell("m", "a", None, None, None, 0))
    ('0.812 [0.79, 0.831]', '–')
    """
    if cell.mean is None or not math.isfinite(cell.mean):
        return "–"
    if cell.low is None or cell.high is None:
        return amount(cell.mean, digits)
    return f"{amount(cell.mean, digits)} [{amount(cell.low, digits)}, {amount(cell.high, digits)}]"


def reasons(cells: Sequence[Cell]) -> dict[str, int]:
    """Why values are not there, and how many, over several cells."""
    counts: dict[str, int] = {}
    for cell in cells:
        for why, count in cell.undefined.items():
            counts[why] = counts.get(why, 0) + count
    return counts
