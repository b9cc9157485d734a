"""What makes a module a drop-in: its forward is the module's own, its torch calls go through the table.

In eval mode a drop-in follows its composite: its output is the plain module's, and the gradient of its input is
relevance per unit, so that relevance is `x * x.grad` after a plain `.backward()`. Its parameters are constants then and
get no gradient, since under the rules theirs would mean nothing. In train mode it is the plain module, trained as ever.
It is built in eval mode; `model.train()` and `model.eval()` switch, as they do for dropout.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.overrides import _get_current_function_mode_stack

from ..composite import Composite, get
from ..ops import Call, activation, mul
from ..trace import Interception, activation_offset

_STANDS_FOR: dict[str, type[Ruled]] = {}
"""Drop-ins by the qualified name of the class whose forward they take over, so that nobody's package is imported."""

_MOVERS = frozenset(f"torch.nn.modules.{file}" for file in (
    "channelshuffle", "container", "dropout", "flatten", "fold", "module", "padding", "pixelshuffle", "sparse"))
"""Files of torch whose modules move data or call other modules: nothing of theirs follows a rule."""


def stands_for(*originals: type[Module] | str) -> Callable[[type[Ruled]], type[Ruled]]:
    """Decorates the drop-in of modules that run the forward of these classes, given as such or by qualified name."""
    def listed(dropin: type[Ruled]) -> type[Ruled]:
        _STANDS_FOR.update({one if isinstance(one, str) else qualified(one): dropin for one in originals})
        return dropin

    return listed


def qualified(one: type) -> str:
    """Where a class is defined, and its name."""
    return f"{one.__module__}.{one.__qualname__}"


class _Rules(Interception):
    """The interception of one module's calls. Parameters are constants in it, also where they may be trained."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            known: dict[int, Tensor] = {}  # q, k and v may be one tensor, and must stay one
            args = self._entering(args, known)
            kwargs = {name: self._entering(value, known) for name, value in (kwargs or {}).items()}
        return super().__torch_function__(func, types, args, kwargs)

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
        return Ruling, (self.composite, self.path, self.lent)  # a copy of a module makes rules of its own


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
            isinstance(mode, Interception) for mode in _get_current_function_mode_stack())

    def _ruled(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, its torch calls under the rules of this module."""
        if self._aside():
            return function(*args, **kwargs)
        with self._ruling.rules(self):
            return function(*args, **kwargs)


class Leaf(Ruled):
    """A drop-in that calls no module of its own: the whole forward of the class that it stands for, under the rules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._ruled(super().forward, *args, **kwargs)


class Function(Leaf):
    """An activation written as several torch calls: one op all the same, since modules win over functions."""

    def forward(self, x: Tensor) -> Tensor:
        plain = super(Leaf, self).forward
        if self._aside() or not x.requires_grad:
            return plain(x)
        ruling = self._ruling
        rule = ruling.composite.rule("activation", ruling.path, type(self)) or activation.gradient
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


def forward_of(module: Module) -> str | None:
    """Qualified name of the class whose forward a module runs; None where the instance has one of its own."""
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return None
    return qualified(next(one for one in type(module).__mro__ if "forward" in one.__dict__))


def moves(forward: str) -> bool:
    """Whether a forward is known to move data or call modules, no more."""
    return forward.rpartition(".")[0] in _MOVERS or forward == qualified(torch.nn.Identity)


def _dropin(module: Module) -> type[Ruled] | None:
    if isinstance(module, Ruled):
        return type(module)
    forward = forward_of(module)
    if forward is None or moves(forward):
        return None
    dropin = _STANDS_FOR.get(forward)
    if dropin is None and next(module.children(), None) is None:
        dropin = Leaf if activation_offset(module) is None else Function
    return None if dropin is None else _joined(dropin, type(module))


@cache
def _joined(dropin: type[Ruled], original: type[Module]) -> type[Ruled]:
    """`dropin` with all else of `original`, of which it stays a subclass."""
    return dropin if issubclass(dropin, original) else type(original.__name__, (dropin, original), {})


def adopt(module: Module, dropin: type[Ruled], ruling: Ruling) -> None:
    """Makes `module` the drop-in of its kind, in place: parameters, hooks and references to it stay."""
    module.__class__ = dropin
    module._ruling = ruling
