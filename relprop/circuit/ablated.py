"""What is put in the place of clean values: zero, the corrupted run's, or a mean over the reference inputs."""
from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..intervene.change import values_at
from ..mediation.memory import PIECE
from ..trace import Tap
from .task import Prepared, check_ablation

Values = dict[Tap, Tensor]


def ablated(task: Prepared, taps: Iterable[Tap], ablation: str) -> Values:
    """The values that take the place of the clean ones at taps, for each row of the task, (B, P, C) by tap.

    "resample": of the corrupted run; "mean": over the reference inputs and their positions, padding left out; "mean by
    position": over the inputs at each position; "zero". Means are of a row's own group where the task has groups.

    Cost: of zero nothing, else a forward pass of the corrupted, or of the reference inputs.
    Raises: ValueError for another ablation, and for means by position of inputs that are longer or shorter.
    """
    check_ablation(ablation)
    taps = list(dict.fromkeys(taps))
    if ablation == "resample":
        return values_at(task.model, task.corrupted.args, task.corrupted.kwargs, taps)
    if ablation == "zero":
        clean = values_at(task.model, task.clean.args, task.clean.kwargs, taps)
        return {tap: torch.zeros_like(value) for tap, value in clean.items()}
    return _means(task, taps, by_position=ablation != "mean")


def _means(task: Prepared, taps: list[Tap], *, by_position: bool) -> Values:
    one = task.clean.take([0])
    length = {tap: value.shape[1] for tap, value in values_at(task.model, one.args, one.kwargs, taps).items()}
    reference, sums, counts = task.reference, {}, {}
    grouped = task.task.groups is not None
    labels = list(task.reference_groups) if grouped else [None] * reference.rows
    own_labels = list(task.task.groups) if grouped else [None] * task.rows
    if len(labels) != reference.rows:
        raise ValueError(f"{reference.rows} reference inputs and {len(labels)} groups; give a label to each, or no "
                         "groups")
    for rows in torch.arange(reference.rows).split(PIECE):
        batch = reference.take(rows.tolist())
        for tap, values in values_at(task.model, batch.args, batch.kwargs, taps).items():
            real = batch.real(values.shape[1]).to(values.device)[..., None]
            if by_position and grouped and real[:, 0].all():  # rows of a group are of one length, so that what is cut
                values, real = (_fitted(one, length[tap]) for one in (values, real))  # is padding, or not asked for
            if by_position and values.shape[1] != length[tap]:
                raise ValueError(f"reference inputs of {values.shape[1]} positions for clean ones of {length[tap]}; "
                                 "means by position need as many")
            for row, value, own in zip(rows.tolist(), values * real, real.to(values)):
                key = tap, labels[row]
                sums[key] = sums.get(key, 0) + (value if by_position else value.sum(0, keepdim=True))
                counts[key] = counts.get(key, 0) + (own if by_position else own.sum(0, keepdim=True))
    return {tap: torch.stack([sums[tap, label] / counts[tap, label].clamp_min(1) for label in own_labels])
            .expand(-1, length[tap], -1) for tap in taps}


def _fitted(values: Tensor, length: int) -> Tensor:
    """(B, P, C) with as many positions as this, cut or filled with zeros at the end."""
    return F.pad(values, (0, 0, 0, length - values.shape[1]))


__all__ = ["Values", "ablated"]
