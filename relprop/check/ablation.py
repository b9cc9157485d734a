"""The ablation check: is the model hurt more by losing what a map calls relevant than by losing what it calls
irrelevant?

References: W. Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", IEEE TNNLS 28,
2017 (removal in order); R. Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
Transformers", ICML 2024 (area between the curves).
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import rows, units
from ..errors import Undefined
from ..result import Curve
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch
from . import statistics
from .removal import Removal, chance, removal, whole


def ablation(subject: Subject, batch: Batch, targets: Targets, relevance: Tensor, *, randoms: int = 20, steps: int = 10,
             seed: int = 0, batch_size: int = 32, baseline: str | int | None = None, by: str | None = None,
             show_progress: bool = True) -> Curve:
    """Curves of the target while units are taken out, most relevant first (MoRF) and last (LeRF), and their area.

    area = int_0^1 (LeRF(f) - MoRF(f)) df, f the share of a row's own units that is gone; positive for a faithful map.
    Each random order gives an area in the same way, with itself reversed, so the random areas are what the statistic
    is when the order means nothing; p = (1 + #{random mean area >= mean area}) / (randoms + 1). One-sided, over the
    mean of the rows. Chance depends on the seed and each row's input, not on the map or the other rows: methods
    compared on a batch meet the same orders.

    Removed inputs are unlike what the model was trained on, and the area depends on what stands in their place:
    compare maps under one baseline only. Cost a row: at most 2 + 2 (randoms + 1) (steps - 1) forwards, no backward;
    equal inputs run once.

    Args: relevance: the map, (B, T) or (B, Y, X), any unit. randoms: number of random orders. steps: F - 1, along the
        fractions. batch_size: rows of changed inputs in one forward. baseline, by: what stands in place of units, and
        what they are (see `removal.removal`). show_progress: a bar of the forwards.
    Returns: `Curve`; its forwards count rows that went through the model, and its interval is None for a single row.
    Raises: ValueError for a map that does not fit or has nothing to rank, an unknown baseline, and where the target
        turns NaN.
    """
    if min(randoms, steps, batch_size) < 1:
        raise ValueError(f"randoms, steps and batch_size must be at least 1, got {randoms}, {steps} and {batch_size}")
    out = removal(subject, batch, baseline=baseline, by=by)
    if relevance.shape != out.groups.shape:
        raise ValueError(f"a map of shape {tuple(relevance.shape)} does not fit an input of {tuple(out.groups.shape)}")
    ranks = _ranks(relevance.detach().cpu().double(), batch, out, randoms, seed)
    fractions = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    with settled(subject.model), torch.no_grad():
        fixed, value = whole(subject, batch, targets, batch_size)
        run = _Run(subject, batch, fixed, out)
        curves, changed = _curves(run, value, ranks, fractions, batch_size, show_progress)
    return _read(curves, fractions, value, seed, batch.rows + changed, out.baseline)


class _Run(NamedTuple):
    """What it takes to run changed rows."""

    subject: Subject
    batch: Batch
    targets: Targets
    removal: Removal

    def values(self, which: Tensor, gone: Tensor) -> Tensor:
        """Target of the rows `which` (R,) without the units `gone` (R, U), (R,), float64 on the CPU."""
        device = rows.leaf(self.batch)[1].device
        which = which.to(device)
        changed = self.removal.without(which, gone.to(device))
        value = self.targets.take(which.tolist()).value(self.subject.forward(changed), changed)
        if not value.isfinite().all():
            raise ValueError(f"the target turns {value[~value.isfinite()][0].item()} under the baseline "
                             f"{self.removal.baseline!r}; choose another one")
        return value.double().cpu()


def _ranks(relevance: Tensor, batch: Batch, out: Removal, randoms: int, seed: int) -> Tensor:
    """When each unit goes: (B, S, U), sequences S = the map's order, its reverse, and `randoms` random orders, each
    with its reverse.

    Units that a row does not have go never: their rank is larger than any count.
    """
    pooled = units.pooled(relevance, out.groups)  # (B, U)
    ranks = torch.full((batch.rows, 2 * (randoms + 1), pooled.shape[1]), pooled.shape[1] + 1)
    for row, count in enumerate(out.counts.tolist()):
        generator = chance(batch, out.groups, row, seed)
        try:
            orders = [statistics.order(pooled[row, :count], generator)]
        except Undefined as cause:
            raise Undefined(f"row {row}: {cause}") from cause
        orders += [torch.randperm(count, generator=generator) for _ in range(randoms)]
        forward = torch.stack(orders).argsort(1)  # (1 + N, U): the inverse of an order is each unit's rank
        ranks[row, :, :count] = torch.stack([forward, count - 1 - forward], 1).flatten(0, 1)
    return ranks


def _curves(run: _Run, value: Tensor, ranks: Tensor, fractions: Tensor, batch_size: int,
            show_progress: bool) -> tuple[Tensor, int]:
    """Target of every sequence at every fraction, (B, S, F), and the number of changed rows that were run for it."""
    from tqdm.auto import tqdm

    counts = (fractions * run.removal.counts[:, None]).round().long()  # (B, F)
    plan = _plan(counts, ranks.shape[1])
    table = torch.full((*ranks.shape[:2], int(counts.max()) + 1), torch.nan, dtype=torch.float64)  # (B, S, U + 1)
    table[:, :, 0] = value[:, None]
    with tqdm(total=len(plan), desc="ablation", unit="row", disable=not show_progress, leave=False) as bar:
        for chunk in plan.split(batch_size):
            row, sequence, count = chunk.T
            table[row, sequence, count] = run.values(row, ranks[row, sequence] < count[:, None])
            bar.update(len(chunk))
    everything = run.removal.counts
    lines = torch.arange(len(table))
    table[lines, :, everything] = table[lines, 0, everything][:, None]  # all sequences end at the same input
    return table.gather(2, counts[:, None].expand(-1, ranks.shape[1], -1)), len(plan)


def _plan(counts: Tensor, sequences: int) -> Tensor:
    """Every input to run, as (row, sequence, units gone), (V, 3); what is the same in several sequences once."""
    plan = []
    for row, wanted in enumerate(counts):
        distinct = wanted.unique()
        between = distinct[(distinct > 0) & (distinct < distinct[-1])]
        plan.append(torch.cartesian_prod(torch.tensor([row]), torch.arange(sequences), between).view(-1, 3))
        plan.append(torch.tensor([[row, 0, int(distinct[-1])]]))
    return torch.cat(plan)


def _read(curves: Tensor, fractions: Tensor, value: Tensor, seed: int, forwards: int, baseline: str) -> Curve:
    """What the curves (B, S, F) say."""
    first, reverse = curves[:, 0::2], curves[:, 1::2]  # (B, 1 + N, F)
    areas = statistics.area(fractions, first, reverse).T  # (1 + N, B)
    area, random_area = areas[0], areas[1:]
    return Curve(fractions=fractions.float(), morf=first[:, 0].float(), lerf=reverse[:, 0].float(),
                 random=first[:, 1:].transpose(0, 1).float(), area=area.float(), random_area=random_area.float(),
                 p_value=statistics.p_value(area.mean().item(), random_area.mean(1)),
                 interval=statistics.interval(area, seed=seed), forwards=forwards, baseline=baseline,
                 value=value.float())
