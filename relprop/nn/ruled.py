"""What makes a module a drop-in: its forward is the module's own, its torch calls go through the table.

In eval mode a drop-in follows its composite: its output is the plain module's, and the gradient of its input is
relevance per unit, so that relevance is `x * x.grad` after a plain `.backward()`. Its parameters are constants then and
get no gradient, since under the rules theirs would mean nothing. In train mode it is the plain module, trained as ever.
It is built in eval mode; `model.train()` and `model.eval()` switch, as they do for dropout.

A drop-in sees the calls that it makes itself; its parts are drop-ins too and see theirs, so that each call follows the
rule of the module that makes it.
"""
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.overrides import _get_current_function_mode_stack

from ..composite import Composite, get
from ..ops import Call, activation, mul
from ..ops.journal import Rows
from ..trace import Interception, activation_offset

_STANDS_FOR: dict[type[Module], type[Ruled]] = {}
"""Drop-ins by the class whose forward they take over. Modules of any other class get `Whole`, `Leaf` or `Function`."""

_MOVERS = frozenset(f"torch.nn.modules.{file}" for file in (
    "channelshuffle", "container", "dropout", "flatten", "fold", "module", "padding", "pixelshuffle", "sparse"))
"""Files of torch whose modules move data or call other modules: nothing of theirs follows a rule."""


def stands_for(original: type[Module]) -> Callable[[type[Ruled]], type[Ruled]]:
    """Decorates the drop-in of modules that run the forward of this class."""
    def listed(dropin: type[Ruled]) -> type[Ruled]:
        _STANDS_FOR[original] = dropin
        return dropin

    return listed


class _Rules(Interception):
    """The interception of one module's calls. Parameters are constants in it, also where they may be trained."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _INNERMOST.get() is not self:  # a part of this module is at work, and its call was seen there
            return func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            known: dict[int, Tensor] = {}  # q, k and v may be one tensor, and must stay one
            args = self._entering(args, known)
            kwargs = {name: self._entering(value, known) for name, value in (kwargs or {}).items()}
        return super().__torch_function__(func, types, args, kwargs)

    def _call(self, kind: str, func: Any, args: Any) -> Call:
        return replace(super()._call(kind, func, args), rows=_BATCH.get())

    def _entering(self, value: Any, known: dict[int, Tensor]) -> Any:
        """`value` with parameters detached, and the explained input known as such where it has a rule of its own."""
        if type(value) in (list, tuple):
            return type(value)(self._entering(member, known) for member in value)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        root = value if value._base is None else value._base
        if isinstance(root, Parameter):
            return value.detach()
        if self.composite.pixels is None or not root.is_leaf:
            return value
        if id(value) not in known:
            known[id(value)] = value.view_as(value)
            known[id(value)]._relprop_input = True  # as `propagate` marks what it explains
        return known[id(value)]


_INNERMOST: ContextVar[_Rules | None] = ContextVar("_INNERMOST", default=None)
"""The rules of the drop-in that is at work now, of those that are inside each other."""


_BATCH: ContextVar[Rows | None] = ContextVar("_BATCH", default=None)
"""The rows of the batch, as the outermost drop-in at work was given them."""


class _Batch(Rows):
    """The rows of a batch, and a warning where a tensor does not show them."""

    def dim(self, t: Tensor, *, sure: bool = False) -> int | None:
        found = super().dim(t, sure=sure)
        if found is None:  # relprop.explain would run the rows alone, which a drop-in cannot
            warnings.warn(f"which dimension of a tensor of shape {tuple(t.shape)} holds the {self.count} rows of the "
                          "batch is open, so that its sum is not shared by row; explain one row at a time, or use "
                          "relprop.explain", stacklevel=2)
        return found


@contextmanager
def _batched(args: tuple[Any, ...]) -> Iterator[None]:
    """A `with` block in which the rows are those of the first tensor that is explained, unless they are known."""
    tensors = [value for value in args if isinstance(value, Tensor) and value.dim()]
    first = next((t for t in tensors if t.requires_grad), tensors[0] if tensors else None)
    if _BATCH.get() is not None or first is None or not len(first):
        yield
        return
    outer = _BATCH.set(_Batch(len(first)))
    try:
        yield
    finally:
        _BATCH.reset(outer)


@contextmanager
def _at_work(rules: _Rules | None) -> Iterator[None]:
    """A `with` block whose calls are those of one drop-in, or of none that rules are asked for."""
    outer = _INNERMOST.set(rules)
    try:
        yield
    finally:
        _INNERMOST.reset(outer)


class Ruling:
    """The composite that a drop-in follows, the path that its patterns see, and whether `replace` lent it."""

    def __init__(self, composite: Composite, path: str = "", lent: bool = False) -> None:
        self.composite, self.path, self.lent = composite, path, lent
        self._rules: _Rules | None = None

    def rules(self, module: Module) -> _Rules:
        if self._rules is None:
            self._rules = _Rules(module, self.composite)
            self._rules.enter_module(self.path, module)
        return self._rules

    def __reduce__(self) -> Any:
        return Ruling, (self.composite, self.path)  # a copy of a module makes rules of its own, and is lent to nobody


def _signature(cls: type[Ruled]) -> inspect.Signature:
    """Of the class that it stands for, with `composite`."""
    owner = next(one for one in cls.__mro__ if one is not Ruled and "__init__" in one.__dict__)
    _, *parameters = inspect.signature(owner.__init__).parameters.values()
    if issubclass(owner, Ruled):
        return inspect.Signature(parameters)
    composite = inspect.Parameter("composite", inspect.Parameter.KEYWORD_ONLY, default="attnlrp",
                                  annotation="str | Composite")
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return inspect.Signature([*named, composite])


class Ruled(Module):
    """A module that follows a composite: the base of all drop-ins. Put it before the class that it stands for.

    Args: those of the class it stands for, and `composite`: which rule its calls follow, by name or as a value.
    """

    _ruling: Ruling

    def __init__(self, *args: Any, composite: str | Composite = "attnlrp", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follow(composite)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__signature__ = _signature(cls)

    @property
    def composite(self) -> Composite:
        """The composite of this module and, when set, of every part of it."""
        return self._ruling.composite

    @composite.setter
    def composite(self, composite: str | Composite) -> None:
        for path, part, dropin in parts(self):
            if dropin is not None:
                adopt(part, dropin, Ruling(get(composite), part._ruling.path if isinstance(part, Ruled) else path))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        made_of = type(self).__dict__.get("_made_of")  # of a class that no module holds, so that pickle cannot find it
        return reduced if made_of is None else (_blank, made_of, *reduced[2:])

    def extra_repr(self) -> str:
        return ", ".join(part for part in (super().extra_repr(), f"composite={self._ruling.composite.name!r}") if part)

    def _follow(self, composite: str | Composite) -> None:
        """To be called when all parts are there: plain ones become drop-ins, all follow `composite`, in eval mode."""
        self._ruling = Ruling(get(composite))
        self.composite = composite
        self.eval()

    def _aside(self) -> bool:
        """Whether this is the plain module now: in training, without gradients, or inside another interception."""
        return self.training or not torch.is_grad_enabled() or any(
            isinstance(mode, Interception) and not isinstance(mode, _Rules)
            for mode in _get_current_function_mode_stack())

    def _ruled(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, its torch calls under the rules of this module."""
        if self._aside():
            with _at_work(None):
                return function(*args, **kwargs)
        rules = self._ruling.rules(self)
        with _batched((*args, *kwargs.values())), _at_work(rules), rules:
            return function(*args, **kwargs)


def _forward_owner(cls: type[Module]) -> type[Module]:
    """The class that defines the forward of `cls`."""
    return next(one for one in cls.__mro__ if "forward" in one.__dict__)


def _under_rules(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)  # its signature too, which tells what a model takes
    def forward(self: Ruled, *args: Any, **kwargs: Any) -> Any:
        return self._ruled(plain, self, *args, **kwargs)

    return forward


class Whole(Ruled):
    """A drop-in with the forward of the class that it stands for, all of it under the rules."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        owner = _forward_owner(cls)
        if owner is not Module and not issubclass(owner, Ruled):
            cls.forward = _under_rules(owner.forward)


class Leaf(Whole):
    """A drop-in that calls no module of its own, though it may read the parameters of some."""


class Function(Ruled):
    """An activation written as several torch calls: one op all the same, since modules win over functions."""

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward
        if self._aside() or not x.requires_grad:
            return plain(x)
        ruling = self._ruling
        rule = ruling.composite.rule("activation", ruling.path, type(self)) or activation.gradient
        with _at_work(None):
            y = activation.apply(Call(plain, "activation", ruling.path, rule), x, plain, offset=activation_offset(self))
        setattr(y, mul.GATE, True)
        return y


def parts(module: Module, path: str = "", known: set[int] | None = None,
          ) -> Iterator[tuple[str, Module, type[Ruled] | None]]:
    """Every module that is called, once, with its path and the class that stands for it, None where there is none."""
    known = set() if known is None else known
    if id(module) in known:
        return
    known.add(id(module))
    dropin = _dropin(module)
    yield path, module, dropin
    if dropin is None or not issubclass(dropin, Leaf):  # a leaf reads its parts' parameters, and never calls them
        for name, child in module.named_children():
            yield from parts(child, f"{path}.{name}" if path else name, known)


def unseen(module: Module) -> bool:
    """Whether a module's forward is none of its class's, so that no drop-in can run it."""
    return "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule)


def _dropin(module: Module) -> type[Ruled] | None:
    if isinstance(module, Ruled):
        return type(module)
    if unseen(module):
        return None
    owner = _forward_owner(type(module))
    if owner.__module__ in _MOVERS or owner is torch.nn.Identity:
        return None
    dropin = _STANDS_FOR.get(owner)
    if dropin is None:
        dropin = Whole if next(module.children(), None) else Leaf if activation_offset(module) is None else Function
    return _joined(dropin, type(module))


@cache
def _joined(dropin: type[Ruled], original: type[Module]) -> type[Ruled]:
    """`dropin` with all else of `original`, of which it stays a subclass."""
    made_of = {"_made_of": (dropin, original), "__module__": original.__module__}
    return dropin if issubclass(dropin, original) else type(original.__name__, (dropin, original), made_of)


def _blank(dropin: type[Ruled], original: type[Module]) -> Ruled:
    """A module of the joined class, empty: what pickle fills with the state."""
    made = _joined(dropin, original)
    return made.__new__(made)


def adopt(module: Module, dropin: type[Ruled], ruling: Ruling) -> None:
    """Makes `module` the drop-in of its kind, in place: parameters, hooks and references to it stay."""
    module.__class__ = dropin
    module._ruling = ruling
