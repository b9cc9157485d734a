"""Ops that only move data, select it, or add it up with constant weights: the plain gradient is their rule.

Relevance per unit goes where the entries came from, so that a reshape, a gather, a window shift or a class-token read
needs nothing. Where a constant is moved in beside the explained tensor (a class token in `cat`, a filled mask), what
the constant takes is booked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Call, dependent
from .journal import preserve
from .split import Split, difference, refilled


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


def sequenced(call: Call, sequences: Any, batch_first: bool = False, padding_value: float = 0.0,
              padding_side: str = "right") -> Tensor:
    """`torch.nn.utils.rnn.pad_sequence`: each one padded, and all put together, as separate calls."""
    longest = max(len(one) for one in sequences)

    def run() -> Tensor:
        padded = []
        for one in sequences:
            ends = (0, longest - len(one)) if padding_side == "right" else (longest - len(one), 0)
            padded.append(torch.nn.functional.pad(one, (0, 0) * (one.dim() - 1) + ends, value=padding_value))
        return torch.stack(padded, 0 if batch_first else 1)

    return call.retrace(run)


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


# -- forward ---------------------------------------------------------------------------------------------------------

_EXTREME = frozenset({"max", "min", "amax", "amin", "maximum", "minimum", "fmax", "fmin", "median", "mode", "cummax",
                      "cummin", "kthvalue", "nan_to_num"})
_ORDER = frozenset({"topk", "sort", "msort"})


def split_move(call: Split, *args: Any, **kwargs: Any) -> Any:
    """Data movement, forward: rel goes where its total goes, and numbers that are filled in are irrelevant.

    An extreme is split by difference; of entries put in order, rel takes the places that the total takes.
    """
    name = getattr(call.func, "__name__", "")
    if name in _EXTREME:
        return difference(call, *args, **kwargs)
    if name in _ORDER:
        place = 2 if name == "topk" else 1
        return _ordered(call, args[0], kwargs.get("dim", args[place] if len(args) > place else -1))
    return refilled(args, kwargs, call.rel, laid(call.func))


def _viewed(x: Tensor, *shape: Any) -> Tensor:
    return x.view(*shape) if isinstance(shape[0], torch.dtype) else x.reshape(*shape)


_LAID = {"view": _viewed, "view_as": Tensor.reshape_as}


def laid(func: Callable[..., Any]) -> Callable[..., Any]:
    """A movement of data for parts, which need not lie in memory as their totals do."""
    return _LAID.get(getattr(func, "__name__", ""), func)


def _ordered(call: Split, x: Tensor, dim: int) -> Any:
    values, order = call.output if isinstance(call.output, tuple) else (call.output, x.argsort(0))
    dim = (dim if isinstance(call.output, tuple) else 0) % x.dim()
    rel = call.rel(x)
    found = rel.gather(dim + 1, order.expand(rel.shape[0], *order.shape))
    return (found, None) if isinstance(call.output, tuple) else found


def split_chosen(call: Split, condition: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.where`, forward."""
    values = [*args, *kwargs.values()]
    if call.func is Tensor.where:
        condition, values = values[0], [condition, *values[1:]]
    if not values:
        return None
    parts = [value if isinstance(value, Tensor) else torch.zeros_like(call.output[:0].sum()) for value in values]
    return refilled((condition, *parts), {}, call.rel, torch.where)


def split_filled(call: Split, input: Tensor, mask: Any, value: Any) -> Any:
    """`masked_fill`, forward: a number that is filled in is irrelevant."""
    return refilled((input, mask, _given(call, value)), {}, call.rel, call.func)


def split_placed(call: Split, input: Tensor, dim: Any, index: Any, value: Any = None, **names: Any) -> Any:
    """`index_fill`, `scatter`, forward."""
    value = next(iter(names.values())) if value is None else value
    return refilled((input, dim, index, _given(call, value)), {}, call.rel, call.func)


def split_padded(call: Split, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """`F.pad`, forward: the border is irrelevant."""
    return refilled((input, pad, mode), {}, call.rel, call.func)


_VALUE = {"__setitem__": 1, "masked_fill_": 1, "masked_scatter_": 1, "index_put_": 1, "index_fill_": 2, "copy_": 0,
          "fill_": 0}
"""Which argument, after the target, is what is written; of those not here, the last one."""


def split_written(call: Split, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`x[i] = v`, `masked_fill_`, `copy_` ..., forward: written into the relevant part of the target, which must be
    there; numbers that are written are irrelevant.
    """
    place = _VALUE.get(getattr(call.func, "__name__", ""), len(args) - 1)
    named = {name: _given(call, value) if name in ("value", "src", "source", "values") else value
             for name, value in kwargs.items()}
    args = tuple(_given(call, arg) if i == place else arg for i, arg in enumerate(args))
    rel, parts = call.rel(target), [call.rel(arg) for arg in args]
    for source in range(call.sources):
        own = [arg if part is None else part[source] for arg, part in zip(args, parts, strict=True)]
        call.func(rel[source], *own, **{name: value if call.rel(value) is None else call.rel(value)[source]
                                        for name, value in named.items()})
    return rel


def _given(call: Split, value: Any) -> Any:
    """What is written, as its relevant part starts from: a constant is zero."""
    if call.rel(value) is not None or isinstance(value, Tensor) and not value.is_floating_point():
        return value
    return torch.zeros_like(value) if isinstance(value, Tensor) else value if value is None else 0
