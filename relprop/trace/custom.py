"""A model's own autograd functions, run in the open: the torch calls inside them follow the rules like any others.

`torch.autograd.Function.apply` hides what it computes from everybody, and gives a gradient of its own instead: that of
an estimate, of a clipped value, of layers that are computed again. While a model is explained, its modules call the
forward pass of such a function directly. Only names that its code looks up are bound anew, in copies of the methods
that these modules have, on the modules themselves; no class and no file of anybody is touched.
"""
from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..ops import lookup

_OPENED: dict[type, dict[str, Callable[..., Any]]] = {}
"""By type of module its methods that call autograd functions, as they are in the open."""


class _Context:
    """What a forward pass is given to keep things in for its way back, which is not taken."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None  # save_for_backward, mark_dirty ...


class _InTheOpen:
    """Stands in for an autograd function: `apply` runs its forward pass under the caller's eyes."""

    def __init__(self, function: type[Function]) -> None:
        self._function = function

    def apply(self, *args: Any) -> Any:
        function = self._function
        forward = _copied(function.forward) or function.forward
        apart = function.setup_context is not Function.setup_context
        with _Watching() as calls:
            output = forward(*args) if apart else forward(_Context(args), *args)
        if any(map(_moving, args)) and not calls.count and not any(map(_moving, tree_leaves(output))):
            return function.apply(*args)  # a kernel that torch does not see: then by the gradient that it has
        return output

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._function, name)
        return _copied(found) or found


class _Watching(TorchFunctionMode):
    """Counts the calls that compute something of what is explained. A forward pass is one without a gradient, so that
    code which is only called there may ask for none, in vain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if any(map(_moving, tree_leaves(args))) and getattr(lookup(func), "kind", "move") != "move":
            self.count += 1
        return func(*args, **(kwargs or {}))


def _moving(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def in_the_open(model: nn.Module) -> Iterator[None]:
    """A `with` block in which the autograd functions that the model's modules call are run as what they are made of."""
    bound: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules():
            for name, function in _methods(type(module)).items():
                if name not in module.__dict__:  # what somebody has put there stays
                    module.__dict__[name] = types.MethodType(function, module)
                    bound.append((module, name))
        yield
    finally:
        for module, name in bound:
            del module.__dict__[name]


def _methods(kind: type) -> dict[str, Callable[..., Any]]:
    if kind not in _OPENED:
        found: dict[str, Callable[..., Any]] = {}
        for one in reversed(kind.__mro__):
            if one.__module__.partition(".")[0] not in ("torch", "builtins"):
                for name, value in vars(one).items():
                    found.pop(name, None)
                    if isinstance(value, types.FunctionType) and (copy := _copied(value)) is not None:
                        found[name] = copy
        _OPENED[kind] = found
    return _OPENED[kind]


def _copied(function: Any, seen: frozenset[Any] = frozenset()) -> Callable[..., Any] | None:
    """The function with stand-ins for the autograd functions that it, or another function of its file, looks up; None
    if there are none.
    """
    if not isinstance(function, types.FunctionType) or function in seen:
        return None
    seen |= {function}
    names, cells = {}, list(function.__closure__ or ())
    for name in _looked_up(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, type) and issubclass(value, Function) and value is not Function:
            names[name] = _InTheOpen(value)
        elif getattr(value, "__module__", None) == function.__module__ and (copy := _copied(value, seen)) is not None:
            names[name] = copy
    wraps = False
    for place, cell in enumerate(cells):  # what a decorator has wrapped
        inner = _content(cell)
        if (copy := _copied(inner, seen)) is not None:
            cells[place], wraps = types.CellType(copy), True
    if not names and not wraps:
        return None
    copy = types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__,
                              function.__defaults__, tuple(cells) or None)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


def _looked_up(code: types.CodeType) -> set[str]:
    """Names that code looks up, and the code of functions written inside it."""
    inside = [_looked_up(one) for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*inside)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
