"""Queries, keys and values of single heads, each made of a stream of its own, for the price of all heads' of one.

Where a layer makes them by linear maps, y = x W + b, each head needs its own entries of y alone: the norm is run on
every stream, and of each result only those entries are computed. Which ones they are is learned from one row.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..address import INPUTS
from ..intervene.change import Shapes
from ..numerics import tolerance
from ..trace import Tap
from ..trace.layout import Layout
from ..trace.watching import Called
from .plan import entries_of
from .record import recorded
from .task import Prepared
from .wiring import Wiring


@dataclass(frozen=True, eq=False)
class Projection:
    """The linear maps of a layer: the taps of what each reads, its W (read, given) and b, and by "q", "k" or "v" and
    the number of a map those of its entries that are of each head, (H, K). Heads that share some come in different
    `rounds`, (n, H) bool.
    """

    taps: tuple[Tap, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    entries: Mapping[tuple[str, int], Tensor]
    rounds: Tensor

    def given(self, which: Tensor, read: Sequence[Tensor], chosen: Tensor) -> dict[Tap, Tensor]:
        """What each map gives, (C, R, P, W), by the tap of its output, entries of heads that are not chosen being zero.

        Args: which: of the streams what each circuit's heads read, (C, 3, H). read: of each map what it reads of each
            stream, (N, R, P, V). chosen: heads, (H,) bool.
        """
        found = {}
        for number, (tap, W, b, x) in enumerate(zip(self.taps, self.weights, self.biases, read)):
            y = x.new_zeros(len(which), *x.shape[1:-1], W.shape[1])
            for name in INPUTS:
                if (name, number) not in self.entries:
                    continue
                for head in chosen.nonzero().flatten().tolist():
                    mine = self.entries[name, number][head]
                    of_head = x[which[:, INPUTS.index(name), head]] @ W[:, mine]  # (C, R, P, K)
                    y[..., mine] = of_head if b is None else of_head + b[mine]
            found[replace(tap, side="output")] = y
        return found


def projections(task: Prepared, wired: Wiring) -> tuple[list[Projection | None], dict[Tap, Layout | None]]:
    """How each layer makes what its heads read, None where that is not by plain linear maps alone; and how what the
    maps read and give is laid out. Cost: two or three forward passes and a backward of one row.
    """
    one = task.take([0])
    found = recorded(one, wired)
    made = [_projection(reads, calls, block.count) for reads, calls, block in
            zip(found.reads, found.calls, wired.blocks)]
    taps = [tap for layer in made if layer is not None for read in layer.taps
            for tap in (read, replace(read, side="output"))]
    values = {tap: value for calls in found.calls for call in calls for tap, value in
              ((call.tap, call.input), (replace(call.tap, side="output"), call.output))}
    shapes = Shapes(task.model, one.clean.args, one.clean.kwargs, taps, {tap: values[tap] for tap in taps})
    try:
        return made, {tap: shapes.layout(tap) for tap in taps}
    except ValueError:  # rows cannot be told apart
        return [None] * len(made), {}


def _projection(reads: Mapping[str, Tensor], calls: Sequence[Called], H: int) -> Projection | None:
    """The maps among these calls, if every entry that they give is of some head, once for each of q, k and v."""
    entries = entries_of(reads, calls, H)
    if entries is None:
        return None
    numbers = sorted({number for _, number in entries.entries})
    for number in numbers:
        call = calls[number]
        mine = torch.cat([own.unique() for (_, of), own in entries.entries.items() if of == number])
        y = call.input @ call.weight + (0 if call.bias is None else call.bias)
        scale = call.output.abs().max()
        if mine.sort().values.tolist() != list(range(call.output.shape[-1])) \
                or not bool((y - call.output).abs().max() <= tolerance(y.dtype) * scale):
            return None
    again = {number: place for place, number in enumerate(numbers)}
    return Projection(tuple(calls[number].tap for number in numbers), tuple(calls[number].weight for number in numbers),
                      tuple(calls[number].bias for number in numbers),
                      {(name, again[number]): own for (name, number), own in entries.entries.items()}, entries.rounds)


__all__ = ["Projection", "projections"]
