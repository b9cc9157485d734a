"""Layers whose weights are packed, or out of reach, are explained by what they do; what cannot be is named."""
from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import relprop
from relprop.composite import NAMES
from relprop.errors import UnruledOp
from relprop.ops.opaque import offset
from relprop.relevance import propagate

D = 32
IDS = torch.tensor([[5, 9, 3, 7, 1, 8], [4, 4, 2, 6, 9, 1]])
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")]
composites = pytest.mark.parametrize("composite", NAMES)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.LayerNorm(2 * D), nn.Linear(2 * D, D)).eval()


def inputs() -> Tensor:
    return torch.randn(3, D, generator=torch.Generator().manual_seed(1))


def second(y: Tensor) -> Tensor:
    return y[:, 1]


def run(model: nn.Module, composite: str = "attnlrp", x: Tensor | None = None, **options):
    found = propagate(model, (inputs() if x is None else x,), {}, second, composite, **options)
    assert found.relevance["0"].abs().max() > 0
    return found


def alike(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def dequantised(model: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain model with the weights that the quantised one has."""
    plain = copy.deepcopy(plain)
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = model.get_submodule(path).weight().dequantize()
    return plain


@composites
def test_layers_that_torch_quantised(composite):
    model = dynamic(mlp())
    found, expected = run(model, composite), run(dequantised(model, mlp()), composite)
    assert torch.equal(found.output, model(inputs()))
    assert alike(found.relevance["0"], expected.relevance["0"]) > 0.999  # activations are rounded to 8 bits as well
    assert (found.ledger.error < 1e-5).all()
    assert abs(found.ledger.absorbed.get("quantized layers", torch.zeros(3))).max() < 0.05 * found.flow.max()


def test_a_quantised_language_model_answers_as_any_other():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)
    plain = LlamaForCausalLM(config).eval()
    model = dynamic(copy.deepcopy(plain))
    token = relprop.Token(3, position=-1)
    found, expected = (relprop.explain(m, IDS, target=token, at="L*.attn.H*") for m in (model, plain))
    assert alike(found.map, expected.map) > 0.99
    assert set(found.latents) == set(expected.latents) and len(found.latents) == 4
    assert all(alike(found.latents[name], expected.latents[name]) > 0.9 for name in found.latents)


class Packed(nn.Module):
    """Weights of 8 bits by the function that torch has for them."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
        self.register_buffer("scale", weight.abs().amax(1) / 127)
        self.register_buffer("packed", (weight / self.scale[:, None]).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.packed, self.scale)


@composites
def test_a_function_without_a_gradient_that_is_linear(composite):
    model = nn.Sequential(Packed(), nn.GELU(), nn.Linear(D, D)).eval()
    plain = copy.deepcopy(model)
    plain[0] = nn.Linear(D, D, bias=False)
    plain[0].weight.data = model[0].packed * model[0].scale[:, None]
    found, expected = run(model, composite), run(plain, composite)
    assert alike(found.relevance["0"], expected.relevance["0"]) > 1 - 1e-6
    assert (found.ledger.error < 1e-5).all()


class ByNumpy(nn.Module):
    """A layer that leaves torch, for its own weights or a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.function(x.detach().numpy())).to(x)


@composites
def test_a_module_that_leaves_torch_and_is_linear(composite):
    W = np.random.default_rng(0).normal(size=(D, D))
    plain = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)).double()
    model = copy.deepcopy(plain)
    plain[0].weight.data, plain[0].bias.data = torch.from_numpy(W.T), torch.full((D,), 0.5, dtype=torch.float64)
    model[0] = ByNumpy(lambda x: x @ W + 0.5)
    found, expected = (run(m, composite, inputs().double()) for m in (model, plain))
    assert torch.allclose(found.relevance["0"], expected.relevance["0"], rtol=1e-6, atol=1e-9)
    assert abs(found.ledger.absorbed.get("biases", torch.zeros(3)) - expected.ledger.absorbed.get(
        "biases", torch.zeros(3))).max() < 1e-9


@pytest.mark.parametrize("function", [np.sort, lambda x: x / x.std(), lambda x: np.cumprod(x, -1)])
def test_a_module_that_leaves_torch_and_is_not_linear_is_named(function):
    model = nn.Sequential(nn.Linear(D, D), ByNumpy(function), nn.Linear(D, D))
    with pytest.raises(UnruledOp, match=r"module '1' \(ByNumpy\) computes out of autograd's sight"):
        run(model)


@torch.library.custom_op("relprop_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x ** 3


@torch.library.custom_op("relprop_tests::thirds", mutates_args=())
def thirds(x: Tensor) -> Tensor:
    return x / 3


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.first = function, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def test_a_kernel_without_a_gradient_is_named():
    with pytest.raises(UnruledOp, match=r"no rule for .*relprop_tests\.cube"):
        run(Calls(cube))
    found = run(Calls(thirds))
    assert torch.allclose(found.ledger.input + found.ledger.absorbed["biases"], found.value.double(), atol=1e-5)


class Biased(torch.autograd.Function):
    """A product with a bias inside, and the gradient that belongs to it, as those of bitsandbytes."""

    calls = 0

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(W)
        return x @ W + b

    @staticmethod
    def backward(ctx, g):
        Biased.calls += 1
        return g @ ctx.saved_tensors[0].T, None, None


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.b, self.kernel = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D)), Biased

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.apply(x, self.W, self.b)


@composites
def test_a_layer_with_a_gradient_of_its_own(composite):
    torch.manual_seed(0)
    model = nn.Sequential(Foreign(), nn.GELU(), nn.Linear(D, D)).double()
    plain = copy.deepcopy(model)
    plain[0] = nn.Linear(D, D).double()
    plain[0].weight.data, plain[0].bias.data = model[0].W.data.T, model[0].b.data
    Biased.calls = 0
    found, expected = (run(m, composite, inputs().double()) for m in (model, plain))
    assert torch.allclose(found.relevance["0"], expected.relevance["0"], rtol=1e-6, atol=1e-9)
    assert (found.ledger.error < 1e-9).all()
    assert bool(Biased.calls) == (composite in ("attnlrp", "cp-lrp", "gradient", "attnlrp-path"))


@pytest.mark.parametrize("function", [np.tanh, lambda x: np.maximum(x, 0)])
def test_a_module_that_leaves_torch_entry_by_entry_is_an_activation(function):
    own = {np.tanh: nn.Tanh()}.get(function, nn.ReLU())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), ByNumpy(function), nn.Linear(D, D))
    plain = nn.Sequential(model[0], own, model[2])
    assert torch.allclose(run(model).relevance["0"], run(plain).relevance["0"], atol=1e-6)


def test_what_only_reads_a_shape_is_left_alone():
    """Rotary positions read how long a text is, and nothing of it."""
    class Shape(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(x.shape) * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shape, self.last = Shape(), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x * self.shape(x))

    assert "other constants" not in run(Model()).ledger.absorbed


@pytest.mark.parametrize(("function", "linear"), [
    (lambda x: x @ torch.ones(D, 3) + 1, True), (lambda x: x.cumsum(-1), True), (torch.relu, False), (torch.abs, False),
    (lambda x: x.softmax(-1), False), (lambda x: x / x.norm(dim=-1, keepdim=True), False),
    (lambda x: x - x.mean(0), False),
    (lambda x: x.amax(-1, keepdim=True), False), (lambda x: x.square().sum(-1, keepdim=True).sqrt(), False)])
def test_linear_maps_are_known_by_what_they_do(function, linear):
    assert (offset(function, inputs()) is not None) == linear


# -- other people's layers ---------------------------------------------------------------------------------------------

def quantised_by_torchao(model: nn.Module, config: str) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, config)())
    return model


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig",
                                    "Float8WeightOnlyConfig"])
@composites
def test_torchao(config, composite):
    model = quantised_by_torchao(mlp(), config)
    found, expected = run(model, composite), run(mlp(), composite)
    assert alike(found.relevance["0"], expected.relevance["0"]) > 0.99
    assert (found.ledger.error < 1e-5).all()


@composites
def test_quanto(composite):
    quanto = pytest.importorskip("optimum.quanto")
    model = mlp()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    found, expected = run(model, composite), run(mlp(), composite)
    assert alike(found.relevance["0"], expected.relevance["0"]) > 0.99
    assert (found.ledger.error < 1e-5).all()


def packed_by_bitsandbytes(bits: int, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = mlp().to(dtype)
    for place in (0, 3):
        old = model[place]
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=dtype) if bits == 4 else \
            bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        model[place] = new
    return model.to(device)


def explained_like_the_plain_one(model: nn.Module, x: Tensor, composite: str, least: float) -> None:
    found, expected = run(model, composite, x), run(mlp().to(x), composite, x)
    assert alike(found.relevance["0"].float().cpu(), expected.relevance["0"].float().cpu()) > least
    assert (found.ledger.error < (1e-4 if x.dtype == torch.float32 else 5e-2)).all()


@composites
@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.9)])
def test_bitsandbytes(bits, least, composite):
    explained_like_the_plain_one(packed_by_bitsandbytes(bits, "cpu"), inputs(), composite, least)


@pytest.mark.gpu
@composites
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.9)])
def test_bitsandbytes_on_a_gpu(bits, least, dtype, composite):
    x = inputs().to("cuda", dtype)
    explained_like_the_plain_one(packed_by_bitsandbytes(bits, "cuda", dtype), x, composite, least)
