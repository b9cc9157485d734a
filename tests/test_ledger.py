"""The books balance whatever a model does, hide nothing, and say where it cannot be explained."""
from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, model
from torch import Tensor, nn
from written import F64, D, Written, closes, run, same, second, tokens

from relprop import ops
from relprop.composite import NAMES, NOT, Composite
from relprop.errors import IndependentOutput, LedgerError
from relprop.ops import activation, matmul, norm, softmax
from relprop.ops.call import Plain
from relprop.ops.opaque import Jacobian
from relprop.relevance import TARGET, propagate

composites = pytest.mark.parametrize("composite", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::UserWarning:timm")


# -- what models do inside ---------------------------------------------------------------------------------------------

def in_place(self, x):
    y = self.first(x)
    y += x
    y.mul_(0.5).sub_(self.norm.bias)
    y[:, 0] = 1.0
    y[:, 1:3] *= 2
    z = y.view(y.shape[0], -1)
    z.masked_fill_(z > 1.5, 0.25)
    return self.head(y.relu_()).sum(1)


def joined(self, x):
    y = torch.cat([self.head.weight.sum(0).expand(x.shape[0], 1, D), self.norm(x)], 1)
    y = torch.where(y > 0.5, y, self.norm.bias)
    y = F.pad(y, (0, 0, 1, 1), value=0.3).roll(1, 1).flip(1)[:, 1:].chunk(2, 1)[0]
    return self.head(torch.stack([y, y.clamp(min=-0.5)]).mean(0)).sum(1)


def gated(self, x):
    gate, y = torch.sigmoid(self.first(x)), F.silu(self.second(x))
    return self.head(gate * y + (1 - gate) * x + 3 * torch.tanh(x) - x / (1 + x.square().mean(-1, keepdim=True))).sum(1)


def by_hand(self, x):
    y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)
    y = F.normalize(y + F.rms_norm(x, (D,)), dim=-1)
    y = torch.einsum("btd,bsd,bse->bte", y, x, x) + torch.baddbmm(y, x, x.mT @ y)
    return self.head(F.softplus(y) + y.abs() - y.square()).amax(1)


def in_float32(self, x):
    """Two readers of a tensor in less precision, writes into it, its own attention, constants and activations."""
    y = self.first(x).float()
    z = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-2) + 0.5
    z += torch.sigmoid(y)
    z = z + F.scaled_dot_product_attention(z, y, z)
    z = torch.cat([z, torch.ones_like(z[:, :1])], 1).relu_() * y[:, :1]
    return self.head(z.to(x.dtype)).sum(1)


@composites
@pytest.mark.parametrize("forward", [in_place, joined, gated, by_hand, in_float32])
def test_books_balance_whatever_the_model_does(forward, composite):
    found, plain = run(forward, composite=composite), Written(forward)(tokens())
    assert closes(found), f"\n{found.ledger}"
    assert same(found.output, plain, 1e-6 if forward is in_float32 else 1e-12)
    assert ("rounding" in found.ledger.absorbed) == (forward is in_float32)


@pytest.mark.parametrize("forward", [in_place, joined, gated, by_hand])
def test_gradient_is_that_of_autograd(forward):
    x = tokens().requires_grad_()
    (g,) = torch.autograd.grad(Written(forward)(x)[:, 1].sum(), x)
    assert same(run(forward, composite="gradient").relevance["0"], (x * g).detach())


def test_activation_modules_are_one_op():
    """A module that computes its function in steps is the function, for the identity rule at least."""
    class Stepwise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x * (1.0 + torch.erf(x / 2 ** 0.5))

    stepwise = Written(lambda self, x: self.head(self.act(self.first(x))).sum(1))
    stepwise.act = Stepwise()
    expected = run(lambda self, x: self.head(F.gelu(self.first(x))).sum(1))
    assert same(run(stepwise).relevance["0"], expected.relevance["0"], 1e-9)


# -- the books are no catch-all ----------------------------------------------------------------------------------------

class Hidden(torch.autograd.Function):
    """x^2 - 1 / 3, out of sight of every interception."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square() - 1 / 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


@composites
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_hidden_op_is_a_leak(composite, dtype):
    model = Written(lambda self, x: self.head(Hidden.apply(self.first(x))).sum(1)).to(dtype)
    with pytest.raises(LedgerError, match="do not balance in row"):
        run(model, tokens().to(dtype), composite=composite)
    run(model, tokens().to(dtype), composite=composite, ledger=False)  # the caller has been told how


def test_a_hidden_op_is_a_leak_in_one_row():
    """Where the others have nothing to lose there; and in a part of less precision."""
    def forward(self, x):
        y = self.first(x)
        return self.head(torch.cat([y[:1], Hidden.apply(y[1:])])).sum(1)

    with pytest.raises(LedgerError, match="in row 1"):
        run(forward)
    with pytest.raises(LedgerError):
        run(lambda self, x: self.head(Hidden.apply(self.first(x).float() * 2).double()).sum(1))


def everything(self, x):
    """What there is a fused backward pass for."""
    gate = torch.sigmoid(self.second(x))
    x = x + F.gelu(self.norm(x)) + F.relu(F.rms_norm(x, (D,)))
    x = x + F.group_norm(x.mT, 2).mT
    x = x + F.scaled_dot_product_attention(x, x, x) + torch.softmax(x @ x.mT, -1) @ x
    wide = x if x.dtype == F64 else x.float()  # torch solves none in less
    x = x + torch.linalg.solve_triangular(wide @ wide.mT / 9, wide, upper=False, unitriangular=True).to(x.dtype)
    return self.head(x + gate * x).sum(1)


def functions() -> list[type[torch.autograd.Function]]:
    """Every autograd function of the table; not that of opaque layers, which is booked by difference and takes the test
    against the same layer in the open (test_quantised.py).
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("relprop.ops.")]
    found = {value for module in modules for value in vars(module).values()
             if isinstance(value, type) and issubclass(value, torch.autograd.Function)}
    return sorted(found - {torch.autograd.Function, Jacobian}, key=lambda function: function.__name__)


@composites
def test_a_model_with_everything_is_right_by_itself(composite):
    assert closes(run(everything, composite=composite))


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__name__)
def test_a_wrong_backward_pass_is_a_leak(monkeypatch, function):
    """Each one in its turn gives back 1 % too much; one that only a low dtype needs, whose books are coarser, twice."""
    right, calls, low = function.backward, [], function is Plain
    factor, dtype = (2.0, torch.bfloat16) if low else (1.01, F64)

    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = right(ctx, *grads)
        calls.append(True)
        if isinstance(found, Tensor):
            return found * factor
        return tuple(g * factor if isinstance(g, Tensor) else g for g in found)

    monkeypatch.setattr(function, "backward", staticmethod(backward))
    noticed = []
    for composite in (*NAMES, UNUSUAL):
        calls.clear()
        try:
            run(Written(everything).to(dtype), tokens().to(dtype), composite=composite)
        except LedgerError:
            noticed.append(composite)
        else:
            # fused attention is booked by difference, so there it takes the test against attention in steps
            assert not calls or composite.startswith("attnlrp"), f"{composite} hides it"
    assert noticed, "no composite uses it"


UNUSUAL = Composite("unusual", NOT, {"softmax": softmax.identity, "norm": norm.identity, "matmul": matmul.epsilon})
"""Rules that no preset uses."""


def test_biases_that_are_forgotten_are_a_leak(monkeypatch):
    monkeypatch.setattr(ops.Journal, "constant", lambda self, name, constant, output: None)
    with pytest.raises(LedgerError):
        run(everything)


def test_what_is_no_rounding_is_not_booked_as_such(monkeypatch):
    """In a part of less precision all is booked by difference, so that a rule which leaks there shows as rounding."""
    right = activation.Recomputed.backward
    monkeypatch.setattr(activation.Recomputed, "backward",
                        staticmethod(lambda ctx, g: (1.01 * right(ctx, g)[0], *right(ctx, g)[1:])))
    with pytest.raises(LedgerError, match="is more than torch.float32 rounds"):
        run(lambda self, x: self.head(F.gelu(self.first(x).float()).double()).sum(1))


# -- values that are not numbers, and outputs that depend on nothing ---------------------------------------------------

@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_input_that_is_not_finite(bad):
    x = tokens()
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match="the input '0' holds NaN or inf"):
        run(lambda self, x: self.head(self.first(x)).sum(1), x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["bert", "llama", "timm-vit"])
def test_weights_that_are_not_finite(name, bad):
    family, model = FAMILIES[name], FAMILIES[name].model()
    where, weight = next((n, p) for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=f"{where}.*holds NaN or inf"):
        propagate(model, *family.inputs(), family.value)


def test_buffers_that_are_not_finite():
    model = Written(lambda self, x: self.head(self.batch(x.mT).mT).sum(1))
    model.batch = nn.BatchNorm1d(D).to(F64).eval()
    assert closes(run(model))
    model.batch.running_mean[2] = torch.nan
    with pytest.raises(ValueError, match=r"batch\.running_mean.*holds NaN"):
        run(model)


@pytest.mark.parametrize("ledger", [True, False])
def test_relevance_that_is_not_finite(ledger):
    """The value is a number, the way back is not: an error, not a map of NaN."""
    with pytest.raises((ValueError, LedgerError)):
        run(lambda self, x: self.head(torch.where(x > 9, x.sqrt(), x)).sum(1), -tokens().abs(), composite="gradient",
            ledger=ledger)


def constant(self, x):
    return self.head.weight.sum(1).expand(len(x), -1)


@composites
@pytest.mark.parametrize("forward", [
    constant, lambda self, x: self.head(self.first(x).detach()).sum(1), lambda self, x: self.head(0 * x).sum(1),
    lambda self, x: F.relu(self.head(x) - 1e6).sum(1), lambda self, x: self.head(torch.ones_like(x)).sum(1)])
@pytest.mark.parametrize("ledger", [True, False])
def test_an_output_that_depends_on_nothing(forward, composite, ledger):
    with pytest.raises(IndependentOutput, match="does not depend on the input"):
        run(forward, composite=composite, ledger=ledger)


def test_an_output_that_depends_on_nothing_in_one_row():
    with pytest.raises(IndependentOutput, match="does not depend on the input"):
        run(lambda self, x: self.head(x * torch.tensor([1.0, 0.0]).reshape(2, 1, 1)).sum(1))


def test_a_model_that_reads_no_input():
    with pytest.raises(ValueError, match="nothing to explain"):
        propagate(Written(constant), (), {}, second)


# -- targets -----------------------------------------------------------------------------------------------------------

def logits(self, x):
    return self.head(F.gelu(self.norm(self.first(x)))).sum(1)


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "gamma", "gradient"])
def test_relevance_of_a_sum_is_the_sum(composite):
    """A contrast is the difference of two maps; its books are that of theirs."""
    of = partial(run, logits, composite=composite)
    first, other = (of(value=lambda output, i=i: output[:, i]) for i in (0, 2))
    contrast = of(value=lambda output: output[:, 0] - output[:, 2])
    assert same(contrast.relevance["0"], first.relevance["0"] - other.relevance["0"])
    assert same(contrast.ledger.input, first.ledger.input - other.ledger.input)
    assert closes(contrast) and TARGET not in contrast.ledger.absorbed


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@composites
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3"])
def test_a_value_of_nothing_has_books_too(name, composite, dtype):
    """The difference of two equal logits is zero, made of much: its rounding is relative to that, not to the value."""
    def tied(output):
        value = FAMILIES[name].value(output)
        other = output.logits.flatten(1)[:, 2]
        return value - (value / other).detach() * other

    found = propagate(model(name, dtype), *FAMILIES[name].inputs(dtype), tied, composite)
    assert found.value.abs().max() <= 1e-6 and TARGET not in found.ledger.absorbed
    assert composite == "deep-taylor" or all(r.abs().max() > 1e-4 for r in found.relevance.values())


def test_a_target_a_row():
    values = [lambda output: output[:, 0], lambda output: output.softmax(-1)[:, 1]]
    found = run(logits, value=lambda output: torch.stack([values[0](output)[0], values[1](output)[1]]))
    for row, value in enumerate(values):
        alone = run(logits, value=value)
        assert same(found.relevance["0"][row], alone.relevance["0"][row])
    assert closes(found)


def test_what_a_probability_keeps_is_booked():
    """p is no linear function of the logits z: the map holds sum z dp/dz, and the target function the rest."""
    found = run(logits, value=lambda output: output.softmax(-1)[:, 1])
    z = found.output.detach().requires_grad_()
    p = z.softmax(-1)[:, 1]
    (g,) = torch.autograd.grad(p.sum(), z)
    assert same(found.ledger.absorbed[TARGET], (p - (z * g).sum(1)).detach(), 1e-9)
    assert same(found.value, p.detach()) and closes(found)


@pytest.mark.parametrize("value", [lambda output: output, lambda output: output.sum(), lambda output: 1.0])
def test_a_value_is_one_number_a_row(value):
    with pytest.raises(ValueError, match="one number a row"):
        propagate(Written(logits), (tokens(),), {}, value)


# -- what else a run can give ------------------------------------------------------------------------------------------

def test_spread_bias_gives_all_of_it_to_the_inputs():
    plain, spread = run(logits), run(logits, spread_bias=True)
    r, s = plain.relevance["0"], spread.relevance["0"]
    assert not same(plain.ledger.input, plain.value, 1e-3)
    assert same(s.flatten(1).sum(1), spread.value) and closes(spread)
    shares = (s - r) / r.abs()
    assert same(shares, shares[:, :1, :1].expand_as(shares), 1e-9)  # in proportion to what each has


def test_relevance_that_crosses_a_layer():
    """What a layer passes on is what it received, less what its own biases took."""
    model = Written(lambda self, x: self.layers(x).sum(1))
    model.layers = nn.Sequential(nn.Linear(D, D, bias=False), nn.ReLU(), nn.Linear(D, D), nn.Linear(D, 3)).to(F64)
    found = run(model, layers=("layers.0", "layers.2", "layers.3"), composite="cp-lrp")
    crossing = found.ledger.layers
    assert same(crossing["layers.3"], found.value)
    assert same(crossing["layers.0"], found.ledger.input)
    assert not same(crossing["layers.0"], crossing["layers.2"], 1e-3)
    assert not same(crossing["layers.2"], crossing["layers.3"], 1e-3)
    both = crossing["layers.3"] - crossing["layers.0"]
    assert same(both, found.ledger.absorbed["biases"]) and closes(found)


def test_options_that_are_none():
    with pytest.raises(ValueError, match="unruled must be 'error' or 'gradient'"):
        run(logits, unruled="ignore")
    with pytest.raises(ValueError, match="unknown composite"):
        run(logits, composite="attnlpr")
