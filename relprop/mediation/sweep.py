"""Many mediators, each changed in a copy of the input of its own, copies run together as far as memory allows."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..intervene import Group, Intervention, Places, Spot, units_of
from ..intervene.inputs import real_of
from ..trace import Tap
from ..trace.intervention import PATTERN
from .memory import out_of_memory
from .stage import Stage

Mediator = Sequence[Spot]
"""The places that are changed together."""


def sweep(stage: Stage, mediators: Sequence[Mediator], one: Intervention, there: Mapping[Tap, Tensor], *,
          batch_size: int | None, places: Places, prompt_only: bool = False,
          report: Callable[[int], None] | None = None) -> Tensor:
    """What the model answers when each mediator alone is changed, (M, B, ...), on the CPU.

    Args: one: what is put at a mediator, made of the values `there`, (R, P, C) by tap. batch_size: rows run at once,
        None: as the stage has room. It is halved where memory runs out. prompt_only: change positions of the prompt
        alone, of patterns rows and columns. report: called with the number of mediators done.
    """
    found: dict[int, Tensor] = {}
    size = max(1, (stage.room if batch_size is None else batch_size) // stage.rows)
    waiting = list(_chunks(stage, mediators, size))[::-1]
    while waiting:
        chunk = waiting.pop()
        groups = grouped(stage, [mediators[index] for index in chunk], one, there, places, prompt_only)
        try:
            answers = stage.answers(len(chunk), groups).cpu()
        except Exception as error:
            if len(chunk) == 1 or not out_of_memory(error):
                raise
            half = len(chunk) // 2
            size = max(1, half)
            waiting = [part[start:start + size] for part in waiting
                       for start in reversed(range(0, len(part), size))]
            waiting += [chunk[half:], chunk[:half]]
            continue
        found.update(zip(chunk, answers))
        if report is not None:
            report(len(chunk))
    return torch.stack([found[index] for index in range(len(mediators))])


def _chunks(stage: Stage, mediators: Sequence[Mediator], size: int) -> Iterator[list[int]]:
    """Mediators that are run together: those that are reached first at the same time, the latest first."""
    when = [min(stage.recording.when[spot.tap] for spot in mediator) for mediator in mediators]
    for time in sorted(set(when), reverse=True):
        same = [index for index, first in enumerate(when) if first == time]
        yield from (same[start:start + size] for start in range(0, len(same), size))


def grouped(stage: Stage, mediators: Sequence[Mediator], one: Intervention, there: Mapping[Tap, Tensor],
            places: Places, prompt_only: bool) -> dict[Tap, list[Group]]:
    alike: dict[tuple, list[tuple[int, int]]] = {}
    for copy, mediator in enumerate(mediators):
        for spot in mediator:
            key = (spot.tap, spot.units, spot.site.address.position)
            alike.setdefault(key, []).append((copy, spot.unit))
    groups: dict[Tap, list[Group]] = {}
    for (tap, units, position), found in alike.items():
        copy, unit = torch.tensor(found).T
        where = partial(_where, stage, tap, position, places, prompt_only)
        other = None if tap not in there else units_of(there[tap], units, unit, tap)  # (N, R, P, W)
        change = _change(one, other, where)
        groups.setdefault(tap, []).append(Group(copy, unit, units, change))
    return groups


def _change(one: Intervention, other: Tensor | None, where: Callable[[Tensor], Tensor | None]
            ) -> Callable[[Tensor], Tensor]:
    def change(now: Tensor) -> Tensor:
        value, chosen = one.value(now, other), where(now)
        return value if chosen is None else torch.where(chosen.to(now.device), value, now)

    return change


def _where(stage: Stage, tap: Tap, position: int | str | None, places: Places, prompt_only: bool, now: Tensor
           ) -> Tensor | None:
    """Which entries of (N, R, P, W) are changed; None: all."""
    if position is None and not prompt_only:
        return None
    rows, length = now.shape[1:3]
    if rows != stage.rows:
        raise ValueError(f"positions cannot be told apart at {tap.path}: {rows} windows of {stage.rows} rows")
    prompt = stage.question.prompt
    if prompt is None or prompt.shape[1] != length + stage.offset:
        prompt = real_of(stage.question.batch.kwargs, rows, length + stage.offset)
    chosen = prompt if position is None else places.at(position, prompt)
    where = chosen[None, :, stage.offset:, None]  # (1, R, P, 1)
    if prompt_only and tap.side == PATTERN:
        where = where & prompt[None, :, None, :]  # columns of the prompt too
    return where
