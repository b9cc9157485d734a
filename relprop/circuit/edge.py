"""Scores of edges: what a source changes by when it is ablated, times the slope of what reads it.

S(u, v) = sum over positions of d_u . g_v (Syed et al. 2023, eq. 2; Hanna et al. 2024, eq. 3), d_u the change of what
u adds to the residual stream and g_v the slope of v (see `record`). All changes are kept side by side, (S, R, P, D),
and a layer's destinations take one product of matrices with those before them.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..trace import Tap
from ..trace.intervention import captured
from .ablated import Values
from .plan import Plan
from .record import Record, Shift
from .task import Prepared


class Changes:
    """What each source adds more when it is ablated, (S, R, P, D); what is another width than the stream, apart.

    Args: found: a pass of the clean inputs. after: the values that take the place of the clean ones, by tap.
    """

    def __init__(self, plan: Plan, found: Record, after: Values) -> None:
        self.plan, self.clean, self.apart = plan, found, {}
        self.shift: Shift = {tap: after[tap] - plan.canonical(tap, found.values[tap]) for tap in plan.wired.sources}
        stream = plan.canonical(plan.segments[0].end, found.streams[plan.segments[0].end].detach())
        self.all = stream.new_zeros(len(plan.wired.graph.sources), *stream.shape)
        for tap, place in plan.slices.items():
            added = self._added(found, tap)
            if added.shape[1:] == stream.shape:
                self.all[place] = added
            else:
                self.apart[tap] = added

    def _added(self, found: Record, tap: Tap) -> Tensor:
        """By what the sources at a tap are more in the stream, (count, R, P, D)."""
        change, call = self.shift[tap], found.writes.get(tap)
        if call is None:
            return change[None]
        place = self.plan.slices[tap]
        H = place.stop - place.start
        by_head = change.unflatten(-1, (H, -1)).movedim(-2, 0)  # (H, R, P, K)
        weight = call.weight
        if weight is None:
            raise ValueError(f"{tap.path}: the output projection has no plain matrix ({type(call.func).__name__}), so "
                             "that what each head adds cannot be told; take a level of nodes")
        return torch.einsum("hrpk,hkd->hrpd", by_head, weight.unflatten(0, (H, -1)))

    def of(self, taps: Sequence[Tap]) -> Iterator[tuple[slice, Tensor]]:
        """The changes at taps that follow each other, the last one first: where in the graph, and (n, R, P, D)."""
        slices = [self.plan.slices[tap] for tap in taps if tap not in self.apart]
        if slices:
            place = slice(slices[-1].start, slices[0].stop)
            yield place, self.all[place]
        for tap in taps:
            if tap in self.apart:
                yield self.plan.slices[tap], self.apart[tap]


def corrupted(task: Prepared, plan: Plan) -> tuple[Values, float]:
    """The values of all sources on the corrupted inputs, and the metric there, summed over rows."""
    batch, taps = task.corrupted, plan.wired.sources
    with torch.no_grad():
        output, values = captured(task.model, taps, lambda: task.model(*batch.args, **batch.kwargs))
        return {tap: plan.canonical(tap, values[tap]) for tap in taps}, float(task.value(output, side=1).sum())


def scored(plan: Plan, found: Record, changes: Changes, *, only: Tap | None = None, positions: bool = False) -> Tensor:
    """The scores of all edges, summed over rows, (S, D), or of each row at each position of the stream, (R, P, S, D),
    in float64.

    Args: only: the tap of the sources that are scored. positions: scores of each row at each position.
    """
    graph = plan.wired.graph
    shape = tuple(changes.all.shape[1:3]) * positions + tuple(graph.edges.shape)
    scores = torch.zeros(shape, dtype=torch.float64, device=changes.all.device)
    since = 0 if only is None else _first(plan, only)
    for columns, point, slopes in plan.slopes(found, since):
        for taps, g in plan.spread(found, point, slopes):
            for place, change in changes.of(taps if only is None else [tap for tap in taps if tap == only]):
                scores[..., place, columns] = _product(change, g, positions)
    return scores.masked_fill_(~graph.edges.to(scores.device), 0).cpu()


def _first(plan: Plan, tap: Tap) -> int:
    """The first layer that may read what is added at a tap."""
    blocks = plan.wired.blocks
    return next((layer for layer, block in enumerate(blocks) if tap in (block.heads, block.mlp)), 0)


def _product(change: Tensor, slopes: Tensor, positions: bool) -> Tensor:
    """sum d_u . g_v over rows and entries, and positions or at each: (n, m) or (R, P, n, m), of (n, R, P, D)."""
    a, b = (x.float() if x.dtype.itemsize < 4 else x for x in (change, slopes))
    if not positions:
        return (a.flatten(1) @ b.flatten(1).T).double()
    return (a.permute(1, 2, 0, 3) @ b.permute(1, 2, 3, 0)).double()


__all__ = ["Changes", "corrupted", "scored"]
