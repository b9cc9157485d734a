"""Rows of a task made ready for circuits of edges, and the walk through the layers that runs them.

Layer by layer, each head's queries, keys and values are made of the streams that they read, equal streams once; what
heads and MLPs then give is told to the streams of the layers behind. A circuit is the unchanged run up to the first
layer in which an edge is cut, and behind the last one the model goes on by itself.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..address import INPUTS, Address
from ..intervene.change import values_at
from ..mediation.memory import PIECE, out_of_memory
from ..mediation.stage import stage
from ..trace import Tap
from ..trace.layout import Layout
from ..trace.operands import Enough, Read
from .ablated import Values, ablated
from .projection import Projection, projections
from .streams import Chain, Streams, Sum, start_of
from .task import ABLATIONS, Prepared, check_ablation
from .wiring import Maps, maps, passed, put, wiring

Edge = tuple[str, str]
Item = str | Edge
Report = Callable[[int], None]
WIDE = 768
"""The width of streams for which the room of a stage is meant."""
MANY = 3
"""From how many streams a circuit on it pays to compute of each what its heads need alone."""
ROOM = 1 << 27
"""Numbers that what the sources of some rows add may be."""


def check_items(circuits: Sequence[Collection[Item]], among: Collection[Item]) -> None:
    """Raises: ValueError for an item of a circuit that is none of those that circuits are made of."""
    known = set(among)
    unknown = next((item for circuit in circuits for item in circuit if item not in known), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is in a circuit, and none of the {len(known)} items that circuits are made of")


class Pieces:
    """A task made ready for circuits of edges, some rows at a time.

    With `denoise` it is the corrupted input that is run, and what is put at cut edges is clean. With `hold` rows that
    were made ready stay so, for many calls of `run`.
    """

    def __init__(self, task: Prepared, ablation: str = "resample", *, denoise: bool = False, hold: bool = False,
                 batch_size: int | None = None) -> None:
        check_ablation(ablation, ABLATIONS[:1] if denoise else ABLATIONS)
        self.task, self.ablation, self.side, self.batch_size = task, ablation, int(denoise), batch_size
        self.wired = wiring(task.model, task.clean)
        self._held: dict[int, Piece] | None = {} if hold else None
        self._maps: Maps | None = None
        self._tried = False
        self._gone: Values | None = None

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """Rows that are run together: fewer where what all sources add, which is kept side by side, is large."""
        one, before = self.task.clean.take([0]), self.wired.blocks[0].before
        each = values_at(self.wired.model, one.args, one.kwargs, [before])[before].numel()
        fitting = ROOM // (each * len(self.wired.graph.sources))
        return torch.arange(self.task.rows).split(max(1, min(PIECE, fitting)))

    def ready(self, rows: Tensor) -> Piece:
        """These rows, one of `rows`, made ready. Cost: about six forward passes of them."""
        if self._held is None:
            return self._made(rows)
        first = int(rows[0])
        if first not in self._held:
            self._held[first] = self._made(rows)
        return self._held[first]

    def _made(self, rows: Tensor) -> Piece:
        mine, wired = self.task.take(rows), self.wired
        staged = stage(wired.model, mine.questions[self.side], wired.taps)
        if not self._tried:
            self._maps, self._tried = maps(wired, staged), True
        streams = Chain(wired, staged, self._values(rows)) if self._maps is None else \
            Sum(wired, staged, self._values(rows), self._maps, zero=self.ablation == "zero")
        return Piece(mine, streams, self.batch_size, lambda: self.projections)

    @cached_property
    def projections(self) -> tuple[list[Projection | None], dict[Tap, Layout | None]]:
        """See `projections`."""
        return projections(self.task, self.wired)

    def _values(self, rows: Tensor) -> Values:
        if self.ablation != "resample":  # means are of all rows
            self._gone = self._gone or ablated(self.task, self.wired.taps, self.ablation)
            return {tap: value[rows] for tap, value in self._gone.items()}
        mine = self.task.take(rows)
        if self.side:
            mine = replace(mine, clean=mine.corrupted, corrupted=mine.clean, questions=mine.questions[::-1])
        return ablated(mine, self.wired.taps, "resample")

    def run(self, cut: Tensor, report: Report | None = None) -> Tensor:
        """The metric of circuits whose edges are `cut`, bool (C, D, S) or (C, D, S, B, P): (C, B), float64."""
        found = []
        for rows in self.rows:
            mine = cut if cut.dim() == 3 else cut[..., rows, :]
            found.append(self.ready(rows).run(mine, report))
        return torch.cat(found, -1)

    def cuts(self, circuits: Sequence[Collection[Edge]], among: Collection[Edge] | None = None) -> Tensor:
        """Which edges are cut where each of these circuits is kept; see `outcomes`."""
        graph = self.wired.graph
        sources, destinations = ({name: i for i, name in enumerate(names)} for names in graph.names)
        among = list(graph.pairs()) if among is None else list(dict.fromkeys(among))
        check_items(circuits, among)
        ends = [tuple(Address.parse(end) for end in edge) for edge in among]
        for edge, (u, v) in zip(among, ends):
            place = sources.get(str(u.whole)), destinations.get(str(v.whole))
            if None in place or not graph.edges[place]:
                raise ValueError(f"{edge[0]} -> {edge[1]} is no edge of this model; an edge goes from embed, "
                                 "L0.attn.H1 or L0.mlp to what reads it later, such as L1.attn.H0.q, L1.mlp or logits")
        left = torch.tensor([[edge not in kept for edge in among] for kept in map(set, circuits)])  # (C, E)
        at = [_at(u, v, edge) for edge, (u, v) in zip(among, ends)]
        d, s = (torch.tensor([table[str(end.whole)] for end in side]) for table, side in
                ((destinations, [v for _, v in ends]), (sources, [u for u, _ in ends])))
        shape = len(circuits), len(destinations), len(sources)
        if not any(one is not None for one in at):
            cut = torch.zeros(shape, dtype=torch.bool)
            cut[:, d, s] = left.view(len(circuits), -1)
            return cut
        return self._positioned(left, d, s, at, shape)

    def _positioned(self, left: Tensor, d: Tensor, s: Tensor, at: list[int | str | None], shape: tuple) -> Tensor:
        """Cuts at some positions alone, (C, D, S, B, P)."""
        prompt = self.task.questions[self.side].prompt
        if prompt is None:
            one = self.ready(self.rows[0]).streams.stage
            prompt = torch.ones(self.task.rows, one.there(self.wired.blocks[0].before).shape[1], dtype=torch.bool)
        where = {one: prompt if one is None else self.task.places.at(one, prompt) for one in dict.fromkeys(at)}
        cut = torch.zeros(*shape, *prompt.shape, dtype=torch.bool)
        for edge, position in enumerate(at):
            cut[:, d[edge], s[edge]] |= left[:, edge, None, None] & where[position]
        return cut


def _at(u: Address, v: Address, edge: Edge) -> int | str | None:
    if None not in (u.position, v.position) and u.position != v.position:
        raise ValueError(f"{edge[0]} -> {edge[1]}: a stream is read at the position where it is written; give one")
    return u.position if v.position is None else v.position


def _idle(cut: Tensor, alive: Tensor) -> Tensor:
    """Cuts (C, 3, H, S, ...) of what heads read, where heads that nothing reads, those not `alive`, (C, H), read what
    another one does: there are fewer streams to run.
    """
    one = cut[torch.arange(len(cut)), 0, alive.int().argmax(1)]  # (C, S, ...)
    return torch.where(alive.view(len(cut), 1, -1, *(1,) * (cut.dim() - 3)), cut, one[:, None, None])


class Piece:
    """Rows of a task made ready, with the streams of their run."""

    def __init__(self, task: Prepared, streams: Streams, batch_size: int | None,
                 projections: Callable[[], tuple[list[Projection | None], dict[Tap, Layout | None]]]) -> None:
        self.task, self.streams, self.wired, self.stage = task, streams, streams.wired, streams.stage
        self._projections = projections
        width = self.stage.there(self.wired.blocks[0].before).shape[-1]
        room = self.stage.room * max(1, WIDE // width) if batch_size is None else batch_size  # narrow streams are many
        self.size = max(1, room // task.rows)
        names = {name: i for i, name in enumerate(self.wired.graph.names[1])}
        place = lambda inner, layer, head: names[str(Address("attn", layer, "H", head, inner=inner))]
        self._heads = [torch.tensor([[place(inner, layer, head) for head in range(block.count)] for inner in INPUTS])
                       for layer, block in enumerate(self.wired.blocks)]  # (3, H) each
        self._mlps = [names.get(str(Address("mlp", layer))) for layer in range(len(self.wired.blocks))]

    def run(self, cut: Tensor, report: Report | None = None) -> Tensor:
        """The metric of circuits whose edges are cut, bool (C, D, S) or (C, D, S, R, P): (C, R), float64."""
        found: dict[int, Tensor] = {}
        for start, chosen in self._chunks(cut):
            answers = self._halved(cut[chosen], start)
            found.update(zip(chosen, self.task.outcome.value([answers.double().cpu()])))
            if report is not None:
                report(len(chosen))
        return torch.stack([found[index] for index in range(len(cut))])

    def _chunks(self, cut: Tensor) -> Iterator[tuple[int, list[int]]]:
        """Circuits that are run together, with the first layer in which any of them is cut."""
        L = len(self.wired.blocks)
        of = torch.tensor([L if one.layer is None else one.layer for one in self.wired.graph.destinations])
        any_cut = cut.flatten(2).any(-1)  # (C, D)
        first = torch.where(any_cut, of, L).amin(1).tolist()
        order = sorted(range(len(cut)), key=lambda index: first[index])
        for begin in range(0, len(order), self.size):
            chosen = order[begin:begin + self.size]
            yield first[chosen[0]], chosen

    def _halved(self, cut: Tensor, start: int) -> Tensor:
        """`_walk`; of half of the circuits and then of the others where memory runs out."""
        try:
            return self._walk(cut, start)
        except Exception as error:
            if len(cut) == 1 or not out_of_memory(error):
                raise
        half = len(cut) // 2
        return torch.cat([self._halved(cut[:half], start), self._halved(cut[half:], start)])

    def _walk(self, cut: Tensor, start: int) -> Tensor:
        """The answers of some circuits, (C, R, ...), which are the unchanged run up to a layer."""
        streams, blocks, circuits = self.streams, self.wired.blocks, torch.arange(len(cut))
        logits, L = cut.shape[1] - 1, len(blocks)
        any_cut = cut.flatten(2).any(-1).any(0)  # (D,)
        alive = self._alive(cut)
        streams.begin(start)
        layer = start
        while layer < L and self._later(any_cut, layer):
            heads, mlp = blocks[layer].heads, blocks[layer].mlp
            span = streams.sources(heads)
            z = self._run_heads(layer, _idle(cut[:, self._heads[layer]], alive[:, span])) if alive[:, span].any() else \
                self.stage.there(heads).expand(len(cut), -1, -1, -1)
            streams.add_heads(layer, z, needed=bool(cut[:, :, span].any()))
            if mlp is not None:
                span = streams.sources(mlp)
                streams.run_mlp(layer, circuits, cut[:, self._mlps[layer]], needed=bool(cut[:, :, span].any()),
                                alive=bool(alive[:, span].any()))
            layer += 1
        none = torch.zeros_like(cut[:, logits])
        groups = streams.to_logits(circuits, cut[:, logits]) if layer == L else \
            streams.to_heads(layer, circuits, none)  # nothing more is cut: the model goes on by itself
        return self.stage.answers(len(cut), groups)

    def _alive(self, cut: Tensor) -> Tensor:
        """Which sources any kept edge leaves, bool (C, S). What the others give is nothing to anyone."""
        gone = cut if cut.dim() == 3 else cut.flatten(3).all(-1)
        return (self.wired.graph.edges.T & ~gone).any(1)

    def _later(self, any_cut: Tensor, layer: int) -> bool:
        """Whether anything is cut in this layer or later."""
        return bool(any_cut[self._heads[layer][0, 0]:].any())

    def _run_heads(self, layer: int, cut: Tensor) -> Tensor:
        """What the heads of a layer give, (C, R, P, H K), by cuts (C, 3, H, S, ...) of what each reads."""
        block, C = self.wired.blocks[layer], len(cut)
        shared = self.streams.alike
        owner = torch.arange(C).view(C, 1, 1).expand(C, 3, block.count).flatten()
        rows = cut.flatten(0, 2)
        key = rows.flatten(1).long() if shared else torch.cat([owner[:, None], rows.flatten(1).long()], 1)
        _, which = key.unique(dim=0, return_inverse=True)
        first = torch.full((int(which.max()) + 1,), len(which)).scatter_reduce(0, which, torch.arange(len(which)),
                                                                              "amin")
        which = which.view(C, 3, block.count)
        alone = which[:, :1, :1]
        if bool((which == alone).all()):  # all heads of a circuit read one stream
            one = first[alone.flatten()]
            groups = self.streams.to_heads(layer, owner[one], rows[one])
            return passed(self.stage, C, groups, start=start_of(self.streams, layer), keep=[block.heads])[block.heads]
        made = self._projection(layer) if len(first) > MANY * C else None
        if made is not None and len(made.rounds) == 1:
            return self._projected(layer, made, which, owner[first], rows[first])
        operands = self._operands(layer, which, owner[first], rows[first]) if made is None else \
            self._in_rounds(layer, made, which, owner[first], rows[first])
        read = Read(block.count, lambda name, _: operands[name].flatten(0, 1))
        return passed(self.stage, C, {}, start=block.before, keep=[block.heads], reads={block.pattern: read},
                      scores=self.wired.scores)[block.heads]

    def _projection(self, layer: int) -> Projection | None:
        """How a layer makes what its heads read; None where it has to make all of it for each stream."""
        if not isinstance(self.streams, Sum):
            return None  # there the price is that of the streams
        made, layouts = self._projections()
        self.stage.recording.layouts.update(layouts)
        return made[layer]

    def _normed(self, layer: int, made: Projection, owner: Tensor, rows: Tensor) -> list[Tensor]:
        """What each linear map reads of each stream, (N, R, P, V)."""
        parts = []
        for ids in torch.arange(len(rows)).split(8 * self.size):  # norms take less room than what comes behind
            found = passed(self.stage, len(ids), self.streams.to_heads(layer, owner[ids], rows[ids]),
                           start=start_of(self.streams, layer), keep=made.taps)
            parts.append([found[tap] for tap in made.taps])
        return [torch.cat(many) for many in zip(*parts)]

    def _projected(self, layer: int, made: Projection, which: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
        """What the heads of a layer give, (C, R, P, H K), each of queries, keys and values of its own streams."""
        block = self.wired.blocks[layer]
        given = made.given(which, self._normed(layer, made, owner, rows), made.rounds[0])
        return passed(self.stage, len(which), {tap: put(value) for tap, value in given.items()}, start=block.before,
                      keep=[block.heads])[block.heads]

    def _in_rounds(self, layer: int, made: Projection, which: Tensor, owner: Tensor, rows: Tensor
                   ) -> dict[str, Tensor]:
        """`_operands`, where heads share keys and values: those that share none together."""
        block, read, found = self.wired.blocks[layer], self._normed(layer, made, owner, rows), {}
        for chosen in made.rounds:
            groups = {tap: put(value) for tap, value in made.given(which, read, chosen).items()}

            def keep(name: str, x: Tensor, chosen: Tensor = chosen) -> Tensor:
                x = x.unflatten(0, (len(which), -1))  # (C, R, H, ...)
                found.setdefault(name, torch.empty_like(x))[:, :, chosen] = x[:, :, chosen]
                if name == "v":
                    raise Enough
                return x.flatten(0, 1)

            passed(self.stage, len(which), groups, start=block.before, reads={block.pattern: Read(block.count, keep)},
                   scores=self.wired.scores)
        return found

    def _operands(self, layer: int, which: Tensor, owner: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The queries, keys and values of each head, (C, R, H, ...), each made of the stream that it reads."""
        block, found = self.wired.blocks[layer], {}
        for ids in torch.arange(len(rows)).split(self.size):
            groups = self.streams.to_heads(layer, owner[ids], rows[ids])

            def keep(name: str, x: Tensor, ids: Tensor = ids) -> Tensor:
                x = x.unflatten(0, (len(ids), -1))  # (N, R, H, ...)
                mine = which[:, INPUTS.index(name)]
                c, h = ((mine >= ids[0]) & (mine <= ids[-1])).nonzero().unbind(1)
                if name not in found:
                    found[name] = x.new_empty(len(mine), *x.shape[1:])
                found[name][c, :, h] = x[mine[c, h] - ids[0], :, h]
                if name == "v":  # the last of the three
                    raise Enough
                return x.flatten(0, 1)

            passed(self.stage, len(ids), groups, start=start_of(self.streams, layer),
                   reads={block.pattern: Read(block.count, keep)}, scores=self.wired.scores)
        return found


__all__ = ["Edge", "Item", "Piece", "Pieces", "Report", "check_items"]
