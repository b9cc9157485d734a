"""The interception: every torch call of an unmodified model passes through the table while a `with` block lasts.

A `torch.overrides.TorchFunctionMode` sees the calls; hooks on the modules tell where each one stands and let modules
win over functions (an activation written as five torch calls is one op). Nothing is patched, and all hooks go at the
end.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import family
from ..composite import Composite
from ..errors import UnruledOp
from ..numerics import LOW
from ..ops import Call, Journal, Op, activation, add, linear, lookup, matmul, move, mul, norm, softmax
from ..ops.call import cast, dependent, offered, plain, scaled
from ..ops.journal import ACTIVATION, CONSTANT, POSITIONS, Rows, preserve
from .activation import activation_offset
from .custom import in_the_open
from .ids import Ids, Origin
from .opaque import follows_gradient, function, layer
from .opening import first, opened
from .slot import hooked_activation

_DEFAULTS: dict[str, Any] = {
    "linear": linear.zero, "conv": linear.zero, "norm": norm.gradient, "softmax": softmax.taylor,
    "activation": activation.gradient, "matmul": matmul.gradient, "add": add.zero, "mul": mul.gradient}
"""The plain gradient of each kind, for kinds that a composite leaves out."""

_ABSORBERS = (
    ("class token", r"cls_token|class_token|class_embedding"), ("distillation token", r"dist_token|distillation"),
    ("register tokens", r"reg_token|register|storage_token"), ("mask token", r"mask_token"),
    (POSITIONS, r"pos_|position|\bpos\b|\bpe\b|wpe|rel_|relative|rope|alibi|sinusoid"),
    ("token type embeddings", r"token_type|segment"), ("biases", r"bias$|\bbias_[ih]h_l\d"))
"""How the ledger names a constant, by the name of the parameter that it came from; the first pattern found wins."""

ROUNDING = "rounding"
PATTERN = "pattern"
"""Side of a tap that means the pattern of an attention, beside "input" and "output"."""
_ORIGIN, _INPUT, _SOFTMAX = "_relprop_origin", "_relprop_input", "_relprop_softmax"
_SCORES, _TURNED = "_relprop_scores", "_relprop_turned"
_LOOKUPS = frozenset({"__getitem__", "index_select"})
_CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16"})


@dataclass(frozen=True)
class Tap:
    """A tensor whose relevance is wanted: what the nth call of `kind` in the module at `path` reads (`side` "input") or
    returns ("output"); with `kind` None, what the module itself reads or returns. Of an attention also its `PATTERN`,
    the softmax's result as it meets the values. `axes`: along which axes of the tensor its vectors lie, in order; the
    last one alone, but for instance the second of what a convolution reads.
    """

    path: str
    kind: str | None = None
    side: str = "output"
    nth: int = 0
    axes: tuple[int, ...] = field(default=(-1,), compare=False)


@dataclass
class Tapped:
    """A tapped tensor and, after the backward pass, its relevance per unit."""

    value: Tensor
    per_unit: Tensor | None = None


@dataclass(frozen=True)
class Way:
    """A place on the straight way from inputs that say nothing to those that are explained: `at` of it, 1 being the
    end. `starts`: by the name of the explained token ids, from ids to those that say nothing in their place.
    """

    starts: Mapping[str, Callable[[Tensor], Tensor]]
    at: float = 1.0


class Interception(TorchFunctionMode):
    """Runs the calls of `model` under the rules of `composite`.

    Use `intercepted`, which also places the hooks. Inside, `leaves` collects the word embeddings that became inputs,
    `steps`, on a `way`, the whole of it for each of them, and `moved` where the entries of those came from that do not
    lie as the ids do. `positions`: rotations by position have relevance.
    """

    def __init__(self, model: nn.Module, composite: Composite, *, journal: Journal | None = None,
                 token_ids: dict[str, Tensor] | None = None, taps: dict[str, Tap] | None = None,
                 unruled: str = "error", precision: torch.dtype = torch.float32, rows: Rows | None = None,
                 way: Way | None = None, positions: bool = False) -> None:
        super().__init__()
        self.model, self.composite, self.journal, self.unruled = model, composite, journal, unruled
        self.rows, self.way, self.positions = rows, way, positions
        self.precision = self.least = precision
        self.leaves: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}
        self.tapped: dict[str, Tapped] = {}
        self.moved: dict[str, Origin] = {}
        self._ids = Ids(token_ids or {}, {} if way is None else way.starts)
        self._ids_shapes = {name: t.numel() for name, t in (token_ids or {}).items()}
        self._taps = dict(taps or {})
        self._opened = {tap.path for tap in self._taps.values() if tap.side == PATTERN}
        self._counts: dict[tuple[str, str], int] = {}
        self._stack: list[tuple[str, nn.Module]] = [("", model)]
        self._rules: dict[tuple[str, str], Any] = {}
        self.asleep, self.computed = False, 0
        self.follows_gradient = follows_gradient(composite)
        self.offloaded = family.offloaded(model)
        self.asks_where = bool(self._taps or composite.paths or composite.modules or self.offloaded)

    @cached_property
    def _names(self) -> dict[int, str]:
        """Parameters and buffers by where their data lies."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        places = ((place_of(t), name) for name, t in named if t.numel())
        return {place: name for place, name in places if place is not None}

    # -- the calls -----------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.asleep or not torch.is_grad_enabled():  # the model's own no_grad blocks, and the backward pass
            return func(*args, **kwargs)
        if self.journal is not None and mutates(func) and args and isinstance(args[0], Tensor):
            preserve(args[0])
        if func is F.embedding or func is torch.embedding:
            return self._embedding(func, *args, **kwargs)
        if not _reached(args, kwargs):
            return self._constant(func, args, kwargs)
        op = lookup(func)
        if op is None:
            return self._unlisted(func, args, kwargs)
        if op.inplace is not None:
            return self._inplace(op, func, args, kwargs)
        return self._run(op, func, args, kwargs)

    def _run(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        if op.run is plain:
            return self._move(op, func, args, kwargs)
        self.computed += 1
        call = self._call(op.kind, func, args)
        if self._taps:
            self._tap_input(op.kind, args)
        if self._loses_precision(args, kwargs) and not mutates(func):
            output = self._rounded(call, op.run, args, kwargs)
        else:
            output = op.run(call, *args, **kwargs)
        if self._taps:
            self._tap_output(op.kind, args, output)
        if op.kind == "activation" and isinstance(output, Tensor):
            setattr(output, mul.GATE, True)
        elif op.kind == "move":
            _mark(args, output)
        return self._at_positions(op.kind, args, output) if self.journal is not None else output

    def _move(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """Data movement: the plain call, unless it brings constants in or changes the precision."""
        name, writes = getattr(func, "__name__", ""), mutates(func)
        moved_in = self.journal is not None and not writes and any(
            isinstance(a, Tensor) and not a.requires_grad and a.is_floating_point() for a in (*args, *kwargs.values()))
        rounds = self._loses_precision(args, kwargs) and not writes
        if moved_in or rounds or (name in _CASTS and self.precision == torch.float64):
            call = self._call(op.kind, func, args)
            output = self._rounded(call, plain, args, kwargs, CONSTANT if moved_in else ROUNDING)
        elif name in _CASTS and args[0].dtype in LOW and dependent(args[0]):
            output = self._cast(func, args, kwargs)
        else:
            output = func(*args, **kwargs)
        _mark(args, output)
        return output

    def _cast(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A tensor of a low dtype, cast or moved: on the way back, what comes in more precision keeps it."""
        with torch.no_grad():
            y = func(*args, **kwargs)
        if y is args[0] or y._is_view():
            return func(*args, **kwargs)
        return cast(args[0], lambda x: y)

    def _call(self, kind: str, func: Any, args: Any) -> Call:
        path, module = self._stack[-1]
        if self.composite.pixels is not None and kind in ("linear", "conv") and getattr(args[0], _INPUT, False):
            rule = self.composite.pixels
        else:
            key = (path, kind)
            if key not in self._rules:
                self._rules[key] = self._rule(kind, path, type(module))
            rule = self._rules[key]
        scores = getattr(func, "__name__", "") == "baddbmm" or any(getattr(a, _SCORES, False) for a in args[:2])
        more = {"fetch": partial(family.fetched, module)} if self.offloaded else {}
        return Call(func, kind, path, rule, self.journal, self._origin, self._retrace, self.rows,
                    open=kind == "attention" and path in self._opened, positions=self.positions, scores=scores, **more)

    def _rule(self, kind: str, path: str, module_type: type) -> Any:
        rule = self.composite.rule(kind, path, module_type)
        if kind == "attention":
            return tuple(r or _DEFAULTS[k] for r, k in zip(rule, ("matmul", "softmax"), strict=True))
        return rule or _DEFAULTS.get(kind)

    def _retrace(self, function: Callable[..., Any], journal: Journal | None = None) -> Any:
        """`function()` with the torch calls inside it intercepted, and booked in `journal` if that is given."""
        before = self.journal
        self.journal = before if journal is None else journal
        try:
            with self:
                return function()
        finally:
            self.journal = before

    def _inplace(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """An op that writes into its first argument: as it is where the gradient is the rule, else in two steps."""
        target, rest = args[0], args[1:]
        call, rounds = self._call(op.kind, func, args), self._loses_precision(args, kwargs)
        moving = [dependent(a) for a in (target, *rest)]
        as_it_is = moving[0] and (all(moving) or self.journal is None or target._base is None)
        if call.rule is add.zero and not rounds and as_it_is:
            if self._taps:
                self._tap_input(op.kind, args)
            output = op.run(call, *args, **kwargs)
            if self._taps:
                self._tap_output(op.kind, args, output)
            return output
        copy = self._rounded(call, _cloned, (target,), {}) if rounds and dependent(target) else target.clone()
        return move.overwrite(call, target, self._run(Op(op.kind, op.run), op.inplace, (copy, *rest), kwargs))

    def _unlisted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function without a row: opened if it is written in Python, else passed if it does not compute."""
        inside = opened(func)
        if inside is not None:
            return self._retrace(lambda: inside(*args, **kwargs))
        output = func(*args, **kwargs)
        found = function(self._call("linear", func, args), named(func), args, kwargs, output)
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        if found is None and not any(dependent(t) for t in outputs):
            return output
        self.computed += 1
        if found is not None:
            return found
        if self.unruled == "gradient":
            name = f"unruled {named(func)}"
            return self._rounded(self._call("move", func, args), plain, args, kwargs, name)
        raise UnruledOp(
            f"no rule for {named(func)} in module {self._stack[-1][0] or '(the model itself)'!r} "
            f"({type(self._stack[-1][1]).__name__}); register one with relprop.ops.register(function, kind), or pass "
            "unruled='gradient' to let its plain gradient through, booked under its name")

    def _rounded(self, call: Call, run: Any, args: Any, kwargs: Any, name: str = ROUNDING) -> Any:
        """The call with what it loses booked under `name`, except for what it books itself; CONSTANT: under the name of
        the constant that it moves in.
        """
        if self.journal is None:
            return run(call, *args, **kwargs)
        if name == CONSTANT:
            constants = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not a.requires_grad]
            name = self._origin(next(c for c in constants if c.is_floating_point()))
        leaves, rebuild = tree_flatten((list(args), dict(kwargs)))
        aliases = []
        for place, leaf in enumerate(leaves):
            if dependent(leaf):
                leaves[place] = leaf.view_as(leaf)
                _mark((leaf,), leaves[place])
                aliases.append(leaves[place])
                if leaf.dtype != self.precision:
                    self.journal.shared(ROUNDING, leaf, leaves[place])
        args, kwargs = tree_unflatten(leaves, rebuild)
        journal = self.journal.within(name)
        output = run(replace(call, journal=journal, retrace=partial(self._retrace, journal=journal)), *args, **kwargs)
        for one in output if isinstance(output, (tuple, list)) else [output]:
            if dependent(one):
                self.journal.difference(name, one, aliases if one is first(output) else [])
        return output

    def _loses_precision(self, args: Any, kwargs: Any) -> bool:
        """Whether a float64 run has come into a part that the model computes in less."""
        if self.precision != torch.float64 or self.journal is None:
            return False
        eps = torch.finfo(self.precision).eps
        lost = [a.dtype.to_real() for a in (*args, *kwargs.values())
                if isinstance(a, Tensor) and a.requires_grad and torch.finfo(a.dtype).eps > eps]
        self.least = max([self.least, *lost], key=lambda dtype: torch.finfo(dtype).eps)
        return bool(lost)

    # -- positions -----------------------------------------------------------------------------------------------

    def _at_positions(self, kind: str, args: Any, output: Any) -> Any:
        """Marks attention scores, in which a position is that of a key; and finds rotations by position: x cos + x'
        sin, of two constants whose squares sum to one number. With `positions`, half of what reaches these is theirs.
        """
        if kind not in ("matmul", "mul", "add") or not isinstance(output, Tensor):
            return output
        moving = [a for a in args if dependent(a)]
        if (kind == "matmul" and len(moving) == 2) or (moving and getattr(moving[0], _SCORES, False)):
            setattr(output, _SCORES, True)
        if not self.positions:
            return output
        fixed = [a for a in args if isinstance(a, Tensor) and not a.requires_grad]
        if kind == "mul" and len(moving) == len(fixed) == 1:
            setattr(output, _TURNED, fixed[0])
        turned = [getattr(a, _TURNED, None) for a in moving]
        if kind == "add" and len(turned) == 2 and _rotates(*turned) and dependent(output):
            with torch._C.DisableTorchFunction():
                self.journal.rotation(turned[0], output)
                output = scaled(output, 0.5)
        return output

    # -- constants and inputs ------------------------------------------------------------------------------------

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that the explained input does not reach; its result keeps the name of the parameter it came from."""
        kind = getattr(lookup(func), "kind", "") if self._taps else ""
        if kind:  # a call counts whether it is reached or not
            self._tap_input(kind, args)
        if func is Tensor.requires_grad_:  # a constant that the model makes a leaf of its own is none of ours
            return args[0]
        output = func(*args, **kwargs)
        if kind:
            self._tap_output(kind, args, output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            self._ids.follow(func, args, kwargs, output)
        elif getattr(func, "__name__", "") in _LOOKUPS and (found := self._ids.origin(args[-1])) is not None:
            return self._read(output, found, lambda ids: func(*args[:-1], ids))  # of a table of floating numbers
        if self.journal is not None and isinstance(output, Tensor) and output.is_floating_point():
            for value in tree_flatten((args, kwargs))[0]:
                if isinstance(value, Tensor) and (name := self._parameter(value)):
                    setattr(output, _ORIGIN, name)
                    break
        return output

    def _parameter(self, tensor: Tensor) -> str | None:
        name = getattr(tensor, _ORIGIN, None)
        if name is None and tensor.is_floating_point() and tensor.device.type != "meta":
            name = self._names.get(place_of(tensor))
        return name

    def _origin(self, constant: Any) -> str:
        """The ledger's name of a constant."""
        name = self._parameter(constant) if isinstance(constant, Tensor) else None
        name = name and ".".join(name.split(".")[-2:])  # not what the model is called: dinov2_with_registers
        return next((label for label, part in _ABSORBERS if name and re.search(part, name)), CONSTANT)

    def _embedding(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """An embedding lookup: of the explained token ids it is the input, of anything else a constant."""
        output = func(input, weight, *args, **kwargs)
        if weight.requires_grad:
            return output
        origin = self._ids.origin(input) or self._by_table(input, weight)
        if origin is None:
            setattr(output, _ORIGIN, self._parameter(weight))
            return output
        return self._read(output, origin, lambda ids: func(ids, weight, *args, **kwargs))

    def _read(self, output: Tensor, origin: Origin, look: Callable[[Tensor], Tensor]) -> Tensor:
        """What was looked up for explained ids becomes an input; `look` looks up others."""
        name = origin.name
        leaf, known = output.detach(), name if name not in self.leaves else f"{name}#{len(self.leaves)}"
        if self.way is not None and name in self.way.starts:
            start = look(origin.start).detach()
            self.steps[known] = leaf - start
            leaf = start + self.way.at * self.steps[known]
        self.leaves[known] = leaf.requires_grad_()
        if not origin.whole:
            self.moved[known] = origin
        return offered(leaf)

    def _by_table(self, input: Tensor, weight: Tensor) -> Origin | None:
        """The ids that a model made anew before it looked them up, known by their number and the model's own table."""
        table = getattr(self.model, "get_input_embeddings", None)
        try:
            table = getattr(table(), "weight", None) if table else None
        except (NotImplementedError, AttributeError, TypeError):
            return None
        fits = [name for name, size in self._ids_shapes.items() if size == input.numel() and name not in self.leaves]
        if table is not weight or not fits:
            return None
        start = self.way.starts[fits[0]](input) if self.way is not None and fits[0] in self.way.starts else None
        return Origin(fits[0], input.shape, torch.arange(input.numel(), device=input.device).view(input.shape), start)

    # -- modules -------------------------------------------------------------------------------------------------

    def enter_module(self, path: str, module: nn.Module) -> None:
        self._stack.append((path, module))

    def read_input(self, path: str, args: Any, kwargs: Any) -> None:
        """Tap what a module reads first, where that is wanted."""
        if self._taps:
            self._tap(path, None, "input", next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None))

    def leave_module(self) -> None:
        self._stack.pop()

    def place(self) -> tuple[list[tuple[str, nn.Module]], dict[tuple[str, str], int]]:
        """Where in the model the run is: the modules that it is in, and which calls have been counted for taps."""
        return list(self._stack), dict(self._counts)

    @contextmanager
    def resumed(self, place: tuple[list[tuple[str, nn.Module]], dict[tuple[str, str], int]]) -> Iterator[None]:
        """A `with` block in which the run is at that place again, to make calls anew that it has made."""
        before = self._stack, self._counts
        self._stack, self._counts = list(place[0]), dict(place[1])
        try:
            yield
        finally:
            self._stack, self._counts = before

    def layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any, *, adapted: bool) -> Tensor | None:
        """What a module returned of which no op was seen, or that is one map in pieces, as a linear layer's; see
        `opaque`.
        """
        if not args or not self.follows(args[0]) or output is None:
            return None
        def again(x: Tensor) -> Tensor:
            """Out of sight, with a gradient: layers may change how they keep their weights when there is none."""
            asked, asleep, self.asleep = x.requires_grad, self.asleep, True
            try:
                with torch.enable_grad():
                    y = module.forward(x if asked else x.detach().requires_grad_(), *args[1:], **kwargs)
            finally:
                self.asleep = asleep
            return y if asked else y.detach()

        call = self._call("linear", module.forward, args)
        return layer(call, module, args[0], output, again, adapted=adapted)

    def leave_output(self, path: str, output: Any) -> None:
        """Tap what a module returns, where that is wanted."""
        if self._taps:
            self._tap(path, None, "output", first(output))

    def follows(self, x: Any) -> bool:
        """Whether an activation module is to be one op for this input."""
        return dependent(x) and torch.is_grad_enabled()

    def activate(self, path: str, module: nn.Module, x: Tensor, y: Tensor, offset: float) -> Tensor:
        """The output y = f(x) of an activation module, under the composite's rule for activations."""
        self.computed += 1
        rule = self._rule("activation", path, type(module))
        call = Call(module.forward, "activation", path, rule, self.journal, self._origin)

        def run(call: Call, x: Tensor) -> Tensor:
            if rule is activation.gradient:
                return call.booked(ACTIVATION, [x], module.forward)
            return activation.apply(call, x, lambda _: y, offset=offset)

        with torch._C.DisableTorchFunction():
            output = self._rounded(call, run, (x,), {}) if self._loses_precision((x,), {}) else run(call, x)
        setattr(output, mul.GATE, True)
        return output

    # -- taps ----------------------------------------------------------------------------------------------------

    def _tap_input(self, kind: str, args: Any) -> None:
        self._tap_call(kind, "input", args)
        if kind == "matmul":  # a softmax meets the values
            weights = [a for a in args if getattr(a, _SOFTMAX, False)]
            if weights:
                self._tap_call("attention", PATTERN, weights)

    def _tap_output(self, kind: str, args: Any, output: Any) -> None:
        self._tap_call(kind, "output", (output,))
        passed = kind in ("linear", "mul") and args and getattr(args[0], _SOFTMAX, False)  # heads mixed, a row left out
        if (kind == "softmax" or passed) and isinstance(output, Tensor):
            setattr(output, _SOFTMAX, True)

    def _tap_call(self, kind: str, side: str, tensors: Any) -> None:
        path = self._stack[-1][0]
        if any(tap.path == path and tap.kind == kind for tap in self._taps.values()):
            self._tap(path, kind, side, next((t for t in tensors if dependent(t)), first(tensors)))

    def _tap(self, path: str, kind: str | None, side: str, tensor: Any) -> None:
        key = (path, f"{kind} {side}")
        nth = self._counts.get(key, 0)
        self._counts[key] = nth + 1
        for name, tap in self._taps.items():
            if (tap.path, tap.kind, tap.side, tap.nth) == (path, kind, side, nth) and dependent(tensor):
                kept = self.tapped[name] = Tapped(tensor.detach())
                tensor.register_hook(lambda g, kept=kept: _keep(kept, g))


def _rotates(cos: Tensor | None, sin: Tensor | None) -> bool:
    """Whether two constants are the cosines and sines of angles, times one number."""
    if cos is None or sin is None or cos.shape != sin.shape or not cos.is_floating_point():
        return False
    size = cos.double().square() + sin.double().square()
    return bool((size - size.mean()).abs().max() <= 1e-2 * size.mean())


_WRITERS = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "pow", "matmul"))}


def mutates(func: Any) -> bool:
    """Whether a function writes into its first argument: `fill_`, `__iadd__`, `__setitem__`."""
    name = getattr(func, "__name__", "")
    return name in _WRITERS if name.endswith("__") else name.endswith("_")


def _mark(args: Any, output: Any) -> None:
    """What is known of a tensor, that it is a gate, the explained input or an attention pattern, is known of it when it
    has been moved.
    """
    if args and isinstance(output, Tensor):
        for mark in (mul.GATE, _INPUT, _SOFTMAX, _SCORES):
            if getattr(args[0], mark, False):
                setattr(output, mark, True)


def place_of(tensor: Tensor) -> int | None:
    """Where a tensor's data lies; None of what has no data of its own, as wrappers of packed weights have not."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def _cloned(call: Call, x: Tensor) -> Tensor:
    return x.clone()


def _keep(kept: Tapped, g: Tensor) -> None:
    kept.per_unit = g.detach() if kept.per_unit is None else kept.per_unit + g.detach()


def _reached(args: Any, kwargs: Any) -> bool:
    """Whether any argument, or a member of a list argument, depends on the explained input."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) and v.requires_grad for v in value):
            return True
    return False


def named(func: Any) -> str:
    """What a torch function is called in an error."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__objclass__", None)
    return f"Tensor.{name}" if owner is not None else f"{(getattr(func, '__module__', None) or 'torch')}.{name}"


@contextmanager
def intercepted(model: nn.Module, composite: Composite, *, kind: type[Interception] = Interception, **options: Any,
                ) -> Iterator[Interception]:
    """A `with` block in which the calls of `model` follow `composite`; options as of `Interception`, or of its `kind`.

    The model's hooks are as before when it ends, also after an exception.
    """
    mode = kind(model, composite, **options)
    handles = []
    try:
        for path, module in model.named_modules():
            if mode.asks_where or not _known(module):
                handles += _hooked(mode, path, module)
        with in_the_open(model), mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()


def _known(module: nn.Module) -> bool:
    """Whether a module is one call of torch, or none: then only a tap or an exception by place needs to see it, and
    most of a model's modules are such.
    """
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def _hooked(mode: Interception, path: str, module: nn.Module) -> list[Any]:
    offset = activation_offset(module)
    if offset is not None:
        return hooked_activation(mode, path, module, offset)

    adapted, entered = family.adapted(module), []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        mode.enter_module(path, module)
        mode.read_input(path, args, kwargs)
        entered.append(mode.computed)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        seen = mode.computed != entered.pop()
        whole = adapted and not mode.follows_gradient
        found = mode.layer(module, args, kwargs, output, adapted=whole) if whole or not seen else None
        mode.leave_module()
        mode.leave_output(path, output if found is None else found)
        return found

    return [module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True, always_call=True)]
