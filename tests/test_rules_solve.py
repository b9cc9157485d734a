"""Triangular systems and Fourier transforms against the sums and products that they are made of, written out."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from oracles import assert_same, propagated, randn
from torch import Tensor

from relprop.ops import matmul, mul

parametrize = pytest.mark.parametrize
SYSTEMS = [(upper, left, unit) for upper in (False, True) for left in (False, True) for unit in (False, True)]


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every tensor here is random, the same each time."""


def systems(batch: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """A, whose diagonal is off zero, B and the relevance of X."""
    A = randn(*batch, 5, 5) / 3
    return A + 2 * torch.eye(5, dtype=torch.float64), randn(*batch, 5, 4), randn(*batch, 5, 4)


def solved(A: Tensor, B: Tensor, upper: bool, left: bool, unit: bool) -> Tensor:
    return torch.linalg.solve_triangular(A, B, upper=upper, left=left, unitriangular=unit)


def written_out(A: Tensor, B: Tensor, unit: bool) -> Tensor:
    """Forward substitution of a lower triangle, row by row."""
    rows: list[Tensor] = []
    for i in range(A.shape[-1]):
        row = B[..., i, :]
        if rows:
            row = row - torch.einsum("...j,...jk->...k", A[..., i, :i], torch.stack(rows, -2))
        rows.append(row if unit else row / A[..., i, i, None])
    return torch.stack(rows, -2)


@parametrize("upper, left, unit", SYSTEMS)
def test_what_is_solved_conserves(upper, left, unit):
    A, B, R = systems()
    B, R = (B, R) if left else (B.mT, R.mT)
    found, absorbed = propagated(partial(solved, upper=upper, left=left, unit=unit), [A, B], R,
                                 {"matmul": matmul.uniform})
    assert_same(found[0].flatten(1).sum(1) + found[1].flatten(1).sum(1), R.flatten(1).sum(1))
    outside = torch.ones(5, 5).tril() if upper else torch.ones(5, 5).triu()  # a diagonal is a scale
    assert found[0].abs().max() > 0 and not found[0][..., outside.bool()].any()
    assert not absorbed


@parametrize("moving", ["both", "system", "right side"])
@parametrize("unit", [False, True])
@parametrize("rule", [matmul.uniform, matmul.gradient, lambda a, b, y, g, vjp: vjp(g / 2)])
def test_it_is_forward_substitution(rule, unit, moving):
    """Any function is a rule: the last one goes the long way round."""
    A, B, R = systems((2,))
    taken = {"both": [A, B], "system": [A], "right side": [B]}[moving]

    def given(function, *moving_parts: Tensor) -> Tensor:
        a, b = moving_parts if len(moving_parts) == 2 else ((moving_parts[0], B) if moving == "system" else
                                                            (A, moving_parts[0]))
        return function(a, b)

    rules = {"matmul": rule, "mul": mul.gradient if rule is matmul.gradient else mul.uniform}  # and of the diagonal
    found, absorbed = propagated(partial(given, partial(solved, upper=False, left=True, unit=unit)), taken, R, rules)
    expected, booked = propagated(partial(given, partial(written_out, unit=unit)), taken, R, rules)
    for relevance, shares in zip(found, expected, strict=True):
        assert relevance.abs().max() > 0
        assert_same(relevance, shares)
    taken = sum(booked.values(), R.new_zeros(2))
    assert torch.allclose(sum(absorbed.values(), R.new_zeros(2)), taken, atol=1e-9 * R.abs().sum())
    assert bool((taken.abs() > 1e-9).any()) == (moving == "system" or (rule is matmul.gradient and moving == "both"))


@parametrize("transform", [
    lambda x: torch.fft.fftn(x, dim=(1, 2)).real,
    lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1)[:, :3], n=6, dim=1),
    lambda x: torch.view_as_real(torch.fft.fft(x, dim=1)).sum(-1)])
def test_fourier_transforms_are_linear(transform):
    x = randn(2, 6, 4)
    R = randn(*transform(x).shape)
    (found,), absorbed = propagated(transform, [x], R, {})
    basis = torch.eye(24, dtype=torch.float64).reshape(24, 6, 4)
    per_unit = torch.einsum("i...,b...->bi", transform(basis), R / transform(x)).reshape(x.shape)
    assert_same(found, x * per_unit)
    assert not absorbed
