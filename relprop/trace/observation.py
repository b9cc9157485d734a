"""A forward pass watched, not changed: its linear maps, its attentions and their patterns."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops import Call, attention, lookup
from .opening import opened


@dataclass(frozen=True)
class Seen:
    """An op noticed in a forward pass: its kind ("linear", or "attention" with output (B, H, T, K)), the module it was
    called in, the how-manieth of its kind there it is (`nth`), its operands' shapes, and its place in the order of all.
    """

    kind: str
    path: str
    nth: int
    inputs: tuple[torch.Size, ...]
    output: torch.Size
    order: int


class Observer(TorchFunctionMode):
    """Notices the linear maps and the attention of a forward pass, and with `patterns` the attention patterns.

    Attention is the fused kernel, or a softmax whose result multiplies a tensor; `rows` tells how a pattern of shape
    (B H, T, S) splits.
    """

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        self.rows, self.patterns = rows, []
        self.seen: list[Seen] = []
        self.path: list[str] = [""]
        self._counts: dict[tuple[str, str], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = lookup(func)
        if func is F.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            call = Call(func, "attention", self.path[-1], None, retrace=self._retrace)
            return attention.multi_head_attention_forward(call, *args, **kwargs)
        inside = opened(func) if op is None else None
        if inside is not None:
            return self._retrace(lambda: inside(*args, **kwargs))
        output = func(*args, **kwargs)
        if op is not None and isinstance(output, Tensor):
            self._notice(op.kind, args, output)
        return output

    def _retrace(self, function: Callable[..., Any]) -> Any:
        with self:
            return function()

    def _fused(self, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **options: Any) -> Tensor:
        output = func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        self._add("attention", (query, key, value), output)
        if self.rows is not None:
            factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
            mask = attention.additive(attn_mask, is_causal, query, key)
            self.patterns.append(attention.pattern(query, attention.grouped(key, query), mask, factor))
        return output

    def _notice(self, kind: str, args: Any, output: Tensor) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if kind == "linear":  # what it reads first; `addmm` has the bias in front
            self._add("linear", sorted(tensors, key=lambda t: isinstance(t, nn.Parameter)), output)
        if kind == "softmax":
            setattr(output, _PATTERN, True)
        elif kind in ("move", "linear") and tensors and getattr(tensors[0], _PATTERN, False):
            setattr(output, _PATTERN, True)  # dropout, a cast, heads mixed after the softmax
        elif kind == "matmul":
            weights = next((t for t in tensors if getattr(t, _PATTERN, False)), None)
            if weights is not None and weights.dim() in (3, 4):
                self._unfused(weights, output)

    def _unfused(self, weights: Tensor, output: Tensor) -> None:
        rows = self.rows or 1
        shape = output.shape if output.dim() == 4 else torch.Size((rows, output.shape[0] // rows, *output.shape[1:]))
        self.seen.append(Seen("attention", self.path[-1], 0, (weights.shape,), shape, len(self.seen)))
        if self.rows is not None:
            self.patterns.append(weights if weights.dim() == 4 else weights.unflatten(0, (rows, -1)))

    def _add(self, kind: str, tensors: Any, output: Tensor) -> None:
        key = (kind, self.path[-1])
        nth = self._counts[key] = self._counts.get(key, -1) + 1
        self.seen.append(Seen(kind, self.path[-1], nth, tuple(t.shape for t in tensors), output.shape, len(self.seen)))


_PATTERN = "_relprop_pattern"


@contextmanager
def _observing(model: nn.Module, observer: Observer) -> Iterator[Observer]:
    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: observer.path.append(path)))
            handles.append(module.register_forward_hook(lambda m, a, o: _popped(observer.path), always_call=True))
        with observer:
            yield observer
    finally:
        for handle in handles:
            handle.remove()


def _popped(path: list[str]) -> None:
    path.pop()


@contextmanager
def observed(model: nn.Module, rows: int | None = None) -> Iterator[list[Seen]]:
    """A `with` block that collects the linear maps and attentions which `model` runs, in order."""
    with _observing(model, Observer(rows)) as observer:
        yield observer.seen


def attention_patterns(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """The output of one forward pass and the pattern of each of its attentions, (B, H, T, S), in order.

    Whatever the backend: a fused kernel's pattern is computed beside it, heads of grouped queries are repeated, and the
    model stays as it is. Patterns are as the model uses them, so that rows which are masked throughout are zero.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    with _observing(model, Observer(tensors[0].shape[0] if tensors else 1)) as observer:
        output = model(*args, **kwargs)
    return output, observer.patterns
