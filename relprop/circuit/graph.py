"""What a circuit is a part of: the graph of a model, made by looking at one forward pass.

The residual stream is a sum, so what reads it reads every part that was added before. *Sources* add: the embedding,
each head by the output projection, each MLP. *Destinations* read: the query, key and value of each head, each MLP, and
the logits. An edge goes from a source to a destination that reads after it was added. Position embeddings and biases
are constants outside the graph. Reference: Hanna et al. 2024 (Have faith in faithfulness), section 2.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..address import INPUTS, Address
from ..anatomy import Anatomy
from ..intervene import parts
from ..intervene.inputs import picked
from ..still import settled
from ..subject import Subject
from ..trace import Tap
from ..trace.intervention import edited


@dataclass(frozen=True, eq=False)
class Graph:
    """Sources and destinations in the order in which they run, and which edges there are, bool (S, D).

    Heads are those of the queries: where several share a key, each has a `k` and a `v` of its own.
    """

    sources: tuple[Address, ...]
    destinations: tuple[Address, ...]
    edges: Tensor

    def __len__(self) -> int:
        """How many edges there are."""
        return int(self.edges.sum())

    @cached_property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Sources and destinations as texts."""
        return tuple(map(str, self.sources)), tuple(map(str, self.destinations))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each edge, by source and then destination, as texts."""
        sources, destinations = self.names
        for u, v in self.edges.nonzero().tolist():
            yield sources[u], destinations[v]

    def named(self, scores: Tensor) -> dict[tuple[str, str], float]:
        """Scores (S, D) by edge, those of no edge left out."""
        return dict(zip(self.pairs(), scores[self.edges.to(scores.device)].tolist(), strict=True))

    def layer(self, number: int) -> slice:
        """Where in `destinations` those of a layer are."""
        found = [i for i, one in enumerate(self.destinations) if one.layer == number]
        return slice(found[0], found[-1] + 1)


def graph(subject: Subject | nn.Module, inputs: object) -> Graph:
    """The graph of a model for inputs of this kind. Cost: two forward passes and a backward of one row.

    Blocks in which the MLP runs beside the attention are told by looking: an edge to an MLP from a head of its own
    layer is there if what the MLP computes depends on the head.

    Args: inputs: as `Subject.prepare` takes them.
    Raises: ValueError for a model without layers, with a head that could not be told apart, or of an encoder and a
        decoder, whose edges are none of one stream.

    >>> import transformers
    >>> config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=9, n_positions=8)
    >>> found = graph(transformers.GPT2LMHeadModel(config), {"input_ids": torch.tensor([[1, 2]])})
    >>> list(found.pairs())[:2], len(found)
    ([('embed', 'L0.attn.H0.q'), ('embed', 'L0.attn.H0.k')], 8)
    """
    subject = subject if isinstance(subject, Subject) else Subject.from_module(subject)
    batch = subject.prepare(inputs)
    known = parts(subject.model, batch.args, batch.kwargs)
    return of(known, beside(subject.model, known, batch.args, batch.kwargs))


def of(known: Anatomy, parallel: tuple[bool, ...]) -> Graph:
    """The graph of a model of this anatomy, in whose layers the MLP runs beside the attention, or not."""
    _check(known)
    sources, written = [Address("embed")], [0]
    destinations, read = [], []
    for number, (layer, both) in enumerate(zip(known.layers, parallel, strict=True)):
        heads = [Address("attn", number, "H", head) for head in range(layer.heads)]
        start = 1 + 2 * number  # when the attention reads, and, after it in a sequence, the MLP
        inputs = [Address("attn", number, "H", head.index, inner=inner) for inner in INPUTS for head in heads]
        destinations, read = destinations + inputs, read + [start] * len(inputs)
        sources, written = sources + heads, written + [start] * len(heads)
        if layer.mlp is not None:
            destinations, read = [*destinations, Address("mlp", number)], [*read, start + (not both)]
            sources, written = [*sources, Address("mlp", number)], [*written, start + 1]
    destinations, read = [*destinations, Address("logits")], [*read, 1 + 2 * len(known.layers)]
    edges = torch.tensor(written)[:, None] < torch.tensor(read)
    return Graph(tuple(sources), tuple(destinations), edges)


def beside(model: nn.Module, known: Anatomy, args: tuple, kwargs: dict) -> tuple[bool, ...]:
    """Of each layer, whether its MLP does not read what its attention adds. Cost: a forward and backward of one row."""
    args, kwargs = picked(args, kwargs, [0])
    probes: dict[int, Tensor] = {}
    neurons: dict[int, Tensor] = {}

    def probed(number: int, value: Tensor) -> Tensor:
        probes[number] = torch.zeros_like(value, requires_grad=True)
        return value + probes[number]

    changes = {}
    for number, layer in enumerate(known.layers):
        if layer.attention is not None and layer.mlp is not None:
            tap = layer.attention
            changes[Tap(tap.path, tap.kind, "output", tap.nth)] = partial(probed, number)
            changes[layer.mlp] = partial(_kept, neurons, number)
    with settled(model), torch.inference_mode(False), torch.enable_grad(), edited(model, changes):
        model(*args, **kwargs)
        return tuple(number in neurons and not _depends(neurons[number], probes.get(number))
                     for number in range(len(known.layers)))


def _kept(where: dict[int, Tensor], number: int, value: Tensor) -> None:
    where[number] = value


def _depends(value: Tensor, probe: Tensor | None) -> bool:
    if probe is None or not value.requires_grad:
        return False
    return torch.autograd.grad(value.sum(), probe, retain_graph=True, allow_unused=True)[0] is not None


def _check(known: Anatomy) -> None:
    if any(layer.cross is not None for layer in known.layers):
        raise ValueError("edges are of one residual stream, and this model has two, an encoder's and a decoder's; take "
                         "a level of nodes")
    for number, layer in enumerate(known.layers):
        if layer.attention is None:
            raise ValueError(f"layer {number} ({layer.path}): no output projection that reads its heads side by side "
                             "was seen, so that they are no sources of edges; take a level of nodes")


__all__ = ["Graph", "beside", "graph", "of"]
