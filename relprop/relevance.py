"""Relevance of inputs by one backward pass through an intercepted model, with its ledger.

`propagate` works on any `nn.Module` and any value that is a function of its output; what the inputs mean (words,
pixels) is the business of the levels above.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .composite import Composite, get
from .errors import IndependentOutput, LedgerError
from .numerics import relevance_of, stabilize, tolerance
from .ops import Journal
from .ops.call import Turn, dependent
from .ops.journal import STABILIZER, Rows
from .result import Ledger
from .still import settled
from .trace import ROUNDING, STREAM, Attending, Attention, Interception, Part, Tap, Way, intercepted
from .trace.interception import Tapped

TARGET, REFERENCE = "target function", "reference"
TOKEN_NAMES = ("input_ids", "decoder_input_ids")

Value = Callable[[Any], Tensor]
"""From a model's output to the explained values, (B,)."""


@dataclass(frozen=True)
class Propagation:
    """What one backward pass found.

    `relevance` holds the relevance of each input, entry by entry: pixels (B, C, Y, X) under the input's name or its
    place ("0"), word embeddings (B, T, D) under the name of the ids. `tapped` holds that of inner tensors asked for,
    `inside` their value and relevance per unit, None where the explained value does not depend on one.
    """

    output: Any
    value: Tensor
    relevance: dict[str, Tensor]
    tapped: dict[str, Tensor] = field(default_factory=dict)
    ledger: Ledger | None = None
    flow: Tensor | None = None
    """Magnitude of all relevance at both ends, positive and negative, (B,): what rounding is relative to."""
    inside: dict[str, Tapped] = field(default_factory=dict)
    positions: dict[int, Tensor] = field(default_factory=dict)
    """What position embeddings took at each position, (B, T) by its number of positions T; needs the ledger."""


def propagate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Value,
              composite: str | Composite = "attnlrp", *, ledger: bool = True, taps: dict[str, Tap] | None = None,
              layers: tuple[str, ...] = (), unruled: str = "error", spread_bias: bool = False,
              way: Way | None = None, positions: bool = False) -> Propagation:
    """Relevance of the inputs of `model(*args, **kwargs)` for `value(output)`, by one forward and one backward pass.

    Floating tensors among the inputs are explained entry by entry, token ids through their embedding; masks are not
    explained. The model runs in eval mode and is given back as it came.

    Args: value: gives the explained value of each row, (B,). composite: which rule where. ledger: keep the books, at
        about a tenth of the cost. taps: inner tensors whose relevance is wanted. layers: module paths at whose outputs
        the ledger reports the relevance that crosses. unruled: "error", or "gradient" to let an op without a rule
        pass with its plain gradient. spread_bias: redistribute what constants took over the inputs. way: explains the
        model there instead, and the relevance is that of the whole way: its step x relevance per unit; what the input
        there holds besides is booked under "reference". positions: that queries and keys are rotated by position has
        half of their relevance, and biases of relative positions in a fused attention are booked apart (see
        `relprop.positions`); keeps the books.
    Raises: IndependentOutput if the value does not depend on the inputs; LedgerError if the books do not balance;
        UnruledOp for an op that is not in the table; ValueError for NaN or inf in the output or its relevance, and for
        weights that no gradient can pass.
    """
    if unruled not in ("error", "gradient"):
        raise ValueError(f"unruled must be 'error' or 'gradient', got {unruled!r}")
    run = _Run(model, args, kwargs, value, get(composite), ledger or spread_bias or positions, dict(taps or {}),
               layers, unruled, way, positions)
    found = run.whole()
    if found is None or _split_wrongly(found, run.precision):  # one row at a time is exact
        found = _stacked([run.of_row(row).whole() for row in range(run.rows)])
    if found.ledger is not None:
        _close(found, run.precision)
    return spread(found) if spread_bias else found


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
    run = _Run(model, args, kwargs, value, get(composite or "gradient"), False, {}, (), unruled)
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


@dataclass
class _Run:
    """One explanation as it is being made."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Value
    composite: Composite
    ledger: bool
    taps: dict[str, Tap]
    layers: tuple[str, ...]
    unruled: str
    way: Way | None = None
    positions: bool = False
    reentrant: bool = False
    """Whether the model has checkpoints of the kind that `torch.autograd.grad` does not pass."""
    precision: torch.dtype = field(init=False)
    """Of the least precise part that the model computes in."""

    def __post_init__(self) -> None:
        self.args = tuple(_ordinary(a) for a in self.args)
        self.kwargs = {name: _ordinary(value) for name, value in self.kwargs.items()}
        name = next((name for name, p in self.model.named_parameters() if p.is_inference()), None)
        if name is not None:
            raise ValueError(f"the parameter {name!r} was made under torch.inference_mode(), and no gradient passes "
                             "such a tensor; make or load the model outside of it")
        tensors = [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor)]
        if not tensors:
            raise ValueError("nothing to explain: no tensor among the inputs")
        explained = [t for name, t in self._inputs() if t.is_floating_point()]
        self.rows = (explained or tensors)[0].shape[0]
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        self.dtype = explained[0].dtype if explained else torch.float32 if parameter is None else parameter.dtype
        self.precision = self.dtype

    def _inputs(self) -> Iterator[tuple[str, Tensor]]:
        named = [*((str(i), t) for i, t in enumerate(self.args)), *self.kwargs.items()]
        return ((name, t) for name, t in named if isinstance(t, Tensor) and "mask" not in name)

    def of_row(self, row: int) -> "_Run":
        """The same run on one row of the batch."""
        def cut(t: Any) -> Any:
            return t[row:row + 1] if isinstance(t, Tensor) and t.dim() and t.shape[0] == self.rows else t

        value, rows = self.value, self.rows
        one = getattr(value, "row", None)
        return replace(self, args=tuple(cut(a) for a in self.args), kwargs={k: cut(v) for k, v in self.kwargs.items()},
                       value=one(row, rows) if one else value)

    def whole(self) -> Propagation | None:
        """`once`, and once more by torch's other way back where the model's checkpoints ask for it."""
        try:
            return self.once()
        except RuntimeError as error:
            if self.reentrant or "use_reentrant" not in str(error):
                raise
        self.reentrant = True
        return self.once()

    def once(self) -> Propagation | None:
        """Forward and backward; None where the ledger cannot tell the rows of the batch apart."""
        rows = Rows(self.rows)
        journal = Journal(rows, torch.promote_types(self.dtype, torch.float32)) if self.ledger else None
        taps = {**self.taps, **{f"layer {path}": Tap(path) for path in self.layers}}
        with self.ran(rows, journal=journal, taps=taps) as (mode, leaves, output):
            with torch._C.DisableTorchFunction():
                value = self._value(output)
                flow = None if journal is None else self._book_target(journal, output, value)
            relevance = self._backward(leaves, value, mode.steps, journal)
            if journal is not None and not mode.steps:
                self._book_zeros(journal, leaves, relevance, value)
        self.precision = _coarser(mode.least, value.device.type)
        if not rows.exact:
            return None
        return self._found(output, value, relevance, mode, journal, flow)

    @contextmanager
    def ran(self, rows: Rows, **options: Any) -> Iterator[tuple[Interception, dict[str, Tensor], Any]]:
        """The forward pass under the rules, in a `with` block for the ways back: the interception, the leaves by name
        and the output. Options as of `intercepted`.
        """
        with ExitStack() as stack:
            stack.enter_context(settled(self.model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # what a checkpoint recomputes must meet the interception, which lives in this thread
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            leaves, args, kwargs = self._leaves()
            mode = stack.enter_context(intercepted(
                self.model, self.composite, token_ids=self._token_ids(), unruled=self.unruled, precision=self.dtype,
                rows=rows, way=self.way, positions=self.positions, **options))
            output = self.model(*args, **kwargs)
            yield mode, {**leaves, **mode.leaves}, output

    def attended(self, layers: slice, two_ways: bool) -> "Attended | None":
        """Patterns with their gradients and, with `two_ways`, their relevance; None where rows cannot be told apart."""
        rows, turn = Rows(self.rows), Turn()
        with self.ran(rows, kind=Attending, turn=turn if two_ways else None) as (mode, _, output):
            with torch._C.DisableTorchFunction():
                value = self._value(output)
                wanted = mode.attentions[layers]
                if mode.attentions and not wanted:
                    raise ValueError(f"no layer {layers.start}; the model has {len(mode.attentions)} attentions, which "
                                     "count from 0, or from -1 backwards")
                ends = [end for found in mode.ends.values() for end in found] if wanted else []
                weights = [attention.weights for attention in wanted]
                turn.plain = True
                slopes = _grads(value, [*weights, *ends], torch.ones_like(value), two_ways)
                turn.plain = False
                per_unit = _grads(value, weights, 1 / stabilize(value.detach()), False) if two_ways else []
        if not rows.exact:
            return None
        found = [Pattern.of(attention, slope, share, self.rows)
                 for attention, slope, share in zip_longest(wanted, slopes[:len(wanted)], per_unit)]
        at_ends = iter(slopes[len(wanted):])
        reads = {stream: _read([next(at_ends) for _ in found]) for stream, found in mode.ends.items()} if wanted else {}
        return Attended(output, value.detach(), found, reads, mode.joined)

    def _leaves(self) -> tuple[dict[str, Tensor], tuple[Any, ...], dict[str, Any]]:
        """The floating inputs as leaves, and the arguments that carry them into the model."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in self._inputs() if t.is_floating_point()}

        def carried(name: str, value: Any) -> Any:
            if name not in leaves:
                return value
            carrier = leaves[name].clone()  # the model may update its input in place; a leaf may not be
            carrier._relprop_input = True
            setattr(carrier, STREAM, name)
            return carrier

        args = tuple(carried(str(i), a) for i, a in enumerate(self.args))
        return leaves, args, {name: carried(name, v) for name, v in self.kwargs.items()}

    def _token_ids(self) -> dict[str, Tensor]:
        whole = {name: t for name, t in self._inputs() if not t.is_floating_point() and t.dtype != torch.bool}
        named = {name: t for name, t in whole.items() if name in TOKEN_NAMES}
        return named or {name: t for name, t in whole.items() if name.isdigit()}

    def _value(self, output: Any) -> Tensor:
        value = self.value(output)
        if not isinstance(value, Tensor) or value.shape != (self.rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the explained value must be one number a row, shape ({self.rows},), got {got}")
        if not torch.isfinite(value).all():
            row = int((~torch.isfinite(value)).int().argmax())
            raise ValueError(f"the explained value of row {row} is {value[row].item()}: "
                             f"{_suspect(self.model, self._inputs(), output)}")
        if not value.requires_grad:
            raise IndependentOutput(_independent([], self.rows))
        return value

    def _book_target(self, journal: Journal, output: Any, value: Tensor) -> Tensor:
        """What a target that is not linear in the output (a probability, a product) keeps for itself.

        Returns: magnitude of the relevance of the output, (B,).
        """
        flat, rebuild = tree_flatten(output)
        places = [i for i, t in enumerate(flat) if dependent(t)]
        for i in places:
            flat[i] = flat[i].detach().requires_grad_()
        again = self.value(tree_unflatten(flat, rebuild))
        size = value.detach().abs().to("cpu", torch.float64)
        if not dependent(again):
            return size  # the value reads the output in a way that cannot be repeated; nothing is known of it
        tensors = [flat[i] for i in places]
        grads = torch.autograd.grad(again.sum(), tensors, allow_unused=True)
        parts = [(g, t.detach()) for t, g in zip(tensors, grads, strict=True) if g is not None]
        flow = size + sum(journal.dot(g, t, magnitude=True).to("cpu", torch.float64) for g, t in parts)
        rest = value.detach().to("cpu", torch.float64) - sum(
            journal.dot(g, t).to("cpu", torch.float64) for g, t in parts)
        if bool((rest.abs() > tolerance(self.dtype) * 1e-3 * flow).any()):
            journal.book(TARGET, rest)
        return flow

    def _book_zeros(self, journal: Journal, leaves: dict[str, Tensor], relevance: dict[str, Tensor],
                    value: Tensor) -> None:
        """Take back from the stabilizer what exact zeros of the input hold by rules such as the z-box: the op that gave
        it to them booked it as lost, since zero x its relevance per unit is zero.
        """
        held = sum(self._total(journal, r.masked_fill(leaves[name] != 0, 0)) for name, r in relevance.items())
        if bool((held.abs() > tolerance(self.dtype) * 1e-3 * value.detach().abs().to("cpu")).any()):
            journal.book(STABILIZER, -held)

    def _backward(self, leaves: dict[str, Tensor], value: Tensor, steps: dict[str, Tensor],
                  journal: Journal | None) -> dict[str, Tensor]:
        if not leaves:
            raise IndependentOutput("no input to explain was seen: pass floating tensors, or token ids that the model "
                                    "looks up in its input embedding")
        # not of value.sum(): the interception, which lasts, would take the sum for one of the model's
        if self.reentrant:
            torch.autograd.backward(value, torch.ones_like(value))
            per_unit = [leaf.grad for leaf in leaves.values()]
        else:
            per_unit = torch.autograd.grad(value, list(leaves.values()), torch.ones_like(value), allow_unused=True)
        reached = {name: (leaf, g) for (name, leaf), g in zip(leaves.items(), per_unit, strict=True) if g is not None}
        strength = sum(g.detach().abs().flatten(1).amax(1) for _, g in reached.values()) if reached else None
        if strength is None or bool((strength == 0).any()):
            idle = [] if strength is None else (strength == 0).nonzero().flatten().tolist()
            raise IndependentOutput(_independent(idle, self.rows))
        if not bool(torch.isfinite(strength).all()):
            raise ValueError("the explained value is finite, but its relevance is NaN or inf: the backward pass "
                             "overflows, or meets a function where it has no slope; try a wider dtype or another rule")
        if steps and journal is not None:
            held = [(leaf.detach() - steps[name]) * g for name, (leaf, g) in reached.items() if name in steps]
            journal.book(REFERENCE, sum(self._total(journal, r) for r in held))
        return {name: steps[name] * g if name in steps else relevance_of(leaf.detach(), g)
                for name, (leaf, g) in reached.items()}

    def _found(self, output: Any, value: Tensor, relevance: dict[str, Tensor], mode: Interception,
               journal: Journal | None, flow: Tensor | None) -> Propagation:
        tapped = {name: t.value * t.per_unit for name, t in mode.tapped.items() if t.per_unit is not None}
        ledger = None
        if journal is not None:
            total = sum(self._total(journal, r) for r in relevance.values())
            flow = flow + sum(self._total(journal, r.abs()) for r in relevance.values())
            crossing = {path: self._total(journal, tapped.pop(f"layer {path}"))
                        for path in self.layers if f"layer {path}" in tapped}
            absorbed = {name: t for name, t in sorted(journal.absorbed.items()) if bool((t != 0).any())}
            ledger = Ledger(value.detach().to("cpu", torch.float64), total, absorbed, crossing or None)
        return Propagation(output, value.detach(), relevance, tapped, ledger, flow, dict(mode.tapped),
                           {} if journal is None else journal.places)

    @staticmethod
    def _total(journal: Journal, relevance: Tensor) -> Tensor:
        return journal.dot(relevance, relevance.new_ones(())).to("cpu", torch.float64)


def _independent(idle: list[int], rows: int) -> str:
    """What is wrong where these rows, or all, have no gradient."""
    some = f" of row {', '.join(map(str, idle[:5]))}" if 0 < len(idle) < rows else ""
    return (f"the explained value{some} does not depend on the input: its gradient is missing or zero throughout. Look "
            "for a target that the model never computes, a detached output, or weights that are all zero")


def _coarser(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype, or that of the caller's autocast, in which linear maps are then computed."""
    if not torch.is_autocast_enabled(device):
        return dtype
    return max(dtype, torch.get_autocast_dtype(device), key=lambda dtype: torch.finfo(dtype).eps)


def _ordinary(value: Any) -> Any:
    """The value; of a tensor that was made under `torch.inference_mode`, a copy that autograd may keep."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def _suspect(model: nn.Module, inputs: Iterator[tuple[str, Tensor]], output: Any) -> str:
    """Where NaN or inf came from, in words."""
    found = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
    if found and all(torch.isfinite(t).all() for t in found):
        return "the model's output is finite, so the target makes it; give one that is defined for this output"
    for name, t in inputs:
        if t.is_floating_point() and not torch.isfinite(t).all():
            return f"the input {name!r} holds NaN or inf"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name!r} holds NaN or inf; load the weights again"
    for name, buffer in model.named_buffers():
        if buffer.isnan().any():  # inf is what masks are made of
            return f"the buffer {name!r} holds NaN; load the weights again"
    return "inputs and weights are finite, so the forward pass overflows; try a wider dtype"


def _split_wrongly(found: Propagation, dtype: torch.dtype) -> bool:
    """Whether the books balance over the batch but not in every row: a model that keeps its tokens first may have as
    many of them as would hold the rows, folded.
    """
    if found.ledger is None or not any(bool(off.any()) for _, off, _ in _gaps(found, dtype)):
        return False
    return bool(found.ledger.residual.sum().abs() <= _allowed(found, dtype).sum())


def _allowed(found: Propagation, dtype: torch.dtype) -> Tensor:
    """What may be missing in each row, (B,): the dtype's tolerance of the largest entry, or a hundred roundings of all
    that was passed on, where that cancels (the difference of two logits may be nothing, made of much).
    """
    entries = (found.ledger.value, found.ledger.input, *found.ledger.absorbed.values())
    largest = torch.stack([entry.abs() for entry in entries]).amax(0)
    share = tolerance(dtype)
    return torch.maximum(share * largest, min(100 * torch.finfo(dtype).eps, share) * found.flow)


def _gaps(found: Propagation, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, str]]:
    """What may not be: an amount (B,), the rows where it is over what is allowed, and what it is."""
    ledger, allowed = found.ledger, _allowed(found, dtype)
    rounding = ledger.absorbed.get(ROUNDING, torch.zeros_like(allowed))
    for amount, what in ((ledger.residual, "is unaccounted for"), (rounding, f"is more than {dtype} rounds")):
        yield amount, ~(amount.abs() <= allowed), what  # NaN is a gap


def _close(found: Propagation, dtype: torch.dtype) -> None:
    """Raises LedgerError if the books do not balance, in any row, or if more is booked as rounding than can be."""
    ledger = found.ledger
    for amount, off, what in _gaps(found, dtype):
        if bool(off.any()):
            row = int(off.nonzero()[0])
            raise LedgerError(
                f"the books do not balance in row {row}: {float(amount[row]):.3g} of {float(ledger.value[row]):.6g} "
                f"{what}. The model computes somewhere out of sight (a custom autograd function, a compiled kernel), "
                f"or a rule gives back more or less than it took.\n{ledger}")


def _stacked(rows: list[Propagation]) -> Propagation:
    """Runs of one row each as one run of the batch."""
    ledgers = [r.ledger for r in rows]
    return Propagation([r.output for r in rows], torch.cat([r.value for r in rows]),
                       {name: torch.cat([r.relevance[name] for r in rows]) for name in rows[0].relevance},
                       {name: torch.cat([r.tapped[name] for r in rows]) for name in rows[0].tapped},
                       None if ledgers[0] is None else _stacked_ledgers(ledgers),
                       None if ledgers[0] is None else torch.cat([r.flow for r in rows]),
                       {name: _stacked_tapped([r.inside[name] for r in rows]) for name in rows[0].inside},
                       {count: torch.cat([r.positions[count] for r in rows]) for count in rows[0].positions})


def _stacked_tapped(rows: list[Tapped]) -> Tapped:
    per_unit = [torch.zeros_like(one.value) if one.per_unit is None else one.per_unit for one in rows]
    return Tapped(torch.cat([one.value for one in rows]), torch.cat(per_unit))


def _stacked_ledgers(ledgers: list[Ledger]) -> Ledger:
    names = sorted({name for ledger in ledgers for name in ledger.absorbed})
    zero = torch.zeros(1, dtype=torch.float64)
    layers = {path: torch.cat([ledger.layers[path] for ledger in ledgers]) for path in ledgers[0].layers or {}}
    return Ledger(torch.cat([ledger.value for ledger in ledgers]), torch.cat([ledger.input for ledger in ledgers]),
                  {name: torch.cat([ledger.absorbed.get(name, zero) for ledger in ledgers]) for name in names},
                  layers or None)


def spread(found: Propagation) -> Propagation:
    """The same map with what biases and other constants took given back to the inputs, so that it sums to the value.

    Each row's absorbed relevance goes to the entries in proportion to the magnitude of what they have.
    """
    absorbed = sum(found.ledger.absorbed.values())
    size = sum(r.abs().flatten(1).sum(1).to("cpu", torch.float64) for r in found.relevance.values())
    share = absorbed / size

    def given(r: Tensor) -> Tensor:
        factor = share.to(r.device, r.dtype).reshape(-1, *[1] * (r.dim() - 1))
        return r + r.abs() * factor

    relevance = {name: given(r) for name, r in found.relevance.items()}
    total = sum(r.flatten(1).sum(1).to("cpu", torch.float64) for r in relevance.values())
    kept = {TARGET: found.ledger.absorbed[TARGET] * 0} if TARGET in found.ledger.absorbed else {}
    return replace(found, relevance=relevance, ledger=replace(found.ledger, input=total, absorbed=kept), positions={})
