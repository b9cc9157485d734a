"""Methods measured against each other on data: a table with an interval in every cell, controls, tests and costs.

    >>> from relprop.benchmark import benchmark
    >>> found = benchmark("digits-vit", "digits", methods=["gradient", "attnlrp"], metrics=["pointing-game"], count=8,
    ...                   show_progress=False)
    >>> list(found.table.loc["pointing-game"].index)
    ['gradient', 'attnlrp', 'random', 'centre-prior', 'reversed']
"""
from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .. import shard, view
from ..composite import Composite
from ..crew import Crew
from ..data import Data, get
from ..load import load
from ..method import compared
from ..result import Table
from ..subject import Subject
from .case import Options
from .method import CONTROLS, controls, listed
from .metric import METRICS, Metric, named
from .run import Run
from .summary import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CONTROLS", "METRICS", "Benchmark", "Metric", "benchmark", "open_benchmark"]


@dataclass(frozen=True, eq=False)
class Benchmark(Table):
    """A `Table` that can be drawn and saved. `table` and `cost` are pandas frames."""

    def show(self) -> Figure:
        """A forest plot for each metric."""
        return view.forest(self)

    def save(self, folder: str | PathLike) -> Path:
        """Writes table.csv, cost.csv, table.json, table.html and table.svg into a folder, which is made.

        Returns: the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.table.to_csv(folder / "table.csv")
        self.cost.to_csv(folder / "cost.csv")
        (folder / "table.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "table.html").write_text(view.report(self), encoding="utf-8", errors="xmlcharrefreplace")
        self.show().savefig(folder / "table.svg", format="svg")
        return folder

    def _repr_html_(self) -> str:
        return self.written()._repr_html_()


def benchmark(subject: str | Subject | nn.Module | tuple, data: str | PathLike | Data, *,
              methods: Sequence[str | Composite] | Mapping[str, object] | None = None,
              metrics: Sequence[str | Metric] | None = None, out: str | PathLike | None = None, count: int | None = 500,
              options: Mapping[str, dict] | None = None, correct_only: bool = True,
              baseline: str | int | None = None, by: str | None = None, seed: int = 0, batch_size: int = 32,
              ends: int = 0, show_progress: bool = True) -> Benchmark:
    """Methods measured on data, with controls, intervals, paired tests against the first method, and costs.

    The interval of each cell is of the mean over the inputs (percentile bootstrap over independent groups of them); the
    test of each method against the first is on the inputs that both have a value for (signs flipped at random, Holm's
    correction over the methods and controls of a metric). Costs are of the maps, relative to one forward and backward.

    With `out`, every chunk of rows is written when it is done, and a call with the same arguments goes on where one was
    stopped. Under `accelerate launch` (without GPUs with `--multi_gpu`) or `torchrun` the chunks are shared among the
    processes; the numbers do not depend on how many there are. On several machines the folder must be one that all of
    them see.

    Args:
        subject: what `relprop.load` takes, a `Subject`, or an `nn.Module`.
        data: what `relprop.data.get` takes ("digits", "mnist:FOLDER", a folder of pictures with masks, a .jsonl), or
            `Data`. count: how many examples at most.
        methods: names of `METHODS` and composites, the first being what the others are tested against; or a mapping
            from names in the table to names, composites, or functions (subject, batch, targets) -> `Relevance`; None:
            `compared`.
        metrics: names of `relprop.benchmark.METRICS`, or a `Metric` of your own; None: all that apply and do not
            explain inputs many times over.
        out: a folder; None: nothing is kept.
        options: of methods, by their name in the table, such as {"integrated-gradients": {"n_steps": 64}}.
        correct_only: leave out inputs for which the model does not decide as the data say.
        baseline: what stands for removed units, of `check.removal`; the id of a token is also the baseline of methods
            where the model came without a tokenizer. by: "token", "word" or "patch"; see `Options`.
        seed: of everything drawn. batch_size: rows at once, and in one shard. ends: read the curves of a perturbation
            at each of so many first and last units, besides tenths, where what counts is less than a tenth of the
            input.
    Returns: a `Benchmark`; saved in `out` as CSV, JSON, HTML and SVG, every row's values as rows.csv.
    Raises: ValueError for an unknown method or metric, with those known, one that does not apply, data the model does
        not read or whose marks do not align, several processes without `out`, and a folder that holds a benchmark of
        another configuration, with what differs.
    """
    subject = subject if isinstance(subject, Subject) else load(subject)
    data = get(data, count=count, seed=seed)
    methods = compared(data.modality) if methods is None else methods
    entered, measured = listed(subject, methods, options, baseline=baseline), named(metrics, subject, data)
    how = Options(baseline=baseline, by=by, share=data.share, seed=seed, batch_size=batch_size, ends=ends)
    config = _config(subject, data, entered, measured, how, correct_only)
    crew = Crew.gathered(subject)
    if out is None and crew.size > 1:
        raise ValueError(f"{crew.size} processes share their work through a folder; give out=FOLDER")
    others = controls(subject, data, entered[0], seed=seed, batch_size=batch_size)
    entered += [one for one in others if one.name not in {method.name for method in entered}]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "benchmark" if out is None else Path(out)
        run = Run(subject, data, tuple(entered), tuple(measured), how, folder, correct_only)
        return _done(run, crew, config, keep=out is not None, show_progress=show_progress)


def open_benchmark(folder: str | PathLike) -> Benchmark:
    """A benchmark that was saved in a folder.

    Raises: FileNotFoundError for a folder without one; ValueError for a file that is none.
    """
    return Benchmark.from_dict(json.loads((Path(folder) / "table.json").read_text(encoding="utf-8")))


def _done(run: Run, crew: Crew, config: dict, *, keep: bool, show_progress: bool) -> Benchmark:
    """The run done and read; the first process reads it for all."""
    if crew.rank == 0:
        shard.settle(run.folder, config, what="benchmark")
    crew.wait()
    if crew.rank:
        shard.settle(run.folder, config, what="benchmark")  # for its errors: it may have been given other arguments
    run.go(crew, show_progress=show_progress)
    crew.wait()
    if crew.rank == 0:
        table = summary(run, config)
        found = Benchmark(**{field.name: getattr(table, field.name) for field in fields(Table)})
        if keep:
            found.save(run.folder)
            (run.folder / "rows.csv").write_text(_rows(run), encoding="utf-8")
    crew.wait()
    return found if crew.rank == 0 else open_benchmark(run.folder)


def _config(subject: Subject, data: Data, methods: Sequence, metrics: Sequence[Metric], options: Options,
            correct_only: bool) -> dict:
    """All that the numbers depend on."""
    from importlib.metadata import version

    about = {"name": subject.name, "dtype": str(subject.dtype).removeprefix("torch."),
             "weights": shard.fingerprint(subject.model)}
    read = {"name": data.name, "modality": data.modality, "rows": len(data), "fingerprint": data.fingerprint(),
            **data.about}
    return {"relprop": version("relprop"), "subject": about, "data": read,
            "methods": {method.name: method.about for method in methods}, "metrics": [one.name for one in metrics],
            "options": {**asdict(options), "correct_only": correct_only}}


def _rows(run: Run) -> str:
    """Every value: one line a row, method and metric, with the reason where there is none."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["row", "group", "method", "metric", "value", "undefined"])
    for method in run.methods:
        for line in run.lines(method):
            for metric in run.metrics:
                why = line.get("skipped") or line["undefined"].get(metric.name, "")
                value = "" if why else line["values"][metric.name]
                writer.writerow([line["row"], line["group"], method.name, metric.name, value, why])
    return text.getvalue()
