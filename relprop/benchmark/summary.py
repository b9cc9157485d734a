"""From the values of every row to the table: means with intervals, paired tests against the first method, costs."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

import torch

from ..check import statistics
from ..errors import Undefined
from ..result import Cell, Cost, Table
from .method import Method
from .metric import Metric
from .run import WRONG, Run

RESAMPLES = 4999  # of a bootstrap or of signs

Lines = Mapping[str, Sequence[dict]]  # by method


def summary(run: Run, config: Mapping[str, object]) -> Table:
    """The table of a run that is complete.

    Raises: ValueError where every input was left out.
    """
    lines = {method.name: list(run.lines(method)) for method in run.methods}
    first = run.methods[0].name
    cells = [cell for metric in run.metrics for cell in _cells(metric, lines, first, run.options.seed)]
    skipped = Counter(line["skipped"] for line in lines[first] if "skipped" in line)
    if sum(skipped.values()) == len(lines[first]):
        raise ValueError(f"nothing to measure: {WRONG} on any of the {len(lines[first])} inputs; explain what it gets "
                         "wrong as well (correct_only=False), or give it data that it knows")
    groups = len({line["group"] for line in lines[first]})
    about = {**config, "rows": len(lines[first]), "groups": groups, "skipped": dict(skipped)}
    controls = tuple(method.name for method in run.methods if method.control)
    return Table(cells=tuple(cells), costs=tuple(_costs(run.methods, lines)),
                 metrics=tuple(metric.to_dict() for metric in run.metrics),
                 methods=tuple(name for name in lines if name not in controls), controls=controls, about=about)


def _cells(metric: Metric, lines: Lines, first: str, seed: int) -> list[Cell]:
    """A metric's cells, in the order of the methods; p-values of its methods are one family."""
    cells = [_cell(metric.name, name, lines, first, seed) for name in lines]
    tested = [cell.p_value for cell in cells if cell.p_value is not None]
    corrected = iter(statistics.holm(tested))
    return [cell if cell.p_value is None else replace(cell, p_holm=next(corrected)) for cell in cells]


def _cell(metric: str, name: str, lines: Lines, first: str, seed: int) -> Cell:
    own = [line for line in lines[name] if metric in line.get("values", {})]
    undefined = Counter(line["undefined"][metric] for line in lines[name] if metric in line.get("undefined", {}))
    if not own:
        return Cell(metric, name, None, None, None, 0, dict(undefined))
    values = torch.tensor([line["values"][metric] for line in own], dtype=torch.float64)
    low, high = _interval(values, [line["group"] for line in own], seed)
    cell = Cell(metric, name, float(values.mean()), low, high, len(own), dict(undefined))
    return cell if name == first else replace(cell, **_against(metric, own, lines[first], seed))


def _against(metric: str, own: Sequence[dict], theirs: Sequence[dict], seed: int) -> dict[str, float | None]:
    """The difference from the first method on the rows that both have a value for."""
    held = {line["row"]: line["values"][metric] for line in theirs if metric in line.get("values", {})}
    both = [line for line in own if line["row"] in held]
    if not both:
        return {}
    differences = torch.tensor([line["values"][metric] - held[line["row"]] for line in both], dtype=torch.float64)
    groups = [line["group"] for line in both]
    low, high = _interval(differences, groups, seed)
    try:
        p_value = statistics.paired_p_value(differences, groups, resamples=RESAMPLES, seed=seed)
    except Undefined:
        p_value = None
    return {"difference": float(differences.mean()), "difference_low": low, "difference_high": high,
            "p_value": p_value}


def _interval(values: torch.Tensor, groups: Sequence[str], seed: int) -> tuple[float | None, float | None]:
    found = statistics.grouped_interval(values, groups, resamples=RESAMPLES, seed=seed)
    return (None, None) if found is None else found


def _costs(methods: Sequence[Method], lines: Lines) -> list[Cost]:
    """Means over the rows; the relative time is the median over them, so that one that was disturbed does not count."""
    costs = []
    for method in methods:
        own = [line for line in lines[method.name] if "seconds" in line]
        if own:
            means = [fmean(line[name] for line in own) for name in ("forwards", "backwards", "seconds")]
            costs.append(Cost(method.name, *means, median(line["seconds"] / line["plain"] for line in own)))
    return costs
