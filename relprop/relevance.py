"""Relevance of inputs by one backward pass through an intercepted model, with its ledger.

`propagate` works on any `nn.Module` and any value that is a function of its output; what the inputs mean (words,
pixels) is the business of the levels above.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .composite import Composite, get
from .errors import IndependentOutput, LedgerError
from .numerics import relevance_of, tolerance
from .ops import Journal
from .ops.call import dependent
from .ops.journal import CONSTANT, STABILIZER, Rows
from .result import Ledger
from .run import Run, Value, independent
from .trace import ROUNDING, Interception, Tap, Way
from .trace.ids import elsewhere, gathered
from .trace.interception import Tapped

TARGET, REFERENCE = "target function", "reference"


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
              way: Way | None = None, positions: bool = False, checkpoint: bool = False) -> Propagation:
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
        `relprop.positions`); keeps the books. checkpoint: keep of each layer what it reads, and run it again on the
        way back: the same numbers, in less memory.
    Raises: IndependentOutput if the value does not depend on the inputs; LedgerError if the books do not balance;
        UnruledOp for an op that is not in the table; ValueError for NaN or inf in the output or its relevance, and for
        weights that no gradient can pass.
    """
    if unruled not in ("error", "gradient"):
        raise ValueError(f"unruled must be 'error' or 'gradient', got {unruled!r}")
    run = _Run(model, args, kwargs, value, get(composite), unruled, way, positions, checkpoint,
               ledger=ledger or spread_bias or positions, taps=dict(taps or {}), layers=layers)
    found = None if run.apart else run.whole()
    if found is None or _split_wrongly(found, run.precision):  # one row at a time is exact
        each = [run.of_row(row) for row in range(run.rows)]
        found = _stacked([one.whole() for one in each])
        run.precision = max((one.precision for one in each), key=lambda dtype: torch.finfo(dtype).eps)
        if run.apart and hasattr(value, "gather"):
            value.gather()
    if found.ledger is not None:
        _close(found, run.precision)
    return spread(found) if spread_bias else found


@dataclass
class _Run(Run):
    """A run for the relevance of the inputs."""

    ledger: bool = True
    taps: dict[str, Tap] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    reentrant: bool = False
    """Whether the model has checkpoints of the kind that `torch.autograd.grad` does not pass."""
    copying: bool = False
    """Whether the model writes into tensors that its own way back needs."""

    def whole(self) -> Propagation | None:
        """`once`, and once more in the way that the model asks for: torch's other way back for its checkpoints, or with
        what is kept for the way back copied where the model writes into it, such as a state between its layers.
        """
        try:
            return self.once()
        except RuntimeError as error:
            if not self.reentrant and "use_reentrant" in str(error):
                self.reentrant = True
            elif not self.copying and "modified by an inplace operation" in str(error):
                self.copying = True
            else:
                raise
        return self.whole()

    def once(self) -> Propagation | None:
        """Forward and backward; None where the ledger cannot tell the rows of the batch apart."""
        rows = Rows(self.rows)
        journal = Journal(rows, torch.promote_types(self.dtype, torch.float32)) if self.ledger else None
        taps = {**self.taps, **{f"layer {path}": Tap(path) for path in self.layers}}
        with self._kept(), self.ran(rows, journal=journal, taps=taps) as (mode, leaves, output):
            with torch._C.DisableTorchFunction():
                value = self.asked(output)
                flow = None if journal is None else self._book_target(journal, output, value)
            relevance = self._backward(leaves, value, mode, journal)
            still = {name: r for name, r in relevance.items() if name not in mode.moved}
            if journal is not None and not mode.steps and still:
                self._book_zeros(journal, leaves, still, value)
        self.precision = _coarser(mode.least, value.device.type)
        if not rows.exact:
            return None
        return self._found(output, value, relevance, mode, journal, flow)

    def _kept(self) -> AbstractContextManager:
        return torch.autograd.graph.allow_mutation_on_saved_tensors() if self.copying else nullcontext()

    def _book_target(self, journal: Journal, output: Any, value: Tensor) -> Tensor:
        """What a target that is not linear in the output (a probability, a product) keeps for itself.

        Returns: magnitude of the relevance of the output, (B,).
        """
        if self.ruled:
            return value.detach().abs().to("cpu", torch.float64)  # it is in the books like all that the model does
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

    def _backward(self, leaves: dict[str, Tensor], value: Tensor, mode: Interception,
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
        steps, moved = mode.steps, mode.moved
        strength = sum(self._strongest(gathered(g.detach().abs(), moved[name]) if name in moved else g)
                       for name, (_, g) in reached.items()) if reached else None
        if strength is None or bool((strength == 0).any()):
            idle = [] if strength is None else (strength == 0).nonzero().flatten().tolist()
            raise IndependentOutput(independent(idle, self.rows))
        if not bool(torch.isfinite(strength).all()):
            raise ValueError("the explained value is finite, but its relevance is NaN or inf: the backward pass "
                             "overflows, or meets a function where it has no slope; try a wider dtype or another rule")
        if steps and journal is not None:
            held = [(leaf.detach() - steps[name]) * g for name, (leaf, g) in reached.items() if name in steps]
            journal.book(REFERENCE, sum(self._total(journal, r) for r in held))
        found = {name: steps[name] * g if name in steps else relevance_of(leaf.detach(), g)
                 for name, (leaf, g) in reached.items()}
        if journal is not None:
            for name in found.keys() & moved.keys():
                journal.book(CONSTANT, self._total(journal, elsewhere(found[name], moved[name])))
        return {name: gathered(r, moved[name]) if name in moved else r for name, r in found.items()}

    def _strongest(self, g: Tensor) -> Tensor:
        """The largest entry of each row, (B,); of what lies otherwise than in rows, the largest of all."""
        size = g.detach().abs()
        whole = size.shape[0] == self.rows
        return size.reshape(len(g), -1).amax(1) if whole else size.amax().expand(self.rows)

    def _found(self, output: Any, value: Tensor, relevance: dict[str, Tensor], mode: Interception,
               journal: Journal | None, flow: Tensor | None) -> Propagation:
        tapped = {name: t.value.to(t.per_unit.dtype) * t.per_unit for name, t in mode.tapped.items()
                  if t.per_unit is not None}
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


def _coarser(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype, or that of the caller's autocast, in which linear maps are then computed."""
    if not torch.is_autocast_enabled(device):
        return dtype
    return max(dtype, torch.get_autocast_dtype(device), key=lambda dtype: torch.finfo(dtype).eps)


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
                       {name: torch.cat([r.relevance[name] for r in rows if name in r.relevance])  # a row without
                        for name in dict.fromkeys(name for r in rows for name in r.relevance)},  # pictures has none
                       {name: torch.cat([r.tapped[name] for r in rows]) for name in rows[0].tapped},
                       None if ledgers[0] is None else _stacked_ledgers(ledgers),
                       None if ledgers[0] is None else torch.cat([r.flow for r in rows]),
                       {name: _stacked_tapped([r.inside[name] for r in rows]) for name in rows[0].inside},
                       {count: torch.cat([r.positions[count] for r in rows]) for count in rows[0].positions
                        if all(count in r.positions for r in rows)})  # pictures of other sizes have others


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
    rows = len(absorbed)
    by_row = lambda r: r.reshape(rows, -1).to("cpu", torch.float64).sum(1)
    if wrong := next((name for name, r in found.relevance.items() if rows not in (1, r.shape[0])), None):
        raise ValueError(f"{wrong} does not lie in rows, so that nothing can be spread over them; explain the rows one "
                         "by one, batch_size=1")
    share = absorbed / sum(by_row(r.abs()) for r in found.relevance.values())

    def given(r: Tensor) -> Tensor:
        factor = share.to(r.device, r.dtype).reshape(-1, *[1] * (r.dim() - 1))
        return r + r.abs() * factor

    relevance = {name: given(r) for name, r in found.relevance.items()}
    total = sum(by_row(r) for r in relevance.values())
    kept = {TARGET: found.ledger.absorbed[TARGET] * 0} if TARGET in found.ledger.absorbed else {}
    return replace(found, relevance=relevance, ledger=replace(found.ledger, input=total, absorbed=kept), positions={})
