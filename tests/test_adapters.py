"""Models with adapters are explained as they are: a layer and what was added to it are one map, merged or not."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import relprop
from relprop.composite import NAMES
from relprop.relevance import propagate

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 3, 7, 1, 8], [4, 4, 2, 6, 9, 1]])
LAYERS = ["q_proj", "v_proj", "o_proj", "down_proj"]
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=LAYERS, r=4, task_type="CAUSAL_LM"),
    "all layers": lambda: peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"),
    "DoRA": lambda: peft.LoraConfig(target_modules=LAYERS, r=4, use_dora=True, task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
                                  task_type="CAUSAL_LM"),
}
PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
ADDED = ("lora", "ia3", "prompt", "magnitude")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
composites = pytest.mark.parametrize("composite", NAMES)


def llama(biases: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=biases, initializer_range=0.2)).eval().double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def adapted(config, model: nn.Module | None = None) -> nn.Module:
    """With adapters that do something, as if they had been trained."""
    model = peft.get_peft_model(llama() if model is None else model, config).eval().double()
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ADDED):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return model


def value(output) -> Tensor:
    return output.logits[:, -1, 3]


def run(model: nn.Module, composite: str):
    found = propagate(model, (), {"input_ids": IDS}, value, composite)
    assert (found.ledger.error < 1e-9).all()
    return found


def close(a: Tensor, b: Tensor) -> bool:
    """Norms of Llama are computed in float32 whatever the model is in."""
    return bool((a - b).abs().max() <= 1e-6 * b.abs().max())


@composites
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_or_not_the_map_is_the_same(name, composite):
    model = adapted(CONFIGS[name]())
    found, plain = run(model, composite), run(llama(), composite)
    expected = run(model.merge_and_unload(), composite)
    assert close(found.relevance["input_ids"], expected.relevance["input_ids"])
    assert not close(found.relevance["input_ids"], plain.relevance["input_ids"])  # the adapters do something
    assert set(found.ledger.absorbed) - {"quantized layers"} == set(expected.ledger.absorbed)  # which take nothing
    assert all(close(amount, expected.ledger.absorbed[name]) or amount.abs().max() < 1e-6
               for name, amount in found.ledger.absorbed.items() if name != "quantized layers")


@pytest.mark.parametrize("composite", ["attnlrp", "attnlrp-gamma"])
def test_gpt2_whose_weights_lie_the_other_way_round(composite):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2,
                                       bos_token_id=0, eos_token_id=0)).eval()
    model = adapted(peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True), model)
    found = run(model, composite)
    assert close(found.relevance["input_ids"], run(model.merge_and_unload(), composite).relevance["input_ids"])


def test_two_adapters_and_one_switched_off():
    model = adapted(CONFIGS["LoRA"]())
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    model.double().base_model.set_adapter(["default", "other"])
    run(model, "deep-taylor")
    with model.disable_adapter():
        off = run(model, "deep-taylor")
    assert close(off.relevance["input_ids"], run(llama(), "deep-taylor").relevance["input_ids"])


def test_an_adapted_embedding_is_explained():
    config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2, task_type="CAUSAL_LM")
    model = adapted(config)
    token = relprop.Token(3, position=-1)
    found = relprop.explain(model, IDS, target=token, method="attnlrp")
    expected = relprop.explain(model.merge_and_unload(), IDS, target=token, method="attnlrp")
    assert torch.allclose(found.map, expected.map, rtol=1e-4, atol=1e-5 * float(expected.map.abs().max()))


@composites
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_were_learned_absorb(name, composite):
    found = run(adapted(PROMPTS[name]()), composite)
    assert found.relevance["input_ids"].shape == (2, 6, 16)
    if name != "prefix tuning" and composite == "cp-lrp":
        assert sum(amount.abs().max() for amount in found.ledger.absorbed.values()) > 1e-3


@pytest.mark.parametrize("method", ["attnlrp", "deep-taylor"])
def test_places_inside_and_effects(method):
    subject = relprop.load(adapted(CONFIGS["LoRA"]()), None)
    merged = relprop.load(adapted(CONFIGS["LoRA"]()).merge_and_unload(), None)
    token = relprop.Token(3, position=-1)
    found, expected = (relprop.explain(s, IDS, target=token, method=method, at="L*.attn.H*") for s in (subject, merged))
    assert list(found.latents) == list(expected.latents)
    for name, latent in found.latents.items():
        assert close(latent, expected.latents[name]), name
    effects, same = (relprop.effects(s, IDS[:1], IDS[1:], token, at="L*.attn.H*") for s in (subject, merged))
    assert close(effects.indirect, same.indirect)


def test_a_decomposition_takes_each_matrix_as_a_layer():
    """Of the embedding all of the target is relevant, but for constants, through adapters as well."""
    subject = relprop.load(adapted(CONFIGS["LoRA"](), llama(biases=False)), None)
    found = relprop.decompose(subject, IDS, source="embed", target=relprop.Token(3, position=-1))
    assert close(found.rel.sum(0), found.total)


def test_adapters_and_modes_are_given_back():
    model = adapted(CONFIGS["DoRA"]()).train()
    before = {name: (one.requires_grad, one.detach().clone()) for name, one in model.named_parameters()}
    run(model, "attnlrp-gamma")
    assert model.training and all(parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
                                  for name, parameter in model.named_parameters())
