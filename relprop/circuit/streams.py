"""The residual stream of a run in which some edges are cut, at any destination.

`Sum` adds up what the sources add; `Chain` has the model make the stream again of what they are, for models in which
norms stand between. Both are told what the sources are as a run comes to them, layer by layer, and give the groups of
changes that make the model arrive at a destination with its own stream.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..intervene import Group
from ..mediation.stage import Stage
from ..trace import Tap
from .ablated import Values
from .wiring import Maps, Wiring, passed, put

Groups = dict[Tap, list[Group]]


class Streams:
    """What is common: sources by tap, in the order of the graph.

    `circuits` (N,) says which copy of the state each of N streams is of, `cut` which of its edges are: bool (N, S) or
    (N, S, R, P), S of the whole graph. States are of one copy until the first layer is run, and then of one a circuit.
    """

    def __init__(self, wired: Wiring, stage: Stage) -> None:
        self.wired, self.stage = wired, stage
        ends = torch.tensor(wired.counts).cumsum(0).tolist()
        self.spans = [slice(end - count, end) for end, count in zip(ends, wired.counts)]
        self._block = {tap: i for i, tap in enumerate(wired.sources)}
        self.alike = True  # whether the state is one for all circuits

    def sources(self, tap: Tap) -> slice:
        """Which of the graph's sources are at a tap."""
        return self.spans[self._block[tap]]

    def before(self, layer: int) -> int:
        """How many taps of sources there are before a layer."""
        return self._block[self.wired.blocks[layer].heads] if layer < len(self.wired.blocks) else len(self.spans)


class Sum(Streams):
    """Streams as sums. `total` is that of a run, (C, R, P, D), `more[i]` what sources of tap i would add more if they
    were ablated, (C, n, R, P, D).
    """

    def __init__(self, wired: Wiring, stage: Stage, gone: Values, found: Maps, *, zero: bool) -> None:
        super().__init__(wired, stage)
        self.maps = found
        self.own = self._added({tap: stage.there(tap) for tap in wired.taps})
        self.gone = [torch.zeros_like(one) for one in self.own] if zero else self._added(gone)
        first = wired.blocks[0].before
        self.gone[0] = passed(stage, 1, {wired.embed: put(gone[wired.embed][None])}, start=wired.embed,
                              keep=[first])[first]
        self.total: Tensor
        self.entered: Tensor  # the total before the last heads that have run
        self.more: list[Tensor | None]

    def _added(self, values: Values) -> list[Tensor]:
        """What each tap's sources add in a run, (n, R, P, D)."""
        found = [values[self.wired.blocks[0].before][None]]
        for layer, block in enumerate(self.wired.blocks):
            heads = self.maps.added(layer, values[block.heads])
            found.append(heads)
            if block.mlp is not None:
                rest = values[block.between] if block.between is not None else \
                    values[block.before] + heads.sum(0) + self.maps.biases[layer]
                found.append((values[block.after] - rest)[None])
        return found

    def begin(self, layer: int) -> None:
        """A run that is the unchanged one up to this layer."""
        blocks = self.wired.blocks
        last = layer == len(blocks)
        self.total = self.stage.there(blocks[-1].after if last else blocks[layer].before)[None]
        before = self.before(layer)
        self.alike = True
        self.more = [(gone - own)[None] for gone, own in zip(self.gone[:before], self.own)]

    def streams(self, circuits: Tensor, cut: Tensor, total: Tensor | None = None) -> Tensor:
        """(N, R, P, D); `total`: of what is read, None: of all that has run."""
        whole = self._picked(self.total if total is None else total, circuits)
        found = whole.clone(memory_format=torch.contiguous_format)
        cut = cut.to(found)
        owners, counts = circuits.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        for span, more in zip(self.spans, self.more):
            if more is None or not cut[:, span].any():
                continue
            if len(more) == 1:
                _add(found, cut[:, span], more[0])
                continue
            for owner, start, end in zip(owners.tolist(), [0, *ends], ends):
                _add(found[start:end], cut[start:end, span], more[owner])
        return found

    @staticmethod
    def _picked(x: Tensor, circuits: Tensor) -> Tensor:
        return x.expand(len(circuits), *x.shape[1:]) if len(x) == 1 else x[circuits]

    def to_heads(self, layer: int, circuits: Tensor, cut: Tensor) -> Groups:
        return {self.wired.blocks[layer].before: put(self.streams(circuits, cut))}

    def to_logits(self, circuits: Tensor, cut: Tensor) -> Groups:
        return {self.wired.blocks[-1].after: put(self.streams(circuits, cut))}

    def add_heads(self, layer: int, z: Tensor, *, needed: bool) -> None:
        """The heads of a layer have run, z (C, R, P, H K); `needed`: an edge from them will be cut."""
        self.alike = False
        added = self.maps.added(layer, z)  # (H, C, R, P, D)
        self.entered = self.total
        self.total = self.total + added.sum(0) + self.maps.biases[layer]
        self.more.append((self.gone[len(self.more)] - added.transpose(0, 1)).contiguous() if needed else None)

    def run_mlp(self, layer: int, circuits: Tensor, cut: Tensor, *, needed: bool, alive: bool) -> None:
        """The MLP of a layer runs on streams of its own; if nothing reads it, it is not `alive` and adds nothing."""
        added = self._mlp(layer, circuits, cut) if alive else torch.zeros_like(self.total)
        self.total = self.total + added
        self.more.append(self.gone[len(self.more)] - added[:, None] if needed else None)

    def _mlp(self, layer: int, circuits: Tensor, cut: Tensor) -> Tensor:
        block = self.wired.blocks[layer]
        stream = self.streams(circuits, cut, self.entered if block.parallel else None)
        if block.between is not None:
            after = passed(self.stage, len(stream), {block.between: put(stream)}, start=block.between,
                           keep=[block.after])[block.after]
            return after - stream
        none = torch.zeros_like(self.stage.there(block.heads)).expand(len(stream), -1, -1, -1)
        after = passed(self.stage, len(stream), {block.before: put(stream), block.heads: put(none)},
                       start=block.before, keep=[block.after])[block.after]
        return after - stream - self.maps.biases[layer]  # which is all that the attention beside it adds


class Chain(Streams):
    """Streams that the model makes again: `now[i]` is the value at tap i in a run, (C, R, P, W)."""

    def __init__(self, wired: Wiring, stage: Stage, gone: Values) -> None:
        super().__init__(wired, stage)
        self.gone = [gone[tap] for tap in wired.sources]
        self.now: list[Tensor]

    def begin(self, layer: int) -> None:
        self.alike = True
        self.now = [self.stage.there(tap)[None] for tap in self.wired.sources[:self.before(layer)]]

    def _groups(self, circuits: Tensor, cut: Tensor) -> Groups:
        groups = {}
        for tap, span, now, gone in zip(self.wired.sources, self.spans, self.now, self.gone):
            x = Sum._picked(now, circuits).unflatten(-1, (span.stop - span.start, -1))  # (N, R, P, n, W / n)
            chosen = cut[:, span]
            chosen = (chosen if chosen.dim() == 4 else chosen[..., None, None]).movedim(1, -1)[..., None]
            groups[tap] = put(torch.where(chosen.to(x.device), gone.unflatten(-1, x.shape[-2:]), x).flatten(-2))
        return groups

    to_logits = _groups

    def to_heads(self, layer: int, circuits: Tensor, cut: Tensor) -> Groups:
        return self._groups(circuits, cut)

    def add_heads(self, layer: int, z: Tensor, *, needed: bool) -> None:
        self.alike = False
        self.now.append(z)

    def run_mlp(self, layer: int, circuits: Tensor, cut: Tensor, *, needed: bool, alive: bool) -> None:
        mlp = self.wired.blocks[layer].mlp
        if not alive:
            self.now.append(self.stage.there(mlp)[None])
            return
        groups = self._groups(circuits, cut)
        self.now.append(passed(self.stage, len(circuits), groups, start=self.wired.embed, keep=[mlp])[mlp])


def _add(streams: Tensor, weights: Tensor, values: Tensor) -> None:
    """Adds sums of values (n, R, P, D), by weights (N, n) or (N, n, R, P), to streams (N, R, P, D)."""
    if weights.dim() == 2:
        streams.view(len(streams), -1).addmm_(weights, values.flatten(1))
    else:
        streams += torch.einsum("nsrp,srpd->nrpd", weights, values)


def start_of(streams: Streams, layer: int) -> Tap:
    """From where a pass has to run to come to a layer's heads with changed streams."""
    return streams.wired.embed if isinstance(streams, Chain) else streams.wired.blocks[layer].before


__all__: Sequence[str] = ["Chain", "Groups", "Streams", "Sum", "start_of"]
