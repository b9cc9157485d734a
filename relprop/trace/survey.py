"""A forward pass surveyed: all its calls as a graph of tensors, its linear maps and attentions, its modules' runs and
its embedding.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_leaves

from ..ops import lookup
from .interception import Tap, mutates, place_of
from .observation import Observer, Seen
from .opening import first

_NUMBER = "_relprop_number"
_MERGES = frozenset({"view", "reshape", "flatten", "view_as", "reshape_as", "unflatten"})
_TURNS = frozenset({"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t"})
SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
"""Names of functions that add."""


@dataclass(frozen=True)
class Called:
    """A call: the tensors that it read, no parameters among them, and the one that it made, by number; with shapes.

    `place` is the tap of what it made. `event`: the place in `Survey.seen` of a linear map or an attention. `widths`:
    of a call that lays axes of a tensor together, how wide the last of them was by how many entries they have together:
    heads side by side. `order`: of a call that moves axes, where each axis of what it made was.
    """

    kind: str
    name: str
    place: Tap
    inputs: tuple[int, ...]
    shapes: tuple[Size, ...]
    output: int
    shape: Size
    event: int | None = None
    order: tuple[int, ...] = ()
    widths: tuple[tuple[int, int], ...] = ()


@dataclass
class Run:
    """The nth run of a module: the tensor that it reads and, when it has ended, the one that it returns, by number;
    `beside` are others of that shape which it is given. `start` and `end` say between which calls it was, `before` and
    `after` between which of the events seen.
    """

    path: str
    nth: int
    read: int
    shape: Size
    start: int
    before: int
    end: int = 0
    after: int = 0
    returned: int | None = None
    beside: tuple[int, ...] = ()


@dataclass
class Survey:
    """What was seen. Tensors have numbers in the order in which they were made. `made` says by the number of a sum, or
    of what a module returns, where it was made. `axes` says of each linear map by its event along which axes it reads.
    `outputs` are the tensors that the model returns, `discrete` those of whole numbers or truths. `embeddings` are
    modules that looked up the model's ids, or first read its pixels.
    """

    seen: list[Seen] = field(default_factory=list)
    calls: list[Called] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    made: dict[int, Tap] = field(default_factory=dict)
    axes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    discrete: set[int] = field(default_factory=set)
    embeddings: list[Tap] = field(default_factory=list)


class Surveyor(Observer):
    """An observer that tells tensors apart."""

    def __init__(self, inputs: list[Tensor], model: nn.Module) -> None:
        super().__init__()
        self._weights = {place_of(p) for p in model.parameters() if p.dim() > 1} - {None}
        self.survey = Survey(self.seen)
        self._numbers, self._token = count(), object()
        self._fixed: dict[int, int | None] = {id(t): None for t in (*inputs, *model.buffers())}  # not ours to mark
        self._entered: dict[str, int] = {}
        self._left: dict[tuple[str, str | None], int] = {}
        self._reads: dict[tuple[str, str], int] = {}
        self._open: list[Run | None] = []
        self._pixels = [t for t in inputs if t.is_floating_point() and t.dim() >= 4]
        whole = [t for t in inputs if not t.is_floating_point() and t.dtype != torch.bool]
        self._copies: set[int] = set()
        self._ids = {t.untyped_storage().data_ptr() for t in whole}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, getattr(lookup(func), "kind", "")
        seen, made = len(self.seen), len(self.survey.calls)
        operands = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        terms = [a for a in operands if not isinstance(a, nn.Parameter)]
        before, shapes = tuple(map(self.number, terms)), tuple(t.shape for t in terms)
        nth = self._reads.get((self.path[-1], kind), 0)
        output = super().__torch_function__(func, types, args, kwargs)
        if len(self.survey.calls) > made:  # it was opened: the calls inside it have been noted
            return output
        if terms and kind:
            self._reads[self.path[-1], kind] = nth + 1
        event = seen if len(self.seen) > seen else None
        if event is None and kind in ("matmul", "conv") and isinstance(output, Tensor):
            event = self._mapped(kind, nth, args, operands, output)
        elif event is not None and kind == "linear":
            self.survey.axes[event] = (-1,)
        self._embedded(func, kind, args, terms)
        order = _order(func.__name__, terms[0], args[1:], kwargs) if kind == "move" and terms else ()
        writes = mutates(func) and bool(terms)
        call = Called(kind, func.__name__, self._made(kind, output), before, shapes, -1, Size(), event, order)
        for one in [terms[0]] if writes else output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(one, Tensor) and (writes or not self._numbered(one)):  # or it is what was read, as of dropout
                self._note(call, one, writes)
                if kind == "move" and not one.is_floating_point() and any(map(self._is_id, terms, before)):
                    self._copies.add(self.number(one))  # ids padded, cut, joined with others
        return output

    def _is_id(self, t: Tensor, number: int) -> bool:
        return number in self._copies or _memory(t) in self._ids

    def _mapped(self, kind: str, nth: int, args: Any, operands: list[Tensor], output: Tensor) -> int | None:
        """Notices a linear map that is written as another kind of call, and along which axes it reads."""
        x = next((t for t in operands if not isinstance(t, nn.Parameter)), None)
        weight = next((t for t in operands if t is not x and self._weighs(t)), None)
        if x is None or weight is None or self._weighs(x):
            return None
        if kind == "conv":
            axes = () if any(size > 1 for size in weight.shape[2:]) else (1 if x.dim() == weight.dim() else 0,)
        elif isinstance(args[0], str):
            axes = _contracted(args[0], x)
        else:
            axes = (*(i - weight.dim() for i in range(weight.dim() - 2) if weight.shape[i] > 1), -1)
        if not axes:
            return None
        self.survey.axes[len(self.seen)] = axes
        self.seen.append(Seen(kind, self.path[-1], nth, (x.shape, weight.shape), output.shape, len(self.seen)))
        return len(self.seen) - 1

    def _weighs(self, operand: Tensor) -> bool:
        return operand.dim() > 1 and place_of(operand) in self._weights

    def _embedded(self, func: Any, kind: str, args: Any, terms: list[Tensor]) -> None:
        if func in (F.embedding, torch.embedding):
            if self._is_id(args[0], self.number(args[0])):
                self.survey.embeddings.append(Tap(self.path[-1]))
        elif kind in ("conv", "linear") and any(t is x for t in terms for x in self._pixels):
            self.survey.embeddings.append(Tap(self.path[-1], kind, axes=(1,) if kind == "conv" else (-1,)))

    def _note(self, call: Called, made: Tensor, writes: bool) -> None:
        """Keeps a call in the graph, with one of the tensors that it made."""
        number = self.number(made, fresh=writes)
        widths = _widths(call.shapes[0], made.shape) if call.shapes and call.name in _MERGES else ()
        self.survey.calls.append(replace(call, output=number, shape=made.shape, widths=widths))
        if call.kind == "add" and [*call.shapes] == [made.shape] * 2:
            self.survey.made[number] = call.place
        elif (call.kind == "move" and len(call.inputs) == 1 and not writes and not call.order
              and call.inputs[0] in self.survey.made):
            self.survey.made.setdefault(number, self.survey.made[call.inputs[0]])  # reshaped, it is the same still
        if writes and made._base is not None:  # what it is a view of is another tensor now as well
            base = made._base
            inputs, shapes = (self.number(base), number), (base.shape, made.shape)
            self.survey.calls.append(replace(call, inputs=inputs, shapes=shapes, shape=base.shape, event=None,
                                             output=self.number(base, fresh=True)))

    def _made(self, kind: str, output: Any) -> Tap:
        return self._place(self.path[-1], kind) if kind and isinstance(output, Tensor) else Tap(self.path[-1], kind)

    def _place(self, path: str, kind: str | None) -> Tap:
        """What a call of this kind, or the module, returns now."""
        nth = self._left[path, kind] = self._left.get((path, kind), -1) + 1
        return Tap(path, kind, "output", nth)

    def _numbered(self, t: Tensor) -> bool:
        return id(t) in self._fixed or getattr(t, _NUMBER, (None, None))[0] is self._token

    def number(self, t: Tensor, *, fresh: bool = False) -> int:
        """What a tensor is known by; `fresh`: it was written to, and is another one now."""
        if id(t) in self._fixed:
            if fresh or self._fixed[id(t)] is None:
                self._fixed[id(t)] = next(self._numbers)
            return self._fixed[id(t)]
        if fresh or not self._numbered(t):
            setattr(t, _NUMBER, (self._token, next(self._numbers)))
            if not t.is_floating_point() and not t.is_complex():
                self.survey.discrete.add(getattr(t, _NUMBER)[1])
        return getattr(t, _NUMBER)[1]

    def enter(self, path: str, args: Any, kwargs: Any) -> None:
        """A module begins."""
        self.path.append(path)
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not given:
            self._open.append(None)
            return
        read = given[0]
        nth = self._entered[path] = self._entered.get(path, -1) + 1
        run = Run(path, nth, self.number(read), read.shape, len(self.survey.calls), len(self.seen), beside=tuple(
            self.number(one) for one in given[1:] if one.shape == read.shape and one.dtype == read.dtype))
        self.survey.runs.append(run)
        self._open.append(run)

    def leave(self, output: Any) -> None:
        """A module ends."""
        place, run, found = self._place(self.path.pop(), None), self._open.pop(), first(output)
        if not place.path:
            self.survey.outputs = tuple(self.number(t) for t in tree_leaves(output) if isinstance(t, Tensor))
        if isinstance(found, Tensor):
            self.survey.made.setdefault(self.number(found), place)
        if run is not None:
            run.end, run.after = len(self.survey.calls), len(self.seen)
            run.returned = self.number(found) if isinstance(found, Tensor) else None


def _memory(t: Tensor) -> int | None:
    """Where a tensor's data lies; None of one that is many, inside `torch.vmap`."""
    return None if torch._C._functorch.is_batchedtensor(t) else t.untyped_storage().data_ptr()


def _widths(before: Size, after: Size) -> tuple[tuple[int, int], ...]:
    """Axes of `before` that are laid together in `after`: how many entries they have, and the last of them."""
    a, b, found = [s for s in before if s != 1], [s for s in after if s != 1], []
    while a and b:
        left, right = [a.pop()], [b.pop()]
        while _product(left) != _product(right):
            short = left if _product(left) < _product(right) else right
            if not (rest := a if short is left else b):
                return tuple(found)
            short.append(rest.pop())
        if right[0] > left[0] and right[0] % left[0] == 0:
            found.append((right[0], left[0]))
    return tuple(found)


def _product(sizes: list[int]) -> int:
    return Size(sizes).numel()


def _order(name: str, x: Tensor, args: Any, kwargs: Any) -> tuple[int, ...]:
    """Where each axis of what a call makes was, of a call that moves axes; () of others."""
    if name not in _TURNS:
        return ()
    with torch._C.DisableTorchFunction():
        told = torch.empty([2 + axis for axis in range(x.dim())], device="meta")  # by their sizes
        return tuple(size - 2 for size in getattr(torch.Tensor, name)(told, *args, **kwargs).shape)


def _contracted(equation: str, x: Tensor) -> tuple[int, ...]:
    """The axes of the first operand of an einsum that its weight has as well."""
    if "." in equation or equation.count(",") != 1:
        return ()
    one, other = equation.replace(" ", "").split("->")[0].split(",")
    return tuple(place - x.dim() for place, letter in enumerate(one) if letter in other)


@contextmanager
def surveyed(model: nn.Module, inputs: list[Tensor]) -> Iterator[Survey]:
    """A `with` block that surveys what `model` does with these inputs; the model is given back as it came."""
    surveyor = Surveyor(inputs, model)
    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: surveyor.enter(path, args, kwargs), with_kwargs=True))
            handles.append(module.register_forward_hook(
                lambda module, args, output: surveyor.leave(output), always_call=True))
        with surveyor:
            yield surveyor.survey
    finally:
        for handle in handles:
            handle.remove()
