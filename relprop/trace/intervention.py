"""A forward pass that is changed at taps: what a module or an op reads or returns, or an attention pattern, is edited
on its way. The model itself stays as it is; a mode sees the calls, hooks say where they stand, both go at the end.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops import Call, Op, attention, lookup
from .interception import Tap
from .layout import laid, vectors
from .opening import first, opened

PATTERN = "pattern"
"""Side of a tap that means the pattern of an attention, beside "input" and "output"."""
_MARK = "_relprop_pattern"

Change = Callable[[Tensor], Tensor | None]
"""From a tapped tensor, its vectors on the last axis, to what goes in its place; None leaves it. It must not write into
what it is given.
"""


@dataclass(frozen=True, eq=False)
class Heads:
    """Attention patterns of some heads, and what goes in their place.

    The rows of the batch are `copies` times the same ones, copy by copy; `copy` and `head`, (N,) each, choose. `change`
    is given their patterns, (N, R, T, S), R rows of a copy.
    """

    copies: int
    copy: Tensor
    head: Tensor
    change: Change

    def pick(self, x: Tensor, group: int = 1) -> Tensor:
        """The chosen heads of x, (copies R, H, ...), as (N, R, ...); with `group` query heads a head of x."""
        return x.unflatten(0, (self.copies, -1))[self.copy, :, self.head // group]

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        """x with `value`, (N, R, ...), at the chosen heads."""
        x = x.clone()
        x.unflatten(0, (self.copies, -1))[self.copy, :, self.head] = value
        return x


class Editor(TorchFunctionMode):
    """Edits a forward pass: `changes` by tap, a `Change`, or `Heads` or a `Change` of all patterns, (B, H, T, S), at a
    tap of side "pattern". `fired` counts how often each one was reached.

    The nth call of a kind is counted as `observed` counts it: in each module for itself.
    """

    def __init__(self, changes: Mapping[Tap, Change | Heads]) -> None:
        super().__init__()
        self.fired: dict[Tap, int] = {}
        self.path: list[str] = [""]
        self.rows, self.asleep = 1, False
        self.install(changes)

    def install(self, changes: Mapping[Tap, Change | Heads]) -> None:
        """Takes these changes from now on, in the place of those before."""
        self.changes = changes
        self._known = {tap: tap for tap in changes}  # with the axes that a call does not tell
        self.fired = dict.fromkeys(changes, 0) | self.fired
        self._wanted = {(tap.path, tap.kind) for tap in changes}
        self._patterns = any(tap.side == PATTERN for tap in changes)
        self._counts: dict[tuple[str, str | None, str], int] = {}

    def begin(self, args: Any, kwargs: Any) -> None:
        """A new forward pass: calls are counted from the start."""
        self._counts.clear()
        value = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
        self.rows = 1 if value is None else value.shape[0]

    def enter(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A module's arguments as it begins, the first tensor edited where that is wanted."""
        self.path.append(path)
        if self.asleep or (path, None) not in self._wanted:
            return args, kwargs
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:place], self.edit(path, None, "input", value), *args[place + 1:]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, name: self.edit(path, None, "input", value)}
        return args, kwargs

    def leave(self, path: str, output: Any) -> Any:
        """A module's output as it ends, edited where that is wanted; None after an exception."""
        self.path.pop()
        if self.asleep or output is None or (path, None) not in self._wanted:
            return output
        return with_first(output, self.edit(path, None, "output", first(output)))

    # -- the calls -----------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.asleep:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            call = Call(func, "attention", self.path[-1], None, retrace=self._retrace)
            return attention.multi_head_attention_forward(call, *args, **kwargs)
        op = lookup(func)
        if op is not None:
            return self._listed(op, func, args, kwargs)
        inside = opened(func)
        return self._unlisted(func, args, kwargs) if inside is None else self._retrace(lambda: inside(*args, **kwargs))

    def _listed(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of the table."""
        if self._patterns and op.kind == "matmul":
            args = self._unfused(args)
        if (self.path[-1], op.kind) in self._wanted:
            output = self._edited(func, op.kind, args, kwargs)
        else:
            output = func(*args, **kwargs)
        if self._patterns:
            _mark(op.kind, args, output)
        return output

    def _unlisted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that is not in the table and cannot be opened."""
        return func(*args, **kwargs)

    def _retrace(self, function: Callable[..., Any]) -> Any:
        with self:
            return function()

    def _edited(self, func: Any, kind: str, args: Any, kwargs: Any) -> Any:
        path, place = self.path[-1], _operand(args)
        if place is not None:
            changed = self.edit(path, kind, "input", args[place])
            args = (*args[:place], changed, *args[place + 1:])
        output = func(*args, **kwargs)
        return self.edit(path, kind, "output", output) if isinstance(output, Tensor) else output

    def edit(self, path: str, kind: str | None, side: str, value: Any) -> Any:
        """`value`, or what a change at this place makes of it."""
        tap = self._reached(path, kind, side)
        if tap is None:
            return value
        with torch._C.DisableTorchFunction():  # what a change calls itself is no call of the model
            changed = self.changes[tap](vectors(value, tap.axes))
            return value if changed is None else laid(changed, tap.axes, value.shape)

    def _reached(self, path: str, kind: str | None, side: str) -> Tap | None:
        """The tap at the call that is being made, which is counted."""
        key = (path, kind, side)
        tap = Tap(path, kind, side, self._counts.get(key, 0))
        self._counts[key] = tap.nth + 1
        known = self._known.get(tap)
        if known is not None:
            self.fired[known] += 1
        return known

    # -- attention patterns --------------------------------------------------------------------------------------

    def _fused(self, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **options: Any) -> Tensor:
        output = func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        tap = self._reached(self.path[-1], "attention", PATTERN)
        if tap is not None:
            factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
            mask = attention.additive(attn_mask, is_causal, query, key)
            output = self._repatterned(tap, output, query, key, value, mask, factor)
        return self.edit(self.path[-1], "attention", "output", output)

    def _repatterned(self, tap: Tap, output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                     factor: float) -> Tensor:
        """The kernel's output plus what the change of pattern adds, (A' - A) V: exact zeros where there is none."""
        heads = self._heads(tap, query.shape[-3], query.device)
        group = query.shape[-3] // key.shape[-3]
        if mask is not None:
            mask = heads.pick(mask.expand(*query.shape[:-1], key.shape[-2]))
        weights = attention.pattern(heads.pick(query), heads.pick(key, group), mask, factor)
        changed = heads.change(weights)
        if changed is None:
            return output
        added = (changed.to(weights) - weights) @ heads.pick(value, group)
        return heads.put(output, heads.pick(output) + added)

    def _unfused(self, args: Any) -> Any:
        """The operands of a product, an attention pattern among them edited."""
        place = next((i for i, a in enumerate(args) if getattr(a, _MARK, False) and a.dim() in (3, 4)), None)
        tap = None if place is None else self._reached(self.path[-1], "attention", PATTERN)
        if tap is None:
            return args
        weights = args[place]
        split = weights if weights.dim() == 4 else weights.unflatten(0, (self.rows, -1))
        heads = self._heads(tap, split.shape[1], split.device)
        changed = heads.change(heads.pick(split))
        if changed is not None:
            weights = heads.put(split, changed.to(split)).reshape(weights.shape)
        return (*args[:place], weights, *args[place + 1:])

    def _heads(self, tap: Tap, count: int, device: torch.device) -> Heads:
        """What a change wants of this attention; a plain function sees all heads."""
        change = self.changes[tap]
        if isinstance(change, Heads):
            return replace(change, copy=change.copy.to(device), head=change.head.to(device))

        def all_heads(weights: Tensor) -> Tensor | None:
            changed = change(weights.transpose(0, 1))  # (H, B, T, S) to (B, H, T, S)
            return None if changed is None else changed.transpose(0, 1)

        head = torch.arange(count, device=device)
        return Heads(1, torch.zeros_like(head), head, all_heads)


def _operand(args: Any) -> int | None:
    """Where in its arguments an op has what it reads: the first floating tensor that is no parameter."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter):
            return place
    return None


def _mark(kind: str, args: Any, output: Any) -> None:
    """Marks an attention pattern on its way from the softmax to the product with the values."""
    if isinstance(output, Tensor) and (kind == "softmax" or kind in ("move", "linear") and any(
            getattr(a, _MARK, False) for a in args)):
        setattr(output, _MARK, True)


@contextmanager
def edited(model: nn.Module, changes: Mapping[Tap, Change | Heads], *, kind: Callable[..., Editor] = Editor,
           begin: Callable[[Editor, Any, Any], None] | None = None) -> Iterator[Editor]:
    """A `with` block in which forward passes of `model` are changed at the given taps, by an editor of this `kind`.

    A tap without a kind is of a module: what it returns (side "output"), or its first tensor (side "input"). `begin`
    is called before each forward pass, with the editor and the pass's arguments; it may install other changes, and run
    the model, which is then as without the block.
    """
    editor = kind(changes)
    handles = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if editor.asleep:
            return
        if begin is not None:
            with _asleep(editor):
                begin(editor, args, kwargs)
        editor.begin(args, kwargs)

    try:
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        for path, module in model.named_modules():
            handles += _hooked(editor, path, module)
        with editor:
            yield editor
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _asleep(editor: Editor) -> Iterator[None]:
    editor.asleep = True
    try:
        yield
    finally:
        editor.asleep = False


def _hooked(editor: Editor, path: str, module: nn.Module) -> list[Any]:
    before = lambda module, args, kwargs: editor.enter(path, args, kwargs)
    after = lambda module, args, output: editor.leave(path, output)
    return [module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True)]


def with_first(output: Any, value: Tensor) -> Any:
    """A module's output with `value` for the tensor that it is about; see `first`."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, dict):  # model outputs among them
        name = next(name for name, found in output.items() if isinstance(found, Tensor))
        copied = output.copy()
        copied[name] = value
        return copied
    place = next(i for i, found in enumerate(output) if isinstance(found, Tensor))
    changed = (*output[:place], value, *output[place + 1:])
    return changed if type(output) is tuple else list(changed) if type(output) is list else type(output)(*changed)


def captured(model: nn.Module, taps: Any, run: Callable[[], Any]) -> tuple[Any, dict[Tap, Tensor]]:
    """What `run()` returns, and the tensors at `taps` on the way; patterns as (B, H, T, S).

    Raises: ValueError for a tap that is never reached.
    """
    found: dict[Tap, Tensor] = {}

    def keep(tap: Tap) -> Change:
        return lambda value: found.__setitem__(tap, value.detach().clone())

    with edited(model, {tap: keep(tap) for tap in taps}):
        output = run()
    missing = [tap for tap in taps if tap not in found]
    if missing:
        raise ValueError(f"the forward pass never came to {missing[0]}, and {len(missing) - 1} more")
    return output, found
