"""Relevance inside a model: what crosses a place is what its neighbours say crosses it, and the plain gradient's is the
activation times that of autograd.
"""
from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from families import _GQA, _T5, FAMILIES, _text, model
from tiny import TOKENIZER, bert, gpt2, images, text, vit

import relprop
from relprop import explain
from relprop.method import METHODS
from relprop.ops import matmul
from relprop.relevance import propagate
from relprop.subject import Subject
from relprop.trace import Tap

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
INSIDE = 1e-6
"""Of a float64 run of transformers, which computes norms and softmax in float32 inside."""
SOME = ["bert", "bert-eager", "gpt-neox", "llama", "gemma2", "bloom", "t5-encoder", "timm-vit", "timm-cait",
        "timm-swin", "torch-encoder-sequence-first"]
WINDOWS = {"timm-swin"}


@cache
def explained(name, method, *at, **options):
    args, kwargs = FAMILIES[name].inputs(F64)
    return explain(model(name, F64), kwargs or args[0], FAMILIES[name].value, method=method, at=list(at),
                   **options)


def close(found, expected, tolerance=INSIDE):
    assert found.shape == expected.shape and expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def total(t):
    """A row's sum, (B,)."""
    return t.double().flatten(1).sum(1)


# -- identities --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp"])
def test_the_stream_is_one(name, method):
    """What enters a layer is what left the one before, and all positions sum to what the ledger says crosses."""
    r = explained(name, method, "L0", "L1", "L1.in", layers=True)
    close(r.latents["L1.in"], r.latents["L0"], 0)
    for layer in ("L0", "L1"):
        close(total(r.latents[layer]), r.ledger.layers[layer])


def test_what_stands_between_two_layers_is_seen():
    """DeBERTa has a convolution behind its first layer."""
    r = explained("deberta-v2", "attnlrp", "L0", "L1.in")
    assert not torch.allclose(r.latents["L0"], r.latents["L1.in"], rtol=1e-3)


@pytest.mark.parametrize("name", SOME)
def test_a_map_is_as_without_addresses(name):
    """Also where an attention is opened for its pattern."""
    r = explained(name, "attnlrp", "L*.attn.H*.pattern", "L0.in", "embed", "L1.mlp.N*")
    plain = explained(name, "attnlrp")
    assert (r.map - plain.map).abs().max() <= INSIDE * plain.map.abs().max()
    assert r.ledger.error.max() < 1e-6


@pytest.mark.parametrize("name", ["llama", "t5-encoder", "gemma2"])
@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp", "epsilon"])
def test_heads_and_neurons_sum_to_their_part(name, method):
    """Where the projections have no biases, position by position."""
    r = explained(name, method, "L1.attn", "L1.attn.H*", "L1.mlp", "L1.mlp.N*")
    for part, unit in (("L1.attn", "H"), ("L1.mlp", "N")):
        units = [t for at, t in r.latents.items() if at.startswith(f"{part}.{unit}")]
        assert len(units) > 1
        if method == "epsilon":  # whose share a stabilizer holds back
            assert (sum(units) - r.latents[part]).abs().max() < 1e-2 * r.latents[part].abs().max()
        else:
            close(sum(units), r.latents[part])


@pytest.mark.parametrize("name, path", [("bert", "bert.encoder.layer.1.attention.output.dense"),
                                        ("torch-encoder", "encoder.layers.1.self_attn")])
def test_heads_sum_to_what_the_output_projection_reads(name, path):
    args, kwargs = FAMILIES[name].inputs(F64)
    nth = 0 if name == "bert" else 1  # torch's has its queries, keys and values in the same module
    found = propagate(model(name, F64), args, kwargs, FAMILIES[name].value, "cp-lrp",
                      taps={"projection": Tap(path, "linear", "input", nth)})
    heads = explained(name, "cp-lrp", "L1.attn.H*").latents
    assert len(heads) == 2
    close(sum(heads.values()), found.tapped["projection"].sum(-1).float())


@pytest.mark.parametrize("name", [name for name in SOME if name not in ("timm-cait",)])
def test_a_pattern_has_half_of_its_head(name):
    """By AttnLRP's rule a product gives half to the pattern and half to the values; by the gradient, all to both."""
    for method, share in (("attnlrp", 0.5), ("input-x-gradient", 1.0)):
        at = ["L1.attn.H0.pattern", "L1.attn.H0"]
        if method == "attnlrp":
            r = explained(name, method, *at)
        else:
            args, kwargs = FAMILIES[name].inputs(F64)
            r = explain(model(name, F64), kwargs or args[0], FAMILIES[name].value, method=method, at=at)
        pattern, head = (r.latents[one] for one in at)
        if name not in WINDOWS:
            assert pattern.shape == (3, head.shape[1], head.shape[1])
        close(pattern.sum(-1), share * head)


def test_a_wrong_rule_fails_that():
    """With the gradient's rule for products in AttnLRP's place, a pattern has all of its head."""
    args, kwargs = FAMILIES["llama"].inputs(F64)
    wrong = relprop.composite.attnlrp().but("wrong", rules={"matmul": matmul.gradient})
    at = ["L1.attn.H0.pattern", "L1.attn.H0"]
    r = explain(model("llama", F64), kwargs, FAMILIES["llama"].value, method=wrong, at=at)
    pattern, head = r.latents.values()
    assert not torch.allclose(total(pattern), total(head) / 2, rtol=0.1)


def test_all_heads_patterns_at_once():
    r = explained("llama", "attnlrp", "L0.attn.pattern", "L0.attn.H1.pattern")
    assert r.latents["L0.attn.pattern"].shape == (3, 2, 7, 7)
    assert torch.equal(r.latents["L0.attn.pattern"][:, 1], r.latents["L0.attn.H1.pattern"])


def test_the_middle_of_a_layer_carries_all():
    """CP-LRP without biases loses nothing, so that the stream has the same relevance before, between and after."""
    r = explained("llama", "cp-lrp", "L1.in", "L1.mid", "L1")
    for at in ("L1.in", "L1.mid"):
        close(total(r.latents[at]), total(r.latents["L1"]), 1e-5)


def test_the_embedding_is_the_map_of_words():
    r = explained("llama", "attnlrp", "embed")
    close(r.latents["embed"], r.map, 1e-6)


@pytest.mark.parametrize("family", [
    _text("T5ForConditionalGeneration", **_T5, num_decoder_layers=2, decoder_start_token_id=0),
    _text("BartForConditionalGeneration", d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
          encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=24, max_position_embeddings=32,
          decoder_start_token_id=2)], ids=["t5", "bart"])
def test_a_decoder_looks_at_the_encoder(family):
    _, kwargs = family.inputs()
    kwargs = {**kwargs, "decoder_input_ids": kwargs["input_ids"][:, :5].clone()}
    at = ["L2.cross.H0", "L2.cross.H0.pattern", "L2.attn.H0.pattern", "L3.cross", "L1@-1"]
    r = explain(family.model().double(), kwargs, lambda o: o.logits[:, 3, 5], method="attnlrp", at=at)
    assert r.latents["L2.cross.H0.pattern"].shape == (3, 5, 7) and r.latents["L2.attn.H0.pattern"].shape == (3, 5, 5)
    close(r.latents["L2.cross.H0.pattern"].sum(-1), r.latents["L2.cross.H0"] / 2)
    encoder = r.at("L1")
    ends = kwargs["attention_mask"].sum(1) - 1  # of the encoder's own tokens
    assert torch.equal(r.latents["L1@-1"], encoder[torch.arange(3), ends])


# -- oracle ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["gradient", "input-x-gradient"])
def test_activation_times_gradient(method):
    """Against torch.autograd at tensors that hooks pick up."""
    family, whole = FAMILIES["llama-eager"], model("llama-eager", F64)
    _, kwargs = family.inputs(F64)
    layer, kept = whole.model.layers[1], {}

    def reading(name):
        return lambda module, args: kept.__setitem__(name, args[0])

    handles = [layer.register_forward_hook(lambda m, a, o: kept.__setitem__("L1", o[0] if isinstance(o, tuple) else o)),
               layer.mlp.register_forward_hook(lambda m, a, o: kept.__setitem__("L1.mlp", o)),
               layer.post_attention_layernorm.register_forward_pre_hook(reading("L1.mid")),
               layer.self_attn.o_proj.register_forward_pre_hook(reading("heads")),
               layer.mlp.down_proj.register_forward_pre_hook(reading("neurons")),
               layer.self_attn.register_forward_hook(lambda m, a, o: kept.__setitem__("pattern", o[1]))]
    value = family.value(whole(**kwargs))
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(value.sum(), list(kept.values()))
    product = {name: (t * g).detach() for (name, t), g in zip(kept.items(), grads, strict=True)}
    expected = {name: product[name].sum(-1) for name in ("L1", "L1.mlp", "L1.mid")}
    expected["L1.attn.H1"] = product["heads"].unflatten(-1, (2, -1))[..., 1, :].sum(-1)
    expected["L1.mlp.N17"], expected["L1.attn.H0.pattern"] = product["neurons"][..., 17], product["pattern"][:, 0]
    r = explain(whole, kwargs, family.value, method=method, at=list(expected))
    for name, there in expected.items():
        close(r.latents[name], there.float())
    assert r.forwards == 3 and r.backwards == 2


# -- integrated gradients ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return Subject(bert(), processor=TOKENIZER, modality="text", labels=tuple("abc"))


BATCH = text([2, 5, 6, 7, 8, 3], [2, 9, 10, 3])


@pytest.mark.parametrize("method", ["integrated-gradients", "layer-integrated-gradients"])
def test_the_path_integral_at_a_layer(reader, method):
    r = explain(reader, BATCH, 1, method=method, options={"n_steps": 8}, at=["L1", "L2.in", "L0.in@1"])
    assert torch.equal(r.latents["L2.in"], r.latents["L1"])
    apart = explain(reader, BATCH, 1, method="layer-integrated-gradients", options={"n_steps": 8, "layer": "L1"})
    close(r.latents["L1"], apart.map, 1e-6)
    read = explain(reader, BATCH, 1, method="layer-integrated-gradients", options={"n_steps": 8, "layer": "L0.in"})
    close(r.latents["L0.in@1"], read.map[:, 1], 1e-6)
    fine = explain(reader, BATCH, 1, method=method, options={"n_steps": 64}, at=["L1"])
    close(total(fine.latents["L1"]), fine.value.double() - fine.ledger.absorbed["baseline"], 1e-3)


def test_no_path_leads_inside_a_layer(reader):
    with pytest.raises(ValueError, match="L1.attn.H0 is inside a layer, .* answer for L3 and L3.in"):
        explain(reader, BATCH, 1, method="integrated-gradients", at="L1.attn.H0")


# -- positions ---------------------------------------------------------------------------------------------------------

def test_positions_are_those_of_the_row(reader):
    spans = {"verb": [[1, 2], [1]], "all": range(4)}
    at = ["L1@-1", "L1@1", "L1@0,2-3", "L1@cls", "L1@verb", "L1@all", "L1.attn.H0.pattern@-1", "L1.mlp.N3@verb"]
    r = explain(reader, BATCH, 1, method="attnlrp", at=at, spans=spans)
    whole, pattern, neuron = r.at("L1"), r.at("L1.attn.H0.pattern"), r.at("L1.mlp.N3")
    rows = torch.arange(2)
    expected = [whole[rows, [5, 3]], whole[:, 1], whole[:, [0, 2, 3]].sum(1), whole[:, 0],
                torch.stack([whole[0, 1] + whole[0, 2], whole[1, 1]]), whole[:, :4].sum(1), pattern[rows, [5, 3]],
                torch.stack([neuron[0, 1] + neuron[0, 2], neuron[1, 1]])]
    for name, there in zip(at, expected, strict=True):
        torch.testing.assert_close(r.latents[name], there)
        torch.testing.assert_close(r.at(name, spans=spans), there)
    parts = explain(reader, BATCH, 1, method="attnlrp", at=at, spans=spans, batch_size=1)
    assert all(torch.allclose(parts.latents[name], r.latents[name], atol=1e-6) for name in at)


def test_padding_on_the_left_counts_from_the_row_s_own():
    torch.manual_seed(0)
    subject = Subject(gpt2(), processor=TOKENIZER, modality="text", task="text-generation")
    rows, last = ([5, 6, 7, 8, 9], [10, 11, 12]), lambda output: output.logits[:, -1, 4]
    one = [explain(subject, text(row), last, method="attnlrp").at("L1@0") for row in rows]
    batch = text(*rows, left=True)
    mask = batch.kwargs["attention_mask"]
    batch = replace(batch, kwargs={**batch.kwargs, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)})
    both = explain(subject, batch, last, method="attnlrp").at("L1@0")
    torch.testing.assert_close(both, torch.cat(one))


def test_patches_stand_behind_the_prefix():
    torch.manual_seed(0)
    subject = Subject(vit(), modality="image", patch=(6, 6), labels=tuple("abc"))
    batch = images(torch.randn(2, 3, 24, 24, dtype=F64), 6)
    r = explain(subject, batch, 1, method="attnlrp", at=["L0@p0", "L0@p14-15", "L0@cls", "embed@3"])
    whole, embed = r.at("L0"), r.at("embed")
    assert whole.shape == (2, 17) and embed.shape == (2, 16)
    expected = {"L0@p0": whole[:, 1], "L0@p14-15": whole[:, 15] + whole[:, 16], "L0@cls": whole[:, 0],
                "embed@3": embed[:, 3]}
    for name, there in expected.items():
        torch.testing.assert_close(r.latents[name], there)
    with pytest.raises(ValueError, match="row 0 has 17 positions, so 17 is not one"):
        r.at("L0@p16")


@pytest.mark.parametrize("at, said", [
    ("L1@4", "^L1@4: row 1 has 4 positions, so 4 is not one of them"), ("L1@-5", "row 1 has 4 positions"),
    ("L1@verb", "no span of this name was given"), ("L1@p3", "only a picture has patches"),
    ("L0.cross", "no attention to an encoder"), ("L3", "no layer 3")])
def test_positions_and_places_that_are_not_there(reader, at, said):
    with pytest.raises(ValueError, match=said):
        explain(reader, BATCH, 1, method="attnlrp", at=at)


def test_windows_have_no_positions_of_the_input():
    args, _ = FAMILIES["timm-swin"].inputs()
    r = explain(model("timm-swin"), args[0], 1, method="attnlrp")
    assert r.at("L0.attn.H0").shape == (3, 4, 16) and r.at("L0").shape == (3, 64)
    with pytest.raises(ValueError, match="attends in windows"):
        r.at("L0.attn.H0@3")


# -- rows, methods, files ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["bert", "llama", "torch-encoder-sequence-first", "bloom"])
def test_a_batch_is_the_loop_over_its_rows(name):
    at = ["L0.mid", "L1.in", "L0.attn.H1", "L0.mlp.N3", "L1.attn.H0.pattern", "embed"]
    r = explained(name, "attnlrp", *at)
    for row in range(3):
        args, kwargs = FAMILIES[name].row(row, F64)
        alone = explain(model(name, F64), kwargs or args[0], FAMILIES[name].value, method="attnlrp", at=at)
        for one in at:
            torch.testing.assert_close(alone.latents[one][0], r.latents[one][row], rtol=1e-4, atol=1e-7)


def test_held_patterns_have_no_relevance():
    with pytest.raises(ValueError, match="L1.attn.H0.pattern has no relevance under cp-lrp: its rules hold attention"):
        explained("llama", "cp-lrp", "L1.attn.H0.pattern")


def test_a_method_that_does_not_pass_says_which_do(reader):
    for call in (lambda: explain(reader, BATCH, 1, method="random", at="L1"),
                 lambda: explain(reader, BATCH, 1, method="random").at("L1")):
        with pytest.raises(ValueError, match="random has no at: it does not pass through the layers; the methods that "
                                             "do are attnlrp, .*gradient, input-x-gradient, integrated-gradients"):
            call()


def test_a_method_takes_part_by_its_keyword(reader, monkeypatch):
    """And is asked for whole places: positions are picked for it."""
    asked = []

    def own(subject, batch, targets, *, at=(), gain=1.0):
        asked.append(at)
        plain = METHODS["input-x-gradient"](subject, batch, targets)
        found = {f"L{i}": gain * torch.arange(6.0).expand(2, 6) + i for i in range(3)}
        return replace(plain, latents=found if at else {})

    monkeypatch.setitem(METHODS, "own", own)
    r = explain(reader, BATCH, 1, method="own", at=["L*@-1"], options={"gain": 2.0})
    assert {name: t.tolist() for name, t in r.latents.items()} == {
        f"L{i}@-1": [10.0 + i, 6.0 + i] for i in range(3)}
    assert r.at("L2@1").tolist() == [4.0, 4.0] and asked == [("L*",), ("L2",)]
    with pytest.raises(ValueError, match="own has no option at; it has gain"):
        explain(reader, BATCH, 1, method="own", options={"at": ("L1",)})


def test_latents_are_saved(reader, tmp_path):
    r = explain(reader, BATCH, 1, method="attnlrp", at=["L1.attn.H*.pattern", "L1@verb"], spans={"verb": 1})
    opened = relprop.open(r.save(tmp_path / "r.safetensors"))
    assert opened.equals(r) and torch.equal(opened.at("L1@verb"), r.latents["L1@verb"])
    assert opened.at("L1.attn.H*.pattern").keys() == {"L1.attn.H0.pattern", "L1.attn.H1.pattern"}
    with pytest.raises(ValueError, match="L2 was not kept with this result"):
        opened.at("L2")


def test_grouped_queries_count_their_own_heads():
    family = _text("LlamaForCausalLM", **{**_GQA, "num_attention_heads": 4, "num_key_value_heads": 2})
    _, kwargs = family.inputs()
    at = ["L0.attn.H*.pattern", "L0.attn.H*", "L0.attn"]
    r = explain(family.model().double(), kwargs, family.value, method="attnlrp", at=at)
    assert sum(".pattern" in name for name in r.latents) == 4
    close(sum(r.latents[f"L0.attn.H{head}"] for head in range(4)), r.latents["L0.attn"])
    close(r.latents["L0.attn.H3.pattern"].sum(-1), r.latents["L0.attn.H3"] / 2)


def test_layers_that_share_a_module_have_latents_of_their_own():
    family = _text("AlbertForSequenceClassification", vocab_size=40, hidden_size=16, num_hidden_layers=2,
                   num_attention_heads=2, intermediate_size=24, embedding_size=8, num_labels=4)
    _, kwargs = family.inputs()
    r = explain(family.model().double(), kwargs, family.value, method="attnlrp", at=["L0", "L1", "L1.in"], layers=True)
    assert torch.equal(r.latents["L1.in"], r.latents["L0"]) and not torch.equal(r.latents["L1"], r.latents["L0"])
    close(total(r.latents["L0"]), r.ledger.layers["L0"])
    assert r.ledger.layers.keys() == {"L0"}  # the ledger taps modules, and this is the first run of one
