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
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..composite import Composite
from ..ops import Call, Op, add, lookup
from ..ops.call import Alternating, Turn, dependent, plain
from ..ops.mul import GATE
from .interception import Interception

STREAM = "_relprop_stream"
"""Name of the mark that tells which input's positions a tensor holds; it follows the first operand that has one."""
_KEYS, _PATTERN, _HELD = "_relprop_keys", "_relprop_pattern", "_relprop_held"
_TWO_WAYS = frozenset({"norm", "softmax", "activation", "matmul", "add", "mul"})


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a forward pass: the module it was called in, the softmax's result as the model has it, (B, H, T,
    S) or (B H, T, S), the values it mixes, and the inputs whose positions are T and S; None for a constant's, such as
    learned queries.
    """

    path: str
    weights: Tensor
    values: Tensor
    queries: str | None
    keys: str | None


class Both(Function):
    """y = f(x), with the graph of its rule and that of its gradient; `turn` says which one the way back takes."""

    @staticmethod
    def forward(ctx: Any, by_rule: Callable[..., Any], by_gradient: Callable[..., Any], turn: Turn,
                held: tuple[bool, ...], *xs: Tensor) -> Any:
        with torch.enable_grad():
            free = [x.detach().requires_grad_() for x in xs]
            ruled = [x.detach().requires_grad_(not h) for x, h in zip(xs, held, strict=True)]
            ctx.graphs = {True: (by_gradient(*free), free), False: (by_rule(*ruled), ruled)}
        ctx.turn = turn
        output = ctx.graphs[False][0]
        return output.detach() if isinstance(output, Tensor) else tuple(t.detach() for t in output)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        outputs, xs = ctx.graphs[ctx.turn.plain]
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        reached = [(y, g) for y, g in zip(outputs, gs, strict=True) if y.requires_grad and g is not None]
        moving = [x for x in xs if x.requires_grad]
        if not reached or not moving:
            return (None,) * (4 + len(xs))
        ys, g_ys = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(ys, moving, g_ys, allow_unused=True, retain_graph=True))
        return None, None, None, None, *(next(found) if x.requires_grad else None for x in xs)


class Attending(Interception):
    """An interception that keeps every attention open and collects them, in order, in `attentions`.

    With a `turn`, ops keep both ways back. `ends` holds, by number of positions, the last tensor (B, T, D) that a
    module returned: what follows it reads the positions.
    """

    def __init__(self, model: nn.Module, composite: Composite, *, turn: Turn | None = None, **options: Any) -> None:
        super().__init__(model, composite, **options)
        self.turn, self.asks_where = turn, True
        self.attentions: list[Attention] = []
        self.ends: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if torch.is_grad_enabled():
            self._follow([a for a in tree_flatten((args, kwargs or {}))[0] if isinstance(a, Tensor)], output)
        return output

    def _follow(self, operands: list[Tensor], output: Any) -> None:
        """Marks of the operands that are the output's as well, where it has none of its own yet."""
        for one in output if isinstance(output, (tuple, list)) else [output]:
            if not isinstance(one, Tensor):
                continue
            for mark in (STREAM, _KEYS):
                if not hasattr(one, mark):
                    found = next((getattr(x, mark) for x in operands if hasattr(x, mark)), None)
                    if found is not None:
                        setattr(one, mark, found)

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
            self.ends[output.shape[1]] = output

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
                _set(output, getattr(first, STREAM, None), getattr(operands[1], STREAM, None))
            else:
                values = operands[0 if patterns[0] is None else 1]
                self._attended(weights, values, output)

    def _attended(self, weights: Tensor, values: Tensor, output: Tensor) -> None:
        queries, keys = getattr(weights, STREAM, None), getattr(weights, _KEYS, None)
        self.attentions.append(Attention(self._stack[-1][0], weights, values, queries, keys))
        _set(output, queries, None)

    # -- two ways back -------------------------------------------------------------------------------------------

    def _two_ways(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        leaves, rebuild = tree_flatten((list(args), dict(kwargs)))
        places = [i for i, leaf in enumerate(leaves) if dependent(leaf)]
        held = tuple(hasattr(leaves[i], _HELD) for i in places)
        call = self._call(op.kind, func, args)
        if len(places) == 1 and not held[0] and _linear_in_one(call, leaves, places[0]):
            return super()._run(op, func, args, kwargs)

        def filled(xs: tuple[Tensor, ...]) -> Any:
            whole = list(leaves)
            for place, x in zip(places, xs, strict=True):
                whole[place] = x
            for place, x in zip(places, xs, strict=True):
                _copy_marks(leaves[place], x)
            return tree_unflatten(whole, rebuild)

        def by_rule(*xs: Tensor) -> Any:
            args, kwargs = filled(xs)
            return op.run(call, *args, **kwargs)

        def by_gradient(*xs: Tensor) -> Any:
            args, kwargs = filled(xs)
            return func(*args, **kwargs)

        return self._both(by_rule, by_gradient, held, [leaves[i] for i in places], call)

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


def _linear_in_one(call: Call, leaves: list[Any], place: int) -> bool:
    """Whether a call of one moving operand is linear in it, so that its rule is its gradient."""
    if call.kind == "add":
        return call.rule is not add.ratio_of_all
    name = getattr(call.func, "__name__", "")
    return call.kind in ("matmul", "mul") and not ("div" in name and (place > 0 or name.startswith("__r")))


def _set(output: Tensor, stream: str | None, keys: str | None) -> None:
    """Marks that are known, also where it is known that there is none."""
    setattr(output, STREAM, stream)
    setattr(output, _KEYS, keys)


def _copy_marks(source: Tensor, target: Tensor) -> None:
    if getattr(source, GATE, False):
        setattr(target, GATE, True)
