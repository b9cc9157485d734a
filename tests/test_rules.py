"""Rules of linear maps and convolutions against the formulas of their papers; every rule has such an oracle."""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    ORACLES,
    Rule,
    assert_same,
    by_row,
    modules,
    name,
    oracle,
    propagated,
    randn,
    rules,
    variants,
)
from torch import Tensor

from relprop import composite
from relprop.numerics import relevance_of
from relprop.ops import activation, linear
from relprop.ops.linear import Affine

parametrize = pytest.mark.parametrize
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every tensor here is random, the same each time."""


# -- every rule has an oracle ------------------------------------------------------------------------------------------

def test_every_rule_has_an_oracle():
    assert len(rules(*modules())) >= 28
    assert set(rules(*modules())) == set(ORACLES)


def test_a_rule_without_an_oracle_is_noticed(monkeypatch):
    def halved(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        return g / 2

    halved.__module__ = activation.__name__
    monkeypatch.setattr(activation, "halved", halved, raising=False)
    assert set(rules(*modules())) - set(ORACLES) == {halved}


@parametrize("rule", rules(*modules()), ids=name)
def test_a_rule_names_its_formula_and_its_paper(rule):
    assert re.search(r"\w+ et al\.\s+20\d\d", rule.__doc__), "no paper"
    assert re.search(r"R_\w+( = R_\w+)* = \S", rule.__doc__), "no formula"
    assert re.search("conserv", rule.__doc__, re.IGNORECASE), "not a word on what is conserved"


# -- linear maps -------------------------------------------------------------------------------------------------------

def affine(W: Tensor, b: Tensor | None) -> Affine:
    return Affine(F.linear, lambda s, W: s @ W, W, b)


def shared(rule: Rule, x: Tensor, W: Tensor, b: Tensor | None, R: Tensor) -> tuple[Tensor, Tensor]:
    """What a rule of linear maps, called as the pure function that it is, gives to x (B, I) and to the bias (B,)."""
    y = F.linear(x, W, b)
    shares = rule(x, y, R / y, affine(W, b))
    return relevance_of(x, shares.x), (R * 0 if shares.bias is None else shares.bias.expand_as(R)).sum(1)


def by_oracle(rule: Rule, x: Tensor, W: Tensor, b: Tensor, R: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    rows = [oracle(rule)(x_row, W, b, R_row) for x_row, R_row in zip(x.flatten(1), R.flatten(1))]
    return [of_x for of_x, _ in rows], [of_b for _, of_b in rows]


@parametrize("zeros", [False, True])
@parametrize("biased", [False, True])
@parametrize("rule", variants(linear), ids=name)
def test_linear_rule(rule, biased, zeros):
    x, W, b, R = randn(3, 6), randn(5, 6), randn(5), randn(3, 5)
    x = x.relu() if zeros else x
    found, of_bias = shared(rule, x, W, b if biased else None, R)
    expected, expected_of_bias = by_oracle(rule, x, W, b if biased else b * 0, R)
    by_row(found, expected)
    by_row(of_bias, expected_of_bias, empty=not torch.stack(expected_of_bias).any())


LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (5,), (4, 5)),
    "linear over positions": (F.linear, (3, 5), (4, 5)),
    "addmm": (lambda x, W, b: torch.addmm(x.new_zeros(4) if b is None else b, x, W), (5,), (5, 4)),
    "conv1d": (partial(F.conv1d, stride=2, padding=2, dilation=2), (3, 7), (4, 3, 3)),
    "conv1d same, even kernel": (partial(F.conv1d, padding="same"), (2, 5), (3, 2, 4)),
    "conv1d same, even dilation": (partial(F.conv1d, padding="same", dilation=2), (2, 6), (3, 2, 2)),
    "conv2d": (F.conv2d, (2, 4, 4), (3, 2, 2, 2)),
    "conv2d uneven": (partial(F.conv2d, stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 4, 4), (3, 2, 2, 3)),
    "conv2d patches": (partial(F.conv2d, stride=3), (2, 6, 3), (3, 2, 3, 3)),
    "conv2d groups": (partial(F.conv2d, groups=2, padding=1), (4, 3, 2), (2, 2, 3, 3)),
    "conv2d depthwise": (partial(F.conv2d, groups=2, padding="valid"), (2, 3, 3), (4, 1, 2, 2)),
    "conv2d same, even kernel": (partial(F.conv2d, padding="same", groups=2), (2, 3, 3), (2, 1, 2, 4)),
    "conv2d same, odd kernel": (partial(F.conv2d, padding="same"), (1, 3, 3), (2, 1, 3, 3)),
    "conv3d": (partial(F.conv3d, stride=(1, 2, 1), padding=1), (1, 2, 3, 2), (2, 1, 2, 3, 2)),
    "conv3d same, even kernel": (partial(F.conv3d, padding="same"), (1, 2, 3, 2), (2, 1, 2, 2, 2)),
    "conv_transpose1d": (partial(F.conv_transpose1d, stride=3, output_padding=2, padding=1), (2, 4), (2, 3, 4)),
    "conv_transpose2d": (partial(F.conv_transpose2d, stride=2, groups=2, dilation=(1, 2)), (2, 2, 2), (2, 2, 2, 2)),
    "conv_transpose3d": (partial(F.conv_transpose3d, stride=(1, 2, 1), padding=(0, 1, 0)), (1, 2, 2, 2),
                         (1, 2, 2, 3, 1))}


def dense(run: Callable[..., Tensor], shape: tuple[int, ...], W: Tensor) -> Tensor:
    """The matrix of a linear map, (J, I), column by column."""
    size = torch.Size(shape).numel()
    return run(torch.eye(size, dtype=W.dtype).reshape(size, *shape), W, None).reshape(size, -1).T


def test_the_matrix_of_a_convolution_is_the_convolution():
    run, shape, weight = LAYERS["conv2d same, even kernel"]
    x, W = randn(2, *shape), randn(*weight)
    assert_same(x.flatten(1) @ dense(run, shape, W).T, run(x, W, None).flatten(1))


@parametrize("biased", [False, True])
@parametrize("rule", variants(linear), ids=name)
@parametrize("layer", LAYERS)
def test_layer(layer, rule, biased):
    """Through the interception; the bias's account is the ledger's."""
    run, shape, weight = LAYERS[layer]
    x, W = randn(2, *shape), randn(*weight)
    b = randn(run(x, W, None).shape[-1 if "linear" in layer or layer == "addmm" else 1]) if biased else None
    y = run(x, W, b)
    R = randn(*y.shape)
    (found,), absorbed = propagated(lambda x: run(x, W, b), [x], R, {"linear": rule, "conv": rule})
    constant = torch.zeros_like(y[0]) if b is None else run(torch.zeros_like(x[:1]), W, b)[0]
    expected, of_bias = by_oracle(rule, x, dense(run, shape, W), constant.flatten(), R)
    by_row(found, expected)
    by_row(absorbed.get("biases", R.new_zeros(2)), of_bias, empty=not torch.stack(of_bias).any())


@parametrize("rule", [linear.zero, partial(linear.gamma, gamma=10.0)], ids=name)
def test_the_ground_is_the_median_colour_of_each_picture(rule):
    x, W, b, R = randn(2, 3, 3, 3), randn(2, 3, 2, 2), randn(2), randn(2, 2, 2, 2)
    x[:, 1] += 5.0  # the channels differ
    x[1] -= 3.0  # and the pictures
    run, ground = partial(F.conv2d, bias=None), x.flatten(2).sort(-1).values[:, :, 4]  # (B, C): the fifth of nine
    (found,), _ = propagated(lambda x: F.conv2d(x, W, b), [x], R, {}, pixels=partial(linear.grounded, rule=rule))
    matrix = dense(lambda x, W, b: run(x, W), (3, 3, 3), W)
    by_row(found, [ORACLES[linear.grounded](
        row.flatten(), matrix, b.repeat_interleave(4), R_row.flatten(), rule=rule,
        ground=own.repeat_interleave(9))[0] for row, own, R_row in zip(x, ground, R)])
    assert (found[x == ground[..., None, None]] == 0).all() and (x == ground[..., None, None]).sum() == 6


def test_the_ground_of_patches_whose_channels_are_not_known_is_the_median_entry():
    x, W, R = randn(2, 3, 5), randn(4, 5), randn(2, 3, 4)
    (found,), _ = propagated(lambda x: F.linear(x, W), [x], R, {}, pixels=linear.grounded)
    middle = x.flatten(1).sort(1).values[:, 7].reshape(2, 1, 1)
    (expected,), _ = propagated(lambda x: F.linear(x, W), [x], R, {}, pixels=partial(linear.grounded, ground=middle))
    assert_same(found, expected)


def test_z_box_with_bounds_of_each_channel():
    x, W, R = torch.rand(2, 3, 4, 4, dtype=torch.float64), randn(2, 3, 2, 2), randn(2, 2, 3, 3)
    low, high = -torch.rand(1, 3, 1, 1, dtype=torch.float64), 1 + torch.rand(1, 3, 1, 1, dtype=torch.float64)
    x[:, 0] = low[:, 0]  # black, exactly
    rule = partial(linear.z_box, low=low, high=high)
    (found,), _ = propagated(lambda x: F.conv2d(x, W), [x], R, {}, pixels=rule)
    of_row = partial(ORACLES[linear.z_box], low=low.expand_as(x)[0].flatten(), high=high.expand_as(x)[0].flatten())
    matrix, nothing = dense(F.conv2d, (3, 4, 4), W), torch.zeros(18, dtype=torch.float64)
    by_row(found, [of_row(a, matrix, nothing, r)[0] for a, r in zip(x.flatten(1), R.flatten(1))])


@parametrize("rule, share", [(linear.z_plus, 1), (linear.alpha_beta, 2), (partial(linear.alpha_beta, alpha=1.0,
                                                                                 beta=0.0), 1)])
def test_a_part_that_is_empty_takes_nothing(rule, share):
    """All contributions are positive: the negative part is 0 / 0 on paper, and rounding in the product with |W|."""
    x, W, R = torch.rand(4, 300, dtype=torch.float64), torch.rand(7, 300, dtype=torch.float64), randn(4, 7)
    found, _ = shared(rule, x, W, None, R)
    by_row(found, by_oracle(rule, x, W, W.new_zeros(7), R)[0])
    assert_same(found.sum(1), share * R.sum(1))
    found, _ = shared(rule, x, -W, None, R)  # and here the positive part is
    assert_same(found.sum(1), (1 - share) * R.sum(1), empty=share == 1)


def dead_output(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, ..., 6), W (5, 6) and R (B, ..., 5): to the first output nothing contributes positively."""
    x, W, R = torch.rand(*shape, 6, dtype=torch.float64), randn(5, 6), randn(*shape, 5)
    W[0] = -W[0].abs()
    return x, W, R


def test_what_an_output_without_positive_part_had_is_shared_within_its_row():
    x, W, R = dead_output(3, 4)
    (found,), _ = propagated(lambda x: F.linear(x, W), [x], R, {"linear": linear.z_plus_whole})
    (less,), _ = propagated(lambda x: F.linear(x, W), [x], R, {"linear": linear.z_plus})
    assert_same(found.flatten(1).sum(1), R.flatten(1).sum(1))
    assert_same(less.flatten(1).sum(1), R[..., 1:].flatten(1).sum(1))
    assert_same(found, less * (R.flatten(1).sum(1) / less.flatten(1).sum(1))[:, None, None])


def test_the_whole_of_a_row_is_found_wherever_the_row_is():
    x, W, R = dead_output(3, 4)
    expected = propagated(lambda x: F.linear(x, W), [x], R, {"linear": linear.z_plus_whole})[0][0]
    for run in (lambda x: F.linear(x.transpose(0, 1), W).transpose(0, 1),
                lambda x: F.linear(x.reshape(12, 6), W).reshape(3, 4, 5)):
        (found,), _ = propagated(run, [x], R, {"linear": linear.z_plus_whole})
        assert_same(found, expected)


@parametrize("rule", [linear.z_box, linear.w_square, linear.flat], ids=name)
def test_exact_zeros_further_up_keep_nothing_and_the_books_close(rule):
    x, W, V = randn(2, 4), randn(5, 4), randn(3, 5)
    x[:, 0] = 0  # at the input a zero keeps its share
    hidden = F.linear(x, W).relu()
    y = F.linear(hidden, V)
    R = randn(2, 3)
    (found,), absorbed = propagated(lambda x: F.linear(F.linear(x, W).relu(), V), [x], R,
                                    {"linear": rule, "activation": activation.identity})
    of_hidden = torch.stack(by_oracle(rule, hidden, V, y.new_zeros(3), R)[0]).where(hidden != 0, 0.0)
    by_row(found, by_oracle(rule, x, W, y.new_zeros(5), of_hidden)[0])
    assert found[:, 0].all()
    assert_same(absorbed["stabilizer"], R.sum(1) - of_hidden.sum(1))


# -- identities of linear rules ----------------------------------------------------------------------------------------

def same_rule(rule: Rule, other: Rule, *, biased: bool = True, tolerance: float = 1e-10) -> None:
    x, W, b, R = randn(3, 6), randn(5, 6), randn(5), randn(3, 5)
    found, expected = (shared(r, x, W, b if biased else None, R) for r in (rule, other))
    for one, another in zip(found, expected):
        assert (one - another).abs().max() <= tolerance * expected[0].abs().max()


def test_gamma_zero_is_the_zero_rule():
    same_rule(partial(linear.gamma, gamma=0.0), linear.zero)
    with pytest.raises(AssertionError):
        same_rule(partial(linear.gamma, gamma=0.01), linear.zero)


def test_gamma_tends_to_z_plus_where_outputs_are_positive():
    x, W, R = randn(3, 6), randn(5, 6), randn(3, 5)
    R = R.where(x @ W.T > 0, 0.0)
    found, expected = (shared(rule, x, W, None, R)[0] for rule in (partial(linear.gamma, gamma=1e9), linear.z_plus))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max() > 0


def test_epsilon_tends_to_the_zero_rule():
    same_rule(partial(linear.epsilon, eps=1e-14), linear.zero)
    with pytest.raises(AssertionError):
        same_rule(partial(linear.epsilon, eps=0.1), linear.zero)


@parametrize("bias", [False, True])
def test_alpha_one_beta_zero_is_z_plus(bias):
    same_rule(partial(linear.alpha_beta, alpha=1.0, beta=0.0, bias=bias), partial(linear.z_plus, bias=bias))


def test_alpha_less_beta_must_be_one():
    with pytest.raises(ValueError, match="conserved"):
        same_rule(partial(linear.alpha_beta, alpha=2.0, beta=2.0), linear.zero)


def test_w_square_and_flat_ignore_what_they_say_they_ignore():
    x, other, W, R = randn(3, 6), randn(3, 6), randn(5, 6), randn(3, 5)
    assert_same(shared(linear.w_square, x, W, None, R)[0], shared(linear.w_square, other, W, None, R)[0])
    assert_same(shared(linear.w_square, x, W, None, R)[0], shared(linear.w_square, x, W.abs(), None, R)[0])
    flat = shared(linear.flat, x, W, randn(5), R)[0]
    assert_same(flat, shared(linear.flat, other, randn(5, 6), None, R)[0])
    assert_same(flat, (R.sum(1) / 6)[:, None].expand(3, 6))


def test_epsilon_to_zero_without_biases_is_gradient_x_input_on_a_relu_net():
    weights = [randn(7, 6), randn(7, 7), randn(3, 7)]

    def net(x: Tensor) -> Tensor:
        for W in weights[:-1]:
            x = F.relu(F.linear(x, W))
        return F.linear(x, weights[-1])

    x, R = randn(4, 6), randn(4, 3)
    (found,), absorbed = propagated(net, [x], R, dict(composite.epsilon(1e-13).rules))
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, R / y.detach())
    assert_same(found, x * gradient)
    assert_same(found.sum(1), R.sum(1))
    assert max((float(t.abs().max()) for t in absorbed.values()), default=0.0) < 1e-9
    (coarse,), _ = propagated(net, [x], R, dict(composite.epsilon(0.5).rules))
    assert not torch.allclose(coarse, x * gradient, rtol=0.05)


# -- an oracle can fail ------------------------------------------------------------------------------------------------

def without_bias(x: Tensor, y: Tensor, g: Tensor, affine: Affine) -> linear.Shares:
    return linear.gamma(x, y, g, affine, bias=False)


def wrong_side(x: Tensor, y: Tensor, g: Tensor, affine: Affine) -> linear.Shares:
    return linear.gamma(x, y.abs(), g * y.sign(), affine)


def other_sign(x: Tensor, y: Tensor, g: Tensor, affine: Affine) -> linear.Shares:
    return linear.z_plus(-x, -y, -g, affine)


@parametrize("wrong, right", [(without_bias, linear.gamma), (wrong_side, linear.gamma), (other_sign, linear.z_plus),
                              (linear.zero, linear.epsilon), (linear.zero, linear.gamma),
                              (linear.flat, linear.w_square)], ids=name)
def test_a_wrong_rule_fails(wrong, right):
    x, W, b, R = randn(3, 6), randn(5, 6), randn(5), randn(3, 5)
    found = shared(wrong, x, W, b, R)[0]
    expected = by_oracle(right, x, W, b, R)[0]
    with pytest.raises(AssertionError):
        by_row(found, expected)
