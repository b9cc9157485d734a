"""Sums of two terms: skip connections, position embeddings, masks and biases.

References: Bach et al. 2015 (On pixel-wise explanations), Achtibat et al. 2024 (AttnLRP, eq. 8), Chefer et al. 2021
(Transformer interpretability beyond attention visualization, eqs. 9 and 10), Chefer et al. 2021b (Generic
attention-model explainability, its code).
"""

from typing import Any

import torch
from torch import Tensor

from ..numerics import LOW, stabilize
from .call import Binary, Call, Plain, Rule, Unary, dependent
from .journal import STABILIZER, Rows
from .split import Split, led


def zero(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """R_a = a R / (a + b): both terms keep the relevance per unit of their sum (Achtibat et al. 2024, eq. 8, eps = 0).

    Strictly conservative. The machine runs it as the plain gradient.
    """
    return g, g


def epsilon(a: Tensor, b: Tensor, y: Tensor, g: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """R_a = a R / (y + eps sign y) (Bach et al. 2015, eq. 58; Achtibat et al. 2024, eq. 8).

    Conserves up to the stabilizer, which is large only where the terms cancel.
    """
    g = g * y / stabilize(y, eps)
    return g, g


def ratio(a: Tensor, b: Tensor, y: Tensor, g: Tensor, *, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """The terms share in proportion to |sum of their relevance| (Chefer et al. 2021, eqs. 9 and 10).

    R_a = a R / (a + b) times |A| / (|A| + |B|) sum R / A, with A the sum of a R / (a + b) over a row, so that the sum
    of R_a is |A| / (|A| + |B|) sum R; this keeps large terms of opposite sign from blowing up. The original sums over
    the whole batch, so that a map depends on what else was in it; here every row stands alone. Strictly conservative
    for each row.
    """
    A, B = ((t * g).flatten(1).sum(1) for t in (a, b))
    total = A + B
    share = A.abs() / stabilize(A.abs() + B.abs(), eps)
    as_rows = (-1,) + (1,) * (g.dim() - 1)
    factor_a = (share * total / stabilize(A, eps)).reshape(as_rows)
    factor_b = ((1 - share) * total / stabilize(B, eps)).reshape(as_rows)
    return g * factor_a, g * factor_b


def ratio_of_all(a: Tensor, b: Tensor, y: Tensor, g: Tensor, *, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """`ratio`, also where one term is a constant, such as position embeddings (Chefer et al. 2021, their code).

    R_a = a R / (a + b) times |A| / (|A| + |B|) sum R / A, with A the sum of a R / (a + b) over a row, so that a
    constant takes |B| / (|A| + |B|) of the row's R. Conserves up to what constants take.
    """
    return ratio(a, b, y, g, eps=eps)


def ratio_of_moving(a: Tensor, b: Tensor, y: Tensor, g: Tensor, *, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """`ratio`; where one term is a constant, such as position embeddings, the other takes it all (Chefer et al. 2021b,
    their code for DETR).

    R_a = R_(a + b) where b is a constant. Strictly conservative, except where such an a is exactly zero.
    """
    return ratio(a, b, y, g, eps=eps)


def _passed(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """R_a = R, R_b = 0."""
    return (y * g / a).masked_fill_(a == 0, 0), torch.zeros_like(g)


BESIDE_CONSTANTS: dict[Rule, Rule] = {ratio_of_all: ratio_of_all, ratio_of_moving: _passed}
"""Rules that say how a term shares with a constant, second; by every other rule a constant keeps b R / (a + b)."""


def by_row(rule: Rule, rows: Rows) -> Rule:
    """The rule on tensors that hold the rows of the batch first, wherever the model has them, (B, M)."""
    def moved(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        dim = rows.dim(g, sure=True)
        if dim is None:  # what comes out of it is not used
            return rule(a, b, y, g)
        shape = g.movedim(dim, 0).shape
        shares = rule(*(t.movedim(dim, 0).reshape(rows.count, -1) for t in (a, b, y, g)))
        return tuple(share.reshape(shape).movedim(0, dim) for share in shares)

    return moved


def add(call: Call, input: Tensor, other: Any, *, alpha: float = 1, out: None = None) -> Tensor:
    """`torch.add`, `+`, `+=`: a constant term absorbs, two dependent ones share."""
    return _sum(call, input, other, alpha, lambda a, b: call.func(a, b, alpha=alpha) if alpha != 1 else call.func(a, b))


def sub(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """`torch.sub`, `-`: a + (-b)."""
    return _sum(call, input, other, -alpha,
                lambda a, b: call.func(a, b, alpha=alpha) if alpha != 1 else call.func(a, b))


def rsub(call: Call, input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """`torch.rsub`, `1 - x`: the second operand less the first."""
    y = call.func(input, other) if alpha == 1 else call.func(input, other, alpha=alpha)
    if dependent(other):
        return y
    call.constant(other, y)
    return y


def addcmul(call: Call, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """`torch.addcmul`: input + value tensor1 tensor2, as separate calls."""
    return call.retrace(lambda: torch.add(input, torch.mul(tensor1, tensor2), alpha=value))


def addcdiv(call: Call, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """`torch.addcdiv`: input + value tensor1 / tensor2, as separate calls."""
    return call.retrace(lambda: torch.add(input, torch.div(tensor1, tensor2), alpha=value))


def lerp(call: Call, input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """`torch.lerp`: (1 - weight) input + weight end, as separate calls."""
    return call.retrace(lambda: torch.add(torch.mul(input, 1 - weight), torch.mul(end, weight)))


def _sum(call: Call, a: Any, b: Any, sign: float, run: Any) -> Tensor:
    """run(a, b) = a + sign b."""
    if dependent(a) and dependent(b):
        if call.rule is zero:
            return _plain(call, a, b, sign, run)
        a_full, b_full = torch.broadcast_tensors(a, b)
        b_full = b_full if sign == 1 else b_full * sign
        rule = call.rule if call.rows is None else by_row(call.rule, call.rows)
        run = _known if torch.result_type(a_full, b_full) in LOW else torch.add
        return Binary.apply(a_full, b_full, run, rule, call.journal, STABILIZER)
    name = call.origin(b) if isinstance(b, Tensor) and dependent(a) else None
    if call.rule in BESIDE_CONSTANTS and isinstance(a, Tensor) and isinstance(b, Tensor) and not _masks(b, a):
        return _with_constant(call, a, b, sign, run)
    constant = (b if sign == 1 else b * sign) if dependent(a) else a
    y = _plain(call, a, b, sign, run)
    call.constant(constant, y, name)
    return y


def _known(a: Tensor, b: Tensor) -> Tensor:
    """a + b; in float32, as the way back sees terms of a low dtype, a sum that is exactly zero counts as half a unit in
    the last place of its terms: rounded as they are, it is not known to be zero, and a rule would lose all of it.
    """
    y = a + b
    if y.dtype in LOW:
        return y
    return y.where(y != 0, torch.maximum(a.abs(), b.abs()) * (torch.finfo(torch.bfloat16).eps / 2))


def _plain(call: Call, a: Any, b: Any, sign: float, run: Any) -> Tensor:
    """run(a, b) by its gradient, which in the stream of a model that adds in less than float32 is added up in that."""
    if call.writes or torch.result_type(a, b) not in LOW:
        return run(a, b)
    moving = [(t, factor) for t, factor in ((a, 1), (b, sign)) if dependent(t)]
    shapes = [(t.shape, factor) for t, factor in moving]

    def back(g: Tensor) -> tuple[Tensor, ...]:
        return tuple((g if factor == 1 else g * factor).sum_to_size(shape) for shape, factor in shapes)

    def filled(*xs: Tensor) -> Tensor:
        source = iter(xs)
        return run(*(next(source) if dependent(t) else t for t in (a, b)))

    return Plain.apply(filled, back, *(t for t, _ in moving))


def _with_constant(call: Call, a: Tensor, b: Tensor, sign: float, run: Any) -> Tensor:
    """run(a, b) = a + sign b, one of them a constant that shares by a rule of its own."""
    constant, rule = b * sign if dependent(a) else a, BESIDE_CONSTANTS[call.rule]
    rule = rule if call.rows is None else by_row(rule, call.rows)

    def of_moving(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        full = constant.expand(g.shape)
        return rule(x.expand(g.shape), full, y, g)[0].sum_to_size(x.shape)

    moving = a if dependent(a) else b
    name = call.origin(b if dependent(a) else a)
    return Unary.apply(moving, lambda x: run(x, b) if dependent(a) else run(a, x), of_moving, call.journal, name)


def _masks(*terms: Tensor) -> bool:
    """Whether the constant among the terms is a mask: 0, or so low that a softmax leaves nothing. It takes nothing."""
    constant = next(t for t in terms if not dependent(t))
    return bool(((constant == 0) | (constant < -1e3)).all())


# -- forward ---------------------------------------------------------------------------------------------------------

def split_sum(call: Split, a: Any, b: Any, *, alpha: float = 1, sign: float = 1) -> Tensor:
    """`torch.add`, `+`, forward: rel_a + rel_b. A constant is irrelevant, but for a bias, one number a feature, which
    is shared as that of a linear map.
    """
    dims = max(t.dim() for t in (a, b) if isinstance(t, Tensor))
    parts = [(None if part is None else led(part, dims)) for part in (call.rel(a), call.rel(b))]
    factor = alpha * sign
    if parts[0] is not None and parts[1] is not None:
        return torch.add(*parts, alpha=factor)
    part, constant = (parts[0], b) if parts[1] is None else (parts[1] * factor if factor != 1 else parts[1], a)
    part = part.expand(part.shape[0], *call.output.shape)
    if not (isinstance(constant, Tensor) and constant.dim() == 1 and constant.is_floating_point() and dims > 1):
        return part
    constant = constant * factor if parts[1] is None else constant
    return part + call.constant(part, call.output - constant, constant)


def split_sub(call: Split, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
    """`torch.sub`, `-`, forward."""
    return split_sum(call, a, b, alpha=alpha, sign=-1)


def split_rsub(call: Split, a: Tensor, b: Any, *, alpha: float = 1) -> Tensor:
    """`torch.rsub`, forward: b - alpha a."""
    return split_sum(call, b, a, alpha=alpha, sign=-1)
