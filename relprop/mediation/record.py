"""A sweep by one process or several, written as it goes where that is wanted, to be resumed at any point.

The work is cut into blocks, each some mediators on a piece of the pairs. Pieces and blocks are always the same, so that
neither the number of processes nor an interruption changes what is run together. A shard holds a block.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .. import shard
from ..crew import Crew
from ..tokens import Batch
from .experiment import Experiment
from .measurement import digest, progress, said
from .memory import Found, by_piece, halved, joined
from .task import Report, Task

BLOCK = 64  # mediators of a block
WHAT = "sweep of effects"


class Work(Protocol):
    """What is measured of mediators, or paths: `Measurement`, for one, says what its members are."""

    task: Task
    step: int

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def leading(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def each(self) -> int: ...
    def part(self, start: int, stop: int) -> Work: ...
    def config(self) -> dict: ...
    def experiment(self, rows: Tensor) -> Experiment: ...
    def of_experiment(self, one: Experiment, report: Report | None = None) -> Found: ...


@dataclass(frozen=True)
class Block:
    """A part of the work: `names` from `start` on, on the pairs of piece number `piece`."""

    piece: int
    rows: tuple[int, ...]
    start: int
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The work in blocks. `made` is the last experiment, for the next block."""

    work: Work
    made: dict[tuple[int, ...], Experiment] = field(default_factory=dict)

    @property
    def all(self) -> list[Block]:
        """All the work, in order."""
        names, size = self.work.names, max(1, BLOCK // self.work.step) * self.work.step
        return [Block(piece, tuple(rows.tolist()), start, names[start:start + size])
                for piece, rows in enumerate(self.work.task.pieces) for start in range(0, len(names), size)]

    def of(self, crew: Crew) -> list[Block]:
        """This process's part: whole pieces, or blocks where there are fewer pieces than processes."""
        few = len(self.work.task.pieces) < crew.size
        return [block for number, block in enumerate(self.all)
                if (number if few else block.piece) % crew.size == crew.rank]

    def measured(self, block: Block, report: Report) -> Found:
        """The outcomes of a block."""
        own = self.work.part(block.start, block.start + len(block.names))
        return halved(lambda rows: own.of_experiment(self._experiment(rows), report), torch.tensor(block.rows))

    def _experiment(self, rows: Tensor) -> Experiment:
        key = tuple(rows.tolist())
        if key not in self.made:
            self.made.clear()  # one at a time: it holds the values of a run
            self.made[key] = self.work.experiment(rows)
        return self.made[key]


def measured(work: Work, out: str | PathLike | None = None, *, report: Report | None = None,
             show_progress: bool = False) -> Found:
    """The outcomes of all the work. With a folder `out` they are written there, those that it has already being read;
    several processes share the work, through the folder or through their group.

    Args: report: called with the numbers done; None: a bar of its own, if `show_progress`.
    Raises: ValueError for a folder that holds something else, or a sweep of other arguments, with what differs.
    """
    crew = Crew.gathered(work.task.subject)
    if out is not None:
        return _written(work, Path(out), crew, report, show_progress)
    if crew.size > 1 and crew.agree(digest(repr(config(work)).encode())):
        return _shared(Blocks(work), crew, report, show_progress)
    total = len(work.names) * len(work.task.pieces) * work.each
    with _reporting(total, report, show_progress and crew.rank == 0) as report:
        return by_piece(lambda rows: work.of_experiment(work.experiment(rows), report), work.task.pieces)


def _reporting(total: int, report: Report | None, shown: bool):
    from contextlib import nullcontext

    return progress(total, shown) if report is None else nullcontext(report)


# -- through a folder ------------------------------------------------------------------------------------------------


def _written(work: Work, folder: Path, crew: Crew, report: Report | None, show_progress: bool) -> Found:
    about, blocks = config(work), Blocks(work)
    if crew.rank == 0:
        shard.settle(folder, about, what=WHAT)
    crew.wait()
    if crew.rank:
        shard.settle(folder, about, what=WHAT)  # for its errors: it may have been given other arguments
    own = blocks.of(crew)
    todo = [block for block in own if not place(folder, block).is_file()]
    count = lambda blocks: sum(len(block.names) for block in blocks) * work.each
    with _reporting(count(todo), report, show_progress and crew.rank == 0) as told:
        if report is not None:
            report(count(own) - count(todo))
        for block in todo:
            shard.write(place(folder, block), list(_lines(block, blocks.measured(block, told))))
    blocks.made.clear()
    crew.wait()
    pieces: dict[int, list[Found]] = {}
    for block in blocks.all:
        pieces.setdefault(block.piece, []).append(_read(folder, block))
    return joined([_stacked(found, folder) for found in pieces.values()])


def place(folder: Path, block: Block) -> Path:
    """File of a block."""
    return shard.place(folder, block.piece, f"pairs-{block.rows[0]}-{block.rows[-1]}", block.start)


def _lines(block: Block, found: Found) -> Iterator[dict]:
    yield {"rows": block.rows, "base": found["base"].tolist(), "counterfactual": found["counterfactual"].tolist()}
    many = {name: value for name, value in found.items() if value.dim() > 1}
    for number, name in enumerate(block.names):
        yield {"mediator": name, **{kind: value[..., number, :].tolist() for kind, value in many.items()}}


def _read(folder: Path, block: Block) -> Found:
    path = place(folder, block)
    if not path.is_file():
        raise ValueError(f"{path} is missing: the sweep is not complete; start it again and it goes on")
    first, *lines = shard.read(path)
    if tuple(first.get("rows", ())) != block.rows or tuple(one["mediator"] for one in lines) != block.names:
        raise ValueError(f"{path} holds other pairs or mediators than its name says; delete it and start again")
    number = lambda value: torch.tensor(value, dtype=torch.float64)
    found = {name: number(first[name]) for name in ("base", "counterfactual")}
    for kind in lines[0].keys() - {"mediator"}:
        found[kind] = torch.stack([number(line[kind]) for line in lines], -2)  # (..., M, R)
    return found


def _stacked(found: Sequence[Found], folder: Path) -> Found:
    """Blocks of the same pairs as one."""
    first = found[0]
    for other in found[1:]:
        for name in ("base", "counterfactual"):
            if not torch.allclose(other[name], first[name], rtol=1e-3, atol=1e-6):
                raise ValueError(f"shards in {folder} disagree on the outcome itself, as if the model, the inputs or "
                                 "a function of the outcome had changed; delete the folder and start again")
    return {name: value if value.dim() == 1 else torch.cat([one[name] for one in found], -2)
            for name, value in first.items()}


def config(work: Work) -> dict:
    """All that the outcomes depend on."""
    from importlib.metadata import version

    task = work.task
    about = {"name": task.subject.name, "dtype": str(task.subject.dtype).removeprefix("torch."),
             "weights": shard.fingerprint(task.subject.model)}
    aligned = {} if task.align is None else {"align": digest(repr(task.align).encode())}
    return {"relprop": version("relprop"), "subject": about, "outcome": said(task.outcome), "rows": task.rows.tolist(),
            "inputs": {"base": _hash(task.base), "counterfactual": _hash(task.counterfactual), **aligned},
            **work.config(), "spans": said(task.spans), "prompt_only": task.prompt_only, "piece": len(task.pieces[0]),
            "block": BLOCK}


def _hash(batch: Batch) -> str:
    tensors = [*enumerate(batch.args), *sorted(batch.kwargs.items())]
    return digest(b"".join(f"{name} {tuple(value.shape)}".encode() + value.detach().cpu().contiguous().float().numpy()
                           .tobytes() for name, value in tensors if isinstance(value, Tensor)))


# -- through the group of processes ----------------------------------------------------------------------------------


def _shared(blocks: Blocks, crew: Crew, report: Report | None, show_progress: bool) -> Found:
    """Each process's blocks, summed up with zeros where others have theirs."""
    work, own = blocks.work, blocks.of(crew)
    rows = work.task.rows.tolist()
    M, B = len(work.names), len(rows)
    whole = {name: torch.zeros(B, dtype=torch.float64) for name in ("base", "counterfactual")}
    whole |= {name: torch.zeros(*axes, M, B, dtype=torch.float64) for name, axes in work.leading.items()}
    total = sum(len(block.names) for block in own) * work.each
    with _reporting(total, report, show_progress and crew.rank == 0) as told:
        for block in own:
            at = torch.tensor([rows.index(row) for row in block.rows])
            for name, value in blocks.measured(block, told).items():
                if value.dim() > 1:
                    whole[name][..., block.start:block.start + len(block.names), at] = value
                elif block.start == 0:  # of a piece the blocks have the same
                    whole[name][at] = value
    blocks.made.clear()
    return {name: crew.summed(value) for name, value in whole.items()}


__all__ = ["BLOCK", "Block", "Blocks", "Work", "config", "measured", "place"]
