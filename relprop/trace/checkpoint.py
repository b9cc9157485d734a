"""Layers that are run again on the way back, so that of each only what it reads is kept in between.

Not `torch.utils.checkpoint`, which leaves the graph and recomputes what autograd saves: rules and the journal keep
tensors of their own. Here a layer is taken out of the graph as a whole, and run again under the same interception when
its turn comes. Entries are booked when a gradient passes, which is in that second run alone.

Reference: Chen et al. 2016 (Training deep nets with sublinear memory cost).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from ..numerics import LOW
from ..ops.call import offered, wide
from ..ops.journal import READERS, Kept
from .interception import Interception
from .stack import layers


class Linked(Function):
    """The tensor as it is in the graph now, whatever is written to it afterwards. No copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return wide(ctx, x.data)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def widest(t: Tensor) -> torch.dtype:
    """The dtype of relevance per unit of a tensor."""
    return torch.float32 if t.dtype in LOW else t.dtype


class Recalled(Function):
    """What a layer made, in the place of its graph."""

    @staticmethod
    def forward(ctx: Any, call: "_Call", made: list[Tensor], *links: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.set_output_grad_dtype(*(widest(t) for t in made))
        return tuple(t.data for t in made)  # no views: the model may write into them

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.call.back(gs)


class _Place(NamedTuple):
    """Stands for a tensor among kept arguments."""

    number: int


class _Read(NamedTuple):
    """A tensor among the arguments of a layer: its value then, what is known of it, and whether it moves."""

    value: Kept
    marks: dict[str, Any]
    moves: bool


class _Call:
    """One call of a layer, and all that it takes to make it again."""

    def __init__(self, mode: Interception, run: Callable[..., Any], given: Any) -> None:
        self.mode, self.run, self.place = mode, run, mode.place()
        found = _tensors(given)
        self.reads = [_Read(Kept(t), _marks(t), t.requires_grad) for t in found]
        self.links = [Linked.apply(t) for t in found if t.requires_grad]
        numbers = {id(t): _Place(number) for number, t in enumerate(found)}
        self.given = _rebuilt(given, lambda t: numbers[id(t)])
        self.before = {id(t): t._version for t in found}
        self.random = torch.get_rng_state(), *get_device_states(*found)

    def made(self, output: Any, given: Any) -> list[Tensor]:
        """The tensors that the call made of the moving ones: what it returns, and what it left in its arguments, such
        as keys and values in a cache.
        """
        found = [t for t in _tensors((output, given)) if t.requires_grad]
        return [t for t in found if self.before.get(id(t)) != t._version]

    def back(self, gs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Relevance per unit of what moves among the arguments."""
        leaves: list[Tensor] = []

        with torch.enable_grad(), self._again():
            with torch._C.DisableTorchFunction():
                read = [self._value(one, leaves) for one in self.reads]
            self.before = {id(t): t._version for t in read}
            args, kwargs = given = _rebuilt(self.given, lambda place: read[place.number])
            made = self.made(self.run(*args, **kwargs), given)
        if len(made) != len(gs):
            raise RuntimeError(f"a layer made {len(gs)} tensors, and {len(made)} when it was run again; explain this "
                               "model without checkpoint")
        reached = [(t, g) for t, g in zip(made, gs, strict=True) if g is not None]
        if not reached:
            return [None] * len(leaves)
        made, gs = zip(*reached, strict=True)
        return list(torch.autograd.grad(made, leaves, gs, allow_unused=True))

    @staticmethod
    def _value(read: _Read, leaves: list[Tensor]) -> Tensor:
        t = read.value.value
        if read.moves:
            leaves.append(t.detach().requires_grad_())
            t = offered(leaves[-1])
        else:
            t = t.detach()
        vars(t).update(read.marks)
        return t

    @contextmanager
    def _again(self) -> Iterator[None]:
        """All as it was in the first run: the place in the model, random numbers, the interception."""
        state, devices, states = self.random
        kind = {} if not devices else {"device_type": self.reads[0].value.value.device.type}
        seen = self.mode in _get_current_function_mode_stack()
        with torch.random.fork_rng(devices, **kind), self.mode.resumed(self.place):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            with nullcontext() if seen else self.mode:
                yield


def _recalled(mode: Interception, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`run(*args, **kwargs)`, taken out of the graph and put back as one `Recalled`."""
    given = args, kwargs
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in _tensors(given)):
        return run(*args, **kwargs)
    leaves = len(mode.leaves)
    with torch._C.DisableTorchFunction():
        call = _Call(mode, run, given)
    output = run(*args, **kwargs)
    if len(mode.leaves) > leaves:  # an input enters here, which the way back would enter anew
        return output
    with torch._C.DisableTorchFunction():
        made = call.made(output, given)
        if not made:
            return output
        links, call.links, call.before = call.links, [], {}
        stands = dict(zip(map(id, made), Recalled.apply(call, made, *links), strict=True))
        for t in made:
            vars(stands[id(t)]).update(_marks(t))
        _exchanged(given, stands, set())
        return _exchanged(output, stands, set())


@contextmanager
def checkpointed(mode: Interception, model: nn.Module) -> Iterator[None]:
    """A `with` block in which each layer of `model` keeps what it reads, and is run again on the way back; but not the
    last one, whose turn comes at once.

    Raises: ValueError where no stack of layers is found.
    """
    found = layers(model)
    before = [(module, vars(module).get("forward")) for module in found]
    try:
        for module in found:
            module.forward = _wrapped(mode, module.forward, spared=module is found[-1])
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _wrapped(mode: Interception, run: Callable[..., Any], *, spared: bool) -> Callable[..., Any]:
    """`run` by `_recalled`; a layer that is `spared` is left alone once: where layers share a module, more come."""
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal spared
        if spared and torch.is_grad_enabled():
            spared = False
            return run(*args, **kwargs)
        return _recalled(mode, run, args, kwargs)

    return forward


# -- arguments: tensors in containers, and in objects with a state such as caches -----------------------------------

def _marks(t: Tensor) -> dict[str, Any]:
    """What is known of a tensor, whoever holds it; not who reads it, which each run says anew."""
    return {name: value for name, value in vars(t).items() if name.startswith("_relprop_") and name != READERS}


def _stateful(value: Any) -> bool:
    """Whether a value is an object that a layer may change."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (Tensor, nn.Module, Enum))


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in a tree, each once, in order."""
    found: dict[int, Tensor] = {}
    _exchanged(tree, found, set(), collect=True)
    return list(found.values())


def _exchanged(value: Any, stands: dict[int, Tensor], seen: set[int], *, collect: bool = False) -> Any:
    """The value with each tensor exchanged for the one that stands for it, in place where it can be written to.

    `collect`: nothing is exchanged; all tensors are put into `stands`.
    """
    if isinstance(value, Tensor):
        return stands.setdefault(id(value), value) if collect else stands.get(id(value), value)
    items = (value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple))
             else vars(value).items() if _stateful(value) else ())
    if id(value) in seen or not items:
        return value
    seen.add(id(value))
    new = {key: one for key, old in list(items)
           if (one := _exchanged(old, stands, seen, collect=collect)) is not old}
    if not new:
        return value
    if isinstance(value, tuple):
        whole = [new.get(place, old) for place, old in enumerate(value)]
        return type(value)(*whole) if hasattr(value, "_fields") else type(value)(whole)
    for key, one in new.items():
        if isinstance(value, (dict, list)):
            value[key] = one
        else:
            vars(value)[key] = one
    return value


def _rebuilt(tree: Any, change: Callable[[Any], Any], twins: dict[int, Any] | None = None) -> Any:
    """A copy of a tree, of its objects too, with `change` of each tensor, or of what stands for one."""
    twins = {} if twins is None else twins
    leaves, spec = tree_flatten(tree, is_leaf=lambda one: isinstance(one, _Place))
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, (Tensor, _Place)):
            leaves[place] = change(leaf)
        elif _stateful(leaf):
            if id(leaf) not in twins:
                twins[id(leaf)] = copy(leaf)
                vars(twins[id(leaf)]).update(
                    {name: _rebuilt(one, change, twins) for name, one in vars(leaf).items()})
            leaves[place] = twins[id(leaf)]
    return tree_unflatten(leaves, spec)
