"""Autograd functions of a model's own are run in the open, for the length of a run and in its modules alone."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import relprop
from relprop.relevance import propagate

F64 = torch.float64


class Clipped(Function):
    """tanh, with a gradient that is none of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable()
        return torch.tanh(x) * scale

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        x, = ctx.saved_tensors
        return g.clamp(-0.1, 0.1) * x, None


class Apart(Function):
    """The same in the newer form, whose context is set up apart."""

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        with torch.no_grad():
            return torch.tanh(x) * scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(g), None


class Unseen(Function):
    """A kernel that torch knows nothing of, with the gradient that it has; linear."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 3)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 3 * g


class Held(Function):
    """A root, which the rules hold constant, so that nothing goes back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.sqrt(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 100 * g


def helped(x: Tensor) -> Tensor:
    return Clipped.apply(x, 2.0)


def decorated(function):
    def wrapper(*args):
        return function(*args)
    return wrapper


class Layer(nn.Module):
    """One linear layer, and something after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)


class Plain(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * 2.0


class Direct(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return Clipped.apply(self.linear(x), 2.0)


class NewForm(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return Apart.apply(self.linear(x), 2.0)


class ByHelper(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self._after(self.linear(x))

    def _after(self, y: Tensor) -> Tensor:
        return helped(y)


class Decorated(Layer):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return helped(self.linear(x))


class Inherited(Decorated):
    pass


def inputs() -> Tensor:
    return torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(1))


def explained(model: nn.Module):
    return propagate(model.double(), (inputs(),), {}, lambda y: y[:, 1], "attnlrp")


@pytest.mark.parametrize("kind", [Direct, NewForm, ByHelper, Decorated, Inherited])
def test_what_is_inside_follows_the_rules(kind):
    found, expected = explained(kind()), explained(Plain())
    assert expected.relevance["0"].abs().min() > 0
    torch.testing.assert_close(found.relevance["0"], expected.relevance["0"])
    assert found.ledger.error.max() < 1e-9 and found.ledger.absorbed.keys() == expected.ledger.absorbed.keys()


@pytest.mark.parametrize("kind", [Direct, NewForm, ByHelper, Decorated, Inherited])
def test_a_model_is_given_back_as_it_came(kind):
    model = kind().double()
    before = [dict(module.__dict__) for module in model.modules()], dict(vars(kind))
    explained(model)
    with pytest.raises(relprop.IndependentOutput):  # also after an exception
        propagate(model, (inputs(),), {}, lambda y: y[:, 1].detach(), "attnlrp")
    assert ([dict(module.__dict__) for module in model.modules()], dict(vars(kind))) == before
    assert Clipped.apply.__self__ is Clipped


def test_what_torch_does_not_see_keeps_its_gradient():
    class Kernel(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return Unseen.apply(self.linear(x))

    class Tripled(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * 3

    found, expected = explained(Kernel()), explained(Tripled())
    torch.testing.assert_close(found.relevance["0"], expected.relevance["0"])


def test_what_a_rule_holds_is_seen():
    class Rooted(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y * Held.apply(y * y + 1)

    found = explained(Rooted())
    assert found.ledger.error.max() < 1e-9 and found.relevance["0"].abs().min() > 0


class Writing(nn.Module):
    """A state that each layer reads and writes, as of recurrent models with a cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 4, 3).to(x)
        for place, layer in enumerate(self.layers):
            state[:, :, place] = x
            x = layer(x) * state[:, :, place]
            state[:, :, place] = x + state[:, :, place]
        return x + state.sum(-1)


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "epsilon"])
def test_what_a_model_writes_over_is_kept_for_the_way_back(composite):
    found = propagate(Writing().double(), (inputs(),), {}, lambda y: y[:, 1], composite)
    assert found.ledger.error.max() < 1e-9
    torch.testing.assert_close(found.ledger.input + sum(found.ledger.absorbed.values()), found.value.to(F64))
    assert found.relevance["0"].abs().min() > 0


class Fallback(nn.Module):
    """A part that is not there and gives a leaf of zeros of its own instead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + self.linear(torch.zeros_like(x).requires_grad_())


def test_a_leaf_of_the_model_is_a_constant():
    found = explained(Fallback())
    assert found.ledger.error.max() < 1e-9 and found.ledger.absorbed
