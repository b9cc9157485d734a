"""Attention flow: how much could pass from each input token to the position that is read, at most.

Reference: S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3, "Attention flow".
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..result import Relevance
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch
from ..trace import attention_patterns
from .readout import mapped, padding_of, readout
from .rollout import check_fusion, check_square, layers_from, over_heads, with_skip

RESOLUTION = 1 << 30
"""Capacities are whole multiples of 1 / RESOLUTION, since scipy's algorithm takes 32-bit integers."""
SECONDS_AN_EDGE = 1e-7
"""What a maximum flow costs for each edge of its graph, on one core."""


def maximum_flow(patterns: list[Tensor], read: Tensor, *, head_fusion: str = "mean", start_layer: int = 0,
                 padding: Tensor | None = None, max_seconds: float | None = 600.0,
                 show_progress: bool = False) -> Tensor:
    """The maximum flow from what is read down to each input position, through the graph of all positions and layers.

    Node (l, t) has an edge to (l - 1, s) with capacity A_{lts}, A_l = row-normalised (fused_l + I), the same as in
    `rollout` (Abnar and Zuidema 2020, section 3). Each input position is the one sink of a flow of its own, so that
    flows do not share the capacity, and do not sum to one. None is less than the rollout, whose paths are such a flow,
    nor more than 1: in deep models many come near it, and are no longer told apart. Addition: where several positions
    are read, a source above them has an edge to each, its capacity their weight, instead of T times the flows.

    Cost: T maximum flows a row of the batch, by Dinic's algorithm in scipy, on (L + 1) T + 1 nodes and L T^2 edges,
    half of it where attention is causal. Measured on one core, 12 layers: 20 tokens 5 ms, 64 tokens 0.2 s, 197 tokens
    (a picture of a ViT-B/16) 7 s, and as T^3 and more beyond; networkx takes 40 to 150 times as long by its fastest.
    Capacities are rounded to 2^-30.

    Args: patterns: one a layer, in order, (B, H, T, T). read: weights of the positions that are read, (B, T), sum to
        one. head_fusion, start_layer, padding: as of `rollout`. max_seconds: the most that it may take by an estimate
        made before it starts; None: no limit. show_progress: a bar, by the flow; it can be stopped between two.
    Returns: (B, S), float64, zero at padding.
    Raises: ValueError as `rollout`, or where it would take too long, with the estimate.
    """
    check_fusion(head_fusion)
    check_square(patterns)
    layers = layers_from(patterns, start_layer)
    real = torch.ones_like(read, dtype=torch.bool) if padding is None else ~padding

    def capacities(row: int) -> Tensor:
        there = None if padding is None else padding[row:row + 1]
        return torch.cat([with_skip(over_heads(pattern[row:row + 1], head_fusion, there)) for pattern in layers])

    edges = [int(capacities(row).count_nonzero()) for row in range(len(read))]
    flows = real.sum(1).tolist()
    _check_time(edges, flows, max_seconds)
    found = torch.zeros(read.shape, dtype=torch.float64)
    with _bar(sum(flows), show_progress) as bar:
        for row in range(len(read)):
            graph = _graph(capacities(row), read[row])
            for s in real[row].nonzero()[:, 0].tolist():
                found[row, s] = _flow(graph, s).flow_value / RESOLUTION
                bar.update()
    return found


def attention_flow(subject: Subject, batch: Batch, targets: Targets, *, head_fusion: str = "mean",
                   start_layer: int = 0, max_seconds: float | None = 600.0, show_progress: bool = False) -> Relevance:
    """`maximum_flow` from where the target is read to each token or patch, as shares that sum to one (so does the
    paper's code).

    Unit: share of attention; the target decides only which rows are read. Not conservative. Cost: that of
    `maximum_flow`, which grows faster than the cube of the length, and two forwards, one of them with a backward
    through what follows the last layer.

    Args: as `maximum_flow`.
    Returns: map as of `attention_rollout`.
    Raises: ValueError where there is no attention to follow, or where it would take too long.
    """
    options = {"head_fusion": head_fusion, "start_layer": start_layer}
    check_fusion(head_fusion)
    with settled(subject.model):
        output, patterns = attention_patterns(subject.model, batch.args, batch.kwargs)
        check_square(patterns)
        value, read, names = readout(subject.model, batch, targets.fixed(output, batch), patterns[0].shape[-1])
    flows = maximum_flow(patterns, read, padding=padding_of(batch, patterns), max_seconds=max_seconds,
                         show_progress=show_progress, **options)
    return mapped(subject, batch, flows / flows.sum(1, keepdim=True), value=value, names=names, method="attention-flow",
                  forwards=2, backwards=1, unit="share of attention", **options)


def _graph(mixed: Tensor, read: Tensor) -> Any:
    """Capacities of one row as a sparse matrix: of layers (L, T, T), and of a source, the last node, to what is read.
    """
    import numpy as np
    from scipy.sparse import csr_array

    layers, length, _ = mixed.shape
    capacity = (mixed.double().cpu() * RESOLUTION).round().to(torch.int32)
    layer, t, s = capacity.nonzero(as_tuple=True)
    entry = (read.double().cpu() * RESOLUTION).round().to(torch.int32)
    first, nodes = entry.nonzero()[:, 0], (layers + 1) * length + 1
    sources = torch.cat([(layer + 1) * length + t, torch.full_like(first, nodes - 1)])
    sinks = torch.cat([layer * length + s, layers * length + first])
    values = torch.cat([capacity[layer, t, s], entry[first]])
    return csr_array((values.numpy(), (sources.numpy().astype(np.int32), sinks.numpy().astype(np.int32))),
                     shape=(nodes, nodes))


def _flow(graph: Any, sink: int) -> Any:
    from scipy.sparse.csgraph import maximum_flow

    return maximum_flow(graph, graph.shape[0] - 1, sink)


def _check_time(edges: list[int], flows: list[int], max_seconds: float | None) -> None:
    """Raises ValueError if these numbers of flows over as many edges, one each a row, take longer than they may."""
    seconds = sum(e * f for e, f in zip(edges, flows, strict=True)) * SECONDS_AN_EDGE
    if max_seconds is not None and seconds > max_seconds:
        raise ValueError(f"attention-flow would take about {seconds:.3g} seconds ({sum(flows)} maximum flows over "
                         f"up to {max(edges)} edges), longer than max_seconds={max_seconds:g}: shorten the input, "
                         "leave out layers with start_layer, take rollout, which is instant, or allow it with "
                         "max_seconds=None")


def _bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="attention-flow", unit="flow", disable=not shown, leave=False)
