"""How the edges of a model are scored by gradients, learned from one row: how what heads read is made, and whether what
is added to the residual stream arrives as it is.

Where norms stand between the parts and the stream (BERT, Gemma 2), a slope is passed back through each of them, from
what reads to what was added, with heads and MLPs held; where the stream is a plain sum, it is the same for all that was
added before. All that is assumed is tried on the row: what an edge has must add up to what the whole node has.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..address import INPUTS
from ..composite import Composite
from ..intervene import canonical
from ..intervene.change import Shapes
from ..numerics import tolerance
from ..ops import add, linear
from ..trace import Tap
from ..trace.layout import Layout
from . import record
from .record import Maps, Record, back, graphed, pulled, recorded
from .task import Prepared
from .wiring import Wiring, wiring


@dataclass(frozen=True)
class Segment:
    """The stream from one point to the next: what is added in between, and what arrives there unchanged, of the stream
    at the `start` and of each of the sources.
    """

    start: Tap | None
    end: Tap
    sources: tuple[Tap, ...]
    kept: bool = False
    whole: tuple[bool, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """The wiring of a model, layouts of its tensors, `maps` of each layer (None: every head takes a way back of its
    own), the segments of its stream, the first one ending where layer 0 begins, and how many `entries` all that sources
    add has for one row.
    """

    wired: Wiring
    composite: Composite | None
    layouts: Mapping[Tap, Layout | None]
    maps: Sequence[Maps | None]
    segments: Sequence[Segment]
    entries: int

    @cached_property
    def slices(self) -> dict[Tap, slice]:
        """Which sources of the graph are at a tap."""
        found, start = {}, 0
        for tap, count in zip(self.wired.sources, self.wired.counts):
            found[tap] = slice(start, start + count)
            start += count
        return found

    def before(self, point: Tap) -> list[Segment]:
        """The segments up to a point of the stream, the last one first."""
        place = next(i for i, one in enumerate(self.segments) if one.end == point)
        return list(reversed(self.segments[:place + 1]))

    def record(self, task: Prepared, **options: object) -> Record:
        """See `recorded`."""
        return recorded(task, self.wired, self.composite, layouts=self.layouts, **options)

    def canonical(self, tap: Tap, value: Tensor) -> Tensor:
        """A value at a tap as (R, P, C)."""
        return canonical(tap, self.layouts[tap], value)

    def slopes(self, found: Record, since: int = 0) -> Iterator[tuple[slice, Tap, Tensor]]:
        """Of each layer from `since` on its heads' and then its MLP's destinations, and of the logits: where they are
        in the graph, at which point they read the stream, and their slopes, (n, ...), laid out as the stream there is.

        The slopes are of the sum of the outcome over rows.
        """
        blocks = self.wired.blocks
        wanted, counts = [], []
        for layer in range(since, len(blocks)):
            mine = record.ends(found, layer, self.maps[layer])
            mine += [] if blocks[layer].mlp is None else [found.added[blocks[layer].mlp]]
            wanted, counts = wanted + mine, [*counts, len(mine)]
        gradients = iter(back(found.outcome.sum(), [*wanted, found.streams[blocks[-1].after]]))
        for layer, count in zip(range(since, len(blocks)), counts):
            block, whole = blocks[layer], self.wired.graph.layer(layer)
            mine = [next(gradients) for _ in range(count)]
            of_mlp = mine.pop() if block.mlp is not None else None
            H = len(INPUTS) * block.count
            yield (slice(whole.start, whole.start + H), block.before,
                   record.heads(found, block, layer, self.maps[layer], mine))
            if of_mlp is not None:
                point = block.between or block.before
                g, = back(found.added[block.mlp], [found.streams[point]], of_mlp)
                yield slice(whole.start + H, whole.stop), point, g[None]
        end = len(self.wired.graph.destinations)
        yield slice(end - 1, end), blocks[-1].after, next(gradients)[None]

    def spread(self, found: Record, point: Tap, slopes: Tensor) -> Iterator[tuple[list[Tap], Tensor]]:
        """What reads the stream at a point, back to what was added: sources' taps, and the slopes there, (n, R, P, C).

        Taps of one slope are told together, the last one first.
        """
        taps: list[Tap] = []
        for segment in self.before(point):
            with found.shut():
                for tap, whole in zip(segment.sources[::-1], segment.whole[::-1]):
                    if whole:
                        taps.append(tap)
                        continue
                    at, = pulled(found.streams[segment.end], [found.added[tap]], slopes)
                    yield [tap], self._rows(tap, at)
                if not segment.kept and segment.start is not None:
                    if taps:
                        yield taps, self._rows(segment.end, slopes)
                        taps = []
                    slopes, = pulled(found.streams[segment.end], [found.streams[segment.start]], slopes)
        if taps:
            yield taps, self._rows(self.segments[0].end, slopes)

    def _rows(self, tap: Tap, slopes: Tensor) -> Tensor:
        return torch.stack([self.canonical(tap, one) for one in slopes])


def plan(task: Prepared, composite: Composite | None = None) -> Plan:
    """The plan for a model, by the first row of a task. Cost: about five forward and two backward passes of one row,
    and one way back for each head's queries, keys and values through what lies before the attention.

    Raises: ValueError for a model whose edges cannot be told, or do not add up, and for rules under which a linear map
        or a sum is not its gradient.
    """
    _check_rules(composite)
    wired, one = wiring(task.model, task.clean), task.take([0])
    with graphed(task):
        return _learned(one, wired, composite)


def _learned(one: Prepared, wired: Wiring, composite: Composite | None) -> Plan:
    """The plan, by a task of one row."""
    found = recorded(one, wired, composite)
    _check_shapes(wired, found)
    points = [*found.streams]
    values = {**found.values, **{tap: value.detach() for tap, value in found.streams.items()}}
    shapes = Shapes(one.model, one.clean.args, one.clean.kwargs, [*dict.fromkeys([*wired.sources, *points])], values)
    layouts = {tap: shapes.layout(tap) for tap in shapes.taps}
    maps = _maps(found, wired)
    entries = found.streams[wired.blocks[0].before].numel() * sum(wired.counts)
    made = Plan(wired, composite, layouts, maps, [_tried(found, segment) for segment in _segments(wired)], entries)
    _check_sums(made, found)
    return made


def _segments(wired: Wiring) -> list[Segment]:
    found = [Segment(None, wired.blocks[0].before, (wired.embed,))]
    ends = [*(block.before for block in wired.blocks[1:]), wired.blocks[-1].after]
    for block, end in zip(wired.blocks, ends):
        mlp = () if block.mlp is None else (block.mlp,)
        if block.between is None:
            found.append(Segment(block.before, end, (block.heads, *mlp)))
        else:
            found += [Segment(block.before, block.between, (block.heads,)), Segment(block.between, end, mlp)]
    return found


def _tried(found: Record, segment: Segment) -> Segment:
    """The segment with what arrives at its end as it is."""
    end = found.streams[segment.end]
    starts = [] if segment.start is None else [found.streams[segment.start]]
    seed = _noise(end)
    with found.shut():
        gradients = back(end, [*starts, *(found.added[tap] for tap in segment.sources)], seed)
    same = [g.numel() == seed.numel() and _close(g.reshape(seed.shape), seed) for g in gradients]
    kept = same.pop(0) if starts else True
    return Segment(segment.start, segment.end, segment.sources, kept, tuple(same))


def _maps(found: Record, wired: Wiring) -> list[Maps | None]:
    """How what the heads of each layer read is made, where it is by linear maps alone: that is tried."""
    made = [entries_of(reads, calls, block.count)
            for reads, calls, block in zip(found.reads, found.calls, wired.blocks)]
    reads = [[mine[name] for name in INPUTS] for mine in found.reads]
    ends = [record.ends(found, layer, of) for layer, of in enumerate(made)]
    gradients = iter(back(found.outcome.sum(), [x for many in (*reads, *ends) for x in many]))
    of_reads, of_ends = ([[next(gradients) for _ in many] for many in lists] for lists in (reads, ends))
    kept = []
    for layer, (block, one) in enumerate(zip(wired.blocks, made)):
        whole, = back(reads[layer], [found.streams[block.before]], of_reads[layer])
        holds = one is not None and _close(record.heads(found, block, layer, one, of_ends[layer]).sum(0), whole)
        kept.append(one if holds else None)
    return kept


def entries_of(reads: Mapping[str, Tensor], calls: Sequence[object], H: int) -> Maps | None:
    """Which entries of what linear maps gave each head depends on; None where heads have different numbers of them, or
    a map is of no plain matrix.
    """
    outputs, entries = [call.output for call in calls], {}
    for name in INPUTS:
        read = reads[name]
        seeds = torch.zeros(H, *read.shape, dtype=read.dtype, device=read.device)
        seeds[torch.arange(H), :, torch.arange(H)] = _noise(read).transpose(0, 1)
        for number, g in enumerate(pulled(read, outputs, seeds) if outputs else []):
            used = (g != 0).flatten(1, -2).any(1)  # (H, C)
            counts = used.sum(1).unique()
            if counts.tolist() == [0]:
                continue
            if len(counts) > 1 or calls[number].weight is None:
                return None
            entries[name, number] = used.nonzero()[:, 1].view(H, -1)
    return Maps(entries, _rounds(entries, H)) if {name for name, _ in entries} == set(INPUTS) else None


def _rounds(entries: Mapping[tuple[str, int], Tensor], H: int) -> Tensor:
    """Heads in groups within which no entry is shared, (n, H) bool; queries, keys and values that share one, in one
    round, would be taken for each other, so that there is none for them.
    """
    rounds: list[tuple[set, list[int]]] = []
    for head in range(H):
        mine = {(number, entry) for (_, number), own in entries.items() for entry in own[head].tolist()}
        for taken, members in rounds:
            if not taken & mine:
                taken |= mine
                members.append(head)
                break
        else:
            rounds.append((mine, [head]))
    found = torch.zeros(len(rounds), H, dtype=torch.bool)
    for number, (_, members) in enumerate(rounds):
        found[number, members] = True
    return found


# -- what is tried ----------------------------------------------------------------------------------------------------


def _noise(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5).to(like)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two gradients differ by rounding alone: in float32, which models keep to in norms, or in less."""
    share = max(tolerance(expected.dtype), tolerance(torch.float32))
    return bool((found - expected).abs().max() <= share * expected.abs().max())


def _check_rules(composite: Composite | None) -> None:
    if composite is None:
        return
    plain = {"linear": linear.zero, "add": add.zero}
    wrong = next((kind for kind, rule in plain.items() if composite.rules.get(kind, rule) is not rule), None)
    if wrong is not None or composite.paths or composite.modules:
        raise ValueError(f"{composite.name} has rules of its own for {wrong or 'some places'}, under which the edges "
                         "of a node do not add up; take a level of nodes, or rules that leave linear maps and sums")


def _check_shapes(wired: Wiring, found: Record) -> None:
    for number, block in enumerate(wired.blocks):
        stream = found.streams[block.before]
        if block.mlp is not None and block.between is None and not block.parallel:
            raise ValueError(f"layer {number}: what its MLP reads could not be told from what it computes; take a "
                             "level of nodes")
        for tap in (block.heads, block.mlp):
            if tap is not None and found.added[tap].numel() != stream.numel():
                raise ValueError(f"layer {number}: {tap.path} gives {tuple(found.added[tap].shape)} for a stream of "
                                 f"{tuple(stream.shape)}, so that it sees some positions alone; take a level of nodes")


def _check_sums(made: Plan, found: Record) -> None:
    """Raises ValueError where the slopes of a source's edges do not add up to its own."""
    sources = made.wired.sources
    whole = dict(zip(sources, back(found.outcome.sum(), [found.added[tap] for tap in sources])))
    sums = {tap: torch.zeros_like(made.canonical(tap, g)) for tap, g in whole.items()}
    for _, point, slopes in made.slopes(found):
        for taps, spread in made.spread(found, point, slopes):
            for tap in taps:
                sums[tap] += spread.sum(0).view_as(sums[tap])
    for tap, g in whole.items():
        expected = made.canonical(tap, g)
        if not _close(sums[tap], expected):
            off = float((sums[tap] - expected).abs().max() / expected.abs().max())
            raise ValueError(f"{tap.path}: what passes along edges is not all that passes ({off:.2g} of it is "
                             "missing), so that the model has ways that the graph does not; take a level of nodes")


__all__ = ["Plan", "Segment", "entries_of", "plan"]
