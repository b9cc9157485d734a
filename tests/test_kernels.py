"""Fused kernels and compiled code give way to an exact equivalent for the length of a run, and come back."""
from __future__ import annotations

import copy
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import relprop
from relprop import kernel
from relprop.anatomy import anatomy
from relprop.relevance import propagate
from relprop.still import settled

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[5, 9, 3, 7, 1, 8], [4, 4, 2, 6, 9, 1]])
FLASH = "flash_attention_2"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **SMALL, **options)).eval()


def leaves_torch(module, query: Tensor, key: Tensor, value: Tensor, mask, scaling=None, **_) -> tuple[Tensor, None]:
    """Causal attention (B, T, H, K) by numpy, as a kernel without a way back would give it; masks are its own."""
    assert mask is None
    q, k, v = (t.detach().double().numpy() for t in (query, key, value))
    k, v = (np.repeat(t, query.shape[1] // key.shape[1], 1) for t in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scaling
    scores = np.where(np.tril(np.ones(scores.shape[-2:])), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return torch.from_numpy(mixed).to(query.dtype).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch):
    """flash-attn as if it were installed: under its name, without its mask."""
    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH, leaves_torch)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, FLASH, lambda **_: None)
    monkeypatch.setattr(kernel, "_told", type(kernel._told)())


def flashed(model: nn.Module) -> nn.Module:
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation_internal = FLASH
    return model


def implementations(model: nn.Module) -> list:
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def value(output) -> Tensor:
    return output.logits[:, -1, 3]


def relevance(model: nn.Module, **options) -> Tensor:
    return propagate(model, (), {"input_ids": IDS}, value, **options).relevance["input_ids"].sum(-1)


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "deep-taylor"])
def test_flash_attention_gives_way(flash, caplog, composite):
    plain, model = llama(), flashed(llama())
    with torch.no_grad():
        own = model(input_ids=IDS).logits
        assert torch.allclose(own, plain(input_ids=IDS).logits, atol=1e-5)  # the kernel is causal, as the model is
    found = propagate(model, (), {"input_ids": IDS}, value, composite)
    assert torch.allclose(found.output.logits, own, atol=1e-5)
    assert torch.allclose(found.relevance["input_ids"].sum(-1), relevance(plain, composite=composite), atol=1e-6)
    propagate(model, (), {"input_ids": IDS}, value, composite)
    told = [record for record in caplog.records if record.name == "relprop"]
    assert len(told) == 1 and FLASH in told[0].message and "sdpa" in told[0].message
    assert set(implementations(model)) == {FLASH}


def test_every_kind_of_run_replaces_kernels(flash):
    plain, model = relprop.load(llama(), None), relprop.load(flashed(llama()), None)
    for run in (
            lambda s: relprop.explain(s, IDS, target=3).map,
            lambda s: relprop.explain(s, IDS, target=3, method="rollout").map,
            lambda s: relprop.explain(s, IDS, target=3, method="transformer-attribution").map,
            lambda s: relprop.explain(s, IDS, target=3).check(steps=2, randoms=2, baseline=0).area,
            lambda s: relprop.effects(s, IDS[:1], IDS[1:], target(3), at="L*.attn.H*").indirect,
            lambda s: relprop.decompose(s, IDS, source="L0.attn.H1", target=3).rel,
    ):
        assert torch.allclose(torch.as_tensor(run(model)), torch.as_tensor(run(plain)), atol=1e-4)
        assert set(implementations(model.model)) == {FLASH}
    assert len(anatomy(model.model, (), {"input_ids": IDS}).layers) == 2


def target(index: int):
    return relprop.Token(index) if hasattr(relprop, "Token") else index


def test_the_name_comes_back_after_an_exception(flash):
    model = flashed(llama())
    with pytest.raises(ZeroDivisionError), settled(model):
        assert set(implementations(model)) == {"sdpa"}
        raise ZeroDivisionError
    assert set(implementations(model)) == {FLASH}


def test_parts_keep_the_way_that_was_chosen_for_them():
    """A model that has eager attention, or of parts of which one alone is fused."""
    model = llama(attn_implementation="eager")
    with settled(model):
        assert set(implementations(model)) == {"eager"}
    pair = nn.ModuleList([llama(attn_implementation="eager"), flashed(llama())])
    with settled(pair):
        assert set(implementations(pair[0])) == {"eager"} and set(implementations(pair[1])) == {"sdpa"}
    assert set(implementations(pair[1])) == {FLASH}


@pytest.mark.parametrize("make", [
    lambda: GptOssForCausalLM(GptOssConfig(vocab_size=20, num_local_experts=2, num_experts_per_tok=1, head_dim=8,
                                           num_key_value_heads=1, **SMALL)),
    lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=20, num_key_value_heads=1, head_dim=8,
                                           attn_logit_softcapping=0.5, **SMALL))], ids=["sinks", "soft caps"])
def test_what_the_fused_attention_of_torch_leaves_out_is_written_in_steps(make):
    model = flashed(make().eval())
    with settled(model):
        assert set(implementations(model)) == {"eager"}


@pytest.mark.parametrize("name", ["flash_attention_3", "flex_attention", "kernels-community/flash-attn3", "paged|sdpa",
                                  "paged|flash_attention_2"])
def test_all_fused_ways_are_known(name):
    model = llama()
    model.config._attn_implementation_internal = name
    assert torch.allclose(relevance(model), relevance(llama()), atol=1e-6)
    assert model.config._attn_implementation == name


def test_flex_attention_is_explained():
    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL)
    model = ViTForImageClassification(config).eval()
    same = copy.deepcopy(model)
    model.set_attn_implementation("flex_attention")
    assert model.config._attn_implementation == "flex_attention"
    pixels = torch.randn(2, 3, 16, 16)
    maps = [propagate(m, (), {"pixel_values": pixels}, lambda o: o.logits[:, 1]).relevance["pixel_values"]
            for m in (model, same)]
    assert torch.allclose(*maps, atol=1e-6)
    assert model.config._attn_implementation == "flex_attention"


def test_kernels_of_the_hub_give_the_forward_back():
    class Norm(nn.LayerNorm):
        kernel_layer_name = "LayerNorm"

    model = nn.Sequential(nn.Linear(4, 4), Norm(4), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    expected = propagate(model, (x,), {}, lambda y: y[:, 1]).relevance["0"]

    def fused(self, x: Tensor) -> Tensor:
        return torch.from_numpy(nn.functional.layer_norm(x, (4,), self.weight, self.bias).detach().numpy())

    model[1].forward = types.MethodType(fused, model[1])
    found = propagate(model, (x,), {}, lambda y: y[:, 1]).relevance["0"]
    assert torch.equal(found, expected)
    assert model[1].forward.__func__ is fused


def test_experts_by_a_kernel_are_computed_in_steps():
    model = llama()
    model.config._experts_implementation_internal = "deepgemm"
    with settled(model):
        assert model.config._experts_implementation == "eager"
    assert model.config._experts_implementation == "deepgemm"


# -- compiled ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def backend():
    """A backend that counts what it compiles."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield count, graphs
    torch._dynamo.reset()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
def test_a_compiled_model_is_explained_as_it_was_written(backend, how):
    compile_with, graphs = backend
    model, x = mlp(), torch.randn(3, 4)
    expected = propagate(mlp(), (x,), {}, lambda y: y[:, 1], "cp-lrp")
    if how == "whole":
        model = torch.compile(model, backend=compile_with)
    elif how == "in place":
        model.compile(backend=compile_with)
    else:
        model[1] = torch.compile(model[1], backend=compile_with)
    with torch.no_grad():
        before = model(x)
    compiled = len(graphs)
    assert compiled
    found = propagate(model, (x,), {}, lambda y: y[:, 1], "cp-lrp")
    assert torch.equal(found.relevance["0"], expected.relevance["0"])
    assert set(found.ledger.absorbed) == set(expected.ledger.absorbed)
    assert relprop.explain(model, x, target=1).map.shape == (3, 4)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert len(graphs) == compiled  # neither the run nor what follows compiles anew


def test_a_compiled_language_model_by_every_kind_of_run(backend):
    compile_with, graphs = backend
    plain, model = llama(), torch.compile(llama(), backend=compile_with)
    subject = relprop.load(model, None)
    assert torch.allclose(relprop.explain(subject, IDS, target=3).map, relprop.explain(plain, IDS, target=3).map)
    kinds = relprop.effects(subject, IDS[:1], IDS[1:], target(3), at="L*.attn.H*")
    same = relprop.effects(relprop.load(plain, None), IDS[:1], IDS[1:], target(3), at="L*.attn.H*")
    assert torch.allclose(kinds.indirect, same.indirect)
    assert not graphs
