"""What each rule says on paper, computed the slow way: every contribution made explicit, relevance in, relevance out.

An oracle knows nothing of relevance per unit, of products with |W| or of autograd. It takes one row of the batch, and
`ORACLES` holds one for each rule of the package, which `rules` finds by looking. `propagated` asks the package.
"""
from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from relprop import ops
from relprop.composite import NOT, Composite
from relprop.errors import IndependentOutput
from relprop.ops import activation, add, linear, matmul, mul, norm, pool, softmax
from relprop.relevance import propagate

Rule = Callable[..., Any]
ORACLES: dict[Rule, Callable[..., Any]] = {}

OPTIONS: dict[Rule, list[dict[str, Any]]] = {
    linear.epsilon: [{}, {"eps": 0.25}],
    linear.gamma: [{}, {"gamma": 1.5}, {"bias": False}],
    linear.z_plus: [{}, {"bias": True}],
    linear.alpha_beta: [{}, {"alpha": 1.0, "beta": 0.0}, {"alpha": 3.0, "beta": 2.0, "bias": False}],
    linear.w_square: [{}, {"bias": False}],
    linear.z_box: [{}, {"low": -3.0, "high": 4.0}, {"low": torch.tensor(0.0)}],
    linear.grounded: [{"ground": 0.3}, {"ground": torch.tensor(-1.5), "rule": partial(linear.gamma, gamma=1.5)},
                      {"ground": 0.3, "rule": linear.epsilon}],
    matmul.epsilon: [{}, {"eps": 0.25}],
    add.epsilon: [{}, {"eps": 0.25}],
    pool.epsilon: [{}, {"eps": 0.25}]}
"""Options that a rule is tested with, besides its defaults."""


def modules() -> list[ModuleType]:
    """Every module of the table."""
    return [importlib.import_module(f"{ops.__name__}.{found.name}") for found in pkgutil.iter_modules(ops.__path__)]


def rules(*where: ModuleType) -> list[Rule]:
    """The rules of some modules: their public functions that take a relevance per unit, `g`."""
    return [function for module in where for name, function in vars(module).items()
            if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
            and "g" in inspect.signature(function).parameters]


def name(rule: Rule) -> str:
    """Of a rule, for people: `linear.gamma(bias=False)`."""
    if isinstance(rule, partial):
        options = (f"{k}={name(v) if callable(v) else v}" for k, v in rule.keywords.items())
        return f"{name(rule.func)}({', '.join(options)})"
    return f"{rule.__module__.rsplit('.', 1)[-1]}.{rule.__name__}"


def variants(*where: ModuleType) -> list[Rule]:
    """The rules of some modules with each of their `OPTIONS`."""
    return [partial(rule, **options) if options else rule for rule in rules(*where)
            for options in OPTIONS.get(rule, [{}])]


def oracle(rule: Rule) -> Callable[..., Any]:
    """The oracle of a rule, with the rule's options."""
    if isinstance(rule, partial):
        return partial(ORACLES[rule.func], **rule.keywords)
    return ORACLES[rule]


def of(rule: Rule) -> Callable[[Rule], Rule]:
    """Decorates the oracle of `rule`."""
    def register(function: Rule) -> Rule:
        assert rule not in ORACLES
        ORACLES[rule] = function
        return function

    return register


# -- linear maps: x (I,), W (J, I), b (J,), R (J,) -> relevance of x (I,) and of the bias ------------------------------

def spread(parts: Tensor, constant: Tensor, R: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """R_i = sum_j parts_ji R_j / (sum_i parts_ji + constant_j), and the same for the constant. Nothing from an output
    to which nothing contributes.
    """
    of_x, of_constant = torch.zeros_like(parts[0]), torch.zeros_like(R[0])
    for j in range(len(R)):
        z = parts[j].sum() + constant[j]
        z = z + (eps if z >= 0 else -eps)
        if z != 0:
            of_x = of_x + parts[j] / z * R[j]
            of_constant = of_constant + constant[j] / z * R[j]
    return of_x, of_constant


def split(t: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative part."""
    return torch.where(t > 0, t, 0.0), torch.where(t < 0, t, 0.0)


@of(linear.zero)
def zero(x: Tensor, W: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return spread(x * W, b, R)


@of(linear.epsilon)
def epsilon(x: Tensor, W: Tensor, b: Tensor, R: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return spread(x * W, b, R, eps)


@of(linear.gamma)
def gamma(x: Tensor, W: Tensor, b: Tensor, R: Tensor, *, gamma: float = 0.25, bias: bool = True,
          ) -> tuple[Tensor, Tensor]:
    (x_pos, x_neg), (W_pos, W_neg), (b_pos, b_neg) = split(x), split(W), split(b)
    upward = x_pos * (W + gamma * W_pos) + x_neg * (W + gamma * W_neg)
    downward = x_pos * (W + gamma * W_neg) + x_neg * (W + gamma * W_pos)
    y = (x * W).sum(1) + b
    parts = torch.stack([upward[j] if y[j] > 0 else downward[j] for j in range(len(y))])
    constant = torch.where(y > 0, b + gamma * b_pos, b + gamma * b_neg)
    return spread(parts, constant if bias else torch.zeros_like(b), R)


@of(linear.z_plus)
def z_plus(x: Tensor, W: Tensor, b: Tensor, R: Tensor, *, bias: bool = False) -> tuple[Tensor, Tensor]:
    parts = x * W
    return spread(split(parts)[0], split(b)[0] if bias else torch.zeros_like(b), R)


@of(linear.z_plus_whole)
def z_plus_whole(x: Tensor, W: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    R = R.where((x * W).any(1) | (b != 0), 0.0)  # an output that nothing reaches is zero, and holds no relevance
    of_x, nothing = z_plus(x, W, b, R)
    return of_x * (sum(R.tolist()) / sum(of_x.tolist()) if of_x.any() else 0.0), nothing


@of(linear.z_plus_apart)
def z_plus_apart(x: Tensor, W: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    found = [spread(sign(x) * sign(W), torch.zeros_like(b), R)[0]
             for sign in (lambda t: split(t)[0], lambda t: split(t)[1])]
    return sum(found), torch.zeros_like(R[0])


@of(linear.alpha_beta)
def alpha_beta(x: Tensor, W: Tensor, b: Tensor, R: Tensor, *, alpha: float = 2.0, beta: float = 1.0,
               bias: bool = True) -> tuple[Tensor, Tensor]:
    parts, constant = split(x * W), split(b if bias else torch.zeros_like(b))
    (x_pos, b_pos), (x_neg, b_neg) = (spread(p, c, R) for p, c in zip(parts, constant))
    return alpha * x_pos - beta * x_neg, alpha * b_pos - beta * b_neg


@of(linear.flat)
def flat(x: Tensor, W: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return spread((W != 0).to(x.dtype), torch.zeros_like(b), R)


@of(linear.w_square)
def w_square(x: Tensor, W: Tensor, b: Tensor, R: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor]:
    return spread(W**2, b**2 if bias else torch.zeros_like(b), R)


@of(linear.z_box)
def z_box(x: Tensor, W: Tensor, b: Tensor, R: Tensor, *, low: Tensor | float | None = None,
          high: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    low, high = min(x.tolist()) if low is None else low, max(x.tolist()) if high is None else high
    W_pos, W_neg = split(W)
    return spread(x * W - low * W_pos - high * W_neg, torch.zeros_like(b), R)


@of(linear.grounded)
def grounded(x: Tensor, W: Tensor, b: Tensor, R: Tensor, *, rule: Rule = linear.zero, ground: Tensor | float,
             ) -> tuple[Tensor, Tensor]:
    of_units = []
    for tiny in (1e-100, -1e-100):  # relevance per unit of an entry that is zero, from both sides
        near = torch.where(x == 0, tiny, x)
        of_x, of_b = oracle(rule)(near, W, b, R)
        of_units.append(of_x / near)
    of_unit = sum(of_units) / 2
    return (x - ground) * of_unit, of_b + (ground * of_unit).sum()


# -- pools: the same without a bias ------------------------------------------------------------------------------------

@of(pool.zero)
def pool_zero(x: Tensor, W: Tensor, R: Tensor) -> Tensor:
    return spread(x * W, torch.zeros_like(R), R)[0]


@of(pool.epsilon)
def pool_epsilon(x: Tensor, W: Tensor, R: Tensor, *, eps: float = 1e-6) -> Tensor:
    return spread(x * W, torch.zeros_like(R), R, eps)[0]


# -- functions of one tensor: f, x (I,), R (I,) -> relevance of x ------------------------------------------------------

def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """df_j / dx_i, (J, I), by central differences of fourth order in steps that float64 resolves to some 1e-12."""
    columns = []
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = 1e-3
        near, far = f(x + step) - f(x - step), f(x + 2 * step) - f(x - 2 * step)
        further = f(x + 3 * step) - f(x - 3 * step)
        columns.append((45 * near - 9 * far + further) / 60e-3)  # sixth order
    return torch.stack(columns, 1)


def linearized(J: Tensor, x: Tensor, y: Tensor, R: Tensor) -> Tensor:
    """R_i = sum_j J_ji x_i R_j / y_j: gradient x input for a Jacobian J. An output of zero has no relevance."""
    return torch.stack([sum(J[j, i] * x[i] * R[j] / y[j] for j in range(len(y)) if y[j] != 0) for i in range(len(x))])


def plain_gradient(f: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Tensor:
    return linearized(jacobian(f, x), x, f(x), R)


def passed(f: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Tensor:
    return R.clone()


def nothing(f: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Tensor:
    return torch.zeros_like(x)


@of(activation.identity)
def activation_identity(f: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Tensor:
    """R_x = R_y, but for what f(0), a constant of the sum f(0) + (f(x) - f(0)), takes as its share."""
    y, at_zero = f(x), f(torch.zeros_like(x))
    return torch.where(y == 0, 0.0, R * (y - at_zero) / y)


of(activation.gradient)(plain_gradient)
of(activation.hold)(nothing)
of(softmax.hold)(nothing)
of(softmax.identity)(passed)
of(norm.identity)(passed)
of(norm.gradient)(plain_gradient)


@of(softmax.taylor)
def taylor(f: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Tensor:
    y = f(x)
    return torch.stack([x[i] * (R[i] - y[i] * sum(R)) if x[i] > -torch.inf else R[i] * 0 for i in range(len(x))])


@of(softmax.tempered)
def tempered(f: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Tensor:
    y, s = f(x), torch.stack([torch.exp(x_i / 2) for x_i in x])
    s = s / sum(s)
    g = torch.stack([R_i / y_i if y_i != 0 else y_i for R_i, y_i in zip(R, y)])
    return torch.stack([x[i] * s[i] * (g[i] - sum(s * g)) if x[i] > -torch.inf else R[i] * 0 for i in range(len(x))])


@of(norm.held)
def held(groups: list[list[int]], weight: Tensor, scale: Tensor, centre: bool, x: Tensor, y: Tensor,
         R: Tensor) -> Tensor:
    """y_j = (x_j - mean of x over j's group) s_j w_j + b_j with s a constant. `groups` are the entries normalised
    together.
    """
    J = torch.zeros(len(x), len(x), dtype=x.dtype)
    for group in groups:
        for j in group:
            for i in group:
                J[j, i] = ((i == j) - (1 / len(group) if centre else 0)) * scale[j] * weight[j]
    return linearized(J, x, y, R)


# -- functions of two tensors: a, b, R -> relevance of a and of b ------------------------------------------------------

def bilinear(a: Tensor, b: Tensor, R: Tensor, denominator: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Of y_ts = sum_k a_tk b_ks: each term a_tk b_ks takes its share of R_ts, and gives it to both of its factors."""
    terms = a[:, :, None] * b[None]  # (T, K, S)
    shares = terms / denominator(terms.sum(1))[:, None] * R[:, None]
    return shares.sum(2), shares.sum(0)


@of(matmul.uniform)
def matmul_uniform(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return bilinear(a, b, R, lambda y: 2 * y)


@of(matmul.epsilon)
def matmul_epsilon(a: Tensor, b: Tensor, R: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return bilinear(a, b, R, lambda y: 2 * y + torch.where(y >= 0, eps, -eps))


@of(matmul.gradient)
def matmul_gradient(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return bilinear(a, b, R, lambda y: y)


@of(add.zero)
def add_zero(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return a * R / (a + b), b * R / (a + b)


@of(add.epsilon)
def add_epsilon(a: Tensor, b: Tensor, R: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    z = a + b
    z = torch.where(z >= 0, z + eps, z - eps)
    return a * R / z, b * R / z


@of(add.ratio)
def add_ratio(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    R_a, R_b = add_zero(a, b, R)
    A, B = sum(R_a.flatten().tolist()), sum(R_b.flatten().tolist())
    total = sum(R.flatten().tolist())
    share_a, share_b = abs(A) / (abs(A) + abs(B)), abs(B) / (abs(A) + abs(B))
    return R_a / A * share_a * total, R_b / B * share_b * total


@of(add.ratio_of_all)
def add_ratio_of_all(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return add_ratio(a, b, R)


@of(add.ratio_of_moving)
def add_ratio_of_moving(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return add_ratio(a, b, R)


@of(mul.uniform)
def mul_uniform(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return R / 2, R / 2


@of(mul.hold_gate)
def mul_hold_gate(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(R), R


@of(mul.gradient)
def mul_gradient(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return R, R


# -- attention: q (T, K), k (S, K), v (S, K), additive mask (T, S), R (T, K) -> relevance of q, k and v ----------------

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, R: Tensor, *, of_product: Rule,
              of_softmax: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T scale + mask) v, oracle after oracle. The mask is a constant that takes its share of the scores."""
    products = q @ k.T * scale
    scores = products + mask
    pattern = scores.softmax(1)
    of_pattern, of_value = oracle(of_product)(pattern, v, R)
    of_scores = torch.stack([oracle(of_softmax)(lambda z: z.softmax(0), z, r) for z, r in zip(scores, of_pattern)])
    of_products = torch.where(scores.isfinite(), of_scores * products / scores, 0.0)
    of_query, of_key = oracle(of_product)(q, k.T, of_products)
    return of_query, of_key.T, of_value


# -- the package's word on the same op ---------------------------------------------------------------------------------

class Written(torch.nn.Module):
    """A model that is one function. Its parameter keeps it from being taken for an activation."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, torch.nn.Parameter(torch.ones(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class Carrying:
    """The explained value of an output that is to have relevance R."""

    def __init__(self, R: Tensor) -> None:
        self.R = R

    def __call__(self, y: Tensor) -> Tensor:
        return ((self.R / y.detach()).nan_to_num(0.0, 0.0, 0.0) * y).reshape(len(y), -1).sum(1)

    def row(self, row: int, rows: int) -> Carrying:
        return Carrying(self.R[row:row + 1])


def propagated(function: Callable[..., Tensor], inputs: list[Tensor], R: Tensor, rules: dict[str, Rule],
               pixels: Rule | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Relevance of the inputs of a function whose output has relevance R, and what the ledger says was absorbed.

    Zero where the rule lets nothing through. The books are closed on the way, or this raises.
    """
    composite = Composite("one op", NOT, rules, pixels=pixels)
    try:
        found = propagate(Written(function).double(), tuple(inputs), {}, Carrying(R), composite)
    except IndependentOutput:
        return [torch.zeros_like(x) for x in inputs], {}
    assert (found.ledger.error <= 1e-9).all()
    return [found.relevance.get(str(i), torch.zeros_like(x)) for i, x in enumerate(inputs)], found.ledger.absorbed


def assert_same(found: Tensor, expected: Tensor, *, empty: bool = False) -> None:
    """Equal to 1e-10 of the largest entry, which must not be zero unless the case is `empty`."""
    assert found.shape == expected.shape
    assert bool(expected.any()) != empty, "nothing is compared"
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def by_row(found: Tensor, expected: list[Tensor], **options: bool) -> None:
    """The same for an oracle's answers row by row."""
    assert_same(found, torch.stack(expected).reshape(found.shape), **options)


def randn(*shape: int) -> Tensor:
    """Signed, in float64."""
    return torch.randn(*shape, dtype=torch.float64)
