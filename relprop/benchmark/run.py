"""The run of a benchmark: chunks of rows, every method on each, by one process or several, to be resumed at any point.

A chunk is always the same rows, and all chance depends on the seed and a row's own input, so that neither the number of
processes nor an interruption changes a number.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .. import shard, units
from ..check import statistics
from ..check.perturbation import KEPT, Readout
from ..crew import Crew
from ..data import Data
from ..data.alignment import aligned, prepared
from ..errors import Undefined
from ..subject import Subject
from .case import Case, Options, Rows
from .method import Made, Method, plain_seconds
from .metric import Metric

WRONG = "the model does not say what is asked for"


@dataclass(frozen=True, eq=False)
class Run:
    """What is to be measured, and where it is written."""

    subject: Subject
    data: Data
    methods: Sequence[Method]
    metrics: Sequence[Metric]
    options: Options
    folder: Path
    correct_only: bool = True

    @property
    def starts(self) -> range:
        """First row of each chunk."""
        return range(0, len(self.data), self.options.batch_size)

    def todo(self, crew: Crew) -> list[int]:
        """Chunks of this process that are not all written yet."""
        own = [start for number, start in enumerate(self.starts) if number % crew.size == crew.rank]
        return [start for start in own if not all(self.place(method, start).is_file() for method in self.methods)]

    def place(self, method: Method, start: int) -> Path:
        """File of a method's rows from `start` on."""
        return shard.place(self.folder, self.methods.index(method), method.name, start)

    def go(self, crew: Crew, *, show_progress: bool = True) -> None:
        """Measures what is not there yet."""
        from tqdm.auto import tqdm

        todo, warm = self.todo(crew), False
        with tqdm(total=len(todo) * len(self.methods), desc="benchmark", unit="shard", leave=False,
                  disable=not show_progress or crew.rank > 0) as bar:
            for start in todo:
                chunk = Chunk(self, start)
                for method in self.methods:
                    if not self.place(method, start).is_file():
                        if not warm and chunk.right:  # what a method sets up once is not its cost
                            warm = bool(self._warm(chunk))
                        shard.write(self.place(method, start), chunk.lines(method))
                    bar.update()

    def lines(self, method: Method) -> Iterator[dict]:
        """All rows of a method that are written.

        Raises: ValueError where a shard is missing or holds other rows than it should.
        """
        for start in self.starts:
            path = self.place(method, start)
            if not path.is_file():
                raise ValueError(f"{path} is missing: the run is not complete; start it again and it goes on")
            found = shard.read(path)
            end = min(start + self.options.batch_size, len(self.data))
            if [line["row"] for line in found] != list(range(start, end)):
                raise ValueError(f"{path} holds other rows than its name says; delete it and start again")
            yield from found

    def _warm(self, chunk: Chunk) -> float:
        one, targets = chunk.rows.batch.take([0]), chunk.rows.targets.take([0])
        for method in self.methods:
            method.made(one, targets)
        return plain_seconds(self.subject, one, targets)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of the data from `start` on, prepared once for all methods."""

    run: Run
    start: int

    @cached_property
    def data(self) -> Data:
        return self.run.data.take(range(self.start, min(self.start + self.run.options.batch_size, len(self.run.data))))

    @cached_property
    def whole(self) -> Rows:
        """All rows of the chunk, with what the model says of them."""
        subject = self.run.subject
        batch = prepared(subject, self.data)
        truths = aligned(subject, batch, self.data.examples)
        targets = subject.targets([one.target for one in self.data.examples], batch.rows)
        readout, start = Readout.of(subject, batch, targets, batch_size=self.run.options.batch_size)
        return Rows(readout, start, truths)

    @cached_property
    def right(self) -> list[int]:
        """Rows of the chunk that are explained."""
        if not self.run.correct_only or not self.whole.readout.decides:
            return list(range(len(self.data)))
        return self.whole.start[:, KEPT].nonzero().flatten().tolist()

    @cached_property
    def rows(self) -> Rows:
        """The rows that are explained."""
        return self.whole.take(self.right)

    def lines(self, method: Method) -> list[dict]:
        """One line a row: its values by metric, or why there is none, and what its map cost."""
        found = [{"row": row, "group": one.group or f"row {row}"}
                 for row, one in enumerate(self.data.examples, start=self.start)]
        for row in set(range(len(self.data))) - set(self.right):
            found[row]["skipped"] = WRONG
        if self.right:
            made, cost = self._made(method)
            for row, (values, reasons) in zip(self.right, self._measured(method, made), strict=True):
                found[row] |= {"values": values, "undefined": reasons, **cost}
        return found

    def _made(self, method: Method) -> tuple[Made, dict[str, float]]:
        """Maps, and what one cost; next to a plain forward and backward, so that a drifting machine cancels."""
        batch, targets = self.rows.batch, self.rows.targets
        if method.control:
            return method.made(batch, targets), {}
        plain = plain_seconds(self.run.subject, batch, targets) / batch.rows
        made = method.made(batch, targets)
        return made, {"forwards": made.forwards, "backwards": made.backwards, "seconds": made.seconds / batch.rows,
                      "plain": plain}

    def _measured(self, method: Method, made: Made) -> list[tuple[dict[str, float], dict[str, str]]]:
        """Values, and reasons for those that are not there, of each row that was explained."""
        reasons = [why or self._silent(made.relevance[row].detach().cpu(), row)
                   for row, why in enumerate(made.reasons)]
        told = [row for row, why in enumerate(reasons) if why is None]
        names = [metric.name for metric in self.run.metrics]
        found = [({}, {} if why is None else dict.fromkeys(names, why)) for why in reasons]
        if told:
            case = Case(self.rows.take(told), made.relevance[told], lambda *what: method.made(*what).relevance,
                        self.run.options)
            for metric in self.run.metrics:
                for row, reading in zip(told, metric.read(case), strict=True):
                    if isinstance(reading, Undefined):
                        found[row][1][metric.name] = str(reading)
                    else:
                        found[row][0][metric.name] = float(reading)
        return found

    @cached_property
    def groups(self) -> Tensor:
        """Number of the unit that each entry of the maps belongs to, (B, T) or (B, Y, X)."""
        return units.groups(self.rows.batch, by="word" if self.run.options.by == "word" else None)

    def _silent(self, relevance: Tensor, row: int) -> str | None:
        """Why the map of a row says nothing, entry by entry or unit by unit, or None if it does."""
        groups = self.groups[row]
        try:
            statistics.told(relevance[groups >= 0])
            statistics.told(units.pooled(relevance[None], groups[None])[0])
        except Undefined as why:
            return str(why)
        return None
