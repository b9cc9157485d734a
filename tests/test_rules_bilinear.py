"""Rules of products and sums against the formulas of their papers."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import ORACLES, assert_same, by_row, name, oracle, propagated, randn, variants
from torch import Tensor

from relprop import composite
from relprop.numerics import relevance_of
from relprop.ops import activation, add, matmul, mul

parametrize = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every tensor here is random, the same each time."""


def by_oracle(rule: Callable, a: Tensor, b: Tensor, R: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    rows = [oracle(rule)(*row) for row in zip(a, b, R)]
    return [of_a for of_a, _ in rows], [of_b for _, of_b in rows]


# -- matrix products ---------------------------------------------------------------------------------------------------

def product_vjp(a: Tensor, b: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda s: (s @ b.mT, a.mT @ s)


@parametrize("rule", variants(matmul), ids=name)
def test_rule_of_matrix_products(rule):
    a, b, R = randn(3, 4, 5), randn(3, 5, 2), randn(3, 4, 2)
    y = a @ b
    found = rule(a, b, y, R / y, product_vjp(a, b))
    for x, per_unit, expected in zip((a, b), found, by_oracle(rule, a, b, R)):
        by_row(relevance_of(x, per_unit), expected)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda a, b: a @ b, "matmul": torch.matmul, "bmm": torch.bmm,
    "einsum": partial(torch.einsum, "btk,bks->bts"), "einsum of a list": lambda a, b: torch.einsum("btk,bks->bts",
                                                                                                   [a, b]),
    "einsum with a constant": lambda a, b: torch.einsum("btk,k,bks->bts", a, a.new_tensor([1.0] * 5), b),
    "matmul method, heads": lambda a, b: a[:, None].matmul(b[:, None])[:, 0],
    "weights that depend on the input": lambda a, b: torch.cat([F.linear(x[None], w.mT) for x, w in zip(a, b)]),
    "baddbmm": lambda a, b: torch.baddbmm(a.new_zeros(4, 2), a, b)}


@parametrize("rule", variants(matmul), ids=name)
@parametrize("function", PRODUCTS)
def test_matrix_product(function, rule):
    a, b, R = randn(3, 4, 5), randn(3, 5, 2), randn(3, 4, 2)
    found, absorbed = propagated(PRODUCTS[function], [a, b], R, {"matmul": rule})
    for relevance, expected in zip(found, by_oracle(rule, a, b, R)):
        by_row(relevance, expected)
    assert set(absorbed) <= {"products"}


@parametrize("rule", variants(matmul), ids=name)
def test_a_constant_factor_is_a_weight_under_every_rule(rule):
    a, b, R = randn(3, 4, 5), randn(5, 2), randn(3, 4, 2)
    (found,), absorbed = propagated(lambda a: a @ b, [a], R, {"matmul": rule})
    expected = [sum(a_row[:, k, None] * b[k] * R_row / (a_row @ b) for k in [k])[..., :].sum(1)
                for a_row, R_row in zip(a, R) for k in range(5)]
    by_row(found, [torch.stack(expected[5 * i:5 * i + 5], 1) for i in range(3)])
    assert not absorbed


@parametrize("rule", [matmul.uniform, matmul.gradient], ids=name)
def test_baddbmm_adds_a_constant_that_absorbs(rule):
    a, b, R, bias = randn(3, 4, 5), randn(3, 5, 2), randn(3, 4, 2), randn(3, 4, 2)
    function = partial(torch.baddbmm, bias, beta=0.5, alpha=2.0)
    found, absorbed = propagated(function, [a, b], R, {"matmul": rule})
    of_bias, of_product = add_shares(bias / 2, 2 * a @ b, R)
    for relevance, expected in zip(found, by_oracle(rule, a, b, of_product)):
        by_row(relevance, expected)
    taken = of_bias.flatten(1).sum(1) - (of_product.flatten(1).sum(1) if rule is matmul.gradient else 0)
    assert_same(sum(absorbed.values()), taken)


def add_shares(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    return a * R / (a + b), b * R / (a + b)


def test_factors_of_a_product_of_three_take_a_third():
    factors, R = [randn(3, 4) for _ in range(3)], randn(3, 4)
    found, _ = propagated(partial(torch.einsum, "bi,bi,bi->bi"), factors, R, composite.attnlrp().rules)
    for relevance in found:
        assert_same(relevance, R / 3)


@parametrize("rule", [matmul.uniform, matmul.epsilon], ids=name)
def test_operands_of_a_product_take_halves(rule):
    a, b, R = randn(3, 4, 5), randn(3, 5, 2), randn(3, 4, 2)
    of_a, of_b = (r.flatten(1).sum(1) for r in propagated(torch.bmm, [a, b], R, {"matmul": partial(
        rule, **({"eps": 1e-14} if rule is matmul.epsilon else {}))})[0])
    assert_same(of_a, of_b)
    assert_same(of_a + of_b, R.flatten(1).sum(1))


# -- entrywise products ------------------------------------------------------------------------------------------------

@parametrize("rule", variants(mul), ids=name)
def test_rule_of_entrywise_products(rule):
    a, b, R = randn(3, 4), randn(3, 4), randn(3, 4)
    found = rule(a, b, a * b, R / (a * b))
    for x, per_unit, expected in zip((a, b), found, by_oracle(rule, a, b, R)):
        by_row(relevance_of(x, per_unit), expected, empty=not torch.stack(expected).any())


@parametrize("function", [torch.mul, lambda a, b: a * b, lambda a, b: (a + 0).mul_(b)])
@parametrize("rule", [mul.uniform, mul.gradient, lambda a, b, y, g: mul.uniform(a, b, y, g)])
def test_entrywise_product(function, rule):
    """Any function is a rule: the last one goes the long way round."""
    a, b, R = randn(3, 2, 4), randn(3, 1, 4), randn(3, 2, 4)
    found, _ = propagated(function, [a, b], R, {"mul": rule})
    of_a, of_b = oracle(mul.gradient if rule is mul.gradient else mul.uniform)(a, b, R)
    assert_same(found[0], of_a)
    assert_same(found[1], of_b.sum(1, keepdim=True))


@parametrize("function, shares", [
    (lambda a, b: F.silu(a) * b, (0, 1)), (lambda a, b: b * F.silu(a), (0, 1)), (lambda a, b: F.silu(b) * a, (1, 0)),
    (lambda a, b: F.silu(a).reshape(3, 4) * b, (0, 1)), (lambda a, b: a * b, (0.5, 0.5)),
    (lambda a, b: F.silu(a) * F.silu(b), (0.5, 0.5))])
def test_a_gate_is_held(function, shares):
    a, b, R = randn(3, 4), randn(3, 4), randn(3, 4)
    found, _ = propagated(function, [a, b], R, {"mul": mul.hold_gate, "activation": activation.identity})
    for relevance, share in zip(found, shares):
        assert_same(relevance, share * R, empty=not share)


def test_a_divisor_is_held():
    a, b, R = randn(3, 4), randn(3, 4), randn(3, 4)
    for function in (torch.div, lambda a, b: a / b, lambda a, b: a * (1 / b), lambda a, b: (a + 0).div_(b)):
        found, absorbed = propagated(function, [a, b], R, composite.attnlrp().rules)
        assert_same(found[0], R)
        assert not found[1].any() and not absorbed
    found, absorbed = propagated(torch.div, [a, b], R, composite.gradient().rules)
    assert_same(found[0], R)
    assert_same(found[1], -R)
    assert_same(absorbed["norms"], R.sum(1))


# -- sums --------------------------------------------------------------------------------------------------------------

@parametrize("rule", variants(add), ids=name)
def test_rule_of_sums(rule):
    a, b, R = randn(3, 4, 2), randn(3, 4, 2), randn(3, 4, 2)
    found = rule(a, b, a + b, R / (a + b))
    for x, per_unit, expected in zip((a, b), found, by_oracle(rule, a, b, R)):
        by_row(relevance_of(x, per_unit), expected)


SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {  # and what the second term is multiplied by
    "+": (lambda a, b: a + b, 1), "add": (torch.add, 1), "alpha": (partial(torch.add, alpha=-0.5), -0.5),
    "-": (lambda a, b: a - b, -1), "sub": (partial(torch.sub, alpha=2), -2), "+=": (lambda a, b: (a * 1).add_(b), 1),
    "-=": (lambda a, b: (a * 1).sub_(b), -1), "rsub": (lambda a, b: torch.rsub(-a, b).neg() * -1, 1),
    "sum of a list": (lambda a, b: sum([a, b]), 1)}


@parametrize("rule", variants(add), ids=name)
@parametrize("function", SUMS)
def test_sum(function, rule):
    run, sign = SUMS[function]
    a, b, R = randn(3, 4, 2), randn(3, 4, 2), randn(3, 4, 2)
    if function == "rsub":  # the plain gradient is its rule
        rule = add.zero
    found, _ = propagated(run, [a, b], R, {"add": rule})
    for relevance, expected in zip(found, by_oracle(rule, a, sign * b, R)):
        by_row(relevance, expected)


@parametrize("first", [True, False])
@parametrize("rule", variants(add), ids=name)
def test_a_constant_term_absorbs_its_share(rule, first):
    """Entry by entry; by `ratio_of_all` alone as the rule shares between terms that move, and by `ratio_of_moving` it
    has none.
    """
    a, b, R = randn(3, 4, 2), randn(1, 4, 2), randn(3, 4, 2)
    (found,), absorbed = propagated(lambda a: a + b if first else torch.add(b, a), [a], R, {"add": rule})
    if rule is add.ratio_of_moving:
        assert_same(found, R)
        assert absorbed["other constants"].abs().max() < 1e-12
        return
    pairs = by_oracle(add.ratio if rule is add.ratio_of_all else add.zero, a, b.expand_as(a), R)
    of_a, of_b = (torch.stack(part) for part in pairs)
    assert_same(found, of_a)
    assert_same(absorbed["other constants"], of_b.flatten(1).sum(1))


def test_a_term_that_is_zero_leaves_all_to_the_constant():
    a, b, R = randn(3, 4), randn(1, 4), randn(3, 4)
    a[:, 1] = 0
    (found,), absorbed = propagated(lambda a: a + b, [a], R, {"add": add.ratio_of_moving})
    assert_same(found, R.where(a != 0, 0.0))
    assert_same(absorbed["other constants"], R[:, 1])


@parametrize("rule", variants(add), ids=name)
def test_a_term_that_is_broadcast_sums_what_its_copies_get(rule):
    a, b, R = randn(3, 4, 2), randn(3, 1, 2), randn(3, 4, 2)
    found, _ = propagated(torch.add, [a, b], R, {"add": rule})
    of_a, of_b = by_oracle(rule, a, b.expand_as(a), R)
    by_row(found[0], of_a)
    by_row(found[1], [r.sum(0, keepdim=True) for r in of_b])


def test_the_ratio_of_a_row_depends_on_no_other_row():
    a, b, R = randn(4, 3, 2), randn(4, 3, 2), randn(4, 3, 2)
    whole = add.ratio(a, b, a + b, R / (a + b))
    alone = [add.ratio(*(t[i:i + 1] for t in (a, b, a + b, R / (a + b)))) for i in range(4)]
    for k in range(2):
        assert_same(whole[k], torch.cat([parts[k] for parts in alone]))
    over_the_batch = ORACLES[add.ratio](a, b, R)  # as the original has it: it takes the batch for one row
    assert not torch.allclose(relevance_of(a, whole[0]), over_the_batch[0], rtol=0.01)


def test_the_ratio_knows_the_rows_wherever_they_are():
    a, b, R = randn(4, 3, 2), randn(4, 3, 2), randn(4, 3, 2)
    expected, _ = propagated(torch.add, [a, b], R, {"add": add.ratio})

    def positions_first(a: Tensor, b: Tensor) -> Tensor:
        return (a.transpose(0, 1) + b.transpose(0, 1)).transpose(0, 1)

    found, _ = propagated(positions_first, [a, b], R, {"add": add.ratio})
    for one, other in zip(found, expected):
        assert_same(one, other)


@parametrize("rule", [add.zero, add.ratio, partial(add.epsilon, eps=0.0)], ids=name)
def test_shares_of_a_sum_are_one(rule):
    a, b, R = randn(3, 4, 2), randn(3, 4, 2), randn(3, 4, 2)
    found = rule(a, b, a + b, R / (a + b))
    total = sum((x * g).flatten(1).sum(1) for x, g in zip((a, b), found))
    assert_same(total, R.flatten(1).sum(1))


def test_the_ratio_bounds_terms_that_cancel():
    a, R = 1e6 * randn(3, 50), randn(3, 50)
    b = 1 - a
    found = add.ratio(a, b, a + b, R / (a + b))
    for x, per_unit in zip((a, b), found):
        assert ((x * per_unit).sum(1).abs() <= R.sum(1).abs() * (1 + 1e-9)).all()
    assert (a * R / (a + b)).sum(1).abs().max() > 1e3 * R.sum(1).abs().max()


# -- an oracle can fail ------------------------------------------------------------------------------------------------

def swapped(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of a given to b: conserves."""
    return g * b / a, g * a / b


def one_norm(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the batch."""
    parts = add.ratio(*(t.reshape(1, -1) for t in (a, b, y, g)))
    return tuple(part.reshape(a.shape) for part in parts)


@parametrize("wrong, right", [(swapped, add.zero), (add.zero, add.ratio), (one_norm, add.ratio),
                              (add.zero, add.epsilon)], ids=name)
def test_a_wrong_rule_fails(wrong, right):
    a, b, R = randn(3, 4), randn(3, 4), randn(3, 4)
    found = relevance_of(a, wrong(a, b, a + b, R / (a + b))[0])
    with pytest.raises(AssertionError):
        by_row(found, by_oracle(right, a, b, R)[0])
