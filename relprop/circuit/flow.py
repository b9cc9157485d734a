"""Information flow routes: how near each part is to the sum that it is added to. One forward pass, and no metric.

A part y of a sum x counts for as much of it as it brings the sum nearer, max(0, |x|_1 - |x - y|_1), divided by the sum
of that over all parts (Ferrando and Voita 2024, Information flow routes: automatically interpreting language models at
scale, eqs. 5 and 6). Shares are what is in the stream, not what the task needs: no input is corrupted, and a circuit of
them is of whatever the model does with these inputs. Position embeddings and biases are in the sums, and no parts.

`information_flow` is of the graph of heads and MLPs, as in the code of EAP-IG; `contributions` of tokens, layer by
layer, as in the authors' own tool.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..intervene import canonical
from ..intervene.change import Shapes
from ..numerics import tolerance
from ..result import Circuit
from ..still import settled
from ..subject import Subject
from ..tokens import Batch
from ..trace import Tap
from ..trace.intervention import edited
from ..trace.operands import Read
from ..trace.watching import Called, Watching
from .record import whole
from .task import Prepared
from .wiring import Block, Wiring, wiring

ROWS = 16
"""Rows that are run together."""


def information_flow(task: Prepared, *, level: str | Sequence[str] = "edges", ablation: str = "resample",
                     batch_size: int | None = None) -> Circuit:
    """The share of each source in what each destination reads, a mean over rows and positions; of the clean inputs.

    Where no part brings the sum nearer, all shares are zero (the original's are NaN). Nodes have what flows through
    them to the logits: the sum over their edges of the share times what flows through its end, the logits having 1.
    Of the metric and of the ablation nothing depends.

    Raises: ValueError for a level of neurons or positions, and for a model whose residual stream is no plain sum.
    """
    wired = wiring(task.model, task.clean)
    total: Tensor | float = 0.0
    for rows in torch.arange(task.rows).split(batch_size or ROWS):
        total = total + _shares(_kept(task.model, wired, task.clean.take(rows.tolist())), wired)
    scores = total / task.rows
    if level == "edges":
        return Circuit.of(wired.graph.named(scores), level="edges", method="information-flow")
    flows = _through(wired, scores)
    wanted = task.nodes(level)
    missing = next((node for node in wanted if node not in flows), None)
    if missing is not None:
        raise ValueError(f"information flow is of whole heads and MLPs at all positions, not of {missing}; take the "
                         "level 'heads', 'mlps', 'heads and mlps' or 'edges'")
    return Circuit.of({node: flows[node] for node in wanted}, level=level if isinstance(level, str) else "nodes",
                      method="information-flow")


def nearness(part: Tensor, total: Tensor) -> Tensor:
    """max(0, |total|_1 - |total - part|_1) over the last axis (Ferrando and Voita 2024, eq. 5); shapes broadcast.

    >>> nearness(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 2.0]]), torch.tensor([2.0, 2.0]))
    tensor([1., 0., 4.])
    """
    return (total.abs().sum(-1) - (total - part).abs().sum(-1)).clamp_min(0)


def _parted(*near: Tensor, floor: float = 0.0) -> list[Tensor]:
    """Each divided by the sum of all, over the axes behind those that are common, (B, T); zero where there is none."""
    near = [one.clamp_min(floor) for one in near]
    total = sum(one.flatten(2).sum(-1) for one in (x[..., None] for x in near))
    total = torch.where(total > 0, total, 1)
    return [one / total.view(*total.shape, *[1] * (one.dim() - total.dim())) for one in near]


# -- one pass ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Kept:
    """What a pass has at the taps, (B, T, C) each, of the embedding what it brings where the stream begins; how the
    heads of each layer are written; and of each layer patterns (B, H, T, S) and values (B, H, S, K), if they were asked
    for. `real` positions are no padding, bool (B, T).
    """

    values: dict[Tap, Tensor]
    writes: dict[Tap, Called]
    patterns: list[Tensor]
    read: list[Tensor]
    real: Tensor

    def written(self, block: Block) -> Tensor:
        """The matrices of a block's output projection by head, (H, K, D)."""
        call = self.writes[block.heads]
        if call.weight is None:
            raise ValueError(f"{block.heads.path}: the output projection has no plain matrix, so that what each head "
                             "adds cannot be told")
        return call.weight.unflatten(0, (block.count, -1))


def _kept(model: nn.Module, wired: Wiring, batch: Batch, *, tokens: bool = False) -> Kept:
    blocks, watching = wired.blocks, []
    found = Kept({}, {}, [], [], torch.empty(0))

    def kept(tap: Tap, value: Tensor) -> None:
        found.values[tap] = value.detach().clone()
        if any(tap == block.heads for block in blocks):
            found.writes[tap] = watching[0].made

    def kind(changes: object) -> Watching:
        reads = {block.pattern: Read(block.count, values_of) for block in blocks} if tokens else {}
        watching.append(Watching(changes, reads=reads, scores=wired.scores))
        return watching[0]

    def values_of(name: str, x: Tensor) -> Tensor:
        if name == "v":
            found.read.append(x.detach())
        return x

    taps = [*wired.taps, *map(whole, blocks)]
    changes = {tap: lambda value, tap=tap: kept(tap, value) for tap in taps}
    if tokens:
        changes |= {block.pattern: lambda value: found.patterns.append(value.detach().clone()) for block in blocks}
    with torch.no_grad(), settled(model), edited(model, changes, kind=kind):
        model(*batch.args, **batch.kwargs)
    watching.clear()  # else a circle of references
    shapes = Shapes(model, batch.args, batch.kwargs, taps, found.values)
    found.values = {tap: canonical(tap, shapes.layout(tap), value) for tap, value in found.values.items()}
    _check_sums(found, wired)
    start = blocks[0].before
    empty: list[Tensor] = []
    with torch.no_grad(), settled(model), edited(model, {wired.embed: torch.zeros_like, start: empty.append}):
        model(*batch.args, **batch.kwargs)
    found.values[wired.embed] = found.values[start] - canonical(start, shapes.layout(start), empty[0])
    found.real = batch.real(found.values[start].shape[1]).to(found.values[start].device)
    return found


def _check_sums(found: Kept, wired: Wiring) -> None:
    """Raises ValueError where the stream is not what it was plus what heads and MLPs have added."""
    nexts = [*(block.before for block in wired.blocks[1:]), wired.blocks[-1].after]
    for number, (block, end) in enumerate(zip(wired.blocks, nexts)):
        steps = [(block.before, end, [whole(block), block.mlp])] if block.between is None else [
            (block.before, block.between, [whole(block)]), (block.between, end, [block.mlp])]
        for start, stop, added in steps:
            total = found.values[stop]
            terms = [found.values[tap] for tap in (start, *added) if tap is not None]
            same = all(term.shape == total.shape for term in terms)
            share = max(tolerance(total.dtype), tolerance(torch.float32))
            if not same or (total - sum(terms)).abs().max() > share * total.abs().max():
                raise ValueError(f"layer {number}: the residual stream is not the sum of what heads and MLPs add, as "
                                 "where norms or scales stand between, so that they have no shares in it")


def _shares(found: Kept, wired: Wiring) -> Tensor:
    """Shares (S, D), means over positions, summed over rows."""
    graph, blocks, sources = wired.graph, wired.blocks, []
    sources.append(found.values[wired.embed][None])
    for block in blocks:
        z = found.values[block.heads].unflatten(-1, (block.count, -1))
        sources.append(torch.einsum("bthk,hkd->hbtd", z, found.written(block)))
        sources += [] if block.mlp is None else [found.values[block.mlp][None]]
    parts, scores = torch.cat(sources), torch.zeros(graph.edges.shape, dtype=torch.float64)
    weight = found.real.double() / found.real.sum(1, keepdim=True)  # (B, T)
    for point, columns in _points(wired):
        count = int(graph.edges[:, columns[0]].sum())  # those before it, which come first
        near = torch.stack([nearness(part, found.values[point]) for part in parts[:count]], -1)  # (B, T, S)
        share, = _parted(near)
        scores[:count, columns] = (share.double() * weight[..., None]).sum((0, 1)).cpu()[:, None]
    return scores


def _points(wired: Wiring) -> list[tuple[Tap, list[int]]]:
    """Where the stream is read, and by which destinations."""
    graph, found = wired.graph, []
    for layer, block in enumerate(wired.blocks):
        place = graph.layer(layer)
        heads = list(range(place.start, place.start + 3 * block.count))
        found.append((block.before, heads))
        if block.mlp is not None:
            found.append((block.between or block.before, [heads[-1] + 1]))
    return [*found, (wired.blocks[-1].after, [len(graph.destinations) - 1])]


def _through(wired: Wiring, scores: Tensor) -> dict[str, float]:
    """What flows through each source to the logits. A head's queries, keys and values read the same stream, and count
    once.
    """
    graph = wired.graph
    names, ends = graph.names
    columns = {end.removesuffix(".v"): i for i, end in enumerate(ends) if not end.endswith((".q", ".k"))}
    flows = {"logits": 1.0}
    for node in reversed(names):
        row = names.index(node)
        flows[node] = sum(float(scores[row, column]) * flows[end] for end, column in columns.items()
                          if graph.edges[row, column])
    return flows


# -- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contributions:
    """Shares of what is added to each token's stream, of L layers: `heads` (L, B, T, S, H) of each head and key token,
    and `kept` (L, B, T) of the stream before, in the stream after the attention; `mlp` and `past` (L, B, T) of the MLP
    and of the stream before it, in the stream after it. What there is not is zero.
    """

    heads: Tensor
    kept: Tensor
    mlp: Tensor
    past: Tensor

    def routes(self, row: int, *, position: int = -1, threshold: float = 0.04) -> list[tuple[str, str, float]]:
        """The edges that lead to a token's last stream and have at least this share, from the last layer back to the
        first: from, to, share. Streams are "L3@5", after layer 3 at position 5, and "L3.mid@5"; parts are addresses.
        """
        L, _, T = self.kept.shape
        wanted, found = {position % T}, []
        for layer in reversed(range(L)):
            reached: set[int] = set()
            for t in sorted(wanted):
                found += _over(threshold, [(f"L{layer}.mid@{t}", f"L{layer}@{t}", self.past[layer, row, t]),
                                           (f"L{layer}.mlp@{t}", f"L{layer}@{t}", self.mlp[layer, row, t])])
                before = f"L{layer - 1}@{t}" if layer else f"embed@{t}"
                found += _over(threshold, [(before, f"L{layer}.mid@{t}", self.kept[layer, row, t])])
                reached.add(t)
                for s, h in (self.heads[layer, row, t] >= threshold).nonzero().tolist():
                    source = f"L{layer - 1}@{s}" if layer else f"embed@{s}"
                    share = float(self.heads[layer, row, t, s, h])
                    found.append((source, f"L{layer}.attn.H{h}@{t}", share))
                    found.append((f"L{layer}.attn.H{h}@{t}", f"L{layer}.mid@{t}", share))
                    reached.add(s)
            wanted = reached
        return list(dict.fromkeys(found))


def _over(threshold: float, edges: list[tuple[str, str, Tensor]]) -> list[tuple[str, str, float]]:
    return [(a, b, float(share)) for a, b, share in edges if float(share) >= threshold]


def contributions(subject: Subject | nn.Module, inputs: object, *, floor: float = 0.0) -> Contributions:
    """How much each head brings from each token, and the MLP, to each token's stream, layer by layer.

    Cost: a forward pass, and as many differences of vectors as there are heads, queries and keys.

    Args: floor: the least that a part brings its sum nearer by; the authors' tool has 1e-5.
    Raises: ValueError for a model whose residual stream is no plain sum, or in whose layers the MLP runs beside the
        attention, so that there is no stream between.

    >>> import transformers
    >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=4, vocab_size=9, n_positions=8)
    >>> found = contributions(transformers.GPT2LMHeadModel(config), {"input_ids": torch.tensor([[1, 2, 3]])})
    >>> found.heads.shape, bool(torch.allclose(found.heads.sum((3, 4)) + found.kept, torch.ones(1, 1, 3)))
    (torch.Size([1, 1, 3, 3, 2]), True)
    """
    subject = subject if isinstance(subject, Subject) else Subject.from_module(subject)
    batch = subject.prepare(inputs)
    wired = wiring(subject.model, batch)
    if any(block.parallel for block in wired.blocks):
        raise ValueError("in this model MLPs run beside the attention, so that there is no stream between to have a "
                         "share in; take information_flow, whose parts are of whole layers")
    found = _kept(subject.model, wired, batch, tokens=True)
    layers = [_layer(found, wired, number, floor) for number in range(len(wired.blocks))]
    return Contributions(*(torch.stack(many) for many in zip(*layers)))


def _layer(found: Kept, wired: Wiring, number: int, floor: float) -> tuple[Tensor, ...]:
    block = wired.blocks[number]
    ends = [*(one.before for one in wired.blocks[1:]), wired.blocks[-1].after]
    before, after = found.values[block.before], found.values[ends[number]]
    middle = found.values[block.between] if block.between is not None else after
    patterns, values, W = found.patterns[number], found.read[number], found.written(block)
    heads = []
    for h in range(block.count):
        brought = values[:, h] @ W[h]  # (B, S, D): of each key token, whole
        part = patterns[:, h, :, :, None] * brought[:, None]  # (B, T, S, D)
        heads.append(nearness(part, middle[:, :, None]))
    near, kept = _parted(torch.stack(heads, -1), nearness(before, middle), floor=floor)
    if block.mlp is None:
        return near, kept, torch.zeros_like(kept), torch.ones_like(kept)
    return near, kept, *_parted(nearness(found.values[block.mlp], after), nearness(middle, after), floor=floor)


__all__ = ["Contributions", "contributions", "information_flow", "nearness"]
