"""Edges at positions: at which words a part is read, and between which words a head carries something.

Scores that are summed over positions cancel where one position speaks for and another against (Haklay et al. 2025,
Position-aware automatic circuit discovery, PEAP). Edges from a source to a destination are those of EAP at each
position by itself. Edges inside a head cross positions: what its output at position i would change by, were the key or
the value at position j, or the query at i, that of the corrupted input; the softmax is evaluated again, so that this is
no first order of it, and the change is taken times the metric's gradient at the head's output.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..address import INPUTS
from ..numerics import tolerance
from ..result import Circuit
from .edge import Changes, corrupted, scored
from .plan import Plan, plan
from .record import Record, back, graphed
from .task import Prepared
from .wiring import Block

Edge = tuple[str, str]
SPANS = ("sum", "mean", "max-abs")
"""How scores of the positions of one span become one."""
ENTRIES = 1 << 25
"""Scores that are kept at once: a quarter of a GiB."""


def peap(task: Prepared, *, level: str = "edges", ablation: str = "resample", spans: str = "sum",
         crossing: bool = True, batch_size: int | None = None) -> Circuit:
    """Every edge at every position, ("L0.mlp@3", "L1.attn.H2.q@3"), and the edges inside heads, ("L1.attn.H2.k@1",
    "L1.attn.H2@3"), which go from a key or value at one position, or the query, to the head's output at another.

    Positions are those that the task names, of which each row may have its own, else their numbers; what is at no named
    position is left out. Scores are means over rows. Cost: of `eap`, and of the crossing edges a product for each head.

    Args: spans: of `SPANS`, what is done with the scores of several positions of one name; of two names, in each.
        crossing: whether edges inside heads are scored.
    Raises: ValueError for attention scores that are no products of queries and keys, times a number.
    """
    if spans not in SPANS:
        raise ValueError(f"scores of a span become one by {', '.join(SPANS)}, not {spans!r}")
    with graphed(task):
        total, metric = _summed(task, spans, crossing, batch_size)
    about = dict(zip(("clean", "corrupted"), (metric / task.rows).tolist()))
    return Circuit.of({edge: score / task.rows for edge, score in total.items()}, level="edges", method="peap",
                      about={**about, "spans": spans})


def _summed(task: Prepared, spans: str, crossing: bool, batch_size: int | None) -> tuple[dict[Edge, float], Tensor]:
    """Scores and the metric on clean and corrupted inputs, (2,), summed over rows."""
    made, names = plan(task), task.positions()
    per_row = made.entries // sum(made.wired.counts) * len(made.wired.graph.destinations)
    total: dict[Edge, float] = {}
    metric = torch.zeros(2, dtype=torch.float64)
    for rows in torch.arange(task.rows).split(batch_size or max(1, ENTRIES // max(1, per_row))):
        some = task.take(rows)
        after, value = corrupted(some, made)
        clean, other = made.record(some, patterns=crossing), made.record(some, side=1)
        metric += torch.tensor([float(clean.outcome.detach().sum()), value], dtype=torch.float64)
        changes = Changes(made, clean, after)
        named = Named.of(some, names, changes.all.shape[2], spans)
        found = _streams(made, scored(_positioned(made, changes, other), clean, changes, positions=True), named)
        for edge, score in found + (_heads(made, clean, other, named) if crossing else []):
            total[edge] = total.get(edge, 0.0) + score
    return total, metric


@dataclass(frozen=True, eq=False)
class Named:
    """Positions by name, which of the stream's positions each one means, bool (N, R, P), and `how` scores of several
    become one.
    """

    names: list[str]
    chosen: Tensor
    how: str

    @staticmethod
    def of(task: Prepared, names: list[str], length: int, how: str) -> Named:
        """The positions of a task whose streams have this many."""
        real = task.clean.real(length)
        return Named(names, torch.stack([task.places.at(name, real) for name in names]), how)

    def joined(self, scores: Tensor, how: str | None = None) -> Tensor:
        """Scores (R, P, ...) by name, (N, R, ...)."""
        mask, how = self.chosen.view(*self.chosen.shape, *[1] * (scores.dim() - 2)).to(scores.device), how or self.how
        if how == "max-abs":
            held = torch.where(mask, scores, 0)
            return held.gather(2, held.abs().argmax(2, keepdim=True)).squeeze(2)
        total = (mask * scores).sum(2)
        return total / mask.sum(2).clamp_min(1) if how == "mean" else total

    def pairs(self, scores: Tensor, how: str | None = None) -> Tensor:
        """Scores (R, H, T, S) by names of both positions, summed over rows: (N, N, H), ends first."""
        by_end = self.joined(scores.transpose(1, 2), how)  # (N, R, H, S)
        return torch.stack([self.joined(of_end.movedim(-1, 1), how).sum(1) for of_end in by_end])


def _positioned(made: Plan, changes: Changes, other: Record) -> Plan:
    """The plan, and the changes, with the embedding where the stream begins: a picture's patches have no class token
    beside them before. What they change there by is the difference of the two runs.
    """
    if not changes.apart:
        return made
    start = made.segments[0]
    if [*changes.apart] != [made.wired.embed]:
        raise ValueError("what heads and MLPs add has other positions than the stream, so that there are no edges at "
                         "positions; take 'eap'")
    there, here = (made.canonical(start.end, one.streams[start.end].detach()) for one in (other, changes.clean))
    changes.all[made.slices[made.wired.embed]] = there - here
    changes.apart.clear()
    return replace(made, segments=[replace(start, whole=(True,)), *made.segments[1:]])


def _streams(made: Plan, scores: Tensor, named: Named) -> list[tuple[Edge, float]]:
    """The scores of edges by position, summed over rows; of (R, P, S, D)."""
    graph = made.wired.graph
    (sources, ends), there = graph.names, graph.edges.nonzero().tolist()
    return [((f"{sources[u]}@{name}", f"{ends[v]}@{name}"), one[u][v])
            for name, one in zip(named.names, named.joined(scores).sum(1).tolist()) for u, v in there]


# -- inside heads -----------------------------------------------------------------------------------------------------


def _heads(made: Plan, clean: Record, other: Record, named: Named) -> list[tuple[Edge, float]]:
    """The scores of the edges inside heads, summed over rows."""
    blocks = made.wired.blocks
    gradients = back(clean.outcome.sum(), [clean.written[block.heads] for block in blocks])
    found = []
    for layer, (block, gradient) in enumerate(zip(blocks, gradients)):
        g = made.canonical(block.heads, gradient).unflatten(-1, (block.count, -1)).transpose(1, 2)  # (R, H, T, K)
        now, then = ({name: _rows(made, block, name, one.reads[layer][name]) for name in INPUTS}
                     for one in (clean, other))
        pattern, factor = clean.patterns[block.pattern].detach(), _factor(clean, made, block, layer)
        with torch.no_grad():
            edges = crossed(pattern, now, then, g, factor)
            seen = named.pairs(pattern.sum(1, keepdim=True), "sum").sum(-1) > 0  # what attends to what
        for name, score in edges.items():
            found += _inside(f"L{layer}.attn.H", name, score.double(), named, seen.tolist())
    return found


def crossed(pattern: Tensor, now: dict[str, Tensor], then: dict[str, Tensor], g: Tensor, factor: float
            ) -> dict[str, Tensor]:
    """What the metric changes by, to first order in a head's output at i, if the key or value at j, or the query at i,
    is another: "k" and "v" (R, H, T, S), "q" (R, H, T).

    Of a key, score s_ij becomes s_ij + e, and z_i = sum_s A_is v_s becomes (sum_{s != j} A_is v_s + A_ij exp(e) v_j) /
    (sum_{s != j} A_is + A_ij exp(e)); the mask and all that is added to scores is in the pattern A already. Of a value,
    A_ij (v_j' - v_j). Of a query the row is evaluated again.

    Args: pattern: A, (R, H, T, S). now, then: queries (R, H, T, K), keys and values (R, H, S, K) of both runs. g: of
        the head's output, (R, H, T, K). factor: of the scores, q k^T factor.
    """
    q, k, v = (now[name].detach() for name in INPUTS)
    v_g = g @ v.mT  # (R, H, T, S)
    z_g = (pattern * v_g).sum(-1)  # (R, H, T)
    e = factor * (q @ (then["k"].detach() - k).mT)
    # numerator and denominator times exp -e where e is above zero, so that neither overflows
    less, own = (-e.clamp_min(0)).exp(), pattern * e.clamp_max(0).exp()
    rest, total = _others(pattern) * less, _others(pattern * v_g) * less
    moved = ((total + own * v_g) / (rest + own)).where(pattern > 0, z_g[..., None])
    turned = (pattern.log() + factor * ((then["q"].detach() - q) @ k.mT)).softmax(-1)
    turned = turned.nan_to_num(0.0)  # a query that may look at nothing
    return {"k": moved - z_g[..., None], "v": pattern * (g @ (then["v"].detach() - v).mT),
            "q": ((turned @ v) * g).sum(-1) - z_g}


def _others(x: Tensor) -> Tensor:
    """The sum over the last axis without the entry itself. Not by taking it off: it may be all but nothing of it."""
    before = x.cumsum(-1).roll(1, -1)
    after = x.flip(-1).cumsum(-1).flip(-1).roll(-1, -1)
    before[..., 0], after[..., -1] = 0, 0
    return before + after


def _rows(made: Plan, block: Block, name: str, x: Tensor) -> Tensor:
    """What an attention reads as (R, H, T, K): keys that meet queries in the open are turned."""
    return x.mT if name == "k" and block.pattern in made.wired.scores else x


def _factor(clean: Record, made: Plan, block: Block, layer: int) -> float:
    """What products of queries and keys are multiplied by: seen in how a pattern depends on both.

    Raises: ValueError where that is not by a number, as under a bound on scores.
    """
    pattern, reads = clean.patterns[block.pattern], clean.reads[layer]
    best = pattern.detach().topk(min(2, pattern.shape[-1]), -1)
    if best.values.shape[-1] < 2 or not float(best.values[..., 1].max()):
        return 0.0  # no query sees two keys, so that no score counts
    r, h, i = torch.unravel_index(best.values[..., 1].argmax(), best.values.shape[:-1])
    a, b = best.indices[r, h, i]
    odds = pattern[r, h, i, a].log() - pattern[r, h, i, b].log()
    of_q, of_k = back(odds, [reads["q"], reads["k"]])
    q, k = (_rows(made, block, name, reads[name].detach()) for name in "qk")
    of_q, of_k = of_q[r, h, i], _rows(made, block, "k", of_k)[r, h, a]
    q, difference = q[r, h, i], k[r, h, a] - k[r, h, b]
    factor = float(of_k @ q / (q @ q))
    off = max(float((of_k - factor * q).norm() / (of_k.norm() + 1e-30)),
              float((of_q - factor * difference).norm() / (of_q.norm() + 1e-30)))
    if off > 1e2 * max(tolerance(q.dtype), tolerance(torch.float32)):
        raise ValueError(f"{block.pattern.path}: attention scores are not queries times keys times a number ({off:.2g} "
                         "off), as where they are bounded, so that a head's edges between positions cannot be told; "
                         "take crossing=False")
    return factor


def _inside(head: str, name: str, scores: Tensor, named: Named, seen: list[list[bool]]) -> list[tuple[Edge, float]]:
    """Scores (R, H, T, S), or of queries (R, H, T), by names of positions, summed over rows."""
    names = named.names
    if name == "q":
        return [((f"{head}{h}.q@{end}", f"{head}{h}@{end}"), score)
                for end, of_end in zip(names, named.joined(scores.transpose(1, 2)).sum(1).tolist())
                for h, score in enumerate(of_end)]
    by_pair = named.pairs(scores).tolist()
    return [((f"{head}{h}.{name}@{start}", f"{head}{h}@{end}"), score)
            for e, end in enumerate(names) for s, start in enumerate(names) if seen[e][s]
            for h, score in enumerate(by_pair[e][s])]


__all__ = ["SPANS", "crossed", "peap"]
