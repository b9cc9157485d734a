"""Addresses read back as they are written; every part that an anatomy finds, on every family, reaches the output."""
from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from families import _GQA, _SMALL, _T5, FAMILIES, _text, _timm, model
from torch.testing import assert_close
from written import state

from relprop.address import Address, located
from relprop.anatomy import anatomy
from relprop.trace.intervention import captured

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PLACES = ["embed", "L5", "L5.in", "L5.mid", "L*", "L5.attn", "L5.attn.H3", "L*.attn.H*.pattern", "L5.attn.pattern",
          "L5.cross", "L5.cross.H*", "L5.cross.H1.pattern", "L5.mlp", "L5.mlp.N17", "L5.attn.H3.q", "L*.attn.H*.k",
          "L5.cross.H1.v", "logits"]
POSITIONS = ["", "@7", "@-1", "@3,5-7", "@3,-1", "@cls", "@p12", "@p3-5,0", "@profession"]


def _parallel():
    from timm.models.vision_transformer import ParallelScalingBlock

    return _timm("vision_transformer.VisionTransformer", block_fn=ParallelScalingBlock)


MORE = {
    "t5": _text("T5ForConditionalGeneration", **_T5, num_decoder_layers=2, decoder_start_token_id=0),
    "bart": _text("BartForConditionalGeneration", d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
                  encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=24, max_position_embeddings=32,
                  decoder_start_token_id=2),
    "gpt-j": _text("GPTJForCausalLM", n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4),
    "falcon": _text("FalconForCausalLM", hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    "mixtral": _text("MixtralForCausalLM", **_GQA, num_local_experts=2, num_experts_per_tok=2),
    "qwen2-moe": _text("Qwen2MoeForCausalLM", **_GQA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12,
                       shared_expert_intermediate_size=20, decoder_sparse_step=1),
    "gpt-bigcode": _text("GPTBigCodeForCausalLM", n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "albert": _text("AlbertForSequenceClassification", **_SMALL, embedding_size=8),
    "timm-parallel": _parallel()}
EXPERTS = {"mixtral", "qwen2-moe"}
PARALLEL = {"gpt-neox", "gpt-j", "falcon", "timm-parallel"}


@cache
def found(name):
    """A family's model, its inputs and its anatomy."""
    family = FAMILIES.get(name) or MORE[name]
    args, kwargs = family.inputs()
    if name in ("t5", "bart"):
        kwargs = {**kwargs, "decoder_input_ids": kwargs["input_ids"][:, :5]}
    whole = model(name) if name in FAMILIES else family.model()
    return whole, args, kwargs, anatomy(whole, args, kwargs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("position", POSITIONS)
def test_an_address_reads_back(place, position):
    address = Address.parse(place + position)
    assert str(address) == place + position and Address.parse(str(address)) == address
    assert str(address.whole) == place


@pytest.mark.parametrize("text", ["", "L", "5", "L5.foo", "L5.mlp.H3", "L5.attn.N3", "L5.in.H3", "L5.mlp.pattern",
                                  "L5.attn.H3.query", "L5.attn.q", "L5.mlp.q", "logits.H1", "L5.logits", "embed.H1",
                                  "L-1", "L5@", "L5@5-3", "L5@3,", "L5@-3-1", "L5@p-", "L5@a b", None, 3])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="is no (address|position)"):
        Address.parse(text)


def test_a_pattern_matches_its_places():
    pattern = Address.parse("L*.attn.H2@-1")
    assert pattern.matches(Address.parse("L7.attn.H2@-1"))
    assert not any(pattern.matches(Address.parse(text)) for text in
                   ("L7.attn.H3@-1", "L7.attn.H2", "L7.cross.H2@-1", "L7.attn.H2.pattern@-1", "L7.mlp@-1"))


def test_positions_are_located():
    assert located(-1, 5) == [4] and located("3,-1,0-1", 5) == [3, 4, 0, 1]
    assert located("cls", 5) == [0] and located("p0", 5, prefix=1) == [1] and located("p1-2", 5, prefix=2) == [3, 4]
    spans = {"job": [[1], [2, 3]], "all": range(3), "one": 2}
    assert [located("job", 5, row=row, spans=spans) for row in (0, 1)] == [[1], [2, 3]]
    assert located("all", 5, row=1, spans=spans) == [0, 1, 2] and located("one", 5, spans=spans) == [2]


@pytest.mark.parametrize("position, options, said", [
    (5, {}, "row 0 has 5 positions, so 5 is not"), ("3-9", {}, "so 5 is not"), (-6, {}, "so -6 is not"),
    ("job", {}, "no span of this name was given; there is none"), ("job", {"spans": {"town": 1}}, "there is town"),
    ("p1", {}, "only a picture has patches"), ("p4", {"prefix": 1}, "so 5 is not"),
    ("cls", {"classed": False}, "there is no class token"), ("cls", {"prefix": 0}, "there is no class token"),
    ("job", {"spans": {"job": [[1]]}, "row": 1}, "has none for row 1"), ("job", {"spans": {"job": []}}, "nothing")])
def test_positions_that_are_not_there(position, options, said):
    with pytest.raises(ValueError, match=said):
        located(position, 5, **options)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_every_part_reaches_the_output(name):
    """And each kind of part is found, in every layer."""
    whole, args, kwargs, parts = found(name)
    before = state(whole)
    verified = parts.verify(whole, args, kwargs)
    assert state(whole) == before
    assert all(verified.values()), [place for place, reached in verified.items() if not reached]
    kinds = {"", ".in", ".attn", ".attn.H0", ".attn.H0.pattern", ".mlp"} | (
        set() if name in PARALLEL else {".mid"}) | (set() if name in EXPERTS else {".mlp.N0"})
    assert verified.keys() >= {f"L{number}{kind}" for number in range(len(parts.layers)) for kind in kinds} | {"embed"}


@pytest.mark.parametrize("name", ["bert", "llama", "timm-vit"])
def test_what_is_found_wrongly_is_not_verified(name):
    whole, args, kwargs, parts = found(name)
    layer = parts.layers[-1]
    wrong = replace(layer, attention=replace(layer.attention, nth=7))
    verified = replace(parts, layers=(*parts.layers[:-1], wrong)).verify(whole, args, kwargs)
    last = len(parts.layers) - 1
    assert not verified[f"L{last}.attn"] and not verified[f"L{last}.attn.H0"] and verified[f"L{last}.mlp"]


@pytest.mark.parametrize("name", sorted(PARALLEL))
def test_parallel_layers_have_no_middle(name):
    with pytest.raises(ValueError, match=r"L0.mid: layer 0 \(.*\) has no stream between .*beside each other"):
        list(found(name)[-1].resolve(Address.parse("L0.mid")))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral", "bloom", "bert-eager"])
def test_heads_are_those_of_the_queries(name):
    whole, *_, parts = found(name)
    config = whole.config
    assert {layer.heads for layer in parts.layers} == {config.num_attention_heads}


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_experts_are_what_they_add_together(name, how):
    """The stream behind the attention and what they add are the stream behind the layer; and they have no neurons."""
    whole, args, kwargs, _ = found(name)
    before, whole.config._experts_implementation = whole.config._experts_implementation, how
    try:
        parts = anatomy(whole, args, kwargs)
        taps = [next(parts.resolve(Address.parse(text)))[1] for text in ("L1.mid", "L1.mlp", "L1")]
        with torch.no_grad():
            values = captured(whole, taps, lambda: whole(*args, **kwargs))[1]
    finally:
        whole.config._experts_implementation = before
    mid, mlp, after = (values[tap].flatten(0, -2) for tap in taps)
    assert_close(mid + mlp, after)
    assert mlp.abs().amax() > 1e-6 and {layer.neurons for layer in parts.layers} == {0}
    with pytest.raises(ValueError, match="no neurons that every token passes"):
        list(parts.resolve(Address.parse("L*.mlp.N*")))


def test_layers_that_share_a_module_are_told_apart():
    _, args, kwargs, parts = found("albert")
    assert [layer.nth for layer in parts.layers] == [0, 1] and len({layer.path for layer in parts.layers}) == 1


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_attends_to_itself_and_to_the_encoder(name):
    *_, parts = found(name)
    assert [layer.cross is not None for layer in parts.layers] == [False, False, True, True]
    places = [str(place) for place, _ in parts.resolve(Address.parse("L*.cross.H*"))]
    assert places == ["L2.cross.H0", "L2.cross.H1", "L3.cross.H0", "L3.cross.H1"]
    (_, own), = parts.resolve(Address.parse("L2.attn"))
    (_, cross), = parts.resolve(Address.parse("L2.cross"))
    assert own != cross
    with pytest.raises(ValueError, match="L0.cross: layer 0 .* has no attention to an encoder"):
        list(parts.resolve(Address.parse("L0.cross")))
    with pytest.raises(ValueError, match="has no attention to an encoder"):
        list(found("bert")[-1].resolve(Address.parse("L*.cross")))


@pytest.mark.parametrize("text, said", [
    ("L9", "no layer 9; the model has layers 0 to 1"), ("L0.attn.H2", "no H2 in layer 0, which has 2 heads"),
    ("L0.attn.H2.pattern", "no H2 in layer 0"), ("L1.mlp.N24", "no N24 in layer 1, which has 24 neurons")])
def test_places_that_are_not_there(text, said):
    with pytest.raises(ValueError, match=said):
        list(found("bert")[-1].resolve(Address.parse(text)))


def test_the_logits_are_made_from_the_last_layer():
    parts = found("gpt-j")[-1]
    (_, tap), = parts.resolve(Address.parse("logits"))
    assert tap == next(tap for _, tap in parts.resolve(Address.parse(f"L{len(parts.layers) - 1}")))


def test_what_edges_end_at_is_no_place_of_its_own():
    with pytest.raises(ValueError, match=r"L1.attn.H0.q is an end of edges.*L1.in"):
        list(found("bert")[-1].resolve(Address.parse("L1.attn.H0.q")))


def test_anatomy_is_given_back():
    whole, args, kwargs, _ = found("bert")
    before = state(whole)
    anatomy(whole, args, kwargs)
    assert state(whole) == before


def test_rows_do_not_change_an_anatomy():
    whole, args, kwargs, parts = found("bloom")
    assert anatomy(whole, args, {name: torch.cat([t, t]) for name, t in kwargs.items()}) == parts
