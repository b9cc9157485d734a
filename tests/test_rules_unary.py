"""Rules of activations, softmax, norms and pools against the formulas of their papers."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, by_row, jacobian, name, oracle, propagated, randn, variants
from torch import Tensor

from relprop import composite
from relprop.ops import activation, norm, pool, softmax

HELD = (activation.hold, softmax.hold)  # nothing passes
parametrize = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every tensor here is random, the same each time."""


# -- activations, softmax, norms ---------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "leaky relu": F.leaky_relu, "elu": F.elu,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=torch.float64)), "hardswish": F.hardswish,
    "exp": torch.exp, "erf": torch.erf, "square": lambda x: x**2, "cos": torch.cos,
    "clamp": lambda x: x.clamp(-0.5, 0.75), "in place": lambda x: F.silu(x + 0, inplace=True),
    "powers": lambda x: x ** torch.arange(7, dtype=torch.float64)}


@parametrize("rule", variants(activation), ids=name)
@parametrize("function", ACTIVATIONS)
def test_activation(function, rule):
    f, x = ACTIVATIONS[function], randn(3, 7)
    R = randn(3, 7).where(f(x) != 0, 0.0)
    (found,), _ = propagated(f, [x], R, {"activation": rule})
    by_row(found, [oracle(rule)(f, x_row, R_row) for x_row, R_row in zip(x, R)], empty=rule in HELD)


@parametrize("rule", variants(activation), ids=name)
def test_a_module_that_is_an_activation_is_one_op(rule):
    class NewGELU(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0))))

    f, x, R = NewGELU(), randn(3, 7), randn(3, 7)
    (found,), _ = propagated(f, [x], R, {"activation": rule})
    by_row(found, [oracle(rule)(f, x_row, R_row) for x_row, R_row in zip(x, R)], empty=rule in HELD)


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(F.softmax, dim=-1), "method": lambda x: x.softmax(-1), "torch": partial(torch.softmax, dim=-1)}


@parametrize("masked", [False, True])
@parametrize("rule", variants(softmax), ids=name)
@parametrize("function", SOFTMAXES)
def test_softmax(function, rule, masked):
    f, x, R = SOFTMAXES[function], randn(3, 7), randn(3, 7)
    mask = torch.zeros(3, 7, dtype=torch.float64)
    if masked:
        mask[1, 2:5] = -torch.inf
        R = R.where(mask == 0, 0.0)  # what is masked is not there to be explained
    (found,), _ = propagated(lambda x: f(x + mask), [x], R, {"softmax": rule})
    rows = [oracle(rule)(partial(torch.softmax, dim=0), x_row, R_row) for x_row, R_row in zip(x + mask, R)]
    by_row(found, rows, empty=rule in HELD)


WIDTH = torch.arange(12)
NORMS = {  # function of (x, weight, bias), what is normalised together, whether the mean is taken out, eps
    "layer norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), WIDTH.reshape(2, 6), True, 1e-5),
    "layer norm of two dimensions": (lambda x, w, b: F.layer_norm(x, (2, 6), twice(w), twice(b), 1e-3), WIDTH[None],
                                     True, 1e-3),
    "rms norm": (lambda x, w, b: F.rms_norm(x, (6,), w, 1e-4), WIDTH.reshape(2, 6), False, 1e-4),
    "group norm": (lambda x, w, b: F.group_norm(x.reshape(-1, 6, 2), 3, w, b).reshape(-1, 2, 6), WIDTH.reshape(3, 4),
                   True, 1e-5),
    "layer norm by hand": (lambda x, w, b: by_hand(x, w, b, True), WIDTH.reshape(2, 6), True, 1e-5),
    "rms norm by hand": (lambda x, w, b: by_hand(x, w, None, False), WIDTH.reshape(2, 6), False, 1e-5)}


def twice(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.expand(2, 6)


def by_hand(x: Tensor, w: Tensor | None, b: Tensor | None, centre: bool) -> Tensor:
    """As models write it: pow, mean and rsqrt."""
    x = x - x.mean(-1, keepdim=True) if centre else x
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    y = y if w is None else y * w
    return y if b is None else y + b


def scales(x: Tensor, groups: list[list[int]], centre: bool, eps: float) -> Tensor:
    """1 / std or 1 / rms of each entry's group, from one row (I,)."""
    scale = torch.zeros_like(x)
    for group in groups:
        mean = sum(x[i] for i in group) / len(group) if centre else 0.0
        scale[group] = (sum((x[i] - mean) ** 2 for i in group) / len(group) + eps) ** -0.5
    return scale


@parametrize("biased", [False, True])
@parametrize("weighted", [False, True])
@parametrize("kind, rule", [(kind, rule) for kind in NORMS for rule in variants(norm)  # pieces have no whole to pass by
                            if not ("by hand" in kind and rule is norm.identity)], ids=lambda v: v if isinstance(v, str)
             else name(v))
def test_norm(kind, rule, weighted, biased):
    function, groups, centre, eps = NORMS[kind]
    x, R = randn(2, 2, 6), randn(2, 2, 6)
    w, b = randn(6) if weighted else None, randn(6) if biased else None
    everything = composite.gradient() if rule is norm.gradient else composite.attnlrp()
    (found,), _ = propagated(lambda x: function(x, w, b), [x], R, {**everything.rules, "norm": rule})
    per_channel = kind == "group norm"
    gain = torch.ones(12, dtype=torch.float64) if w is None else w.repeat_interleave(2) if per_channel else w.repeat(2)
    rows = []
    for x_row, R_row in zip(x.flatten(1), R.flatten(1)):
        y_row = function(x_row.reshape(1, 2, 6), w, b).flatten()
        if rule is norm.held:
            scale = scales(x_row, groups.tolist(), centre, eps)
            rows.append(oracle(rule)(groups.tolist(), gain, scale, centre, x_row, y_row, R_row))
        else:
            rows.append(oracle(rule)(lambda t: function(t.reshape(1, 2, 6), w, b).flatten(), x_row, R_row))
    by_row(found, rows)


@parametrize("rule", variants(norm), ids=name)
def test_batch_norm(rule):
    """In eval mode mean and variance are constants: linear, entry by entry."""
    x, R, w, b, mean = randn(2, 6, 2), randn(2, 6, 2), randn(6), randn(6), randn(6)
    variance = torch.rand(6, dtype=torch.float64) + 0.5

    def function(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, w, b)

    (found,), _ = propagated(function, [x], R, {"norm": rule})
    scale, gain = (variance + 1e-5).rsqrt().repeat_interleave(2), w.repeat_interleave(2)
    alone = [[i] for i in range(12)]
    whole = partial(oracle(rule), alone, gain, scale, False)
    rows = [whole(x_row.flatten(), function(x_row[None]).flatten(), R_row.flatten()) if rule is norm.held else
            oracle(rule)(lambda t: function(t.reshape(1, 6, 2)).flatten(), x_row.flatten(), R_row.flatten())
            for x_row, R_row in zip(x, R)]
    by_row(found, rows)


def test_the_fused_layer_norm_is_the_formula():
    x, w, b, g = randn(2, 3, 6), randn(6), randn(6), randn(2, 3, 6)
    leaf = x.clone().requires_grad_()
    y = norm.Held.apply(leaf, [6], w, b, 1e-5)
    assert torch.equal(y, F.layer_norm(x, (6,), w, b))
    scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    expected = norm.held(g, w, scale, centre=True, dims=[-1])
    assert_same(torch.autograd.grad(y, leaf, g)[0], expected)


def test_the_fused_activation_is_the_formula():
    x, g = randn(3, 7), randn(3, 7)
    leaf = x.clone().requires_grad_()
    y = activation.Identity.apply(leaf, F.gelu, 0.0)
    assert_same(torch.autograd.grad(y, leaf, g)[0], activation.identity(x, F.gelu(x), g))


# -- pools -------------------------------------------------------------------------------------------------------------

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)), "sum": lambda x: x.sum(1), "avg pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 1)), "max pool": lambda x: F.max_pool2d(x, 2),
    "interpolation": lambda x: F.interpolate(x, (3, 5), mode="bilinear"), "cumsum": lambda x: x.cumsum(2)}


@parametrize("rule", variants(pool), ids=name)
@parametrize("function", POOLS)
def test_pool(function, rule):
    f, x = POOLS[function], randn(2, 2, 4, 4)
    y = f(x)
    R = randn(*y.shape)
    (found,), _ = propagated(f, [x], R, {"pool": rule})
    rows = []
    for x_row, R_row in zip(x.flatten(1), R.flatten(1)):
        W = jacobian(lambda t: f(t.reshape(1, 2, 4, 4)).flatten(), x_row)  # of a maximum: which entry it is
        rows.append(oracle(rule)(x_row, W, R_row))
    by_row(found, rows)
