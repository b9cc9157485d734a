"""Ops that only move data, select it, or add it up with constant weights: the plain gradient is their rule.

Relevance per unit goes where the entries came from, so that a reshape, a gather, a window shift or a class-token read
needs nothing. Where a constant is moved in beside the explained tensor (a class token in `cat`, a filled mask), what
the constant takes is booked.
"""

from typing import Any

import torch
from torch import Tensor

from .call import Call, dependent
from .journal import preserve


def joined(call: Call, tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.cat`, `torch.stack`: constants among the parts (class and register tokens) absorb."""
    parts = list(tensors)
    constants = [t for t in parts if not dependent(t) and t.is_floating_point()]
    if call.journal is None or not constants:
        return call.func(parts, *args, **kwargs)
    return _booked(call, parts, constants, lambda *filled: call.func(list(filled), *args, **kwargs))


def chosen(call: Call, condition: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.where(condition, a, b)`, `a.where(condition, b)`."""
    values = [*args, *kwargs.values()]
    if call.func is Tensor.where:
        condition, values = values[0], [condition, *values[1:]]
    constants = [v for v in values if not dependent(v)]
    if call.journal is None or not values or not constants:
        return torch.where(condition, *values)
    return _booked(call, values, constants, lambda *filled: torch.where(condition, *filled))


def filled(call: Call, input: Tensor, mask: Any, value: Any, *rest: Any, **kwargs: Any) -> Tensor:
    """`masked_fill` and its kin, out of place: the filled-in value is a constant unless it depends on the input."""
    if call.journal is None or dependent(value):
        return call.func(input, mask, value, *rest, **kwargs)
    return _booked(call, [input], [value], lambda x: call.func(x, mask, value, *rest, **kwargs))


def padded(call: Call, *args: Any, **kwargs: Any) -> Tensor:
    """`F.pad`, `index_fill`, `scatter` ...: entries filled with a number absorb."""
    y = call.func(*args, **kwargs)
    constant = None if call.journal is None else _at_zero(call, args, kwargs)
    if constant is not None:
        call.constant(constant, y)
    return y


def written(call: Call, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`x[i] = v`, `masked_fill_`, `copy_` ...: constants that are written, or left standing, absorb."""
    constant = None if call.journal is None else _at_zero(call, (target, *args), kwargs)
    if constant is None and (call.journal is None or target._base is None or dependent(target)):
        return call.func(target, *args, **kwargs)
    y = target.clone()
    call.func(y, *args, **kwargs)
    if constant is not None:
        call.constant(constant, y)
    return overwrite(call, target, y)


def overwrite(call: Call, target: Tensor, y: Tensor) -> Tensor:
    """`target.copy_(y)`. Where the target is a view of a constant, what stands around it in there absorbs.

    What is booked of y must be booked before: whoever reads the whole that a view belongs to passes the view by.
    """
    whole = target._base
    standing = None
    if call.journal is not None and whole is not None and not dependent(whole):
        standing = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device=whole.device).copy_(whole)
        offset = target.storage_offset() - whole.storage_offset()
        standing.as_strided(target.shape, target.stride(), offset).zero_()
    preserve(target)  # of which the steps that led to y may have kept something
    target.copy_(y)
    if standing is not None and bool(standing.any()):
        call.constant(standing, whole, call.origin(whole))
    return target


def _at_zero(call: Call, args: Any, kwargs: Any) -> Tensor | None:
    """The constant part of what a call returns or writes, the op being linear in its tensors; None if it is zero."""
    first, *rest = [torch.zeros_like(v) if dependent(v) else v for v in args]
    with torch.no_grad():
        first = first.clone()
        y = call.func(first, *rest, **{name: torch.zeros_like(v) if dependent(v) else v for name, v in kwargs.items()})
    y = first if y is None else y
    return y if bool(y.any()) else None


def _booked(call: Call, values: list[Any], constants: list[Any], run: Any) -> Any:
    """run(*values) with the constants' part booked under the first one that has a name of its own."""
    moving = [v for v in values if dependent(v)]
    names = [call.origin(c) for c in constants if isinstance(c, Tensor)]
    name = next(iter(names), None) or call.origin(values[0])

    def refilled(*aliases: Tensor) -> Any:
        source = iter(aliases)
        return run(*(next(source) if dependent(v) else v for v in values))

    return call.booked(name, moving, refilled)
