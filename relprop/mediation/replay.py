"""What need not be computed again: modules that end before an intervention return what they returned in a recorded run,
and modules behind the last attention are given the positions alone that are read.

Both take the place of modules of the model for a `with` block. Nothing is approximated: a value that the intervention
cannot reach is the recorded one.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..numerics import tolerance
from ..trace import Tap
from ..trace.intervention import PATTERN, Editor, edited
from ..trace.layout import Layout, learn

_PLAIN = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device)


@dataclass
class Done:
    """A module's call in a recorded run: when it began and ended, what it read first, and what it returned."""

    path: str
    start: int
    end: int = -1
    read: Tensor | None = None
    tensors: int = 0
    output: Any = None
    versions: tuple[int, ...] = ()


class Recorder(Editor):
    """Watches a forward pass, changes nothing: every module's call, the values at taps, and when each came.

    With `light` it keeps shapes in the place of outputs.
    """

    def __init__(self, taps: Iterable[Tap], *, light: bool = False) -> None:
        self.light = light
        self.calls: list[Done] = []
        self.values: dict[Tap, Tensor] = {}
        self.when: dict[Tap, int] = {}
        self.attended = -1
        self._open: list[Done] = []
        self._time = 0
        super().__init__({tap: self._keeper(tap) for tap in taps})
        self._patterns = True

    def _keeper(self, tap: Tap) -> Callable[[Tensor], None]:
        def keep(value: Tensor) -> None:
            self.values[tap], self.when[tap] = value.clone(), self._tick()
        return keep

    @staticmethod
    def _shape(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _reached(self, path: str, kind: str | None, side: str) -> Tap | None:
        if side == PATTERN:
            self.attended = self._tick()
        return super()._reached(path, kind, side)

    def enter(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        call = Done(path, self._tick(), read=args[0] if args and isinstance(args[0], Tensor) else None,
                    tensors=len(tensors))
        self.calls.append(call)
        self._open.append(call)
        return super().enter(path, args, kwargs)

    def leave(self, path: str, output: Any) -> Any:
        call = self._open.pop()
        call.end = self._tick()
        call.output, call.versions = tree_map(self._shape, output) if self.light else output, _versions(output)
        call.read = None if self.light else call.read
        return super().leave(path, output)  # after the end, so that a tap of the module's output finds it ended


@dataclass(frozen=True, eq=False)
class Kept:
    """What a module returned, as a tree of tensors with the layout of each, to be given again to more rows."""

    call: Done
    leaves: list[Any]
    layouts: list[Layout | None]
    rebuild: Any

    def output(self, copies: int) -> Any:
        """The output for the rows `copies` times; of memory of its own, since the model may write into it."""
        leaves = [leaf if not isinstance(leaf, Tensor) else leaf.clone() if layout is None
                  else layout.tile(leaf, copies) for leaf, layout in zip(self.leaves, self.layouts)]
        return tree_unflatten(leaves, self.rebuild)


@dataclass(frozen=True, eq=False)
class Recording:
    """A forward pass of some rows, ready to be run again from any tap on: its output, the values at taps, (rows as the
    model has them), their layouts and times, the outputs that can be given again, and the tail that can be narrowed.
    """

    output: Any
    values: dict[Tap, Tensor]
    layouts: dict[Tap, Layout | None]
    when: dict[Tap, int]
    kept: list[Kept]
    tail: list[Done]

    def before(self, time: int) -> list[Kept]:
        """The outermost modules that had ended at this time."""
        found, until = [], -1
        for kept in self.kept:
            if kept.call.start > until and kept.call.end <= time:
                found.append(kept)
                until = kept.call.end
        return found


def record(model: nn.Module, run: Callable[[list[int]], Any], rows: int, taps: Iterable[Tap]) -> Recording:
    """Two forward passes: of all rows, and of one alone (of one: twice), which tells where rows are in every tensor.

    Args: run: the model's output for these of the rows.
    """
    taps = list(dict.fromkeys(taps))
    output, seen = _watched(model, lambda: run(list(range(rows))), taps)
    others = 1 if rows > 1 else 2
    _, less = _watched(model, lambda: run([0] * others), taps, light=True)
    layouts = {tap: None if tap.side == PATTERN else learn(seen.values[tap].shape, rows, less.values[tap].shape,
                                                           others) for tap in taps}
    for tap, layout in layouts.items():
        _check_rows(tap, layout, seen.values[tap], less.values[tap])
    once = _called_once(seen.calls) & _called_once(less.calls)
    shapes = {call.path: call for call in less.calls}
    kept = [found for call in seen.calls if call.path in once
            for found in [_kept(call, rows, shapes[call.path], others)] if found is not None]
    whole = Recording(output, seen.values, layouts, seen.when, kept, _tail(seen, once, rows))
    needed = {id(found) for time in whole.when.values() for found in whole.before(time)}
    kept[:] = [found for found in kept if id(found) in needed]  # the rest would only fill the memory
    for call in (*whole.tail, *(found.call for found in kept)):
        call.read = call.output = None
    return whole


def _check_rows(tap: Tap, layout: Layout | None, whole: Tensor, alone: Tensor) -> None:
    """Raises: ValueError where the first row is not by itself what it is among others, so that what is taken for rows
    are none.
    """
    pick = lambda value: value[0] if tap.side == PATTERN else layout.view(value)[0, 0]
    if layout is None and tap.side != PATTERN:
        return
    one, other = pick(whole), pick(alone)
    close = tolerance(one.dtype) * float(one.abs().nan_to_num().amax().clamp_min(torch.finfo(one.dtype).tiny))
    if not torch.allclose(one, other, rtol=0, atol=close, equal_nan=True):
        raise ValueError(f"rows cannot be told apart at {tap.path}: the first one has other values there by itself, as "
                         "where experts see some of the tokens; take a place that all tokens pass, such as L0 or "
                         "L0.attn.H*")


def again(model: nn.Module, run: Callable[[list[int]], Any], rows: int, like: Recording, *, light: bool = False
          ) -> Recording:
    """A recording of another input of the same length, laid out as the first; `light`: of the values at taps alone."""
    output, seen = _watched(model, lambda: run(list(range(rows))), list(like.values))
    calls = {call.path: call for call in seen.calls}
    kept = []
    for one in () if light else like.kept:
        call = calls[one.call.path]
        leaves = tree_flatten(call.output)[0]
        if call.versions == _versions(call.output) and len(leaves) == len(one.leaves):
            kept.append(Kept(call, leaves, one.layouts, one.rebuild))
    tail = [calls[call.path] for call in like.tail]
    for call in (*tail, *(found.call for found in kept)):
        call.read = call.output = None
    return Recording(output, seen.values, like.layouts, seen.when, kept, tail)


def _watched(model: nn.Module, run: Callable[[], Any], taps: list[Tap], *, light: bool = False
             ) -> tuple[Any, Recorder]:
    with edited(model, dict.fromkeys(taps), kind=partial(Recorder, light=light)) as seen:
        output = run()
    missing = [tap for tap in taps if tap not in seen.values]
    if missing:
        raise ValueError(f"the forward pass never came to {missing[0]}, and {len(missing) - 1} more")
    return output, seen


def _called_once(calls: list[Done]) -> set[str]:
    return {path for path, count in Counter(call.path for call in calls).items() if count == 1 and path}


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))


def _kept(call: Done, rows: int, less: Done, others: int) -> Kept | None:
    """The output of a call, None if it cannot be given again: not tensors alone, written into by the model later, or
    with rows that cannot be told apart.
    """
    leaves, rebuild = tree_flatten(call.output)
    shapes = tree_flatten(less.output)[0]
    if len(shapes) != len(leaves) or not call.versions or call.versions != _versions(call.output):
        return None
    layouts: list[Layout | None] = []
    for leaf, other in zip(leaves, shapes):
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, _PLAIN):
                return None
            layouts.append(None)
            continue
        try:
            layouts.append(learn(leaf.shape, rows, other.shape, others))
        except ValueError:
            return None
    return Kept(call, leaves, layouts, rebuild)


def _tail(seen: Recorder, once: set[str], rows: int) -> list[Done]:
    """The calls of the outermost modules behind the last attention that make (B, T, C') of (B, T, C) alone."""
    found, until = [], seen.attended
    for call in seen.calls:
        if call.start <= until or call.path not in once:
            continue
        until = call.end
        x, y = call.read, call.output
        if call.tensors == 1 and isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim() == 3 \
                and x.shape[:2] == y.shape[:2] and x.shape[0] == rows:
            found.append(call)
    return found


class Replay(nn.Module):
    """In the place of a module: returns what that has returned, and computes nothing."""

    def __init__(self, original: nn.Module, output: Callable[[], Any]) -> None:
        super().__init__()
        self.original, self._give = original, output

    def __getattr__(self, name: str) -> Any:  # what the model asks of its module, such as a layer's kind of attention
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._give()


class Narrow(Replay):
    """In the place of a module that works on each position for itself: it is given the positions alone that are read.

    Args: at: the positions, (R, P) for R rows. compact: return them alone, (R, P, C); else where they were, with zeros
        at the others. entries: of a linear map, the entries of its output that are read, in the place of all.
    """

    def __init__(self, original: nn.Module, at: Tensor, *, compact: bool, entries: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.original, self._at, self._compact, self._entries = original, at, compact, entries

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row = torch.arange(len(x), device=x.device)[:, None]
        y = self._some(x[row, self._at]) if self._entries is not None else self.original(x[row, self._at], *args,
                                                                                         **kwargs)
        if self._compact:
            return y
        whole = y.new_zeros(*x.shape[:2], y.shape[-1])
        whole[row, self._at] = y
        return whole

    def _some(self, x: Tensor) -> Tensor:
        weight, bias = self.original.weight, self.original.bias
        entries = self._entries.to(weight.device)
        return F.linear(x, weight[entries], None if bias is None else bias[entries])


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, Callable[[nn.Module], nn.Module]]) -> Iterator[None]:
    """A `with` block in which other modules, made of those there, stand at these paths."""
    before = []
    try:
        for path, made in modules.items():
            owner, _, name = path.rpartition(".")
            parent = model.get_submodule(owner)
            original = parent._modules[name]
            before.append((parent, name, original))
            parent._modules[name] = made(original).train(original.training)
        yield
    finally:
        for parent, name, original in reversed(before):
            parent._modules[name] = original
