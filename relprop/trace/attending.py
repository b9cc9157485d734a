"""A run whose attention patterns stay in reach: for one backward pass under rules, and one by the plain gradient.

Maps such as Chefer et al.'s need both the relevance and the gradient of every attention pattern. Both backward passes
here go through one forward pass: every op whose rule is not its gradient keeps two small graphs, one of each kind, and
a `Turn` says which of them a backward pass follows.

Reference: Chefer et al. 2021 (Transformer interpretability beyond attention visualization; Generic
attention-model explainability for interpreting bi-modal and encoder-decoder transformers).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..composite import Composite
from ..numerics import LOW
from ..ops import Call, Op, activation, add, lookup, matmul, mul, softmax
from ..ops.call import Alternating, Turn, dependent, plain, scaled, wide
from ..ops.mul import GATE
from .interception import Interception

STREAM = "_relprop_stream"
"""Name of the mark that tells which input's positions a tensor holds; it follows the first operand that has one."""
_AFTER, _PATTERN, _HELD = "_relprop_after", "_relprop_pattern", "_relprop_held"
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_SOFTMAX = frozenset({torch.softmax, torch.nn.functional.softmax, Tensor.softmax})
_TWO_WAYS = frozenset({"norm", "softmax", "activation", "matmul", "add", "mul"})


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a forward pass: the module it was called in, the softmax's result as the model has it, (B, H, T,
    S) or (B H, T, S), the values it mixes, and the inputs whose positions are T and S; None for a constant's, such as
    learned queries.

    `queries_after` and `keys_after` say which state of the two it reads: number of the last attention that wrote into
    it, counted from 0 over the forward pass, -1 before any. In co-attention both of a pair read what was before either.
    """

    path: str
    weights: Tensor
    values: Tensor
    queries: str | None
    keys: str | None
    queries_after: int = -1
    keys_after: int = -1


@dataclass(frozen=True)
class Part:
    """Positions of a joint sequence that are an input's: those from `start` on, in the state that they had (see
    `Attention`) when the sequence was put together.
    """

    name: str
    length: int
    start: int
    after: int


class Both(Function):
    """y = f(x), with the graph of its rule and that of its gradient; `turn` says which one the way back takes."""

    @staticmethod
    def forward(ctx: Any, by_rule: Callable[..., Any], by_gradient: Callable[..., Any], turn: Turn,
                held: tuple[bool, ...], *xs: Tensor) -> Any:
        with torch.enable_grad():
            free = [_leaf(x, True) for x in xs]
            ruled = [_leaf(x, not h) for x, h in zip(xs, held, strict=True)]
            ctx.graphs = {True: (_edges(by_gradient(*free)), free)}  # its values, which are the same, go
            output = by_rule(*ruled)
            ctx.graphs[False] = _edges(output), ruled
        ctx.turn = turn
        if isinstance(output, Tensor):
            return wide(ctx, output.detach())
        ctx.set_output_grad_dtype(*(torch.float32 if t.dtype in LOW else None for t in output))
        return tuple(t.detach() for t in output)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        edges, xs = ctx.graphs[ctx.turn.plain]
        reached = [(edge, g) for edge, g in zip(edges, gs, strict=True) if edge is not None and g is not None]
        moving = [x for x in xs if x.requires_grad]
        if not reached or not moving:
            return (None,) * (4 + len(xs))
        ys, g_ys = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(ys, moving, g_ys, allow_unused=True, retain_graph=True))
        return None, None, None, None, *(next(found) if x.requires_grad else None for x in xs)


def _leaf(x: Tensor, moves: bool) -> Tensor:
    """Where an inner graph starts; relevance per unit arrives there in float32 at least."""
    leaf = x.detach().requires_grad_(moves)
    if moves and x.dtype in LOW:
        leaf.grad_dtype = torch.float32
    return leaf


def _edges(output: Any) -> list[Any]:
    """Where the graph of each output ends; None for one that depends on nothing."""
    outputs = (output,) if isinstance(output, Tensor) else output
    return [get_gradient_edge(t) if t.requires_grad else None for t in outputs]


class Attending(Interception):
    """An interception that keeps every attention open and collects them, in order, in `attentions`.

    With a `turn`, ops keep both ways back. `ends` holds, by stream and its number of positions, the tensors (B, T, D)
    that modules returned since its last attention: the last of them that the value depends on says which it reads.
    """

    def __init__(self, model: nn.Module, composite: Composite, *, turn: Turn | None = None, **options: Any) -> None:
        super().__init__(model, composite, **options)
        self.turn, self.asks_where = turn, True
        self.attentions: list[Attention] = []
        self.ends: dict[tuple[str | None, int], list[Tensor]] = {}
        self.joined: dict[str, tuple[Part, ...]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if torch.is_grad_enabled():
            if func in _JOINS:
                self._join(output, *args, **(kwargs or {}))
            self._follow([a for a in tree_flatten((args, kwargs or {}))[0] if isinstance(a, Tensor)], output)
        return output

    def _follow(self, operands: list[Tensor], output: Any) -> None:
        """The operands' stream is the output's as well, unless it has one of its own, and in its latest state."""
        for one in output if isinstance(output, (tuple, list)) else [output]:
            if not isinstance(one, Tensor):
                continue
            known = [getattr(x, STREAM) for x in operands if hasattr(x, STREAM)]
            if known and not hasattr(one, STREAM):
                setattr(one, STREAM, known[0])  # also where it is known that there is none
            stream = _stream(one)
            after = max(_after(x) for x in (one, *operands) if _stream(x) == stream)
            if after > _after(one):
                setattr(one, _AFTER, after)

    def _join(self, output: Tensor, tensors: Any, dim: int = 0, **_: Any) -> None:
        """Notes a sequence (B, T, D) that is put together from positions of several inputs: words and patches."""
        if output.dim() != 3 or dim not in (1, -2):
            return
        parts, start = [], 0
        for one in tensors:
            if _stream(one) is not None:
                parts.append(Part(_stream(one), one.shape[1], start, _after(one)))
            start += one.shape[1]
        if len({part.name for part in parts}) > 1:
            name = "+".join(part.name for part in parts)
            self.joined[name] = tuple(parts)
            setattr(output, STREAM, name)

    def _embedding(self, *args: Any, **kwargs: Any) -> Tensor:
        before = len(self.leaves)
        output = super()._embedding(*args, **kwargs)
        if len(self.leaves) > before:
            setattr(output, STREAM, [*self.leaves][-1])
        return output

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A pattern of constants, such as that of learned queries with each other, is a place to look at as well."""
        op = lookup(func)
        if op is not None and op.kind == "attention":
            return self._run(op, func, args, kwargs)
        output = super()._constant(func, args, kwargs)
        operands = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        if op is not None and operands and isinstance(output, Tensor):
            if op.kind == "softmax" and output.dim() in (3, 4):
                output = output.detach().requires_grad_()
            self._notice(op.kind, operands, output)
        return output

    def leave_output(self, path: str, output: Any) -> None:
        super().leave_output(path, output)
        if path and dependent(output) and output.dim() == 3:
            self.ends.setdefault((_stream(output), output.shape[1]), []).append(output)

    # -- attention -----------------------------------------------------------------------------------------------

    def _call(self, kind: str, func: Any, args: Any) -> Call:
        call = super()._call(kind, func, args)
        if kind == "attention":
            return replace(call, open=True)
        if self.turn is not None and kind in ("linear", "conv"):
            return replace(call, rule=Alternating(call.rule, self.turn))
        return call

    def _run(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        both = self.turn is not None and op.kind in _TWO_WAYS and op.run is not plain
        output = self._two_ways(op, func, args, kwargs) if both else super()._run(op, func, args, kwargs)
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        if isinstance(output, Tensor) and tensors:
            self._notice(op.kind, tensors, output)
        return output

    def _notice(self, kind: str, operands: list[Tensor], output: Tensor) -> None:
        """What the streams of a product are, and whether it is that of an attention pattern with its values."""
        first = operands[0]
        if kind == "softmax" and output.dim() in (3, 4):
            setattr(output, _PATTERN, output)
        elif kind in ("move", "mul", "linear") and not any(map(dependent, operands[1:])):
            for mark in (_PATTERN, _HELD):
                if hasattr(first, mark):
                    setattr(output, mark, getattr(first, mark))
        elif kind == "matmul" and len(operands) == 2:
            patterns = [getattr(x, _PATTERN, None) for x in operands]
            weights = next((p for p in patterns if p is not None), None)
            if weights is None:
                setattr(output, STREAM, _stream(first))  # the queries', also where they have none and the keys do
            else:
                values = operands[0 if patterns[0] is None else 1]
                self._attended(weights, values, output)

    def _attended(self, weights: Tensor, values: Tensor, output: Tensor) -> None:
        queries, keys = _stream(weights), _stream(values)
        self.attentions.append(Attention(self._stack[-1][0], weights, values, queries, keys, _after(weights),
                                         _after(values)))
        self.ends.pop((queries, weights.shape[-2]), None)
        setattr(output, STREAM, queries)
        setattr(output, _AFTER, len(self.attentions) - 1)

    # -- two ways back -------------------------------------------------------------------------------------------

    def _two_ways(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        leaves, rebuild = tree_flatten((list(args), dict(kwargs)))
        leaves = _met(leaves) if op.kind == "matmul" else leaves
        places = [i for i, leaf in enumerate(leaves) if dependent(leaf)]
        held = tuple(hasattr(leaves[i], _HELD) for i in places)
        call = self._call(op.kind, func, args)
        if len(places) == 1 and not held[0] and _linear_in_one(call, leaves, places[0]):
            return super()._run(op, func, args, kwargs)

        if len(places) == 2 and not any(held) and call.rule in (matmul.uniform, mul.uniform):
            return self._halved(func, leaves, places, rebuild)
        if op.run is activation.elementwise and len(places) == 1 and call.rule is activation.identity:
            return self._activated(call, func, leaves, places[0], rebuild)

        if call.rule is softmax.identity and places == [0] and not held[0] and func in _SOFTMAX:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            return op.run(replace(call, rule=self._in_turn(dim)), *args, **kwargs)

        def filled(xs: tuple[Tensor, ...]) -> Any:
            whole = list(leaves)
            for place, x in zip(places, xs, strict=True):
                whole[place] = x
                _copy_marks(leaves[place], x)
            return tree_unflatten(whole, rebuild)

        def by_rule(*xs: Tensor) -> Any:
            args, kwargs = filled(xs)
            return op.run(call, *args, **kwargs)

        def by_gradient(*xs: Tensor) -> Any:
            args, kwargs = filled(xs)
            return func(*args, **kwargs)

        return self._both(by_rule, by_gradient, held, [leaves[i] for i in places], call)

    def _in_turn(self, dim: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The identity rule of a softmax, or its gradient, for both of which what came out is enough."""
        def rule(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
            return softmax.taylor(x, y, g, dim=dim) if self.turn.plain else softmax.identity(x, y, g)

        return rule

    def _halved(self, func: Any, leaves: list[Any], places: list[int], rebuild: Any) -> Any:
        """A product under the uniform rule: halved once, at its operands or at what comes out, whichever is smaller."""
        a, b = (leaves[place] for place in places)
        at_output = max(a.numel(), b.numel()) > 2 * a[..., 0].numel() * b.shape[-1]  # of a product of matrices
        if not at_output:
            for place in places:
                leaves[place] = scaled(leaves[place], 0.5, self.turn)
        args, kwargs = tree_unflatten(leaves, rebuild)
        output = func(*args, **kwargs)
        return scaled(output, 0.5, self.turn) if at_output else output

    def _activated(self, call: Call, func: Any, leaves: list[Any], place: int, rebuild: Any) -> Tensor:
        """An activation under the identity rule, computed once for both ways back."""
        found: list[Tensor] = []

        def run(x: Tensor) -> Tensor:
            args, kwargs = tree_unflatten([*leaves[:place], x, *leaves[place + 1:]], rebuild)
            return func(*args, **{**kwargs, "inplace": False} if kwargs.get("inplace") else kwargs)

        def by_gradient(x: Tensor) -> Tensor:
            found.append(run(x))
            return found[0]

        def by_rule(x: Tensor) -> Tensor:
            once = lambda x: found.pop().detach() if found else run(x)
            return activation.Identity.apply(x, once, activation.at_zero(run, x))

        return self._both(by_rule, by_gradient, (hasattr(leaves[place], _HELD),), [leaves[place]], call)

    def _both(self, by_rule: Any, by_gradient: Any, held: tuple[bool, ...], xs: list[Tensor], call: Call) -> Any:
        passes = []  # whether the rule passes anything on; a scale that is held does not

        def watched(*inner: Tensor) -> Any:
            output = by_rule(*inner)
            passes.append(any(t.requires_grad for t in (output if isinstance(output, tuple) else (output,))))
            return output

        with torch._C.DisableTorchFunction():
            output = Both.apply(watched, by_gradient, self.turn, held, *xs)
        for one in output if isinstance(output, tuple) else (output,):
            if not passes[0]:
                setattr(one, _HELD, True)
            if call.kind == "activation":
                setattr(one, GATE, True)
        return output

    def activate(self, path: str, module: nn.Module, x: Tensor, y: Tensor, offset: float) -> Tensor:
        if self.turn is None:
            output = super().activate(path, module, x, y, offset)
        else:
            call = self._call("activation", module.forward, (x,))
            output = self._both(lambda x: super(Attending, self).activate(path, module, x, y, offset), module.forward,
                                (hasattr(x, _HELD),), [x], call)
        self._follow([x], output)
        return output


def _met(operands: list[Any]) -> list[Any]:
    """The operands of a product. Of a pattern of constants with constant values both move, so that the pattern has its
    share and no more, as any other.
    """
    if not any(getattr(x, _PATTERN).is_leaf for x in operands if hasattr(x, _PATTERN)):
        return operands
    return [x.detach().requires_grad_() if isinstance(x, Tensor) and not dependent(x) else x for x in operands]


def _linear_in_one(call: Call, leaves: list[Any], place: int) -> bool:
    """Whether a call of one moving operand is linear in it, so that its rule is its gradient."""
    if call.kind == "add":
        return call.rule not in add.BESIDE_CONSTANTS
    name = getattr(call.func, "__name__", "")
    return call.kind in ("matmul", "mul") and not ("div" in name and (place > 0 or name.startswith("__r")))


def _stream(x: Tensor) -> str | None:
    return getattr(x, STREAM, None)


def _after(x: Tensor) -> int:
    return getattr(x, _AFTER, -1)


def _copy_marks(source: Tensor, target: Tensor) -> None:
    if getattr(source, GATE, False):
        setattr(target, GATE, True)
