"""A sweep that writes as it goes: outcomes in shards, by one process or several, to be resumed at any point.

A shard holds a block of mediators on a piece of the pairs. Pieces and blocks are always the same, so that neither the
number of processes nor an interruption changes what is run together.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .. import shard
from ..crew import Crew
from ..tokens import Batch
from .experiment import Experiment
from .measurement import Measurement, progress
from .task import Found, Report, halved, joined

BLOCK = 64  # mediators of a shard
WHAT = "sweep of effects"


@dataclass(frozen=True)
class Block:
    """A shard's part of the work: `mediators` from `start` on, on the pairs of piece number `piece`."""

    piece: int
    rows: tuple[int, ...]
    start: int
    mediators: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Record:
    """A measurement and the folder that it is written to. `made` is the last experiment, for the next block."""

    measurement: Measurement
    folder: Path
    made: dict[tuple[int, ...], Experiment] = field(default_factory=dict)

    @property
    def blocks(self) -> list[Block]:
        """All the work, in order."""
        names = tuple(self.measurement.mediators)
        return [Block(piece, tuple(rows.tolist()), start, names[start:start + BLOCK])
                for piece, rows in enumerate(self.measurement.task.pieces) for start in range(0, len(names), BLOCK)]

    def todo(self, crew: Crew) -> list[Block]:
        """What this process has to do: whole pieces, or blocks where there are fewer pieces than processes."""
        blocks = self.blocks
        few = len(self.measurement.task.pieces) < crew.size
        return [block for number, block in enumerate(blocks) if (number if few else block.piece) % crew.size ==
                crew.rank and not self.place(block).is_file()]

    def place(self, block: Block) -> Path:
        """File of a block."""
        return shard.place(self.folder, block.piece, f"pairs-{block.rows[0]}-{block.rows[-1]}", block.start)

    def go(self, crew: Crew, *, show_progress: bool) -> None:
        """Measures what is not there yet."""
        todo = self.todo(crew)
        each = self.measurement.each
        left = sum(len(block.mediators) for block in todo) * each
        with progress(left, show_progress and crew.rank == 0) as report:
            for block in todo:
                shard.write(self.place(block), list(self._lines(block, report)))
        self.made.clear()

    def found(self) -> Found:
        """All outcomes that were written.

        Raises: ValueError where a shard is missing, or does not go with the others.
        """
        pieces: dict[int, list[Found]] = {}
        for block in self.blocks:
            pieces.setdefault(block.piece, []).append(self._read(block))
        return joined([_stacked(found, self.folder) for found in pieces.values()])

    def _lines(self, block: Block, report: Report) -> Iterator[dict]:
        own = replace(self.measurement, mediators={name: self.measurement.mediators[name] for name in block.mediators})
        found = halved(lambda rows: own.of_experiment(self._experiment(rows), report), torch.tensor(block.rows))
        yield {"rows": block.rows, "base": found.pop("base").tolist(),
               "counterfactual": found.pop("counterfactual").tolist()}
        for number, name in enumerate(block.mediators):
            yield {"mediator": name, **{kind: value[..., number, :].tolist() for kind, value in found.items()}}

    def _experiment(self, rows: Tensor) -> Experiment:
        key = tuple(rows.tolist())
        if key not in self.made:
            self.made.clear()  # one at a time: it holds the values of a run
            self.made[key] = self.measurement.experiment(rows)
        return self.made[key]

    def _read(self, block: Block) -> Found:
        path = self.place(block)
        if not path.is_file():
            raise ValueError(f"{path} is missing: the sweep is not complete; start it again and it goes on")
        first, *lines = shard.read(path)
        if tuple(first.get("rows", ())) != block.rows or tuple(one["mediator"] for one in lines) != block.mediators:
            raise ValueError(f"{path} holds other pairs or mediators than its name says; delete it and start again")
        number = lambda value: torch.tensor(value, dtype=torch.float64)
        found = {name: number(first[name]) for name in ("base", "counterfactual")}
        for kind in lines[0].keys() - {"mediator"}:
            found[kind] = torch.stack([number(line[kind]) for line in lines], -2)  # (..., M, R)
        return found


def written(measurement: Measurement, folder: str | PathLike, *, show_progress: bool) -> Found:
    """The outcomes of a measurement, those that the folder has not yet being measured and written there.

    Raises: ValueError for a folder that holds something else, or a sweep of other arguments, with what differs.
    """
    crew, record = Crew.gathered(measurement.task.subject), Record(measurement, Path(folder))
    about = config(measurement)
    if crew.rank == 0:
        shard.settle(record.folder, about, what=WHAT)
    crew.wait()
    if crew.rank:
        shard.settle(record.folder, about, what=WHAT)  # for its errors: it may have been given other arguments
    record.go(crew, show_progress=show_progress)
    crew.wait()
    return record.found()


def config(measurement: Measurement) -> dict:
    """All that the outcomes depend on."""
    from importlib.metadata import version

    task, names = measurement.task, list(measurement.mediators)
    about = {"name": task.subject.name, "dtype": str(task.subject.dtype).removeprefix("torch."),
             "weights": shard.fingerprint(task.subject.model)}
    spots = [str(spot.site) for spots in measurement.mediators.values() for spot in spots]
    return {"relprop": version("relprop"), "subject": about, "outcome": _said(task.outcome), "rows": task.rows.tolist(),
            "inputs": {"base": _hash(task.base), "counterfactual": _hash(task.counterfactual)},
            "mediators": {"count": len(names), "names": _digest(repr((names, spots)).encode())},
            "kinds": list(measurement.kinds), "fixed": _said(measurement.fixed), "spans": _said(task.spans),
            "prompt_only": task.prompt_only, "piece": len(task.pieces[0]), "block": BLOCK}


def _said(one: object) -> str:
    """What it is, without where it lies in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(one))


def _hash(batch: Batch) -> str:
    tensors = [*enumerate(batch.args), *sorted(batch.kwargs.items())]
    return _digest(b"".join(f"{name} {tuple(value.shape)}".encode() + value.detach().cpu().contiguous().float().numpy()
                            .tobytes() for name, value in tensors if isinstance(value, Tensor)))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _stacked(found: list[Found], folder: Path) -> Found:
    """Blocks of the same pairs as one."""
    first = found[0]
    for other in found[1:]:
        for name in ("base", "counterfactual"):
            if not torch.allclose(other[name], first[name], rtol=1e-3, atol=1e-6):
                raise ValueError(f"shards in {folder} disagree on the outcome itself, as if the model, the inputs or "
                                 "a function of the outcome had changed; delete the folder and start again")
    return {name: value if value.dim() == 1 else torch.cat([one[name] for one in found], -2)
            for name, value in first.items()}
