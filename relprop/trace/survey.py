"""A forward pass surveyed: beside its linear maps and attentions, what its modules read, its sums and its embedding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..ops import lookup
from .interception import Tap
from .observation import Observer, Seen
from .opening import first

_NUMBER, _DEPTH = "_relprop_number", "_relprop_depth"


@dataclass(frozen=True)
class Read:
    """A module begins and reads a tensor, known by its `number`; `order` events were seen before."""

    path: str
    nth: int
    number: int
    order: int


@dataclass(frozen=True)
class Sum:
    """Two tensors of one shape are added, neither of them a parameter: the numbers of the terms and of the sum."""

    terms: tuple[int, int]
    number: int
    order: int


@dataclass
class Survey:
    """What was seen. Tensors have numbers in the order in which they were made. `depths` says of each linear map by its
    order, how many attentions had been made when the last of those was that its operand depends on. `made` says by the
    number of a sum, or of what a module returns, where it was made. `embeddings` are modules that looked up the model's
    ids, or first read its pixels.
    """

    seen: list[Seen] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    depths: dict[int, int] = field(default_factory=dict)
    made: dict[int, Tap] = field(default_factory=dict)
    embeddings: list[Tap] = field(default_factory=list)


class Surveyor(Observer):
    """An observer that tells tensors apart."""

    def __init__(self, inputs: list[Tensor], model: nn.Module) -> None:
        super().__init__()
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 2}
        self.survey = Survey(self.seen)
        self._numbers = count()
        self._entered: dict[str, int] = {}
        self._left: dict[tuple[str, str | None], int] = {}
        self._pixels = [t for t in inputs if t.is_floating_point() and t.dim() == 4]
        whole = [t for t in inputs if not t.is_floating_point() and t.dtype != torch.bool]
        self._ids = {t.untyped_storage().data_ptr() for t in whole}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, seen = getattr(lookup(func), "kind", ""), len(self.seen)
        operands = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        terms = [a for a in operands if not isinstance(a, nn.Parameter)]
        before = tuple(map(self.number, terms)) if kind == "add" else ()
        depth = max(map(_depth, operands), default=0)
        if kind in ("linear", "matmul"):
            self.survey.depths[seen] = depth
        output = super().__torch_function__(func, types, args, kwargs)
        if kind == "matmul" and len(terms) == 2 and self._weighs(terms[1]):  # a linear map, written out
            self._add("matmul", terms, output)
        if func in (F.embedding, torch.embedding):
            if args[0].untyped_storage().data_ptr() in self._ids:
                self.survey.embeddings.append(Tap(self.path[-1]))
        elif kind in ("conv", "linear") and any(t is x for t in terms for x in self._pixels):
            self.survey.embeddings.append(Tap(self.path[-1], kind))
        attentions = sum(event.kind == "attention" for event in self.seen[seen:])
        for one in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(one, Tensor):
                setattr(one, _DEPTH, max(depth, _depth(one), self._attended if attentions else 0))
        if kind == "add":
            place = self._place(self.path[-1], "add")
            if isinstance(output, Tensor) and [t.shape for t in terms] == [output.shape] * 2:
                number = self.number(output, fresh=output is terms[0])
                self.survey.sums.append(Sum(before, number, len(self.seen)))
                self.survey.made[number] = place
        elif kind == "move" and len(operands) == 1 and isinstance(output, Tensor):  # reshaped, it is the same still
            place = self.survey.made.get(getattr(operands[0], _NUMBER, (None, None))[1])
            if place is not None:
                self.survey.made.setdefault(self.number(output), place)
        return output

    def _place(self, path: str, kind: str | None) -> Tap:
        """What a call of this kind, or the module, returns now."""
        nth = self._left[path, kind] = self._left.get((path, kind), -1) + 1
        return Tap(path, kind, "output", nth)

    def _weighs(self, operand: Tensor) -> bool:
        return operand.dim() == 2 and operand.untyped_storage().data_ptr() in self._weights

    @property
    def _attended(self) -> int:
        return sum(event.kind == "attention" for event in self.seen)

    def number(self, t: Tensor, *, fresh: bool = False) -> int:
        """What a tensor is known by; `fresh`: it was written to, and is another one now."""
        if fresh or getattr(t, _NUMBER, (None, None))[0] is not self:
            setattr(t, _NUMBER, (self, next(self._numbers)))
        return getattr(t, _NUMBER)[1]

    def enter(self, path: str, args: Any, kwargs: Any) -> None:
        """A module begins."""
        self.path.append(path)
        read = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if read is not None:
            nth = self._entered[path] = self._entered.get(path, -1) + 1
            self.survey.reads.append(Read(path, nth, self.number(read), len(self.seen)))

    def leave(self, output: Any) -> None:
        """A module ends."""
        place = self._place(self.path.pop(), None)
        if isinstance(found := first(output), Tensor):
            self.survey.made.setdefault(self.number(found), place)


def _depth(t: Tensor) -> int:
    return getattr(t, _DEPTH, 0)


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
