"""A shadow beside the model: what of every value is relevant, for many sources at once, while the model computes the
totals once and as ever.

A `torch.overrides.TorchFunctionMode` sees the calls of the unmodified model and, for those that a source reaches, has
the table split them; see `ops.split`. What no source reaches costs nothing.

Reference: Hsu et al. 2024 (Efficient automated circuit discovery in transformers using contextual decomposition).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..division import Division
from ..errors import UnruledOp
from ..ops import Op, Split, activation, add, attention, linear, lookup, move, norm, share
from ..ops.split import difference
from .activation import activation_offset
from .interception import Tap, mutates, named
from .intervention import Editor, edited
from .late import Late
from .layout import laid, vectors
from .live import Live
from .slot import REL, Slot, hooked_activation

Mark = Callable[[Tensor, Tensor | None], Tensor]
"""From the total at a tap, and its relevant part so far, (S, ...), to its relevant part from there on."""
Read = Callable[[Tensor, Tensor | None], None]
"""Looks at a total and its relevant part; None where no source reaches it."""

QUERY, KEY, VALUE = "query", "key", "value"
"""Sides of a tap of an attention: its operands, as they meet."""
_ADDED, _PATTERN, _OPERANDS = "_relprop_added", "_relprop_pattern", "_relprop_operands"
_MADE = ("new_", "_like")
"""In the names of functions whose result only has the shape of their argument."""


class Finished(Exception):
    """All that was asked for has been read: the rest of the model need not run."""


class Shadow(Editor):
    """Carries relevant parts beside a forward pass; see `shadowed`, which also places the hooks.

    Args: division: which rule where. sources: S. marks: where sources are set. reads: what is looked at on the way,
        after sources are set. layers: paths of the layers, whose halves tell where clashing signs are settled. whole:
        False: the model is left when everything has been read.
    """

    def __init__(self, division: Division, sources: int, marks: Mapping[Tap, Mark],
                 reads: Mapping[Tap, Read] | None = None, *, layers: Iterable[str] = (), unruled: str = "error",
                 whole: bool = True) -> None:
        self.division, self.sources, self.marks, self.reads = division, sources, dict(marks), dict(reads or {})
        self.layers, self.unruled, self.whole = frozenset(layers), unruled, whole
        super().__init__(dict.fromkeys([*self.marks, *self.reads]))
        self.slot = Slot(sources)
        self.half: str | None = None
        self._projected = self._inside = False
        self._rules: dict[tuple[str, str], Any] = {}
        self._left = set(self.reads)

    def rule(self, kind: str, rule: Any) -> None:
        """From here on, ops of this kind follow this rule, wherever they are."""
        self.division = self.division.but(rules={kind: rule}, paths={})
        self._rules.clear()

    def part(self, x: Tensor) -> Tensor | None:
        """What is relevant of a tensor, (S, ...); None where no source reaches it."""
        with torch._C.DisableTorchFunction():
            return self.slot.rel(x)

    # -- where it stands -----------------------------------------------------------------------------------------

    def enter(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A module begins."""
        if path in self.layers:
            self.half = None
        return super().enter(path, args, kwargs)

    def leave(self, path: str, output: Any) -> Any:
        """A module ends."""
        if path in self.layers:
            self.half = None
        return super().leave(path, output)

    def edit(self, path: str, kind: str | None, side: str, value: Any) -> Any:
        """The tensor at a place, with sources set there where that is wanted."""
        tap = None if self._inside or not isinstance(value, Tensor) else self._reached(path, kind, side)
        if tap is None:
            return value
        with torch._C.DisableTorchFunction():
            rel, total = self.slot.rel(value), vectors(value, tap.axes)
            rel = None if rel is None else vectors(rel, tap.axes, 1)
            if tap in self.marks:
                rel, value = self.marks[tap](total, rel), value.clone()
                self.slot.put(value, laid(rel, tap.axes, value.shape, 1))
            if tap in self.reads:
                self.reads[tap](total, rel)
                self._left.discard(tap)
        if not self.whole and not self._left:
            raise Finished
        return value

    # -- the calls -----------------------------------------------------------------------------------------------

    def _listed(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        if op.kind == "matmul":
            args = self._meeting(args)
        if not self._inside and (self.path[-1], op.kind) in self._wanted:
            return self._edited(lambda *a, **k: self._run(op, func, a, k), op.kind, args, kwargs)
        return self._run(op, func, args, kwargs)

    def _run(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """The call, and its relevant part where a source reaches it."""
        if self._reaches(args, kwargs):
            output = self._split(op, func, args, kwargs)
        else:
            output = func(*args, **kwargs)
        self._follow(op.kind, func, args, kwargs, output)
        return output

    def _split(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        if op.inplace is not None or kwargs.get("inplace"):
            outside = Op(op.kind, op.run, None, op.split)
            y = self._split(outside, op.inplace or func, args, {k: v for k, v in kwargs.items() if k != "inplace"})
            args[0].copy_(y)
            self.slot.write(args[0], self.slot.rel(y))
            return args[0]
        if op.split is op.run:
            return op.run(self._call(op, func, None), *args, **kwargs)
        if mutates(func) and op.split is move.split_written:
            self.slot.ensure(args[0])
            op.split(self._call(op, func, args[0]), *args, **kwargs)
            return func(*args, **kwargs)
        late = self.slot.late(args[0]) if func == Tensor.__getitem__ else None
        output = func(*args, **kwargs)
        if late is not None:
            self.slot.put(output, late.at(args[1], output))
            return output
        call = self._call(op, func, output)
        if op.split is linear.split_linear and Late.fits(call, *args, **kwargs):
            self.slot.put(output, Late.of(call, *args, **kwargs))
            return output
        live = self._live(op, func, args, kwargs, output, call)
        if live is not None:
            self.slot.put(output, live)
            return output
        rel = op.split(call, *args, **kwargs)
        if isinstance(rel, Tensor) and self.slot.holds(rel):  # the same by other calls, which were split
            if hasattr(rel, _ADDED):
                setattr(output, _ADDED, getattr(rel, _ADDED))
            rel = self.slot.rel(rel)
        mixes = op.kind == "matmul" and any(hasattr(a, _PATTERN) for a in args[:2])
        return self._settled("context" if mixes else op.kind, args, output, rel, call)

    def _live(self, op: Op, func: Any, args: Any, kwargs: Any, output: Any, call: Split) -> Live | None:
        """The relevant part of an op that takes each row by itself, from rows that are not zero; None for others."""
        if not isinstance(output, Tensor) or not self.division.whole:
            return None
        if op.split is add.split_sum:
            return self._live_sum(op.kind, args, kwargs, output)
        if op.split is move.split_move:
            return self._live_view(args, output)
        place = _ROWS.get(op.split)
        live = None if place is None or place >= len(args) else self.slot.live(args[place])
        others = [a for i, a in enumerate(args) if i != place and isinstance(a, Tensor)]
        alone = op.split is not activation.split_elementwise or not others
        if live is None or not alone or any(map(self.slot.holds, others)) or live.shape[1:] != args[place].shape:
            return None
        x, y = live.rows(args[place]), live.rows(output)
        inner = replace(call, output=y, rel=lambda t: live.values[None] if t is x else None)
        rel = op.split(inner, *args[:place], x, *args[place + 1:], **kwargs)[0]
        return live.with_values(self._unclashed(op.kind, args, rel, y), output)

    def _live_sum(self, kind: str, args: Any, kwargs: Any, output: Tensor) -> Live | None:
        """A sum of two values that sources reach."""
        if len(args) != 2 or kwargs or not _joins(args) or not all(map(self.slot.holds, args)):
            return None
        a, b = map(self.slot.live, args)
        if a is None or b is None:
            return None
        found = a.plus(b)
        return found.with_values(self._unclashed(kind, args, found.values, found.rows(output)), output)

    def _live_view(self, args: Any, output: Tensor) -> Live | None:
        """Data movement that leaves rows as they are, and in their order."""
        x = args[0]
        rel = getattr(x, REL, None) if isinstance(x, Tensor) else None
        same = isinstance(rel, Live) and x.shape[-1] == output.shape[-1] and x.numel() == output.numel()
        if not same or output.data_ptr() != x.data_ptr() or not x.is_contiguous() or not output.is_contiguous():
            return None
        return rel.reshaped(output.shape)

    def _unclashed(self, kind: str, args: Any, rel: Tensor, total: Tensor) -> Tensor:
        """Parts whose signs are settled where the division says so."""
        place = self._place(kind, args)
        settled = place is not None and kind in self.division.normalized.get(place, ())
        return share.unclashed(rel, total) if settled else rel

    def _call(self, op: Op, func: Any, output: Any) -> Split:
        path = self.path[-1]
        key = (op.kind, path)
        if key not in self._rules:
            self._rules[key] = self.division.rule(op.kind, path), self.division.constants(path)
        return Split(func, op.kind, path, *self._rules[key], output, self.slot.rel, self.sources,
                     self._retrace, lambda t: getattr(t, _ADDED, None), self.division.whole)

    def _settled(self, kind: str, args: Any, output: Any, rel: Any, call: Split | None = None) -> Any:
        """The output with its relevant part, clashing signs settled where the division says so."""
        if isinstance(output, (tuple, list)):
            for one, part in zip(output, rel if rel is not None else [None] * len(output), strict=True):
                self._put(one, part)
            return output
        if rel is None:
            return output
        if call is not None and call.lost is not None:
            output = output - call.lost[0]
        self._put(output, self._unclashed(kind, args, rel, output))
        return output

    def _put(self, output: Any, rel: Tensor | None) -> None:
        if rel is not None and isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex()):
            whole = rel.shape[1:] == output.shape
            self.slot.put(output, rel if whole else rel.expand(rel.shape[0], *output.shape))

    def _unlisted(self, func: Any, args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        if not made or any(part in name for part in _MADE) or not self._reaches(args, kwargs):
            return output
        if self.unruled != "difference":
            raise UnruledOp(
                f"no rule for {named(func)} in module {self.path[-1] or '(the model itself)'!r}; register one with "
                "relprop.ops.register(function, kind), or pass unruled='difference' to split it by what its output "
                "loses with the relevant part")
        call = self._call(Op("move", move.split_move), func, output)
        return self._settled("", args, output, difference(call, *args, **kwargs))

    def _reaches(self, args: Any, kwargs: Any) -> bool:
        """Whether a source reaches any argument, or a member of a list among them."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                if self.slot.holds(value):
                    return True
            elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) and self.slot.holds(v) for v in value):
                return True
        return False

    # -- halves of a layer ---------------------------------------------------------------------------------------

    def _place(self, kind: str, args: Any) -> str | None:
        """The half of a layer that an op is of."""
        if self.half == "attention" and kind == "linear" and self._projected:
            self.half = "mlp"
        return self.half if kind != "add" or _joins(args) else None

    def _follow(self, kind: str, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """What an op tells of where in a layer the model is, and of attention scores and patterns."""
        if kind == "linear" and self.half == "attention":
            if self._projected:
                self.half = "mlp"
            self._projected = True
        elif kind == "add":
            self._follow_scores(args, output)
        if not isinstance(output, Tensor):
            return
        first = next((a for a in args if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)), None)
        if kind == "softmax" or (first is not None and kind in ("move", "linear", "mul") and hasattr(first, _PATTERN)):
            setattr(output, _PATTERN, True)
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)][-2:]  # baddbmm adds first
        if kind == "matmul" and len(operands) == 2:
            setattr(output, _OPERANDS, operands)
        elif first is not None and hasattr(first, _OPERANDS) and kind in _SCORED:
            setattr(output, _OPERANDS, getattr(first, _OPERANDS))
            if kind == "move" and hasattr(first, _ADDED) and first is args[0] and not mutates(func):
                added = getattr(first, _ADDED).expand_as(first)
                setattr(output, _ADDED, move.laid(func)(added, *args[1:], **kwargs))

    def _follow_scores(self, args: Any, output: Any) -> None:
        """Keeps constants that are added to attention scores, such as masks."""
        terms = [a for a in args[:2] if isinstance(a, Tensor)]
        if len(terms) < 2 or not isinstance(output, Tensor) or not hasattr(terms[0], _OPERANDS):
            return
        before, constant = getattr(terms[0], _ADDED, None), terms[1]
        if constant.is_floating_point() and not self.slot.holds(constant):
            setattr(output, _ADDED, constant if before is None else before + constant)

    def _meeting(self, args: Any) -> Any:
        """The operands of a product, looked at where a pattern meets values: that is where an attention begins."""
        place = next((i for i, a in enumerate(args[:2]) if hasattr(a, _PATTERN)), None)
        if place is None or self._inside:
            return args
        path, value = self.path[-1], 1 - place
        if (path, "attention") in self._wanted:
            for side, operand in zip((QUERY, KEY), getattr(args[place], _OPERANDS, ()), strict=False):
                self.edit(path, "attention", side, self._turned(operand) if side == KEY else operand)
        args = list(args)
        args[value] = self.edit(path, "attention", VALUE, args[value])
        self.half, self._projected = "attention", False
        return tuple(args)

    def _turned(self, operand: Tensor) -> Tensor:
        """Keys as they are, of keys as they meet queries."""
        keys, rel = operand.mT, self.slot.rel(operand)
        if rel is not None:
            self.slot.put(keys, rel.mT)
        return keys

    def _fused(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        path = self.path[-1]
        query, key, value = (self.edit(path, "attention", side, t)
                             for side, t in ((QUERY, query), (KEY, key), (VALUE, value)))
        output = func(query, key, value, *args, **options)
        self.half, self._projected = "attention", False
        if any(map(self.slot.holds, (query, key, value))):
            call = self._call(lookup(func), func, output)
            call.retrace = self._unseen
            rel = attention.split_attention(call, query, key, value, *args, **options)
            output = self._settled("context", (), output, rel)
        return self.edit(path, "attention", "output", output)

    def _unseen(self, function: Callable[[], Any]) -> Any:
        """`function()` with its calls split, which no tap counts and no layer is made of."""
        before, self._inside, half, projected = self._inside, True, self.half, self._projected
        self.half = None
        try:
            return self._retrace(function)
        finally:
            self._inside, self.half, self._projected = before, half, projected

    # -- modules -------------------------------------------------------------------------------------------------

    def follows(self, x: Any) -> bool:
        """Whether an activation module is to be one op for this input."""
        return isinstance(x, Tensor) and self.slot.holds(x)

    def activate(self, path: str, module: nn.Module, x: Tensor, y: Tensor, offset: float) -> Tensor:
        """The output y = f(x) of an activation module, split as one op."""
        with torch._C.DisableTorchFunction():
            call, live = self._call(Op("activation", activation.elementwise), module.forward, y), self.slot.live(x)
            if live is None or not self.division.whole:
                self._put(y, activation.split_by(call, self.slot.rel(x), x, module.forward, offset))
                return y
            call = replace(call, output=live.rows(y))
            rel = activation.split_by(call, live.values, live.rows(x), module.forward, offset)
            self.slot.put(y, live.with_values(rel, y))
        return y


_SCORED = frozenset({"move", "mul", "add", "softmax", "linear", "activation"})
"""Kinds of ops on the way from a product of queries and keys to the pattern."""


_ROWS = {linear.split_linear: 0, linear.split_addmm: 1, norm.split_layer_norm: 0, norm.split_rms_norm: 0,
         activation.split_elementwise: 0}
"""Ops that take each row of an argument by itself, and which argument."""


def _joins(args: Any) -> bool:
    """Whether a sum is of two values, as at a skip connection."""
    terms = [a for a in args[:2] if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)]
    return len(terms) == 2 and terms[0].shape == terms[1].shape


@contextmanager
def shadowed(model: nn.Module, shadow: Shadow) -> Iterator[Shadow]:
    """A `with` block in which a forward pass of `model` has this shadow; the model is given back as it came.

    A pass that ends early, since all has been read, ends the block.
    """
    handles: list[Any] = []
    with edited(model, {}, kind=lambda changes: shadow):
        try:
            for path, module in model.named_modules():
                offset = activation_offset(module)
                if offset is not None:
                    handles += hooked_activation(shadow, path, module, offset)
            with torch.no_grad(), suppress(Finished):
                yield shadow
        finally:
            for handle in handles:
                handle.remove()
