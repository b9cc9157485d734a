"""One forward pass kept with its graph, and the ways back from what reads the residual stream to what was added to it.

The slope of a destination is what the metric changes by per unit of what it reads, (R, P, D): the gradient, or
relevance per unit under a composite. All slopes of a layer are found without a copy of the stream for each head: the
gradient of the metric where queries, keys and values enter the attention, or where the linear maps give them, is passed
on head by head through that head's part of the maps, and then, for all heads at once, through the norm.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..address import INPUTS
from ..composite import Composite
from ..intervene import canonical
from ..still import settled
from ..trace import Tap, intercepted
from ..trace.intervention import edited
from ..trace.layout import Layout
from ..trace.operands import Read
from ..trace.watching import Called, Watching
from .task import Prepared
from .wiring import Block, Wiring

Shift = Mapping[Tap, Tensor]
"""What is added at taps on the way, (R, P, C)."""


class Gate(Function):
    """The identity, whose way back is closed while `closed` holds something."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, closed: list[bool]) -> Tensor:
        ctx.closed = closed
        return x.clone()  # a view made in here could not be updated in place

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.closed else g, None


@dataclass(eq=False)
class Record:
    """What was kept of a pass, of tensors that autograd knows: `outcome` of each row (R,), the stream at the points of
    each layer, what the embedding, heads and MLPs add (`added`, by tap), what attentions read, and the linear maps that
    made it. `values` of all sources, as the model has them, without a graph; `written`, what the output projections
    read, with it; `writes`, how they were called. `patterns` of attentions, (B, H, T, S), if they were asked for.
    """

    outcome: Tensor | None = None
    streams: dict[Tap, Tensor] = field(default_factory=dict)
    added: dict[Tap, Tensor] = field(default_factory=dict)
    reads: list[dict[str, Tensor]] = field(default_factory=list)
    calls: list[list[Called]] = field(default_factory=list)
    values: dict[Tap, Tensor] = field(default_factory=dict)
    written: dict[Tap, Tensor] = field(default_factory=dict)
    writes: dict[Tap, Called] = field(default_factory=dict)
    patterns: dict[Tap, Tensor] = field(default_factory=dict)
    closed: list[bool] = field(default_factory=list)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """A `with` block in which nothing passes back into heads and MLPs."""
        self.closed.append(True)
        try:
            yield
        finally:
            self.closed.pop()


def whole(block: Block) -> Tap:
    """Where all that the heads of a block add is."""
    return Tap(block.heads.path, block.heads.kind, "output", block.heads.nth)


def recorded(task: Prepared, wired: Wiring, composite: Composite | None = None, *, shift: Shift | None = None,
             layouts: Mapping[Tap, Layout | None] | None = None, side: int = 0, patterns: bool = False) -> Record:
    """A forward pass of the clean inputs (`side` 1: the corrupted ones), kept.

    Args: composite: rules of the way back; None: the gradient. shift: what is added on the way; of it `layouts`.
        patterns: whether patterns are kept, too.
    """
    found, batch = Record(), (task.clean, task.corrupted)[side]
    watching: list[Watching] = []
    changes, reads = _changes(found, wired, watching, partial(_shifted, shift or {}, layouts or {}))
    if patterns:
        changes |= {block.pattern: partial(_into, found.patterns, block.pattern) for block in wired.blocks}
    make = partial(Watching, reads=reads, scores=wired.scores)

    def kind(changes: Any) -> Watching:
        watching.append(make(changes))
        return watching[0]

    with graphed(task), ExitStack() as stack:
        if composite is not None:
            stack.enter_context(intercepted(task.model, composite))
        stack.enter_context(edited(task.model, changes, kind=kind))
        output = task.model(*batch.args, **batch.kwargs)
        with torch._C.DisableTorchFunction():
            found.outcome = task.value(output, side=side)
        found.calls = [watching[0].before[block.pattern] for block in wired.blocks]
        for call in (*found.writes.values(), *(call for many in found.calls for call in many)):
            _ = call.weight  # told now: once parameters are trained again, a product with one is no linear map
    watching.clear()  # which would keep the graph of the pass in a circle
    return found


@contextmanager
def graphed(task: Prepared) -> Iterator[None]:
    """A `with` block in which passes are kept and taken back, whatever the caller does with gradients."""
    with settled(task.model), torch.inference_mode(False), torch.enable_grad():
        yield


def _changes(found: Record, wired: Wiring, watching: list[Watching], moved: Callable[[Tap, Tensor], Tensor]
             ) -> tuple[dict[Tap, Callable[[Tensor], Tensor | None]], dict[Tap, Read]]:
    changes: dict[Tap, Callable[[Tensor], Tensor | None]] = {wired.embed: partial(_begun, found, wired.embed, moved)}
    reads = {}

    def passed(tap: Tap, value: Tensor) -> None:
        found.streams[tap] = value

    def entered(tap: Tap, value: Tensor) -> None:
        found.streams[tap] = value
        watching[0].watch()

    def attended(tap: Tap, value: Tensor) -> Tensor:
        found.values[tap], found.writes[tap] = value.detach(), watching[0].made
        found.written[tap] = moved(tap, value).view_as(value)
        return found.written[tap]

    def added(tap: Tap, value: Tensor) -> Tensor:
        found.added[tap] = Gate.apply(value, found.closed)
        return found.added[tap].clone()  # the model may add to it in place

    def worked(tap: Tap, value: Tensor) -> Tensor:
        found.values[tap] = value.detach()
        return added(tap, moved(tap, value))

    for block in wired.blocks:
        mine: dict[str, Tensor] = {}
        found.reads.append(mine)
        changes |= {block.before: partial(entered, block.before), block.heads: partial(attended, block.heads),
                    whole(block): partial(added, block.heads)}
        if block.between is not None:
            changes[block.between] = partial(passed, block.between)
        if block.mlp is not None:
            changes[block.mlp] = partial(worked, block.mlp)
        reads[block.pattern] = Read(block.count, partial(_aliased, mine))
    changes[wired.blocks[-1].after] = partial(passed, wired.blocks[-1].after)
    return changes, reads


def _begun(found: Record, tap: Tap, moved: Callable[[Tap, Tensor], Tensor], value: Tensor) -> Tensor:
    """The embedding, from which autograd starts."""
    found.values[tap] = value.detach()
    found.added[tap] = moved(tap, value) + torch.zeros_like(value, requires_grad=True)
    return found.added[tap].clone()


def _into(kept: dict[Tap, Tensor], tap: Tap, value: Tensor) -> None:
    kept[tap] = value


def _aliased(kept: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    kept[name] = x.view_as(x)
    return kept[name]


def _shifted(shift: Shift, layouts: Mapping[Tap, Layout | None], tap: Tap, value: Tensor) -> Tensor:
    if tap not in shift:
        return value
    change = torch.zeros_like(value, memory_format=torch.contiguous_format)
    canonical(tap, layouts[tap], change).copy_(shift[tap])  # a view of it
    return value + change


# -- ways back --------------------------------------------------------------------------------------------------------


def pulled(output: Tensor, inputs: Sequence[Tensor], seeds: Tensor) -> list[Tensor]:
    """The gradients of `inputs`, (n, ...) each, for n gradients of `output`, (n, ...); zeros where there are none."""
    if len(inputs) == 1 and inputs[0] is output:
        return [seeds]
    try:
        found = torch.autograd.grad(output, inputs, seeds, is_grads_batched=True, retain_graph=True, allow_unused=True)
    except RuntimeError:  # an op whose way back cannot be run for many at once
        each = [back(output, inputs, seed) for seed in seeds]
        return [torch.stack(many) for many in zip(*each)]
    return [x.new_zeros(len(seeds), *x.shape) if g is None else g for x, g in zip(inputs, found)]


def back(output: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], seed: Tensor | Sequence[Tensor] | None = None
         ) -> list[Tensor]:
    """The gradients of `inputs`, zeros where `output` does not depend on one."""
    found = torch.autograd.grad(output, inputs, seed, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


@dataclass(frozen=True, eq=False)
class Maps:
    """How the queries, keys and values of a layer are made by plain linear maps: `entries`, by what is read and the
    number of the map in the order of their calls, those of its output that are of each head, (H, K). Heads that share
    some come in different `rounds`, (n, H) bool.
    """

    entries: Mapping[tuple[str, int], Tensor]
    rounds: Tensor


def ends(found: Record, layer: int, made: Maps | None) -> list[Tensor]:
    """Where the metric's gradient is wanted for the slopes of a layer's heads."""
    if made is None or len(made.rounds) > 1:
        return [found.reads[layer][name] for name in INPUTS]
    return [found.calls[layer][number].output for number in _numbers(made)]


def _numbers(made: Maps) -> list[int]:
    return sorted({number for _, number in made.entries})


def heads(found: Record, block: Block, layer: int, made: Maps | None, gradients: Sequence[Tensor]) -> Tensor:
    """The slopes of the queries, keys and values of each head of a layer, (3 H, ...), as the stream is laid out.

    Args: gradients: of the metric at the `ends`.
    """
    stream, reads = found.streams[block.before], found.reads[layer]
    if made is None:
        return torch.cat([_one_by_one(reads[name], stream, g) for name, g in zip(INPUTS, gradients)])
    numbers = _numbers(made)
    if len(made.rounds) == 1:
        by_round = [dict(zip(numbers, gradients))]
    else:
        outputs = [found.calls[layer][number].output for number in numbers]
        seeds = lambda chosen: [g * chosen.view(1, -1, *[1] * (g.dim() - 2)) for g in gradients]
        by_round = [dict(zip(numbers, back([reads[name] for name in INPUTS], outputs, seeds(chosen.to(stream)))))
                    for chosen in made.rounds]
    return _through_maps(found.calls[layer], stream, made, by_round)


def _one_by_one(read: Tensor, stream: Tensor, gradient: Tensor) -> Tensor:
    """The slopes of each head where nothing is known of how it is made: a way back for each."""
    found = []
    for head in range(read.shape[1]):
        seed = torch.zeros_like(gradient)
        seed[:, head] = gradient[:, head]
        found += back(read, [stream], seed)
    return torch.stack(found)


def _through_maps(calls: Sequence[Called], stream: Tensor, made: Maps, by_round: Sequence[Mapping[int, Tensor]]
                  ) -> Tensor:
    """Gradients of what linear maps gave, through each head's part of them, and through the norm."""
    H = made.rounds.shape[1]
    of_inputs: dict[int, tuple[Tensor, Tensor]] = {}  # what was read, and its gradients (3 H, ...)
    for (name, number), entries in made.entries.items():
        x, W = calls[number].input, calls[number].weight
        if id(x) not in of_inputs:
            of_inputs[id(x)] = x, x.new_zeros(len(INPUTS) * H, *x.shape)
        start = INPUTS.index(name) * H
        for chosen, gradients in zip(made.rounds, by_round):
            picked = entries[chosen]  # (h, K)
            g = gradients[number].flatten(0, -2)[:, picked].transpose(0, 1)  # (h, N, K)
            into = of_inputs[id(x)][1][start:start + H]
            into[chosen] += (g @ W[:, picked].permute(1, 2, 0)).view(len(picked), *x.shape)
    return sum(pulled(x, [stream], g)[0] for x, g in of_inputs.values())


__all__ = ["Gate", "Maps", "Record", "Shift", "back", "ends", "graphed", "heads", "pulled", "recorded", "whole"]
