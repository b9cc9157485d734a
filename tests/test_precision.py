"""Models in less than float32: their forward pass is their own, and relevance is that of a float32 run."""
from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import relprop
from relprop.composite import NAMES
from relprop.numerics import through
from relprop.ops import activation, add, linear
from relprop.ops.call import Call
from relprop.relevance import propagate
from relprop.zoo.digits import canvases

REVIEWS = ["A gripping, beautifully acted story that holds you until the last scene and stays with you for days.",
           "I wanted to like this film, but the jokes fall flat, the music is loud and the ending is a mess.",
           "It is neither good nor bad, just an hour and a half of forgettable entertainment for a rainy evening."]
DEEP = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=12, num_attention_heads=4, vocab_size=100,
            initializer_range=0.1)
LOW = torch.bfloat16


@cache
def pair(name: str) -> tuple[relprop.Subject, relprop.Subject]:
    """A bundled model in bfloat16, and the same weights in float32."""
    low = relprop.load(name, dtype="bfloat16")
    whole = relprop.load(name)
    whole.model.load_state_dict(low.model.state_dict())
    return low, whole


@cache
def deep(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **DEEP)).eval().to(LOW)
    return BertForSequenceClassification(BertConfig(**DEEP)).eval().to(LOW)


def rank(a: Tensor, b: Tensor) -> float:
    return float(spearmanr(a.flatten().double(), b.flatten().double()).statistic)


def inputs(name: str) -> list:
    if name == "reviews-bert":
        return REVIEWS
    return [(picture[0] * 255).byte().numpy() for picture in canvases(3, seed=3, digits=(2, 3)).images]


@pytest.mark.parametrize("method", [name for name in NAMES if name != "gradient"])
@pytest.mark.parametrize("name", ["reviews-bert", "digits-vit"])
def test_a_map_in_bfloat16_is_that_of_a_float32_run(name, method):
    low, whole = pair(name)
    for one in inputs(name):
        expected = relprop.explain(whole, one, target=1, method=method)
        found = relprop.explain(low, one, target=1, method=method)
        assert found.map.dtype == torch.float32
        assert rank(found.map, expected.map) >= 0.99


@pytest.mark.parametrize("composite", NAMES)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_map_through_twelve_layers_in_bfloat16(name, composite):
    low = deep(name)
    whole = copy.deepcopy(low).float()
    ids = torch.randint(0, 100, (2, 48), generator=torch.Generator().manual_seed(1))

    def value(output):
        return (output.logits[:, -1] if name == "llama" else output.logits)[:, 1]

    found = propagate(low, (), {"input_ids": ids}, value, composite)
    expected = propagate(whole, (), {"input_ids": ids}, value, composite)
    with torch.no_grad():
        assert torch.equal(found.value, value(low(input_ids=ids)))  # bit for bit what the model says
    for row in range(2):
        got, wanted = (one.relevance["input_ids"][row].float().sum(-1) for one in (found, expected))
        assert rank(got, wanted) >= 0.99


def test_relevance_is_not_rounded_on_its_way():
    """Gradients add up in float32 along sums, norms, casts, products with constants and activations."""
    class Stream(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = x + F.gelu(F.layer_norm(x, (8,))) * torch.linspace(1, 2, 8, dtype=x.dtype)
            return x.float().sum(-1)

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(LOW)
    found = propagate(Stream(), (x,), {}, lambda y: y, "attnlrp").relevance["0"] / x.float()
    assert found.dtype == torch.float32
    assert (found != found.to(LOW).float()).float().mean() > 0.9


@pytest.mark.parametrize("rule", [linear.z_plus, partial(linear.z_plus, bias=True), linear.alpha_beta, linear.gamma,
                                  linear.epsilon, linear.z_plus_apart])
def test_rules_of_products_in_bfloat16_are_those_of_float32(rule):
    """Where contributions nearly cancel, what is left of rounded products would be rounding."""
    torch.manual_seed(0)
    x, W, b, g = torch.randn(16, 64), torch.randn(32, 64), torch.randn(32), torch.randn(16, 32)
    x, W, b = (t.to(LOW) for t in (x, W - 0.9 * (W > 0) * W, b))

    def shares(dtype: torch.dtype) -> linear.Shares:
        affine = linear.Affine(F.linear, lambda s, W: s @ W, W.to(dtype), b.to(dtype), 0).widened()
        y = F.linear(x.to(dtype), W.to(dtype), b.to(dtype)).float()
        return rule(x.float(), y, g, affine)

    found, expected = shares(LOW), shares(torch.float32)
    assert found.x.dtype == torch.float32
    assert (found.x - expected.x).norm() <= 0.02 * expected.x.norm()


def test_a_rounded_sum_that_is_zero_loses_nothing():
    x = torch.tensor([[1.0, 2.0]], dtype=LOW, requires_grad=True)
    y = torch.tensor([[-1.0, 1.0]], dtype=LOW, requires_grad=True)
    call = Call(torch.add, "add", "", add.epsilon)
    add.add(call, x, y).backward(torch.ones(1, 2))
    assert torch.allclose(x.grad.float(), torch.ones(1, 2), atol=1e-2)


def test_an_activation_that_is_not_zero_at_zero_is_precise_near_it():
    x = torch.tensor([1e-3, 1e-2, 0.1], dtype=LOW, requires_grad=True)
    y = activation.elementwise(Call(torch.sigmoid, "activation", "", activation.identity), x)
    y.backward(torch.ones(3))
    assert torch.allclose(x.grad.float(), torch.full((3,), 0.25), rtol=0.02)


def test_products_in_float16_neither_overflow_nor_vanish():
    W = torch.eye(4, dtype=torch.float16)
    for size in (1e7, 1e-9):
        t = torch.tensor([[1.0, -0.5, 0.0, 0.25]]) * size
        assert torch.allclose(through(lambda t: t @ W, t, torch.float16), t, rtol=1e-3)
    assert not torch.isfinite(torch.full((1, 4), 1e7).half() @ W).all()  # or there would be nothing to do


def test_float16_relevance_that_grows_is_finite():
    """A backward pass in float16 would overflow: fourteen layers multiply by three."""
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(14))
            for layer in self.layers:
                layer.weight.data.copy_(3 * torch.eye(8))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.sum(-1)

    x = torch.full((1, 8), 1e-3, dtype=torch.float16)
    found = propagate(Growing().half(), (x,), {}, lambda y: y, "attnlrp")
    assert (found.relevance["0"] / x.float()).max() > torch.finfo(torch.float16).max
    assert (found.relevance["0"].sum(1) - found.value.float()).abs() <= 2e-2 * found.value.float()
