"""Every family of models that relprop promises, under every composite: books that balance, rows that stand alone.

Parametrized over the table of tiny models in `families`, so that a new row is tested because it exists.
"""
from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import relprop
from relprop.composite import NAMES
from relprop.numerics import tolerance
from relprop.relevance import Propagation, propagate
from relprop.target import Class, Token

F32, F64 = torch.float32, torch.float64
INSIDE = 1e-6
"""Of a float64 run, relative to its largest entry: transformers computes norms and softmax in float32 inside."""
ROWS = 1e-9
"""Of a float64 run: a row alone and the same row in a batch; float32 inside is the same for both."""
CONSTANTS = {"biases", "position embeddings", "token type embeddings", "class token", "distillation token",
             "register tokens", "mask token", "other constants", "activations", "rounding"}
"""What any composite may lose to: constants of the model ("activations": f(0)), and rounding, which is bounded."""
LOSSES = {"attnlrp": {"softmax"}, "attnlrp-path": {"softmax"}, "attnlrp-gamma": {"softmax", "stabilizer"},
          "attnlrp-vision": {"softmax", "stabilizer"}, "cp-lrp": set(), "gamma": {"stabilizer"},
          "epsilon": {"stabilizer"}, "deep-taylor": {"stabilizer"},
          "gradient": {"softmax", "norms", "activations", "products"}}
"""And what each may lose by its rules. A rule that leaks elsewhere would be booked under a name that is not here."""

families = pytest.mark.parametrize("name", FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers and timm, on tiny configs


def propagated(name: str, composite: str, dtype: torch.dtype, inputs: Any = None, **options: Any) -> Propagation:
    args, kwargs = FAMILIES[name].inputs(dtype) if inputs is None else inputs
    return propagate(model(name, dtype), args, kwargs, FAMILIES[name].value, composite, **options)


@cache
def batch(name: str, composite: str, dtype: torch.dtype) -> Propagation:
    """The family's own batch, explained once."""
    return propagated(name, composite, dtype)


def largest(found: Propagation) -> Tensor:
    """The largest entry of each row's books, (B,)."""
    books = found.ledger
    return torch.stack([e.abs() for e in (books.value, books.input, *books.absorbed.values())]).amax(0)


def close(found: Tensor, expected: Tensor, tolerance: float, scale: Tensor | float = 0.0) -> bool:
    """Whether all entries agree, relative to the largest one of `expected` or, if that is larger, to `scale`."""
    scale = max(float(expected.abs().max()), float(torch.as_tensor(scale).max()))
    return bool((found - expected).abs().max() <= tolerance * scale)


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in a model's output, in order."""
    return [t for t in tree_leaves(dict(output) if isinstance(output, dict) else output) if isinstance(t, Tensor)]


# -- the books ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("composite", NAMES)
@families
def test_books_balance(name, composite, dtype):
    found = batch(name, composite, dtype)
    books = found.ledger
    assert books.error.max() <= tolerance(dtype), f"\n{books}"
    assert books.value.abs().min() > 0 and all(r.abs().flatten(1).amax(1).min() > 0 for r in found.relevance.values())
    total = sum(r.double().flatten(1).sum(1) for r in found.relevance.values())
    assert close(total, books.input, tolerance(dtype), largest(found)), "the map does not sum to what the inputs took"


@pytest.mark.parametrize("composite", NAMES)
@families
def test_what_is_lost_is_lost_by_name(name, composite):
    found = batch(name, composite, F64)
    assert set(found.ledger.absorbed) <= CONSTANTS | LOSSES[composite]
    assert composite != "cp-lrp" or "other constants" not in found.ledger.absorbed, "a constant that has no name"
    for account in ("rounding", "stabilizer"):
        taken = found.ledger.absorbed.get(account, torch.zeros(1))
        by_rule = composite in ("epsilon", "deep-taylor") and account == "stabilizer"  # eps; no positive part at all
        bound = 0.1 if by_rule else 1e-9 if account == "stabilizer" else 1e-4
        assert (taken.abs() <= bound * largest(found)).all(), f"{account}\n{found.ledger}"


@families
def test_the_books_change_nothing(name):
    kept, without = batch(name, "attnlrp", F32), propagated(name, "attnlrp", F32, ledger=False)
    assert without.ledger is None and torch.equal(without.value, kept.value)
    assert all(close(without.relevance[key], r, 1e-5) for key, r in kept.relevance.items())


# -- the model ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("composite", NAMES)
@families
def test_the_output_is_the_models_own(name, composite):
    """Bit for bit, except that torch's own multi-head attention is one call, which has to be written out."""
    args, kwargs = FAMILIES[name].inputs()
    with torch.no_grad():
        expected = tensors(model(name)(*args, **kwargs))
    found = tensors(batch(name, composite, F32).output)
    opened = any(isinstance(module, nn.MultiheadAttention) for module in model(name).modules())
    assert expected and len(found) == len(expected)
    for ours, plain in zip(found, expected):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-6) if opened else torch.equal(ours, plain)


@families
def test_gradient_is_that_of_autograd(name):
    """An oracle for the whole of the machinery: the plain gradient x input of the model by itself."""
    family, dtype = FAMILIES[name], F64
    leaf, output = family.states(model(name, dtype), *family.inputs(dtype))
    (gradient,) = torch.autograd.grad(family.value(output).sum(), leaf)
    (found,) = batch(name, "gradient", dtype).relevance.values()
    assert close(found, (leaf * gradient).detach(), INSIDE)


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "gradient"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if f"{name}-eager" in FAMILIES])
def test_fused_attention_and_attention_in_steps_give_the_same_map(name, composite):
    (fused,) = batch(name, composite, F64).relevance.values()
    (stepwise,) = batch(f"{name}-eager", composite, F64).relevance.values()
    assert close(fused, stepwise, INSIDE)


# -- rows --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "deep-taylor"])
@families
def test_a_batch_is_its_rows(name, composite):
    """The map and every entry of the books; a padded row keeps its padding."""
    whole = batch(name, composite, F64)
    for row in range(3):
        alone = propagated(name, composite, F64, FAMILIES[name].row(row, F64))
        scale = largest(alone)
        for key, r in alone.relevance.items():
            assert close(whole.relevance[key][row], r[0], ROWS), f"the map of row {row}"
        assert close(whole.ledger.value[row], alone.ledger.value[0], ROWS, scale)
        for account in {*whole.ledger.absorbed, *alone.ledger.absorbed} - {"rounding"}:
            none = torch.zeros(3, dtype=F64)
            ours, theirs = whole.ledger.absorbed.get(account, none)[row], alone.ledger.absorbed.get(account, none)[0]
            assert close(ours, theirs, ROWS, scale), f"{account} of row {row}"


@pytest.mark.parametrize("rows", [2, 4, 7, 16])
@pytest.mark.parametrize("composite", ["attnlrp", "deep-taylor"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in ("bert", "bloom") or name.startswith("torch-")])
def test_as_many_rows_as_tokens(name, composite, rows):
    """Where the rows of a batch are in a tensor has to be found, and their number is that of something else here."""
    family = FAMILIES[name]
    args, kwargs = family.inputs(F64, rows)
    whole = propagated(name, composite, F64, (args, kwargs))
    for row in (0, rows - 1):
        one = tuple(a[row:row + 1] for a in args), {key: t[row:row + 1] for key, t in kwargs.items()}
        alone = propagated(name, composite, F64, one)
        for key, r in alone.relevance.items():
            assert close(whole.relevance[key][row], r[0], INSIDE)
        assert close(whole.ledger.input[row], alone.ledger.input[0], INSIDE, largest(alone))


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.modality == "text"])
def test_padding_is_nothing(name, composite):
    """It receives nothing, and a text has the same map without it."""
    (_, kwargs), whole = FAMILIES[name].inputs(F64), batch(name, composite, F64)
    found = whole.relevance["input_ids"]
    padding = kwargs["input_ids"] == PAD
    assert padding.any() and (found[padding] == 0).all()
    for row in range(3):
        length = int(kwargs["attention_mask"][row].sum())
        short = {key: t[row:row + 1, :length] for key, t in kwargs.items()}
        alone = propagated(name, composite, F64, ((), short))
        assert close(found[row, :length], alone.relevance["input_ids"][0], INSIDE)


@families
def test_two_runs_are_equal_bit_for_bit(name):
    first, again = batch(name, "attnlrp", F32), propagated(name, "attnlrp", F32)
    assert first.relevance.keys() == again.relevance.keys()
    assert all(torch.equal(r, again.relevance[key]) for key, r in first.relevance.items())
    assert first.ledger.absorbed.keys() == again.ledger.absorbed.keys()
    assert all(torch.equal(t, again.ledger.absorbed[key]) for key, t in first.ledger.absorbed.items())


# -- the public face ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp"])
@families
def test_explain_takes_every_family(name, method):
    family = FAMILIES[name]
    args, kwargs = family.inputs()
    r = relprop.explain(model(name), kwargs or args[0], target=family.value, method=method)
    found = batch(name, method, F32)
    (expected,) = found.relevance.values()
    assert close(r.map, expected.sum(1 if family.modality == "image" else -1), 1e-5)
    assert torch.equal(r.value, found.value) and (r.ledger.error <= tolerance(F32)).all()


@families
def test_explain_finds_what_the_output_means(name):
    """A class or a token by number is the same target as a function that reads it."""
    family = FAMILIES[name]
    args, kwargs = family.inputs()
    by_function = batch(name, "cp-lrp", F32)
    if isinstance(by_function.output, Tensor):
        target = 1
    elif getattr(by_function.output, "logits", None) is None:
        pytest.skip("a model without a head has no classes and no tokens")
    else:
        target = Class(1) if by_function.output.logits.dim() == 2 else Token(5, 3)
    r = relprop.explain(model(name), kwargs or args[0], target=target, method="cp-lrp")
    assert torch.equal(r.value, by_function.value)
    assert close(r.ledger.input, by_function.ledger.input, 1e-5, largest(by_function))
