"""Models and processors that cannot be explained as they were given are said so at the door; what can be, is."""
from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from lexicon import reading, writing
from torch import nn

from relprop import Class, UnruledOp, explain, fit, load

IDS = torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]])


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every model here is random, the same each time."""


# -- operations --------------------------------------------------------------------------------------------------------

class Odd(nn.Module):
    """A layer with an operation that no table has."""

    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(4, 4), nn.ModuleList([nn.Sequential(), Cumulated()])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(self.first(x))
        return self.head(x)


class Cumulated(nn.Module):
    def forward(self, x):
        return torch.cumprod(x, 1)


def test_an_op_without_a_rule_is_named_with_its_module():
    model, x = Odd(), torch.rand(2, 4)
    with pytest.raises(UnruledOp, match=r"cumprod.*layers\.1"):
        explain(model, x, 1)
    r = explain(model, x, 1, unruled="gradient")
    assert any("cumprod" in name for name in r.ledger.absorbed) and (r.ledger.error < 1e-4).all()


# -- wrappers ----------------------------------------------------------------------------------------------------------

def test_what_a_wrapper_runs_as_it_is_is_explained():
    model = tiny.bert()
    whole = explain(model, IDS, 1)
    for wrapped in (nn.DataParallel(model), nn.DataParallel(nn.DataParallel(model))):
        r = explain(wrapped, IDS, 1)
        assert torch.equal(r.map, whole.map) and r.provenance == whole.provenance
        subject = load(wrapped, reading())
        assert subject.model is model and subject.task == "text-classification"
    with pytest.raises(ValueError, match="no class index 7"):
        explain(nn.DataParallel(model), IDS, 7)


def test_an_adapter_is_explained_as_the_model_that_it_adapts():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(r=2, target_modules=["query", "value"],
                                                             init_lora_weights=False)).double().eval()
    r = explain(load(model, reading()), ["alice saw bob", "a cat"], [Class(1), Class(2)])
    subject = load(model, reading())
    z = subject.forward(subject.prepare(["alice saw bob", "a cat"])).logits
    assert torch.allclose(r.value.double(), z[[0, 1], [1, 2]], atol=1e-5) and (r.ledger.error < 1e-9).all()
    assert subject.task == "text-classification"


class Held:
    """A wrapper as people write it."""

    def __init__(self, model):
        self.threshold, self.network = 0.5, model

    def __call__(self, x):
        return self.network(x) > self.threshold


@pytest.mark.parametrize("what, said", [
    (Held(nn.Linear(4, 3)), r"not Held; it has one, \.network \(Linear\): give that, and as the target a function"),
    (lambda x: x.sum(1), "not function; what is explained are the operations of a module, so give the one that this"),
    (np.tanh, "not ufunc; what is explained are the operations of a module"),
    (3, "not int$"), (None, "not NoneType$"),
])
def test_what_is_no_module(what, said):
    with pytest.raises(TypeError, match=said):
        explain(what, torch.rand(2, 4), 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile", [torch.jit.script, lambda model: torch.jit.trace(model, torch.rand(2, 4))],
                         ids=["script", "trace"])
def test_operations_that_torch_jit_hides(compile):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="is compiled by torch.jit, .* give the module that it was made from"):
        explain(compile(model), torch.rand(2, 4), 0)
    with pytest.raises(ValueError, match="^0 of Sequential is compiled by torch.jit"):
        explain(nn.Sequential(compile(model), nn.Linear(3, 3)), torch.rand(2, 4), 0)


# -- devices -----------------------------------------------------------------------------------------------------------

def test_a_model_on_the_meta_device_has_no_values():
    with pytest.raises(ValueError, match=r"bert.embeddings.*word.*weight of .* on the meta device.*to_empty"):
        explain(tiny.bert().to("meta"), IDS, 1)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="^0.weight of Sequential is on the meta device"):
        explain(model, torch.rand(2, 4), 0)


def test_a_model_that_is_in_part_on_the_meta_device():
    model = tiny.bert()
    model.classifier.to("meta")
    with pytest.raises(ValueError, match=r"^classifier.weight of .* is on the meta device"):
        explain(model, IDS, 1)


def test_an_input_on_the_meta_device():
    with pytest.raises(ValueError, match="the input is on the meta device, where tensors have no values"):
        explain(nn.Linear(4, 3), torch.rand(2, 4, device="meta"), 0)
    with pytest.raises(ValueError, match="pixel_values is on the meta device|the input is on the meta device"):
        explain(tiny.vit(), torch.rand(2, 3, 24, 24, device="meta"), 0)


def test_weights_that_accelerate_keeps_elsewhere_have_values(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny.bert()
    off = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in off.parameters())
    fit.weights(off, "model")


def test_a_model_in_several_places_that_moves_nothing(monkeypatch):
    """Here is one device; what torch says of two is said by the model."""
    class Apart(nn.Linear):
        def forward(self, x):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")

    model = Apart(4, 3)
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        explain(model, torch.rand(2, 4), 0)  # in one place, it is no fault of places
    monkeypatch.setattr(fit, "devices", lambda model: "weight on cpu, bias on cuda:0")
    with pytest.raises(ValueError, match="Apart is in several places, weight on cpu, bias on cuda:0, .* device_map="):
        explain(model, torch.rand(2, 4), 0)


def test_places_are_told_by_the_first_weight_there():
    model = tiny.bert()
    assert fit.devices(model) == ""
    model.classifier.to("meta")
    assert fit.devices(model) == "bert.embeddings.word_embeddings.weight on cpu, classifier.weight on meta"


# -- inputs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("inputs, said", [
    ({"inputs_embeds": torch.rand(1, 4, 16)}, "give input_ids, relevance reaches the embeddings from there"),
    ({"input_ids": torch.rand(1, 4)}, r"token ids of dtype torch.float32 .* embeddings are reached from their ids"),
    (torch.rand(1, 4, 16), r"dtype torch.float32 and shape \(1, 4, 16\), .* embeddings are reached from their ids"),
])
def test_embeddings_are_given_as_ids(inputs, said):
    with pytest.raises((TypeError, ValueError), match=said):
        explain(tiny.bert(), inputs, 1)


# -- processors --------------------------------------------------------------------------------------------------------

def pictures(size=24, channels=3):
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * channels,
                             image_std=[0.5] * channels)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        image_size=24, patch_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5)).eval()


def test_a_tokenizer_with_more_tokens_than_the_model():
    model = tiny.bert(vocab_size=20)
    subject = load(model, reading())
    assert explain(subject, "alice saw bob", 1).rows == 1  # these it has
    with pytest.raises(ValueError, match=r"gives 'today' the id 20, and .* has embeddings of 0 to 19; use the"):
        explain(subject, "alice saw bob today", 1)


@pytest.mark.parametrize("make, processor, said", [
    (tiny.bert, pictures, "reads images, and .* takes texts; give the tokenizer"),
    (tiny.gpt2, pictures, "reads images, and .* takes texts; give the tokenizer"),
    (vit, reading, "reads texts, and .* takes images; give the image processor"),
    (vit, writing, "reads texts, and .* takes images; give the image processor"),
    (vit, lambda: pictures(channels=1), "normalises 1 channels, the model takes 3; give the one that belongs to it"),
])
def test_a_processor_of_another_kind(make, processor, said):
    with pytest.raises(ValueError, match=said):
        load(make(), processor())


def test_an_image_processor_of_another_size():
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert explain(load(vit(), pictures()), picture, 0).map.shape == (1, 24, 24)
    with pytest.raises(ValueError, match="makes 3 x 32 x 32 of a picture, and .* takes 3 x 24 x 24; give the one"):
        explain(load(vit(), pictures(32)), picture, 0)
