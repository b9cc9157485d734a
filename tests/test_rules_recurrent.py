"""Recurrent layers against a cell that is written out, and a step of one against the rules on paper."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relprop import composite, division
from relprop.errors import UnruledOp
from relprop.relevance import propagate
from relprop.trace import Tap
from relprop.trace.shadow import Shadow, shadowed

LAYERS = {
    "lstm": (nn.LSTM, {}), "lstm, two ways": (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
    "lstm, projected": (nn.LSTM, {"proj_size": 3}), "lstm without biases": (nn.LSTM, {"bias": False}),
    "gru": (nn.GRU, {"num_layers": 2}), "gru, two ways": (nn.GRU, {"bidirectional": True}),
    "tanh": (nn.RNN, {}), "relu, time first": (nn.RNN, {"nonlinearity": "relu", "batch_first": False}),
}


class Model(nn.Module):
    """A recurrent layer and the classes of its mean over the positions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind, options = LAYERS[name]
        self.rnn = kind(4, 5, **{"batch_first": True, **options})
        self.head = nn.LazyLinear(3, bias=False)
        self(torch.randn(2, 6, 4))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        if not self.rnn.batch_first:
            return self.head(self.rnn(x.transpose(0, 1))[0].mean(0))
        return self.head(self.rnn(x)[0].mean(1))


class WrittenOut(nn.Module):
    """The same of an LSTM of one layer, one operation after the other."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.rnn, self.head = model.rnn, model.head

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 5)
        states = []
        for z in F.linear(x, self.rnn.weight_ih_l0, self.rnn.bias_ih_l0).unbind(1):
            i, f, g, o = (z + F.linear(h, self.rnn.weight_hh_l0, self.rnn.bias_hh_l0)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return self.head(torch.stack(states, 1).mean(1))


def inputs() -> Tensor:
    return torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", composite.NAMES)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_unchanged_and_books_balance(name, method):
    model, seen = Model(name), []
    found = propagate(model, (inputs(),), {}, lambda y: seen.append(y) or y[:, 1], method)
    torch.testing.assert_close(seen[0], model(inputs()), rtol=1e-12, atol=1e-12)
    assert (found.ledger.error < 1e-9).all()
    assert found.relevance["0"].abs().sum((1, 2)).min() > 0
    if method == "attnlrp" and not name.startswith("gru"):  # a slice of a constant has no name
        biases = {"biases"} if name != "lstm without biases" else set()
        assert found.ledger.absorbed.keys() - {"activations"} == biases


@pytest.mark.parametrize("method", ["attnlrp", "gradient", "deep-taylor"])
def test_a_layer_is_what_is_written_out(method):
    model = Model("lstm")
    found, expected = (propagate(one, (inputs(),), {}, lambda y: y[:, 1], method) for one in (model, WrittenOut(model)))
    torch.testing.assert_close(found.relevance["0"], expected.relevance["0"], rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_torch():
    model, x = Model("gru, two ways"), inputs().requires_grad_()
    expected = torch.autograd.grad(model(x)[:, 1].sum(), x)[0] * x
    found = propagate(model, (inputs(),), {}, lambda y: y[:, 1], "gradient", ledger=False)
    torch.testing.assert_close(found.relevance["0"], expected.detach(), rtol=1e-9, atol=1e-12)


def test_relevance_of_a_step_follows_the_signal_and_passes_the_gates_by():
    """h = o tanh(i tanh g), g = V x: R of x by CP-LRP is h / g of each neuron through V, as of Arras et al. 2017."""
    model, x = Model("lstm without biases"), inputs()[:, :1]
    V = model.rnn.weight_ih_l0[10:15]
    h, g = model.rnn(x)[0][:, 0], x[:, 0] @ V.T
    expected = x[:, 0] * ((model.head.weight[1] * h / g) @ V)
    found = propagate(model, (x,), {}, lambda y: y[:, 1], "cp-lrp")
    torch.testing.assert_close(found.relevance["0"][:, 0], expected.detach(), rtol=1e-6, atol=1e-9)


def split(model, how, *parts):
    """The relevant part of the output for each relevant part of the input."""
    shadow = Shadow(division.get(how), len(parts), {Tap("", None, "input"): lambda total, rel: torch.stack(parts)})
    with torch.no_grad(), shadowed(model, shadow):
        output = model(inputs())
    torch.testing.assert_close(output, model(inputs()), rtol=1e-12, atol=1e-12)
    return shadow.part(output)


@pytest.mark.parametrize("how", division.NAMES)
@pytest.mark.parametrize("name", ["lstm, two ways", "lstm without biases", "gru", "tanh", "relu, time first"])
def test_all_of_the_input_is_all_of_the_output_and_nothing_is_nothing(name, how):
    model, x = Model(name), inputs()
    first = x * (torch.arange(6) == 0)[:, None]
    (whole, some), (nothing,) = split(model, how, x, first), split(model, how, 0 * x)
    torch.testing.assert_close(whole, model(x), rtol=1e-9, atol=1e-12)
    assert nothing.abs().max() <= 1e-12 and some.abs().min() > 0


def test_packed_sequences_are_an_error_that_names_them():
    class Packed(Model):
        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.PackedSequence(x.flatten(0, 1), torch.full((len(x),), x.shape[1]))
            return self.head(self.rnn(packed)[0].data.unflatten(0, x.shape[:2]).mean(1))

    with pytest.raises(UnruledOp, match=r"torch.lstm of packed sequences in module '.*'; give the model a padded"):
        propagate(Packed("lstm"), (inputs(),), {}, lambda y: y[:, 1], "attnlrp")
