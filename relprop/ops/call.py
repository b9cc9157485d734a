"""One torch call on the way through the table: where it stands, the rule it follows, and three small machines.

A rule is a plain function of tensors that returns *relevance per unit* of the input: relevance of x is x times that.
The machines below let PyTorch's autograd carry a rule, whatever kind of op it belongs to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..numerics import LOW, widened
from .journal import CONSTANT, POSITIONS, Journal, Rows

Rule = Callable[..., Any]


@dataclass
class Call:
    """One intercepted call.

    `func` is the torch function as the model called it, `kind` its row of the table, `path` the module it was called
    in, `rule` what the composite says for it. `origin` names a constant ("position embeddings"); `retrace` runs a
    function so that the torch calls inside it are intercepted in their turn; `rows`, where known, those of the batch;
    `open` keeps a fused attention from staying fused, for those who want its pattern. `positions`: a bias of relative
    positions among the scores of a fused attention is to be booked as such, not with the softmax. `scores`: the operand
    is attention scores. `fetch` gives what brings a weight back that is kept elsewhere when it is not used.
    """

    func: Callable[..., Any]
    kind: str
    path: str
    rule: Rule
    journal: Journal | None = None
    origin: Callable[[Tensor], str] = field(default=lambda tensor: CONSTANT)
    retrace: Callable[[Callable[..., Any]], Any] = field(default=lambda function: function())
    rows: Rows | None = None
    open: bool = False
    positions: bool = False
    scores: bool = False
    fetch: Callable[[Tensor], Callable[[], Tensor] | None] = field(default=lambda weight: None)

    @property
    def writes(self) -> bool:
        """Whether the function writes into its first argument: `add_`, `__iadd__`."""
        name = getattr(self.func, "__name__", "")
        return name.startswith("__i") if name.endswith("__") else name.endswith("_")

    def constant(self, constant: Tensor | float, output: Tensor, name: str | None = None) -> None:
        """Book a constant added at `output`, under its own name where it has one."""
        if self.journal is not None and output.requires_grad:
            if name is None:
                name = self.origin(constant) if isinstance(constant, Tensor) else CONSTANT
            if self.scores and name == CONSTANT and isinstance(constant, Tensor) and biases(constant):
                name = POSITIONS
            self.journal.constant(name, constant, output)
            if name == POSITIONS:
                self.journal.position(constant, output, scores=self.scores)

    def booked(self, name: str, inputs: list[Tensor], run: Callable[..., Tensor]) -> Tensor:
        """`run(*inputs)` with what it does not pass on booked under `name`."""
        if self.journal is None:
            return run(*inputs)
        aliases = [x.view_as(x) for x in inputs]
        output = run(*aliases)
        if output.requires_grad:
            self.journal.difference(name, output, [x for x in aliases if x.requires_grad])
        return output


MASKED = -5e3
"""Below this a score is left out: models write -10000, the least number of their dtype, or -inf."""


def biases(constant: Tensor) -> bool:
    """Whether a constant that is added to attention scores tells keys apart, as ALiBi does, and is no mask, which only
    leaves some of them out.
    """
    if not constant.is_floating_point() or constant.numel() < 2:
        return False
    kept = constant > MASKED
    return bool((kept & (constant != 0)).any())


@dataclass(eq=False)
class Turn:
    """Whose turn the next backward pass is: the rules', or, with `plain`, the gradient's."""

    plain: bool = False


@dataclass(frozen=True, eq=False)
class Alternating:
    """A rule of linear maps that gives way to the plain gradient whenever it is the gradient's turn."""

    rule: Rule
    turn: Turn

    def __call__(self, *tensors: Any) -> Any:
        return self.rule(*tensors)


def dependent(value: Any) -> bool:
    """Whether `value` is a tensor that the explained input reaches."""
    return isinstance(value, Tensor) and value.requires_grad


def wide(ctx: Any, y: Tensor) -> Tensor:
    """`y`, the result of an autograd function, whose relevance per unit is to arrive in float32 if it is in less."""
    if y.dtype in LOW:
        ctx.set_output_grad_dtype(torch.float32)
    return y


class Scaled(Function):
    """The identity, whose gradient is multiplied by a constant factor, unless it is the plain gradient's turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, turn: Turn | None) -> Tensor:
        ctx.factor, ctx.turn = factor, turn
        return wide(ctx, x.view_as(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g if ctx.turn is not None and ctx.turn.plain else g * ctx.factor, None, None


class Unary(Function):
    """y = run(x) under a rule g_x = rule(x, y, g_y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], rule: Rule, journal: Journal | None,
                name: str) -> Tensor:
        y = run(x)
        y = y.clone() if y is x or y._is_view() else y  # a view made in here could not be updated in place
        ctx.save_for_backward(x)
        # the model may write into y, which no backward pass of its own may need: then it is computed again
        ctx.y, ctx.version, ctx.run = y.detach(), y._version, run
        ctx.rule, ctx.journal, ctx.name = rule, journal, name
        return wide(ctx, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, = ctx.saved_tensors
        x, y = widened(x), widened(ctx.y if ctx.y._version == ctx.version else ctx.run(x))
        g_x = ctx.rule(x, y, g)
        if ctx.journal is not None:
            ctx.journal.book(ctx.name, ctx.journal.dot(g, y) - ctx.journal.dot(g_x, x))
        return g_x, None, None, None, None


class Binary(Function):
    """y = run(a, b) under a rule g_a, g_b = rule(a, b, y, g_y). y is computed again on the way back, not kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor], rule: Rule,
                journal: Journal | None, name: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.run, ctx.rule, ctx.journal, ctx.name = run, rule, journal, name
        return wide(ctx, run(a, b))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        a, b = ctx.saved_tensors
        a, b = widened(a), widened(b)
        y = ctx.run(a, b)
        g_a, g_b = ctx.rule(a, b, y, g)
        if ctx.journal is not None:
            dot = ctx.journal.dot
            ctx.journal.book(ctx.name, dot(g, y) - dot(g_a, a) - dot(g_b, b))
        return g_a, g_b, None, None, None, None


class Plain(Function):
    """y = run(*xs) by a gradient of its own, g -> one for each x, which is computed and passed on in float32 where y is
    in less. Of ops that torch would differentiate as well, but in y's dtype.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], back: Callable[[Tensor], tuple[Tensor | None, ...]],
                *xs: Tensor) -> Tensor:
        ctx.back = back
        return wide(ctx, run(*xs))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.back(g)


def offered(leaf: Tensor) -> Tensor:
    """A copy of an explained tensor for the model, which may update its input in place; relevance per unit arrives at
    the leaf in float32 at least.
    """
    if leaf.dtype not in LOW:
        return leaf.clone()
    leaf.grad_dtype = torch.float32
    return Plain.apply(torch.clone, lambda g: (g,), leaf)


def cast(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x), which is x in another dtype, whose relevance per unit is not rounded to the lesser of the two."""
    return Plain.apply(run, lambda g: (g,), x)


def scaled(x: Tensor, factor: float, turn: Turn | None = None) -> Tensor:
    """`x`, whose relevance per unit is multiplied by `factor` on the way back; with a `turn`, its gradient is not."""
    return Scaled.apply(x, factor, turn) if x.requires_grad and factor != 1 else x


def plain(call: Call, *args: Any, **kwargs: Any) -> Any:
    """The call as it is: its gradient is its rule. Data movement, and every op that is linear in one input."""
    return call.func(*args, **kwargs)
