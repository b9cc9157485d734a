"""A run that makes each layer again on the way back is the run that keeps what it needs."""
from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from families import _GQA, _T5, FAMILIES, _text, model
from test_bad_input import state
from torch import Tensor, nn

from relprop import explain
from relprop.composite import NAMES
from relprop.relevance import propagate
from relprop.trace.checkpoint import Recalled
from relprop.trace.stack import layers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
F64 = torch.float64
SOME = ["bert", "bert-eager", "gpt2", "gpt-neox", "llama", "gemma3", "modernbert", "deberta-v3", "t5-encoder",
        "hf-dinov2", "timm-vit-registers", "timm-eva02", "timm-cait", "timm-swin", "torch-encoder-sequence-first"]
DEEP = {
    "albert": _text("AlbertForSequenceClassification", hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                    intermediate_size=24, embedding_size=8, max_position_embeddings=32),
    "cached": _text("LlamaForCausalLM", **_GQA | {"num_hidden_layers": 4}, use_cache=True),
    "uncached": _text("LlamaForCausalLM", **_GQA | {"num_hidden_layers": 4}, use_cache=False),
    "mixtral": _text("MixtralForCausalLM", **_GQA | {"num_hidden_layers": 3}, num_local_experts=4),
    "shared-keys": _text("Gemma3nForCausalLM", **_GQA | {"num_hidden_layers": 4}, head_dim=8, num_kv_shared_layers=2,
                         vocab_size_per_layer_input=40, laurel_rank=4, hidden_size_per_layer_input=8,
                         activation_sparsity_pattern=[0.0] * 4,
                         layer_types=["sliding_attention", "full_attention"] * 2),
    "t5-gated": _text("T5EncoderModel", **_T5 | {"num_layers": 4}, feed_forward_proj="gated-gelu"),
}


def recalls(monkeypatch) -> list[int]:
    """Counts how many layers were run again."""
    counts, back = [0], Recalled.backward

    def counted(ctx, *gs):
        counts[0] += 1
        return back(ctx, *gs)

    monkeypatch.setattr(Recalled, "backward", staticmethod(counted))
    return counts


def same(found, expected, tolerance=1e-9):
    """All that was found, by name; what one tensor is given by several is added up in another order."""
    assert found.keys() == expected.keys()
    size = max((one.abs().max() for one in expected.values()), default=0)
    for name, one in expected.items():
        assert (found[name] - one).abs().max() <= tolerance * size, name


def agrees(found, expected, tolerance=1e-9):
    assert max(float(r.abs().max()) for r in expected.relevance.values()) > 0
    same(found.relevance, expected.relevance, tolerance)
    same(found.tapped, expected.tapped, tolerance)
    if expected.ledger is not None:
        same(found.ledger.absorbed, expected.ledger.absorbed, tolerance)
        assert torch.equal(found.value, expected.value)


# -- the same numbers --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, composite", [
    *((name, "attnlrp") for name in SOME), ("llama", "deep-taylor"), ("timm-vit-registers", "deep-taylor")])
def test_a_family_is_explained_the_same(name, composite, monkeypatch):
    family, whole, counts = FAMILIES[name], model(name, F64), recalls(monkeypatch)
    before = state(whole)
    expected = propagate(whole, *family.inputs(F64), family.value, composite)
    assert not counts[0]
    found = propagate(whole, *family.inputs(F64), family.value, composite, checkpoint=True)
    agrees(found, expected)
    assert counts[0] and state(whole) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("composite", [name for name in NAMES if name != "attnlrp-path"])
def test_every_family_is_explained_the_same_by_every_composite(name, composite):
    family, whole = FAMILIES[name], model(name, F64)
    expected = propagate(whole, *family.inputs(F64), family.value, composite)
    agrees(propagate(whole, *family.inputs(F64), family.value, composite, checkpoint=True), expected)


@pytest.mark.parametrize("name", DEEP)
def test_layers_that_share_are_run_again_one_by_one(name, monkeypatch):
    """A module, keys and values in a cache, a bias of positions."""
    family, counts = DEEP[name], recalls(monkeypatch)
    whole = family.model()
    expected = propagate(whole, *family.inputs(), family.value)
    found = propagate(whole, *family.inputs(), family.value, checkpoint=True)
    agrees(found, expected, 1e-4)
    assert counts[0] >= 2


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_a_decoder_that_reads_an_encoder(name, monkeypatch):
    config = _T5 | {"num_decoder_layers": 2} if name.startswith("T5") else dict(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32)
    whole = _text(name, **config, decoder_start_token_id=0).model().double()
    counts, ids = recalls(monkeypatch), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    given = (), {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    expected = propagate(whole, *given, lambda out: out.logits[:, -1, 5])
    agrees(propagate(whole, *given, lambda out: out.logits[:, -1, 5], checkpoint=True), expected)
    assert counts[0] == 3  # the last keeps what it needs


@pytest.mark.parametrize("name, method", [("llama", "attnlrp"), ("llama", "cp-lrp"), ("t5-encoder", "attnlrp"),
                                          ("timm-swin", "attnlrp")])
def test_inside_the_layers(name, method):
    """Taps count calls, of which there are twice as many."""
    args, kwargs = FAMILIES[name].inputs(F64)
    at = ["L*", "L*.in", "L*.attn.H*", "L0.mlp.N3", "embed"] + (["L*.attn.H*.pattern"] if method == "attnlrp" else [])
    expected, found = (explain(model(name, F64), kwargs or args[0], FAMILIES[name].value, method=method, at=at,
                               layers=True, checkpoint=on) for on in (False, True))
    same(found.latents, expected.latents, 1e-6)
    same(found.ledger.layers, expected.ledger.layers)
    same(found.ledger.absorbed, expected.ledger.absorbed)


@pytest.mark.parametrize("name", ["llama", "timm-swin", "bloom"])
@pytest.mark.parametrize("options", [{"positions": "apart"}, {"spread_bias": True}, {"ledger": False}], ids=str)
def test_with_options(name, options):
    args, kwargs = FAMILIES[name].inputs()
    expected, found = (explain(model(name), kwargs or args[0], FAMILIES[name].value, method="attnlrp", checkpoint=on,
                               **options) for on in (False, True))
    same({"map": found.map}, {"map": expected.map}, 1e-5)
    if expected.positions is not None:
        same({"positions": found.positions}, {"positions": expected.positions}, 1e-5)


def test_a_half_precise_model():
    family, whole = FAMILIES["llama"], FAMILIES["llama"].model().bfloat16()
    expected = propagate(whole, *family.inputs(), family.value)
    agrees(propagate(whole, *family.inputs(), family.value, checkpoint=True), expected, 1e-2)


# -- models as people write them ---------------------------------------------------------------------------------------

class Layer(nn.Module):
    """A layer; `how` it goes about."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.first, self.second, self.how = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), how
        self.stash: Tensor | None = None

    def forward(self, x: Tensor, seen: dict | None = None) -> Tensor:
        h = F.gelu(self.first(self.norm(x)))
        if self.how == "draws":
            h = h * (1 + torch.rand(12))
        if self.how == "fails":
            raise KeyError("no such thing")
        if self.how == "puts into an argument":
            seen["h"] = h + seen.get("h", 0)
        if self.how == "keeps aside":
            self.stash = h
        y = self.second(h)
        if self.how == "writes into what it reads":
            x += y
            return x
        return {"returns what it reads": x, "returns a tuple": (x + y, h, None)}.get(self.how, x + y)


class Written(nn.Module):
    def __init__(self, how: str, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(how) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        extra, seen = 0, {}
        for layer in self.layers:
            x = layer(x, seen)
            if isinstance(x, tuple):
                x, extra = x[0], extra + x[1].mean((1, 2))
            x += 1  # as a model may
        for kept in [*seen.values(), *(layer.stash for layer in self.layers if layer.stash is not None)]:
            extra = extra + kept.mean((1, 2))
        return self.head(x).sum(1) + (extra[:, None] if isinstance(extra, Tensor) else 0)


WAYS = ["adds", "draws", "puts into an argument", "keeps aside", "writes into what it reads", "returns what it reads",
        "returns a tuple"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("composite", ["attnlrp", "gamma"])
def test_a_layer_of_ones_own(how, composite):
    found = []
    for on in (False, True):
        torch.manual_seed(1)
        x = torch.randn(2, 4, 8, dtype=F64)
        found.append(propagate(Written(how).double(), (x,), {}, lambda y: y[:, 1], composite, checkpoint=on))
    agrees(found[1], found[0])


def test_the_model_is_given_back_also_after_an_error():
    whole = Written("fails")
    whole.layers[0].forward = own = whole.layers[0].forward  # someone has put one there
    before = state(whole)
    with pytest.raises(KeyError, match="no such thing"):
        propagate(whole, (torch.randn(2, 4, 8),), {}, lambda y: y[:, 1], checkpoint=True)
    assert state(whole) == before and whole.layers[0].forward is own and "forward" not in vars(whole.layers[1])


def test_a_layer_that_does_something_else_the_second_time_is_an_error():
    whole = Written("adds")
    plain, calls = whole.layers[0].forward, []

    def forward(x: Tensor, seen: dict) -> object:
        calls.append(x)
        return plain(x) if len(calls) == 1 else (plain(x), plain(x))

    whole.layers[0].forward = forward
    with pytest.raises(RuntimeError, match="made 1 tensors, and 2 when it was run again"):
        propagate(whole, (torch.randn(2, 4, 8),), {}, lambda y: y[:, 1], checkpoint=True)


# -- memory ------------------------------------------------------------------------------------------------------------

def held(depth: int, checkpoint: bool, composite: str) -> int:
    """Most of the layers' hidden tensors that are alive at once, with what their rules and journals keep."""
    whole, alive, most = Written("adds", depth), weakref.WeakSet(), [0]

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        storage = output.untyped_storage()
        alive.add(storage)
        most[0] = max(most[0], len(alive))

    for layer in whole.layers:
        layer.first.register_forward_hook(watch)
    propagate(whole, (torch.randn(2, 4, 8),), {}, lambda y: y[:, 1], composite, checkpoint=checkpoint)
    return most[0]


@pytest.mark.parametrize("composite", ["attnlrp", "deep-taylor", "epsilon"])
def test_no_layer_but_one_keeps_what_is_inside(composite):
    assert held(6, False, composite) == 6
    assert held(6, True, composite) <= 3


# -- which modules are layers ------------------------------------------------------------------------------------------

def test_layers_are_found_in_every_family():
    counts = {name: len(layers(model(name))) for name in FAMILIES}
    assert {name: count for name, count in counts.items() if count != 2} == {"timm-swin": 4, "timm-cait": 4}


def block(*inside: nn.Module) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), *inside)


def test_stages_are_gone_into_and_experts_are_not():
    stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(3)), "down": nn.Linear(8, 8)})
                           for _ in range(2))
    assert layers(stages) == [one for stage in stages for one in stage["blocks"]]
    mixed = nn.ModuleList(block(nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))) for _ in range(2))
    assert layers(mixed) == list(mixed)
    assert layers(nn.Sequential(nn.Linear(8, 8), mixed, nn.Linear(8, 8))) == list(mixed)


def test_layers_without_norms_are_those_of_lists_of_equal_ones():
    plain = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
    assert layers(nn.ModuleDict({"layers": plain, "head": nn.Linear(8, 2)})) == list(plain)


# -- bad input ---------------------------------------------------------------------------------------------------------

def test_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match="no stack of layers was found to run again, .* explain this model without"):
        explain(nn.Linear(4, 3), torch.randn(2, 4), target=1, checkpoint=True)


def test_a_method_that_has_none_says_so():
    args, _ = FAMILIES["timm-vit"].inputs()
    with pytest.raises(ValueError, match="rollout has no checkpoint"):
        explain(model("timm-vit"), args[0], target=1, method="rollout", checkpoint=True)
