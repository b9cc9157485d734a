"""How the parts of a model are wired, as running a circuit of edges needs it: where each writes and reads, and whether
the residual stream is a sum.

Where it is, what a head adds is linear in its output, and a stream in which some parts are changed is the stream plus
what they add more: nothing below has to be run again. That is tried, not assumed. Where norms stand between the parts
and the stream (BERT, Gemma 2), the model makes the stream again of the changed parts.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..address import Address
from ..anatomy import Anatomy
from ..errors import RelpropError
from ..intervene import Group, changed, parts
from ..mediation.replay import Replay, replaced
from ..mediation.stage import Stage
from ..numerics import tolerance
from ..tokens import Batch
from ..trace import Tap
from ..trace.intervention import edited
from ..trace.operands import Enough, Product, Read, Reading
from .graph import Graph, beside, of


@dataclass(frozen=True)
class Block:
    """The taps of a layer: the stream before it, between its attention and its MLP (None if they run beside each other
    or there is no MLP) and after it; the heads, what the MLP returns, and the pattern; and how many heads there are.
    """

    before: Tap
    between: Tap | None
    after: Tap
    heads: Tap
    mlp: Tap | None
    pattern: Tap
    count: int
    parallel: bool = False


@dataclass(frozen=True, eq=False)
class Wiring:
    """The blocks of a model, the graph of its edges, and which product makes the scores of an attention in the open."""

    model: nn.Module
    graph: Graph
    blocks: tuple[Block, ...]
    embed: Tap
    scores: Mapping[Tap, Product]

    @property
    def taps(self) -> list[Tap]:
        """All that are read or changed."""
        found = [self.embed]
        for block in self.blocks:
            found += [block.before, block.between, block.after, block.heads, block.mlp]
        return [tap for tap in found if tap is not None]

    @property
    def sources(self) -> list[Tap]:
        """Where each source is, those of one tap as one: the embedding, and of each layer its heads and its MLP."""
        return [self.embed, *(tap for block in self.blocks for tap in (block.heads, block.mlp) if tap is not None)]

    @property
    def counts(self) -> list[int]:
        """How many sources each tap of `sources` has."""
        return [1, *(count for block in self.blocks for tap, count in ((block.heads, block.count), (block.mlp, 1))
                     if tap is not None)]


def wiring(model: nn.Module, batch: Batch) -> Wiring:
    """How a model is wired, by inputs of this kind. Cost: three forward passes and a backward of one row.

    Raises: ValueError for a model whose edges cannot be told, as of `graph`, or an attention whose scores are made of
        several products.
    """
    known = parts(model, batch.args, batch.kwargs)
    parallel = beside(model, known, batch.args, batch.kwargs)
    found = of(known, parallel)
    if known.embed is None:
        raise ValueError("no lookup of word embeddings or embedding of patches was seen, from which edges start; take "
                         "a level of nodes")
    blocks = tuple(_block(known, number, beside) for number, beside in enumerate(parallel))
    return Wiring(model, found, blocks, known.embed, _scores(model, batch, blocks))


def _block(known: Anatomy, number: int, parallel: bool) -> Block:
    layer = known.layers[number]
    whole = lambda part: next(iter(known.resolve(Address(part, number))))[1]
    mlp = None if layer.mlp is None else whole("mlp")
    between = None if parallel or mlp is None else layer.mid
    return Block(whole("in"), between, whole("layer"), layer.attention, mlp, layer.pattern, layer.heads, parallel)


def _scores(model: nn.Module, batch: Batch, blocks: tuple[Block, ...]) -> dict[Tap, Product]:
    one = batch.take([0])
    with torch.no_grad(), edited(model, {}, kind=Reading) as editor:
        model(*one.args, **one.kwargs)
    found = {tap: products for tap, products in editor.seen.items() if any(tap == block.pattern for block in blocks)}
    several = next((tap for tap, products in found.items() if len(products) != 1), None)
    if several is not None:
        raise ValueError(f"{several.path}: attention scores are made of {len(found[several])} products, so that what a "
                         "head's queries and keys read cannot be changed one by one; take a level of nodes")
    return {tap: next(iter(products)) for tap, products in found.items()}


# -- a pass that starts and ends where it is wanted -------------------------------------------------------------------


def passed(stage: Stage, copies: int, groups: Mapping[Tap, list[Group]], *, start: Tap, keep: Iterable[Tap] = (),
           reads: Mapping[Tap, Read] | None = None, scores: Mapping[Tap, Product] | None = None) -> dict[Tap, Tensor]:
    """The values at the taps `keep`, (copies, R, P, C) each, in copies of the input that are changed by these groups.

    What ended before `start` is replayed, and the pass ends when all is known that is kept.

    Raises: RelpropError if that never happened.
    """
    keep, layouts, found = list(keep), stage.recording.layouts, {}

    def kept(tap: Tap, value: Tensor) -> None:
        found[tap] = layouts[tap].view(value.clone(memory_format=torch.contiguous_format), copies)
        if len(found) == len(keep):
            raise Enough

    changes = {tap: changed(tap, layouts[tap], copies, many) for tap, many in groups.items()}
    changes |= {tap: partial(kept, tap) for tap in keep}
    modules = {one.call.path: partial(Replay, output=partial(one.output, copies))
               for one in stage.recording.before(stage.recording.when[start])}
    kind = partial(Reading, reads=reads, scores=scores)
    with replaced(stage.model, modules), edited(stage.model, changes, kind=kind):
        try:
            stage.feed(list(range(stage.rows)) * copies)
        except Enough:
            return found
    missing = [tap for tap in keep if tap not in found] or list(reads or ())
    raise RelpropError(f"the forward pass never came to {missing[0] if missing else 'what was wanted'}")


def put(value: Tensor) -> list[Group]:
    """The group that puts a value, (copies, R, P, C), at a tap."""
    return [Group(torch.arange(len(value)), torch.zeros(len(value), dtype=torch.long), 1, lambda now: value)]


# -- a stream that is a sum -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Maps:
    """What each layer's heads add to the stream, by the values at their tap: `heads[l]`, (H, K, D), and a bias (D,)."""

    heads: list[Tensor]
    biases: list[Tensor]

    def added(self, layer: int, z: Tensor) -> Tensor:
        """What each head adds, (H, ..., D), of z, (..., H K)."""
        by_head = z.unflatten(-1, (len(self.heads[layer]), -1)).movedim(-2, 0)  # (H, ..., K)
        return torch.einsum("h...k,hkd->h...d", by_head, self.heads[layer])


def maps(wired: Wiring, stage: Stage) -> Maps | None:
    """What heads add to the stream; None if the stream is no sum. Cost: two passes a layer, of part of it."""
    try:
        found = Maps(*map(list, zip(*(_map(block, stage) for block in wired.blocks))))
        return found if _sums(wired, stage, found) else None
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # the stream does not even keep its shape


def _map(block: Block, stage: Stage) -> tuple[Tensor, Tensor]:
    """What a layer adds for each entry of its heads alone, and for none of them."""
    z, into = stage.there(block.heads), block.between or block.after
    width, places = z.shape[-1], z.shape[0] * z.shape[1]
    N = -(-width // places)
    basis = z.new_zeros(1 + N, places, width)
    basis[1:].flatten(0, 1)[torch.arange(width), torch.arange(width)] = 1
    groups = {block.heads: put(basis.view(1 + N, *z.shape))}
    if block.between is None and block.mlp is not None:
        groups[block.mlp] = put(torch.zeros_like(stage.there(block.mlp)).expand(1 + N, -1, -1, -1))
    found = passed(stage, 1 + N, groups, start=block.before, keep=[into])[into]
    D = found.shape[-1]
    rows = (found[1:] - found[0]).reshape(-1, D)[:width]
    bias = found[0, 0, 0] - stage.there(block.before)[0, 0]
    return rows.unflatten(0, (block.count, -1)), bias


def _sums(wired: Wiring, stage: Stage, found: Maps) -> bool:
    """Whether the streams move by as much as what was added to them, MLPs being held at what they return."""
    generator = torch.Generator().manual_seed(0)

    def moved(tap: Tap) -> tuple[Tensor, Tensor]:
        value = stage.there(tap)
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value) * value.std()
        return put((value + noise)[None]), noise

    first, last = wired.blocks[0].before, wired.blocks[-1].after
    groups, expected = {}, {}
    groups[first], shift = moved(first)
    for layer, block in enumerate(wired.blocks):
        if block.before is not first:
            expected[block.before] = shift
        groups[block.heads], noise = moved(block.heads)
        shift = shift + found.added(layer, noise).sum(0)
        if block.between is not None:
            expected[block.between] = shift
        if block.mlp is not None:
            groups[block.mlp] = put(stage.there(block.mlp)[None])
    expected[last] = shift
    values = passed(stage, 1, groups, start=first, keep=expected)
    for tap, shift in expected.items():
        value = stage.there(tap) + shift
        if not bool((values[tap][0] - value).abs().max() <= tolerance(value.dtype) * value.abs().max()):
            return False
    return True


__all__ = ["Block", "Maps", "Wiring", "maps", "passed", "put", "wiring"]
