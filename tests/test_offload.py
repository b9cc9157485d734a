"""Models whose weights are kept elsewhere until they are used are explained where they are placed."""
from __future__ import annotations

import gc

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import relprop
from relprop.composite import NAMES
from relprop.relevance import propagate

IDS = torch.tensor([[5, 9, 3, 7, 1, 8], [4, 4, 2, 6, 9, 1]])
TOKEN = relprop.Token(3, position=-1)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, initializer_range=0.2)).eval()


def placed(how: str, folder) -> nn.Module:
    model, inside = llama(), ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    if how == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if how == "disk":
        return disk_offload(model, folder / "all", execution_device=CPU)
    return dispatch_model(model, {**dict.fromkeys(inside, "cpu"), "model.layers.1": "disk", "lm_head": "disk"},
                          main_device="cpu", offload_dir=folder / "some", force_hooks=True)


@pytest.fixture(params=["cpu", "disk", "parts"])
def offloaded(request, tmp_path) -> nn.Module:
    return placed(request.param, tmp_path)


def where(model: nn.Module) -> dict[str, tuple]:
    kept = {name: (t.device, t.requires_grad) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return kept | {path: (id(getattr(m, "_hf_hook", None)), m.training) for path, m in model.named_modules()}


def value(output) -> Tensor:
    return output.logits[:, -1, 3]


@pytest.mark.parametrize("composite", NAMES)
def test_relevance_is_that_of_the_model_in_one_place(offloaded, composite):
    before = where(offloaded)
    assert any(device.type == "meta" for device, *_ in before.values() if isinstance(device, torch.device))
    found, expected = (propagate(m, (), {"input_ids": IDS}, value, composite) for m in (offloaded, llama()))
    assert torch.equal(found.relevance["input_ids"], expected.relevance["input_ids"])
    assert set(found.ledger.absorbed) == set(expected.ledger.absorbed)  # constants keep their names
    assert where(offloaded) == before


RUNS = {
    "explain": lambda m: relprop.explain(m, IDS, target=TOKEN).map,
    "places": lambda m: torch.stack([*relprop.explain(m, IDS, target=TOKEN, method="cp-lrp", at=["L*.attn.H*", "L*"])
                                     .latents.values()]),
    "check": lambda m: relprop.explain(m, IDS, target=TOKEN).check(steps=2, randoms=2, baseline=0).area,
    "transformer-attribution": lambda m: relprop.explain(m, IDS, target=TOKEN, method="transformer-attribution").map,
    "input-x-gradient": lambda m: relprop.explain(m, IDS, target=TOKEN, method="input-x-gradient").map,
    "rollout": lambda m: relprop.explain(m, IDS, target=TOKEN, method="rollout").map,
    "effects": lambda m: relprop.effects(m, IDS[:1], IDS[1:], TOKEN, at="L*.attn.H*").indirect,
    "estimates": lambda m: relprop.effects(m, IDS[:1], IDS[1:], TOKEN, at="L*.mlp.N*",
                                           estimate="attribution").indirect,
    "decompose": lambda m: relprop.decompose(m, IDS, source="L0.attn.H1", target=TOKEN).rel,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_kind_of_run(offloaded, run):
    before = where(offloaded)
    assert torch.allclose(run(offloaded), run(llama()), atol=1e-5)
    assert where(offloaded) == before


@pytest.mark.parametrize("composite", NAMES)
def test_weights_are_not_held_on_to(tmp_path, composite):
    """Between the two passes those of linear layers are where they are kept: a model may be larger than a device."""
    model, alive = placed("disk", tmp_path), []

    def counted(output) -> Tensor:
        gc.collect()
        alive.append(sum(type(one) is nn.Parameter and one.dim() == 2 and not one.is_meta for one in gc.get_objects()))
        return value(output)

    plain = llama()  # whose weights count as well
    gc.collect()
    before = sum(type(one) is nn.Parameter and one.dim() == 2 and not one.is_meta for one in gc.get_objects())
    found = propagate(model, (), {"input_ids": IDS}, counted, composite)
    assert before >= 15 and max(alive) <= before
    assert torch.equal(found.relevance["input_ids"],
                       propagate(plain, (), {"input_ids": IDS}, value, composite).relevance["input_ids"])


def test_everything_is_as_before_after_an_exception(offloaded):
    before = where(offloaded)
    with pytest.raises(ZeroDivisionError):
        propagate(offloaded, (), {"input_ids": IDS}, lambda output: 1 / 0)
    assert where(offloaded) == before


@pytest.mark.gpu
@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "deep-taylor"])
def test_one_gpu_and_the_cpu(tmp_path, composite):
    llama().save_pretrained(tmp_path)
    memory = {0: "14KB", "cpu": "1GB"}  # a part of it
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory=memory).eval()
    assert len(set(model.hf_device_map.values())) > 1, model.hf_device_map
    before = where(model)
    found = relprop.explain(model, IDS, target=TOKEN, method=composite)
    expected = relprop.explain(llama().cuda(), IDS, target=TOKEN, method=composite)
    assert torch.allclose(found.map.cpu(), expected.map.cpu(), atol=1e-5)
    assert where(model) == before
