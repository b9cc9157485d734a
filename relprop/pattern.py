"""Attention patterns of one forward pass, with the gradient of a value and the relevance that reach them.

Reference: Chefer et al. 2021 (Transformer interpretability beyond attention visualization).
"""

from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .composite import Composite, get
from .errors import IndependentOutput
from .ops.call import Turn
from .ops.journal import Rows
from .run import Run, Value, from_one, independent
from .trace import Attending, Attention, Part


@dataclass(frozen=True, eq=False)
class Pattern:
    """What was found of one attention. `weights`, `slope` (gradient of the explained value) and `relevance` (None if it
    was not asked for) are (B, H, T, S), `values` (B, H, S, K) or as the model has them. See `trace.Attention`.
    """

    path: str
    weights: Tensor
    slope: Tensor
    relevance: Tensor | None
    values: Tensor
    queries: str | None
    keys: str | None
    queries_after: int = -1
    keys_after: int = -1

    @staticmethod
    def of(attention: Attention, slope: Tensor, per_unit: Tensor | None, rows: int) -> "Pattern":
        weights = attention.weights.detach()
        whole = [None if t is None else _by_head(t, rows)
                 for t in (weights, slope, None if per_unit is None else weights * per_unit)]
        return Pattern(attention.path, *whole, attention.values.detach(), attention.queries, attention.keys,
                       attention.queries_after, attention.keys_after)


@dataclass(frozen=True, eq=False)
class Attended:
    """The output of a forward pass, the explained values (B,), and its attention patterns in order.

    `reads`: by stream (the name of the input whose positions they are, and their number) how much the value depends on
    each of them once all attention is done, |dy/dh_t|_1, (B, T), with h the last tensor of the stream that a module
    returned and the value depends on; streams of which no module returned one are missing. `joined`: of which inputs'
    positions a stream is made that several share. `forwards`: of the batch.
    """

    output: Any
    value: Tensor
    patterns: list[Pattern]
    reads: dict[tuple[str | None, int], Tensor]
    joined: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    forwards: int = 1


def attend(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Value, *,
           composite: str | Composite | None = None, layers: slice = slice(None), unruled: str = "error") -> Attended:
    """Every attention pattern with its gradient and, under a `composite`, its relevance where the value's own is one.

    d y / d A and R_A = A x relevance per unit, from one forward pass: one backward pass for the gradients, and one for
    the relevance, neither further down than the lowest pattern of `layers`.

    Args: value: as of `propagate`. composite: rules of the relevance; None for gradients alone. layers: of all
        attentions in the order in which they run, which are wanted.
    Raises: as of `propagate`; ValueError if the model has no attention.
    """
    run = _Run(model, args, kwargs, value, get(composite or "gradient"), unruled)
    found = run.attended(layers, composite is not None)
    if found is None:
        found = _side_by_side([run.of_row(row).attended(layers, composite is not None) for row in range(run.rows)])
    if not found.patterns:
        raise ValueError(NO_ATTENTION)
    return found


NO_ATTENTION = ("no attention was found in the model's forward, neither a softmax of scores nor "
                "scaled_dot_product_attention; use a method that needs none, such as input-x-gradient")


def _by_head(t: Tensor, rows: int) -> Tensor:
    """(B H, T, S) as (B, H, T, S)."""
    return t if t.dim() == 4 else t.unflatten(0, (rows, -1))


def _read(slopes: list[Tensor]) -> Tensor:
    """|slope|_1 of each position, (B, T), of the last of the slopes (B, T, D) that is not zero, in each row."""
    sizes = [slope.abs().sum(-1) for slope in slopes]
    found = sizes[0]
    for size in sizes[1:]:
        found = torch.where((size > 0).any(-1, keepdim=True), size.to(found.dtype), found)
    return found


def _grads(value: Tensor, tensors: list[Tensor], start: Tensor, retain: bool) -> list[Tensor]:
    """Gradient of the values at each tensor, zeros where it is not reached."""
    if not tensors:
        return []
    found = torch.autograd.grad(value, tensors, start, allow_unused=True, retain_graph=retain)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _side_by_side(rows: list[Attended]) -> Attended:
    """Runs of one row each as one run of the batch."""
    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat(tensors)

    patterns = [replace(one[0], **{name: joined([getattr(p, name) for p in one])
                                   for name in ("weights", "slope", "relevance", "values")})
                for one in zip(*(row.patterns for row in rows), strict=True)]
    return Attended([row.output for row in rows], torch.cat([row.value for row in rows]), patterns,
                    {stream: torch.cat([row.reads[stream] for row in rows]) for stream in rows[0].reads},
                    rows[0].joined, forwards=2)


class _Run(Run):
    """A run for attention patterns."""

    def attended(self, layers: slice, two_ways: bool) -> Attended | None:
        """Patterns with their gradients and, with `two_ways`, their relevance; None where rows cannot be told apart."""
        rows, turn = Rows(self.rows), Turn()
        with self.ran(rows, kind=Attending, turn=turn if two_ways else None) as (mode, _, output):
            with torch._C.DisableTorchFunction():
                value = self.asked(output)
                wanted = mode.attentions[layers]
                if mode.attentions and not wanted:
                    raise ValueError(f"no layer {layers.start}; the model has {len(mode.attentions)} attentions, which "
                                     "count from 0, or from -1 backwards")
                ends = [end for found in mode.ends.values() for end in found] if wanted else []
                weights = [attention.weights for attention in wanted]
                turn.plain = True
                slopes = _grads(value, [*weights, *ends], torch.ones_like(value), two_ways)
                turn.plain = False
                if slopes and not any(bool(slope.any()) for slope in slopes):
                    raise IndependentOutput(independent([], self.rows))
                per_unit = _grads(value, weights, from_one(value.detach()), False) if two_ways else []
        if not rows.exact:
            return None
        found = [Pattern.of(attention, slope, share, self.rows)
                 for attention, slope, share in zip_longest(wanted, slopes[:len(wanted)], per_unit)]
        at_ends = iter(slopes[len(wanted):])
        reads = {stream: _read([next(at_ends) for _ in found]) for stream, found in mode.ends.items()} if wanted else {}
        return Attended(output, value.detach(), found, reads, mode.joined)
