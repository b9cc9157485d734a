"""Modules and functions that compute where neither the interception nor autograd sees them, and layers that are one map
in several pieces: what is linear in its input is run as a linear layer, by its own Jacobian or by what it does to unit
vectors; anything else that computes out of sight is named.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..composite import Composite
from ..errors import UnruledOp
from ..ops import linear
from ..ops.call import Call, dependent
from ..ops.opaque import Opaque, heeds, offset, run_opaque

_NODES = 100
_KERNELS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_SHAPED = ("_like", "new_", "rand", "bernoulli", "empty")
"""In the names of functions whose result has the shape of their argument, and nothing of its values."""


def follows_gradient(composite: Composite) -> bool:
    """Whether all linear maps of a composite follow their plain gradient, so that those in pieces need no care."""
    rule = composite.rules.get("linear", linear.zero)
    return rule is linear.zero and not composite.paths and not composite.modules


def layer(call: Call, module: nn.Module, x: Tensor, y: Any, again: Callable[[Tensor], Tensor], *,
          adapted: bool) -> Tensor | None:
    """The output of a module as that of one linear layer, None for one to be left as it is.

    Args: x: what it reads, dependent. y: what it returned. again: runs it. adapted: its pieces are one map.
    Raises: UnruledOp for a module that is not linear and of whose output autograd knows nothing.
    """
    if not isinstance(y, Tensor) or not y.is_floating_point() or x.dim() < 2 or y.shape[:-1] != x.shape[:-1]:
        return None
    hidden = not dependent(y)
    if not (adapted or hidden or _foreign(y, x)):
        return None
    if hidden and not heeds(again, x, y):  # made of the shape of what it reads, such as positions
        return None
    bias = offset(again, x)
    if bias is None:
        if hidden:
            raise UnruledOp(out_of_sight(f"the module {call.path!r} ({type(module).__name__})"))
        return None
    return _run(call, x, y, again, bias, own=not hidden)


def function(call: Call, name: str, args: Any, kwargs: Any, y: Any) -> Tensor | None:
    """The result of a function without a row and without a gradient, as that of a linear layer; None for one that has
    a gradient, or whose result has nothing of the values of its first argument.

    Raises: UnruledOp for one that is not linear.
    """
    x = args[0] if args else None
    if not isinstance(y, Tensor) or not y.is_floating_point() or not dependent(x):
        return None
    hidden = _without_gradient(y)
    if any(part in name for part in _SHAPED) or not (hidden or isinstance(call.func, _KERNELS)):
        return None

    def again(t: Tensor) -> Tensor:
        return call.func(t, *args[1:], **kwargs)

    rows = x.dim() > 1 and y.shape[:-1] == x.shape[:-1] and not any(map(dependent, (*args[1:], *kwargs.values())))
    bias = offset(again, x) if rows else None
    if bias is not None:
        return _run(call, x, y, again, bias)
    if not hidden or not heeds(again, x, y.detach()):
        return None
    raise UnruledOp(out_of_sight(f"{name} in module {call.path or '(the model itself)'!r}"))


def out_of_sight(what: str) -> str:
    """The message for what computes where no relevance can follow."""
    return (f"{what} computes out of autograd's sight, and is not linear in its input, so that no relevance can pass; "
            "register a rule with relprop.ops.register(function, kind), or explain the model with torch's own "
            "operations in its place")


def _run(call: Call, x: Tensor, y: Tensor, again: Callable[[Tensor], Tensor], bias: Tensor, *,
         own: bool = False) -> Tensor:
    with torch._C.DisableTorchFunction():
        known = [y.detach()]  # not computed twice
        return run_opaque(call, x, lambda t: known.pop() if known else again(t), Opaque.of(again, x, bias), own=own)


def _without_gradient(y: Tensor) -> bool:
    return not y.requires_grad or "NotImplemented" in y.grad_fn.name()


def _foreign(y: Tensor, x: Tensor) -> bool:
    """Whether an autograd function that is not ours lies between x and y."""
    waiting, seen = [y.grad_fn], set()
    while waiting and len(seen) < _NODES:
        node = waiting.pop()
        if node is None or node in seen or node is x.grad_fn:
            continue
        seen.add(node)
        made_by = getattr(type(node), "_forward_cls", None)
        if isinstance(node, BackwardCFunction) and not getattr(made_by, "__module__", "").startswith("relprop."):
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
