"""Linear maps z = x W + b: the rules shared by linear layers and convolutions, and the linear layer itself.

Every rule takes x, y = x W + b, the relevance per unit g of y (relevance of y is y g) and the map, and returns the
relevance per unit of x and, entry by entry of y, the relevance that the bias took. The products with |W| come from
x+ W+ + x- W- = (x W + |x| |W|) / 2 and x+ W- + x- W+ = (x W - |x| |W|) / 2, so that one extra product serves a rule.
Flat, w-square, z-box and grounded rules give relevance to entries that are exactly zero: the input keeps it, further
up it cannot be carried on and the stabilizer takes it.

References: Bach et al. 2015 (On pixel-wise explanations), Montavon et al. 2017 (Deep Taylor decomposition),
Montavon et al. 2019 (Layer-wise relevance propagation: an overview), Lapuschkin et al. 2019 (Unmasking Clever Hans
predictors), Chefer et al. 2021 (Transformer interpretability beyond attention visualization), Chefer et al. 2021b
(Generic attention-model explainability, its code), Andéol et al. 2022 (Learning domain invariant representations by
joint Wasserstein distance minimization).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..numerics import EPS, LOW, stabilize, through, widened
from .call import Alternating, Call, Rule, dependent, wide
from .journal import BIAS, STABILIZER, Journal, Rows
from .split import Split, difference


@dataclass(frozen=True)
class Affine:
    """A linear map: `product(x, W)` gives x W, `transpose(s, W)` its adjoint.

    `bias` broadcasts to the output; `outputs` is the dimension of W that counts them, if y has them last.
    """

    product: Callable[[Tensor, Tensor], Tensor]
    transpose: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None = None
    outputs: int | None = None

    @property
    def low(self) -> bool:
        """Whether products are rounded to less than float32, in which the rules are computed."""
        return self.weight.dtype in LOW

    def widened(self) -> "Affine":
        """The same map of tensors in float32, where its own are in less: products of matrices stay what they are."""
        if not self.low:
            return self

        def of(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda t, W: through(lambda t: run(t, W), t, W.dtype)

        return replace(self, product=of(self.product), transpose=of(self.transpose),
                       bias=None if self.bias is None else widened(self.bias))

    def adjoint(self, g: Tensor) -> Tensor:
        """g W^T: relevance per unit of x under LRP-0, by the rows of g that hold any."""
        return _sparse(self, g)

    def bias_part(self, part: Callable[[Tensor], Tensor]) -> Tensor | float:
        """`part` (positive, negative ...) of the bias; 0 without one."""
        return 0.0 if self.bias is None else part(self.bias)


@dataclass(frozen=True, eq=False)
class Fetched:
    """A linear map whose weight is elsewhere until it is used, so that it is not held on to for the way back."""

    affine: Affine
    """Without a weight."""
    fetch: Callable[[], Tensor]

    @property
    def bias(self) -> Tensor | None:
        return self.affine.bias

    @property
    def outputs(self) -> int | None:
        return self.affine.outputs

    def widened(self) -> Affine:
        """The map, with its weight."""
        return replace(self.affine, weight=self.fetch()).widened()

    def again(self, x: Tensor) -> Tensor:
        """x W + b once more."""
        y = self.affine.product(x, self.fetch())
        return y if self.bias is None else y + self.bias


class Shares(NamedTuple):
    """What a rule returns: relevance per unit of x, and the relevance of the bias entry by entry of y (or None)."""

    x: Tensor
    bias: Tensor | None


def positive(t: Tensor) -> Tensor:
    """max(t, 0)"""
    return t.clamp(min=0)


def negative(t: Tensor) -> Tensor:
    """min(t, 0)"""
    return t.clamp(max=0)


_SCRATCH = threading.local()
SCRATCH = 1 << 24
"""Entries of the largest weight whose magnitude is put into memory that is kept: 64 MiB in float32."""


def absolute(W: Tensor) -> Tensor:
    """|W|, valid until the next call: the memory is used again, since pages that are new cost as much as a product."""
    if W.numel() > SCRATCH or W.device.type != "cpu":
        return W.abs()
    kept = getattr(_SCRATCH, "entries", None)
    if kept is None or kept.dtype != W.dtype or kept.numel() < W.numel():
        kept = _SCRATCH.entries = torch.empty(W.numel(), dtype=W.dtype)
    return torch.abs(W, out=kept[:W.numel()].view(W.shape))


def quotient(numerator: Tensor, part: Tensor, magnitude: Tensor, eps: float | None) -> Tensor:
    """numerator / stabilize(part), 0 where there is no such part: where all contributions have the other sign,
    (x W ± |x| |W|) / 2 is nothing but the rounding of what cancels in it, as the sums that follow would be.
    `magnitude`: of all that was added up, the bias with it. The result takes the memory of the numerator.
    """
    absent = part.abs() <= magnitude.mul(8 * torch.finfo(part.dtype).eps)
    return numerator.div_(stabilize(part, eps)).masked_fill_(absent, 0)


def zero(x: Tensor, y: Tensor, g: Tensor, affine: Affine) -> Shares:
    """LRP-0: R_i = sum_j x_i w_ij R_j / z_j, which is gradient x input (Bach et al. 2015, eq. 56).

    Conserves up to the bias, which takes b_j R_j / z_j. The machine runs it as the plain gradient.
    """
    return Shares(affine.transpose(g, affine.weight), None if affine.bias is None else affine.bias * g)


def epsilon(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, eps: float = 1e-6) -> Shares:
    """LRP-epsilon: R_i = sum_j x_i w_ij R_j / (z_j + eps sign z_j) (Bach et al. 2015, eq. 58).

    Conserves up to the bias and the stabilizer's part R_j eps / (|z_j| + eps). A larger eps drops faint contributions.
    """
    return zero(x, y, g * (y / stabilize(y, eps)), affine)


def gamma(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, gamma: float = 0.25, eps: float | None = None,
          bias: bool = True) -> Shares:
    """LRP-gamma for inputs and outputs of either sign: favours what pushes the output the way it went.

    Where z_j > 0: R_i = [x_i+ (w + gamma w+) + x_i- (w + gamma w-)] R_j / (sum of the same); where z_j < 0 with w+
    and w- swapped (Montavon et al. 2019, eq. 10.2, in the signed form of Andéol et al. 2022 that zennit uses).
    Conserves up to the bias (b + gamma b+, or b + gamma b-) and the stabilizer. gamma = 0 is LRP-0; large gamma
    tends to z-plus. With `bias` False the bias is left out of the denominator, and all relevance goes to the inputs.
    """
    W, W_abs, side = affine.weight, absolute(affine.weight), y.sign()
    magnitude = affine.product(x.abs(), W_abs)
    z0 = y - affine.bias_part(lambda b: b)
    z = (1 + gamma / 2) * z0 + (gamma / 2) * side * magnitude
    b = affine.bias_part(lambda b: b + gamma * torch.where(y > 0, positive(b), negative(b))) if bias else 0.0
    s = y * g / stabilize(z + b, eps)
    g_x = (1 + gamma / 2) * affine.transpose(s, W) + (gamma / 2) * x.sign() * affine.transpose(side * s, W_abs)
    return Shares(g_x, b * s if isinstance(b, Tensor) else None)


def z_plus(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, eps: float | None = None, bias: bool = False) -> Shares:
    """z-plus: R_i = sum_j (x_i+ w_ij+ + x_i- w_ij-) R_j / z_j, z_j the same summed over i (Montavon et al. 2017,
    eq. 13, with Chefer et al. 2021's second term for signed inputs).

    Strictly conservative where some contribution is positive. With `bias`, b+ joins the denominator (zennit's form).
    """
    if affine.low:
        return _z_plus_by_sign(x, y, g, affine, eps, bias)
    W, W_abs, eps = affine.weight, absolute(affine.weight), EPS[x.dtype] if eps is None else eps
    b = affine.bias_part(positive) if bias else 0.0
    z = affine.product(x.abs(), W_abs).add_(y).add_(2 * b - affine.bias_part(lambda b: b))  # twice what is positive
    # z <= rounding (|x| |W| + |b|): nothing is positive, see `quotient`; |x| |W| is z less the rest
    rounding = 16 * torch.finfo(x.dtype).eps
    s = torch.add(z, y, alpha=rounding)
    absent = s <= 2 * rounding * (affine.bias_part(positive) - b)
    s = torch.mul(y, g, out=s).div_(z.add_(2 * eps)).masked_fill_(absent, 0)
    g_x = affine.transpose(s, W_abs).mul_(x.sign()).add_(affine.transpose(s, W))
    return Shares(g_x, 2 * b * s if isinstance(b, Tensor) else None)


def _by_sign(x: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """x+ W+ + x- W- and x+ W- + x- W+, four products in which nothing cancels: what is left of a difference of products
    that are rounded to bfloat16 would be rounding.
    """
    W_pos, W_neg = positive(affine.weight), negative(affine.weight)
    x_pos, x_neg = positive(x), negative(x)
    return (affine.product(x_pos, W_pos) + affine.product(x_neg, W_neg),
            affine.product(x_pos, W_neg) + affine.product(x_neg, W_pos))


def _back_by_sign(x: Tensor, s_pos: Tensor, s_neg: Tensor | None, affine: Affine) -> Tensor:
    """What s passes back: s_pos through contributions that are positive, s_neg through those that are negative."""
    parts = [affine.transpose(s_pos, W) for W in (positive(affine.weight), negative(affine.weight))]
    if s_neg is not None:
        parts = [part + affine.transpose(s_neg, W)
                 for part, W in zip(parts, (negative(affine.weight), positive(affine.weight)), strict=True)]
    return torch.where(x > 0, *parts).where(x != 0, (parts[0] + parts[1]) / 2)


def _z_plus_by_sign(x: Tensor, y: Tensor, g: Tensor, affine: Affine, eps: float | None, bias: bool) -> Shares:
    """`z_plus` of a map whose products are rounded to less than float32."""
    b = affine.bias_part(positive) if bias else 0.0
    z = _by_sign(x, affine)[0] + b
    s = (y * g / stabilize(z, eps)).masked_fill_(z == 0, 0)
    return Shares(_back_by_sign(x, s, None, affine), b * s if isinstance(b, Tensor) else None)


def z_plus_whole(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, eps: float | None = None) -> Shares:
    """`z_plus`, with each row of the batch brought to the sum of its R (Chefer et al. 2021b, their code for DETR).

    R_i = R_i' sum_j R_j / sum_i R_i' with R' that of z-plus and sums over all of a row: what outputs without a positive
    contribution had is shared by all inputs. Strictly conservative, unless z-plus leaves nothing of a row. x (B, ...).
    """
    found = z_plus(x, y, g, affine, eps=eps).x
    wanted, got = ((t * per_unit).flatten(1).sum(1) for t, per_unit in ((y, g), (x, found)))
    factor = (wanted / got).masked_fill_(got == 0, 0)
    return Shares(found * factor.reshape(-1, *(1,) * (x.dim() - 1)), None)


def alpha_beta(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, alpha: float = 2.0, beta: float = 1.0,
               eps: float | None = None, bias: bool = True) -> Shares:
    """LRP-alpha-beta: R_i = sum_j (alpha z_ij+ / z_j+ - beta z_ij- / z_j-) R_j with z_ij = x_i w_ij and z_j the same
    summed over i, and alpha - beta = 1 (Bach et al. 2015, eq. 60).

    Conserves up to the bias where both parts are present. Raises: ValueError if alpha - beta is not 1.
    """
    if abs(alpha - beta - 1) > 1e-9:
        raise ValueError(f"alpha - beta must be 1, or relevance is not conserved; got {alpha} - {beta}")
    b_pos, b_neg = (affine.bias_part(positive), affine.bias_part(negative)) if bias else (0.0, 0.0)
    if affine.low:
        z_pos, z_neg = _by_sign(x, affine)
        s_pos = (alpha * y * g / stabilize(z_pos + b_pos, eps)).masked_fill_(z_pos + b_pos == 0, 0)
        s_neg = (beta * y * g / stabilize(z_neg + b_neg, eps)).masked_fill_(z_neg + b_neg == 0, 0)
        taken = b_pos * s_pos - b_neg * s_neg if isinstance(b_pos, Tensor) else None
        return Shares(_back_by_sign(x, s_pos, -s_neg, affine), taken)
    W, W_abs = affine.weight, absolute(affine.weight)
    z0, magnitude = y - affine.bias_part(lambda b: b), affine.product(x.abs(), W_abs)
    size = magnitude + affine.bias_part(torch.abs)
    s_pos = quotient(alpha * y * g, (z0 + magnitude) / 2 + b_pos, size, eps)
    s_neg = quotient(beta * y * g, (z0 - magnitude) / 2 + b_neg, size, eps)
    g_x = affine.transpose(s_pos - s_neg, W) + x.sign() * affine.transpose(s_pos + s_neg, W_abs)
    return Shares(g_x / 2, b_pos * s_pos - b_neg * s_neg if isinstance(b_pos, Tensor) else None)


def flat(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, eps: float | None = None) -> Shares:
    """Flat rule: R_i = sum_j R_j / n_j, n_j the number of inputs of output j (Lapuschkin et al. 2019, x = w = 1).

    Strictly conservative; says where, not what. For the first layer only: it looks neither at x nor at W.
    """
    ones = torch.ones_like(affine.weight)
    s = y * g / stabilize(affine.product(torch.ones_like(x), ones), eps)
    return Shares(affine.transpose(s, ones) / stabilize(x), None)


def w_square(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, eps: float | None = None, bias: bool = True) -> Shares:
    """w-square: R_i = sum_j w_ij^2 R_j / sum_i w_ij^2 (Montavon et al. 2017, eq. 12), for unbounded input domains.

    Conserves up to the bias's b^2, which joins the denominator unless `bias` is False.
    """
    W = affine.weight.square()
    b = affine.bias_part(torch.square) if bias else 0.0
    s = y * g / stabilize(affine.product(torch.ones_like(x), W) + b, eps)
    return Shares(affine.transpose(s, W) / stabilize(x), b * s if isinstance(b, Tensor) else None)


def z_box(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, low: Tensor | float | None = None,
          high: Tensor | float | None = None, eps: float | None = None) -> Shares:
    """z-box: R_i = sum_j (x_i w_ij - l_i w_ij+ - h_i w_ij-) R_j / z_j for inputs bounded by l and h (Montavon et al.
    2017, eq. 14), the Deep Taylor rule for pixels.

    `low` and `high` broadcast to x; None takes each row's own least and greatest entry (Chefer et al. 2021).
    Strictly conservative: the bias cancels out of the bounded form. Computed as (x - l) w+ + (x - h) w-, whose terms
    have one sign, so that nothing cancels where the pixels stand at a bound.
    """
    rows = (x.shape[0],) + (1,) * (x.dim() - 1)
    low = x.flatten(1).amin(1).reshape(rows) if low is None else torch.as_tensor(low, dtype=x.dtype, device=x.device)
    high = x.flatten(1).amax(1).reshape(rows) if high is None else torch.as_tensor(high, dtype=x.dtype, device=x.device)
    above, below, W_pos, W_neg = x - low, x - high, positive(affine.weight), negative(affine.weight)
    s = y * g / stabilize(affine.product(above, W_pos) + affine.product(below, W_neg), eps)
    share = above * affine.transpose(s, W_pos) + below * affine.transpose(s, W_neg)
    return Shares(share / stabilize(x), None)


def grounded(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, rule: Rule = zero,
             ground: Tensor | float | None = None, eps: float | None = None) -> Shares:
    """Another rule, expanded at the ground m of a picture instead of at zero: what stands out from it is relevant.

    R_i = (x_i - m_i) R'_i / x_i, R' what `rule` gives; of LRP-0, sum_j (x_i - m_i) w_ij R_j / z_j, a Taylor expansion
    at m (Montavon et al. 2017, eq. 2, the root given). A pixel of the ground's own colour gets nothing. Zero, where
    other rules start, is just another grey of a normalised picture. Conserves as `rule` does, up to the ground's part
    sum_i m_i R'_i / x_i, which is a constant's and booked with the bias. For pixels.

    Args: rule: of the same map. ground: broadcasts to x; None takes each row's own median colour (where the channels
        are not known, its median entry), what `check.removal` puts in the place of a patch.
    """
    m = _median(x, affine) if ground is None else torch.as_tensor(ground, dtype=x.dtype, device=x.device)
    shares = Shares(*rule(x, y, g, affine))
    kept = (m * shares.x).flatten(1).sum(1).reshape(-1, *[1] * (y.dim() - 1)) / y[0].numel()  # evenly over y
    taken = kept.expand_as(y) if shares.bias is None else kept + shares.bias
    return Shares(shares.x * (x - m) / stabilize(x, eps), taken)


def _median(x: Tensor, affine: Affine) -> Tensor:
    """Of each row, and each channel of pixels (B, C, Y, X)."""
    kept = 2 if affine.outputs is None and x.dim() == 4 else 1
    return x.flatten(kept).median(-1).values.reshape(x.shape[:kept] + (1,) * (x.dim() - kept))


def z_plus_apart(x: Tensor, y: Tensor, g: Tensor, affine: Affine, *, eps: float | None = None) -> Shares:
    """R_i = x_i+ sum_j w_ij+ R_j / z_j' + x_i- sum_j w_ij- R_j / z_j'', each of the two parts divided by its own sum.

    The LRP baseline in the code of Chefer et al. 2021 ("partial LRP"). Not conservative: R counts once for each part
    that is there, so that it about doubles in every map. For comparison with published numbers only; see `z_plus`.
    """
    W, found = affine.weight, 0
    for part in (positive, negative):
        z = affine.product(part(x), part(W))
        s = (y * g / stabilize(z, eps)).masked_fill_(z == 0, 0)
        found = found + affine.transpose(s, part(W)).masked_fill_(part(x) == 0, 0)
    return Shares(found, None)


ROW_BY_ROW = frozenset({zero, epsilon, gamma, z_plus, z_plus_apart, alpha_beta, flat, w_square})
"""Rules that look at one row of x at a time, so that rows without relevance may be left out."""
OF_WHOLE_ROWS = frozenset({z_plus_whole})
"""Rules that look at all that belongs to a row of the batch, which has to come first."""


def by_row(rule: Rule, rows: Rows) -> Rule:
    """The rule of a linear layer on tensors that hold the rows of the batch first, wherever the model has them."""
    if isinstance(rule, Alternating):
        return replace(rule, rule=by_row(rule.rule, rows))

    def moved(x: Tensor, y: Tensor, g: Tensor, affine: Affine) -> Shares:
        dim = rows.dim(g, sure=True)
        if dim is None:  # what comes out of it is not used
            return rule(x, y, g, affine)
        shape = x.movedim(dim, 0).shape
        whole = (t.movedim(dim, 0).reshape(rows.count, -1, t.shape[-1]) for t in (x, y, g))
        return Shares(rule(*whole, affine).x.reshape(shape).movedim(0, dim), None)

    return moved


def _inner(rule: Rule) -> Rule:
    """The function itself, without its options."""
    inner = rule.rule if isinstance(rule, Alternating) else rule
    return inner.func if isinstance(inner, partial) else inner


class Ruled(Function):
    """y = run(x), linear in x, under one of the rules above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], affine: Affine, rule: Rule,
                journal: Journal | None) -> Tensor:
        y = run(x)
        ctx.save_for_backward(x)
        # the model may write into y, which no backward pass of its own needs: then it is computed again
        ctx.y, ctx.version = y.detach(), y._version
        ctx.run = affine.again if isinstance(affine, Fetched) else run
        ctx.affine, ctx.rule, ctx.journal = affine, rule, journal
        return wide(ctx, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        affine = ctx.affine.widened()
        if isinstance(ctx.rule, Alternating) and ctx.rule.turn.plain:
            return _sparse(affine, g), None, None, None, None
        x, = ctx.saved_tensors
        y = ctx.y if ctx.y._version == ctx.version else ctx.run(x)
        x, y = widened(x), widened(y)
        shares = _by_used_rows(ctx.rule, x, y, g, affine)
        g_x, taken = shares if isinstance(shares, tuple) else (shares, None)
        if ctx.journal is not None:
            rest = ctx.journal.dot(g, y) - ctx.journal.dot(g_x, x)
            if taken is not None:
                of_bias = ctx.journal.dot(taken, torch.ones_like(taken[:1, ..., :1]))
                ctx.journal.book(BIAS, of_bias)
                rest = rest - of_bias
            ctx.journal.book(STABILIZER, rest)
        return g_x, None, None, None, None


class Sparse(Function):
    """y = run(x) under `zero`: rows and outputs without relevance are left out of the product.

    There are many: all positions but one at the head of a language model, all tokens but the class token in the last
    layer of a vision model, the queries and keys of a packed projection where attention patterns are held.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], affine: Affine) -> Tensor:
        ctx.affine = affine
        return wide(ctx, run(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _sparse(ctx.affine.widened(), g), None, None


def _sparse(affine: Affine, g: Tensor) -> Tensor:
    """The adjoint of the map applied to g, where most of g may be zero."""
    if affine.outputs is None:
        return affine.transpose(g, affine.weight)
    g_rows = g.reshape(-1, g.shape[-1])
    rows = _used(g_rows)
    if rows is None:
        return _transposed(affine, g)
    return _scattered(_transposed(affine, g_rows[rows]), rows, g)


def _scattered(some: Tensor, rows: Tensor, g: Tensor) -> Tensor:
    """What the given rows of g hold, among zeros, in g's shape but for the last dimension."""
    whole = some.new_zeros(g.shape[:-1].numel(), some.shape[-1])
    whole[rows] = some
    return whole.reshape(*g.shape[:-1], some.shape[-1])  # there may be no rows


def _by_used_rows(rule: Rule, x: Tensor, y: Tensor, g: Tensor, affine: Affine) -> Any:
    """The rule, without the rows of a linear layer that hold no relevance, where it takes each row by itself."""
    apart = affine.outputs is not None and _inner(rule) in ROW_BY_ROW
    rows = _used(g.reshape(-1, g.shape[-1])) if apart else None
    if rows is None:
        return rule(x, y, g, affine)
    x_rows, y_rows, g_rows = (t.reshape(-1, t.shape[-1])[rows] for t in (x, y, g))
    g_x, taken = rule(x_rows, y_rows, g_rows, affine)
    return Shares(_scattered(g_x, rows, g), None if taken is None else _scattered(taken, rows, g))


def _transposed(affine: Affine, g: Tensor) -> Tensor:
    """The adjoint of the map applied to g, without the outputs before the first and after the last that are used."""
    places, size = _used(g.reshape(-1, g.shape[-1]).T), g.shape[-1]
    if places is None or not len(places) or 3 * int(places[-1] - places[0] + 1) > 2 * size:
        return affine.transpose(g, affine.weight)
    start, stop = int(places[0]), int(places[-1]) + 1
    return affine.transpose(g[..., start:stop], affine.weight.narrow(affine.outputs, start, stop - start))


def _used(g: Tensor) -> Tensor | None:
    """Rows of a matrix that hold anything, in order; None if that is more than two thirds of them.

    A few columns tell whether it is worth looking at all of them.
    """
    few = g[:, :: max(1, g.shape[1] // 4)]
    if 3 * int((few != 0).any(1).sum()) > 2 * len(g):
        return None
    rows = torch.linalg.vector_norm(g, 1, dim=1).nonzero().squeeze(1)  # no copy of g in the making
    return None if 3 * len(rows) > 2 * len(g) else rows


def run_affine(call: Call, x: Tensor, run: Callable[[Tensor], Tensor], affine: Affine) -> Tensor:
    """The linear map under the call's rule; LRP-0 is the plain gradient with the bias booked."""
    fetch = call.fetch(affine.weight) if isinstance(affine, Affine) and affine.outputs is not None else None
    if fetch is not None:
        affine = Fetched(replace(affine, weight=None), fetch)
    if call.rule is zero:
        y = run(x) if affine.outputs is None else Sparse.apply(x, run, affine)
        if affine.bias is not None:
            call.constant(affine.bias, y, BIAS)
        return y
    together = affine.outputs is not None and call.rows is not None and _inner(call.rule) in OF_WHOLE_ROWS
    return Ruled.apply(x, run, affine, by_row(call.rule, call.rows) if together else call.rule, call.journal)


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; weights that depend on the input are a factor of a product like any other."""
    if dependent(weight) or dependent(bias):
        return call.retrace(lambda: torch.add(torch.matmul(input, weight.mT), 0 if bias is None else bias))
    affine = Affine(F.linear, lambda s, W: s @ W, weight, bias, 0)
    return run_affine(call, input, lambda x: call.func(x, weight, bias), affine)


def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.addmm`, the linear layer of GPT-2 (weight stored (in, out))."""
    if dependent(input) or dependent(mat2) or beta != 1 or alpha != 1:
        total = call.retrace(lambda: torch.add(torch.mul(input, beta), torch.mul(torch.mm(mat1, mat2), alpha)))
        return total
    affine = Affine(torch.matmul, lambda s, W: s @ W.mT, mat2, input, 1)
    return run_affine(call, mat1, lambda x: call.func(input, x, mat2), affine)


def image(call: Split, rel: Tensor, product: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
    """The relevant part of y = x W + b: rel W and the share of b that goes with it (Hsu et al. 2024, section 3).

    Args: rel: of x, (S, ...). product: x to x W, for any leading axes.
    """
    part = product(rel)
    if bias is None:
        return part
    return part + call.constant(part, call.output - bias, bias)


def split_linear(call: Split, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, forward."""
    rel = call.rel(input)
    if rel is None or call.rel(weight) is not None or call.rel(bias) is not None:
        return difference(call, input, weight, bias)
    return image(call, rel, lambda x: F.linear(x, weight), bias)


def split_addmm(call: Split, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.addmm`, forward."""
    rel = call.rel(mat1)
    if rel is None or call.rel(input) is not None or call.rel(mat2) is not None or beta != 1 or alpha != 1:
        return difference(call, input, mat1, mat2, beta=beta, alpha=alpha)
    return image(call, rel, lambda x: x @ mat2, input)
