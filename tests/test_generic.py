"""Generic attention explainability: against the outputs of the original code, and against what the rules must give."""
from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from tiny import bert, images, targets, text, vit
from torch import Tensor, nn

from relprop import composite
from relprop.attention import METHODS, RULES, rollout
from relprop.attention.generic import Joint, Link, aggregate, fused, normalised
from relprop.explain import explain
from relprop.pattern import attend
from relprop.subject import Subject
from relprop.target import Token
from relprop.tokens import Batch, TensorUnits

REFERENCE = SHARED / "reference"
STORED, RUN = 1e-6, 1e-5  # of the largest entry: from stored attention and gradients, and through the models
generic = METHODS["generic-attention"]


def case(name: str, *, stored: bool = False) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """What is known of a case, its tensors, and its outputs: of its float64 run, or those that belong to the `stored`
    patterns and gradients, which are of its float32 run.
    """
    from safetensors.torch import load_file

    path = REFERENCE / f"cheferMM_{name}_a.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path}: the original's outputs do not ship")
    tensors = load_file(path)
    if not stored:
        tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    out, of_float64 = inputs(tensors, "out."), inputs(tensors, "out64.")
    return json.loads(path.with_suffix(".json").read_text()), tensors, out if stored else out | of_float64


def inputs(tensors: dict[str, Tensor], prefix: str = "input.") -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def filled(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    model = model.double().eval()
    model.load_state_dict(inputs(tensors, "model."))
    return model


def same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal within a share of the largest entry, and neither of them empty."""
    assert found.shape == expected.shape and expected.abs().max() > 0
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def patched(pixels: Tensor, size: int) -> Tensor:
    """Sums over patches of a map (B, Y, X): (B, Gy Gx)."""
    return pixels.double().unflatten(1, (-1, size)).unflatten(3, (-1, size)).sum((2, 4)).flatten(1)


# From stored attention and gradients ---------------------------------------------------------------------------------

VARIANTS = {"generic": {}, "generic_no_norm": {"normalize_self": False},
            "generic_no_rule10_self": {"apply_self_in_rule_10": False}}


def layer(out: dict[str, Tensor], prefix: str, name: str, index: int) -> Tensor:
    """The fused pattern of one layer, (1, T, S), from what is stored."""
    return fused(out[f"{prefix}attn_grad.{name}"][index][None], out[f"attention.{name}"][index][None])


def detr_links(out: dict[str, Tensor], prefix: str) -> list[Link]:
    stored = partial(layer, out, prefix)
    links = [Link(stored("enc_self", i), "i", "i") for i in range(2)]
    for i in range(6):
        links += [Link(stored("dec_self", i), "q", "q"), Link(stored("dec_cross", i), "q", "i")]
    return links


def lxmert_links(out: dict[str, Tensor], prefix: str) -> list[Link]:
    stored = partial(layer, out, prefix)
    links = [Link(stored("lang", i), "t", "t") for i in range(2)] + [Link(stored("vis", i), "i", "i") for i in range(2)]
    links += [Link(stored("x_lang_cross", 0), "t", "i", (1, 3)), Link(stored("x_vis_cross", 0), "i", "t", (3, 1))]
    links += [Link(stored("x_lang_self", 0), "t", "t"), Link(stored("x_vis_self", 0), "i", "i")]
    return links + [Link(stored("x_lang_cross", 1), "t", "i"), Link(stored("x_lang_self", 1), "t", "t")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix, query", [(f"q{q}.{c}.", q) for q in (1, 3) for c in ("top", "other")])
def test_encoder_and_decoder_from_stored_patterns(prefix, query, variant):
    out = case("detr", stored=True)[2]
    flow = aggregate(detr_links(out, prefix), **VARIANTS[variant])
    same(flow.found["q"]["i"][0, query], out[f"{prefix}{variant}"], STORED)
    same(flow.found["i"]["i"][0], out[f"{prefix}R_i_i"], STORED)
    same(flow.found["q"]["q"][0], out[f"{prefix}R_q_q"], STORED)
    assert flow.last == {"q"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", ["top.", "other."])
def test_co_attention_from_stored_patterns(prefix, variant):
    out = case("lxmert", stored=True)[2]
    found = aggregate(lxmert_links(out, prefix), **VARIANTS[variant]).found["t"]
    found["t"][0, 0, 0] = 0  # as the code does
    same(found["t"][0], out[f"{prefix}{variant}.R_t_t"], STORED)
    same(found["i"][0], out[f"{prefix}{variant}.R_t_i"], STORED)


def test_a_wrong_order_would_be_seen():
    """The second cross-attention of a pair after the first, instead of beside it."""
    out = case("lxmert", stored=True)[2]
    links = lxmert_links(out, "top.")
    links[5] = Link(links[5].weights, "i", "t")
    expected = out["top.generic.R_t_i"]
    assert ((aggregate(links).found["t"]["i"][0] - expected).abs().max() / expected.abs().max()) > 1e-4
    with pytest.raises(AssertionError):
        same(aggregate(links).found["t"]["i"][0], expected, STORED)


# Through the models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["top", "other"])
def test_vit(target):
    about, tensors, out = case("vit")
    from timm.models.vision_transformer import VisionTransformer

    model = filled(VisionTransformer(**about["config"]["kwargs"]), tensors)
    batch = images(tensors["input.pixel_values"], 6)
    found = generic(Subject(model), batch, targets(about["targets"][target], batch, labels=None))
    same(patched(found.map, 6)[0], out[f"{target}.generic"], STORED)  # maps are float32


@pytest.mark.parametrize("target", ["top", "other"])
@pytest.mark.parametrize("prefix", ["nopad", "pad"])
def test_bert_and_its_baselines(prefix, target):
    about, tensors, out = case("bert")
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**about["config"]["config"]))
    model.double().eval().load_state_dict(inputs(tensors, "model."), strict=False)
    given = inputs(tensors, f"input.{prefix}.")
    asked = {"target": about["targets"][prefix][target], "method": "generic-attention"}
    real = int(given["attention_mask"].sum())
    found = explain(Subject.from_module(model), given, **asked)
    same(found.map[0], out[f"{prefix}.{target}.ours"][0].masked_fill(given["attention_mask"][0] == 0, 0), RUN)
    assert not found.map[0, real:].any() and found.map[0, 1:real].all()
    without = explain(model, given, **asked | {"method": "transformer-attribution"}, options={"normalize": False})
    same(without.map[0, 1:real], out[f"{prefix}.{target}.transformer_att"][0, 1:real], RUN)


def clip(about: dict, tensors: dict[str, Tensor], repeat: int = 2) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import CLIPConfig, CLIPModel

    model = filled(CLIPModel(CLIPConfig(**about["config"]["config"])), tensors)
    given = inputs(tensors)
    given["pixel_values"] = given["pixel_values"].repeat(repeat, 1, 1, 1)
    return model, given | {"attention_mask": torch.ones_like(given["input_ids"])}


def pairs(output: object) -> Tensor:
    return output.logits_per_image.diagonal()


@pytest.mark.parametrize("which, start", [("all_layers", 0), ("last_layer", -1)])
def test_clip(which, start):
    about, tensors, out = case("clip")
    model, given = clip(about, tensors)
    found = explain(model, given, pairs, method="generic-attention", options={"start_layer": start})
    rows = torch.arange(2)
    ends = torch.tensor(about["eot_positions"])
    expected = out[f"{which}.text_R"][rows, ends]
    expected[rows, ends] = 0
    same(found.map, expected, RUN)
    same(patched(found.inputs["pixel_values"], 8), out[f"{which}.image"], RUN)
    torch.testing.assert_close(found.value.double(), out["logits_per_image"].diagonal(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant, tolerance", [*((v, RUN) for v in VARIANTS), ("generic_with_lrp", RUN)])
@pytest.mark.parametrize("target", ["top", "other"])
def test_lxmert(target, variant, tolerance):
    about, tensors, out = case("lxmert")
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    model = filled(LxmertForQuestionAnswering(LxmertConfig(**about["config"]["config"])), tensors)
    index = about["targets"][target]
    found = explain(model, inputs(tensors), lambda output: output.question_answering_score[:, index],
                    method="generic-attention", options=VARIANTS.get(variant, {"relevance": True}))
    same(found.map[0], out[f"{target}.{variant}.R_t_t"][0], tolerance)
    same(found.inputs["visual_feats"][0], out[f"{target}.{variant}.R_t_i"][0], tolerance)


@pytest.mark.parametrize("target", ["top", "other"])
def test_baselines_of_lxmert(target):
    about, tensors, out = case("lxmert")
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    model = filled(LxmertForQuestionAnswering(LxmertConfig(**about["config"]["config"])), tensors)
    found = attend(model, (), inputs(tensors),
                   lambda output: output.question_answering_score[:, about["targets"][target]],
                   composite=composite.chefer()).patterns
    own = [p for p in found if (p.queries, p.keys) == ("input_ids", "input_ids")]
    across = [p for p in found if (p.queries, p.keys) == ("input_ids", "visual_feats")][-1]
    texts = aggregate([Link(fused(p.slope, p.relevance), "t", "t") for p in own]).found["t"]["t"]
    wanted = {"transformer_attr": (texts, fused(across.slope, across.relevance)),
              "partial_lrp": tuple(spread(p.relevance.mean(1)) for p in (own[-1], across))}
    for name, pair in wanted.items():
        for part, ours in zip(("R_t_t", "R_t_i"), pair, strict=True):
            ours = ours[0].clone()
            ours[0, 0] = 0 if part == "R_t_t" else ours[0, 0]
            same(ours, out[f"{target}.{name}.{part}"], RUN)
    same(across.weights.mean(1)[0], out["raw_attn.R_t_i"], RUN)


def spread(shares: Tensor) -> Tensor:
    """From nothing for the least to one for the most."""
    return (shares - shares.min()) / (shares.max() - shares.min())


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for projection, x in
                   ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, *, cross: bool) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if cross:
            self.multihead_attn, self.norm3 = Attention(width, heads), nn.LayerNorm(width)

    def forward(self, x: Tensor, place: Tensor, memory: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.self_attn(x + place, x + place, x))
        norm = self.norm2
        if memory is not None:
            x, norm = norm(x + self.multihead_attn(x + place, memory + at, memory)), self.norm3
        return norm(x + self.linear2(self.linear1(x).relu()))


class Detector(nn.Module):
    """DETR of the case, behind its backbone."""

    def __init__(self, about: dict) -> None:
        super().__init__()
        config = about["config"]
        width, heads, hidden = config["d_model"], config["nhead"], config["ff"]
        self.input_proj = nn.Conv2d(12, width, 1)
        self.query_embed = nn.Embedding(config["queries"], width)
        self.transformer = nn.ModuleDict({
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                Layer(width, heads, hidden, cross=False) for _ in range(config["encoder_layers"]))}),
            "decoder": nn.ModuleDict({"norm": nn.LayerNorm(width), "layers": nn.ModuleList(
                Layer(width, heads, hidden, cross=True) for _ in range(config["decoder_layers"]))})})
        self.class_embed = nn.Linear(width, config["classes_plus_noobject"])
        self.bbox_embed = nn.ModuleDict({"layers": nn.ModuleList(
            nn.Linear(width, size) for size in (width, width, 4))})

    def forward(self, features: Tensor, place: Tensor) -> dict[str, Tensor]:
        x, place = (t.flatten(2).transpose(1, 2) for t in (self.input_proj(features), place))
        for layer in self.transformer["encoder"]["layers"]:
            x = layer(x, place)
        asking = self.query_embed.weight.expand(len(x), -1, -1)
        y = torch.zeros_like(asking)
        for layer in self.transformer["decoder"]["layers"]:
            y = layer(y, asking, x, place)
        y = self.transformer["decoder"]["norm"](y)
        boxes = y
        for layer in self.bbox_embed["layers"]:
            boxes = layer(boxes)
        return {"logits": self.class_embed(y), "boxes": boxes}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("index", range(4))
def test_detr(index, variant):
    about, tensors, out = case("detr")
    model = filled(Detector(about), tensors)
    wanted = about["targets"][index]
    batch = Batch((tensors["input.features"], tensors["input.position_encoding"]), {}, 1, TensorUnits((1, 12, 3, 4)))
    asked = targets(lambda output: output["logits"][:, wanted["query"], wanted["class"]], batch)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch.args)["logits"], out["logits"])
    found = generic(Subject(model), batch, asked, **VARIANTS[variant])
    same(found.map[0].double().flatten(), out[f"{wanted['prefix']}{variant}"], RUN)


@pytest.mark.parametrize("index", range(4))
def test_baselines_of_detr(index):
    """From the patterns and their relevance: what the original compares itself with, in the last cross-attention."""
    about, tensors, out = case("detr")
    wanted = about["targets"][index]
    prefix, query = wanted["prefix"], wanted["query"]
    args = tensors["input.features"], tensors["input.position_encoding"]
    found = attend(filled(Detector(about), tensors), args, {},
                   lambda output: output["logits"][:, query, wanted["class"]], composite=composite.chefer()).patterns
    last = found[-1]
    same(fused(last.slope, last.relevance)[0, query], out[f"{prefix}transformer_att"], RUN)
    same(spread(last.relevance.mean(1))[0, query], out[f"{prefix}partial_lrp"], RUN)
    if wanted["class"] != about["targets"][2 * (index // 2)]["class"]:
        return  # those that know nothing of the target are stored once
    cross = last.weights.mean(1)
    same(cross[0, query], out[f"{prefix}raw_attn"], RUN)
    of_features, of_queries = (rollout([p.weights for p in found if (p.queries, p.keys) == (name, name)])
                               for name in ("0", None))
    same((of_queries.mT @ cross @ of_features)[0, query], out[f"{prefix}rollout"], RUN)


class Placed(nn.Module):
    """A model that knows the positions of its features itself, as a constant."""

    def __init__(self, inner: nn.Module, place: Tensor) -> None:
        super().__init__()
        self.inner, self.place = inner, place

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return self.inner(features, self.place)


def with_relevance_of_detr(index: int, rules: str) -> tuple[Tensor, Tensor]:
    """The map of the case with the relevance of attention in its place, (Y X,), and the original's."""
    about, tensors, out = case("detr")
    wanted = about["targets"][index]
    model = Placed(filled(Detector(about), tensors), tensors["input.position_encoding"])
    batch = Batch((tensors["input.features"],), {}, 1, TensorUnits((1, 12, 3, 4)))
    asked = targets(lambda output: output["logits"][:, wanted["query"], wanted["class"]], batch)
    found = generic(Subject(model), batch, asked, relevance=True, rules=rules)
    return found.map[0].double().flatten(), out[f"{wanted['prefix']}generic_with_lrp"]


@pytest.mark.parametrize("index", range(4))
def test_detr_with_relevance(index):
    same(*with_relevance_of_detr(index, "chefer-detr"), RUN)


@pytest.mark.parametrize("wrong", ["add", "linear"])
def test_detr_needs_each_of_its_rules(wrong, monkeypatch):
    """Position embeddings that take their share, and maps that lose what no input contributed to."""
    one_off = composite.chefer_detr().but(rules={wrong: composite.chefer().rules[wrong]})
    monkeypatch.setitem(RULES, "one-off", lambda: one_off)
    found, expected = with_relevance_of_detr(0, "one-off")
    assert (found - expected).abs().max() > 1e-4 * expected.abs().max()
    with pytest.raises(AssertionError):
        same(found, expected, RUN)


class Asking(nn.Module):
    """Two learned queries that attend to each other, then to the input, of which they hold zero times if `moved`."""

    def __init__(self, moved: bool = False) -> None:
        super().__init__()
        self.moved, self.queries = moved, nn.Parameter(torch.randn(1, 2, 8))
        self.own, self.across, self.head = Attention(8, 2), Attention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.queries.expand(len(x), -1, -1)
        y = y + 0 * x.mean(1, keepdim=True) if self.moved else y
        y = self.own(y, y, y)
        return self.head(y + self.across(y, x, x)).mean(1)


def test_a_pattern_of_constants_has_the_relevance_that_it_has_when_they_move(seed):
    model, x = Asking().double(), torch.randn(2, 4, 8).double()
    moving = Asking(moved=True).double()
    moving.load_state_dict(model.state_dict())
    for rules in (composite.chefer(), composite.chefer_detr()):
        found, expected = (attend(one, (x,), {}, lambda y: y[:, 1], composite=rules).patterns[0].relevance
                           for one in (model, moving))
        same(found, expected, 1e-9)


# What must hold ------------------------------------------------------------------------------------------------------

def rows_of(network: nn.Module, batch: Batch, **options: object) -> Tensor:
    return generic(Subject(network), batch, targets(1, batch), **options).map


@pytest.mark.parametrize("network, batch", [(bert, text([2, 5, 6, 7, 3])),
                                            (vit, images(torch.randn(2, 3, 24, 24).double(), 6))], ids=["bert", "vit"])
def test_one_stream_is_the_product_of_its_layers(seed, network, batch):
    network = network()
    found = attend(network, batch.args, batch.kwargs, lambda output: getattr(output, "logits", output)[:, 1])
    product = torch.eye(found.patterns[0].weights.shape[-1]).double()
    for pattern in found.patterns:
        product = (torch.eye(len(product[0])).double() + fused(pattern.slope, pattern.weights)) @ product
    ours = rows_of(network, batch)
    expected = product[:, 0, 1:].float()
    same(ours[:, 1:] if ours.dim() == 2 else patched(ours, 6).float(), expected, 1e-6)


def random_links(*streams: tuple[str, str], sizes: dict[str, int], rows: int = 2) -> list[Link]:
    return [Link(torch.rand(rows, sizes[q], sizes[k], dtype=torch.float64), q, k) for q, k in streams]


def test_a_decoder_without_self_attention_reads_its_encoder(seed):
    """N(I) = I, so that one cross-attention holds A N(R) of what it reads."""
    links = random_links(("i", "i"), ("q", "i"), sizes={"i": 4, "q": 3})
    flow = aggregate(links, undefined="keep")
    expected = links[1].weights @ normalised(torch.eye(4).double() + links[0].weights)
    torch.testing.assert_close(flow.found["q"]["i"], expected)
    assert not aggregate(links).found["q"]["i"].any()  # as the original's DETR, where nothing was attended to yet
    torch.testing.assert_close(aggregate(links, apply_self_in_rule_10=False).found["q"]["i"], links[1].weights)


def test_co_attention_goes_back_and_forth(seed):
    """Rule 11: what the text holds of the picture comes back to the picture when that reads the text."""
    sizes = {"t": 3, "i": 4}
    links = random_links(("t", "i"), ("i", "t"), sizes=sizes)
    options = {"normalize_self": False}
    one_by_one, at_once = aggregate(links, **options), aggregate(
        [Link(link.weights, link.queries, link.keys, (-1, -1)) for link in links], **options)
    eye = torch.eye(4).double()
    torch.testing.assert_close(one_by_one.found["i"]["i"], eye + links[1].weights @ links[0].weights)
    assert torch.equal(at_once.found["i"]["i"], eye.expand(2, 4, 4))
    assert one_by_one.last == {"i"} and at_once.last == {"t", "i"}


def test_a_joint_stream_holds_what_its_parts_held(seed):
    links = random_links(("t", "t"), ("t+i", "t+i"), sizes={"t": 2, "i": 3, "t+i": 6})
    joints = {"t+i": [Joint("t", 2, 0, after=0), Joint("i", 3, 3)]}  # a token of nobody's in between
    found = aggregate(links, joints=joints).found["t+i"]
    mixed = torch.eye(6).double() + links[1].weights
    torch.testing.assert_close(found["t"], mixed[:, :, :2] @ (torch.eye(2).double() + links[0].weights))
    torch.testing.assert_close(found["i"], mixed[:, :, 3:])


def test_only_padding_may_stay_untouched(seed):
    """A position that takes no part does not make the code's 0/0, so that padding changes nothing."""
    links = random_links(("i", "i"), ("q", "q"), ("q", "i"), sizes={"i": 4, "q": 2})
    alone = aggregate(links).found["q"]["i"]
    padded = [Link(F.pad(link.weights, (0, link.keys == "i", 0, link.queries == "i")), link.queries, link.keys)
              for link in links]
    torch.testing.assert_close(aggregate(padded).found["q"]["i"], F.pad(alone, (0, 1)))


# Models of several inputs --------------------------------------------------------------------------------------------


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).double().eval()


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.5)
    return BartForConditionalGeneration(config).double().eval()


GIVEN = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 2], [10, 11, 12, 2, 0, 0]]),
         "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
         "decoder_input_ids": torch.tensor([[2, 13, 14, 15], [2, 16, 17, 18]])}


@pytest.mark.parametrize("relevance", [False, True])
@pytest.mark.parametrize("network", [t5, bart])
def test_encoder_and_decoder_texts(seed, network, relevance):
    network = network()
    asked = {"method": "generic-attention", "options": {"relevance": relevance, "undefined": "keep"}}
    found = explain(network, GIVEN, 7, **asked)
    other = explain(network, GIVEN, 8, **asked)
    assert set(found.inputs) == {"input_ids", "decoder_input_ids"} and torch.equal(found.map, found.inputs["input_ids"])
    assert found.map.shape == (2, 6) and found.inputs["decoder_input_ids"].shape == (2, 4)
    assert not found.map[1, 4:].any() and found.map[:, :4].all()
    assert not found.inputs["decoder_input_ids"][:, -1].any()  # where the target is read
    assert found.inputs["decoder_input_ids"][:, :-1].any()
    assert (found.map - other.map).abs().max() > 0.01 * found.map.max()
    for row, length in ((0, 6), (1, 4)):
        cut = {k: v[row:row + 1] if k.startswith("decoder") else v[row:row + 1, :length] for k, v in GIVEN.items()}
        alone = explain(network, cut, 7, **asked)
        for name in found.inputs:
            wide = found.inputs[name][row:row + 1, :alone.inputs[name].shape[1]]
            torch.testing.assert_close(alone.inputs[name], wide, rtol=1e-5, atol=1e-7)


def test_a_decoder_that_has_only_started(seed):
    """Its one token has no part in itself that is not the identity's."""
    given = {name: t for name, t in GIVEN.items() if name != "decoder_input_ids"}
    found = explain(t5(), given, 7, method="generic-attention", options={"undefined": "keep"})
    assert found.inputs["decoder_input_ids"].shape == (2, 1) and not found.inputs["decoder_input_ids"].any()
    assert found.map[0].all()


def detector() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
                            out_features=["stage4"])
    config = DetrConfig(use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone,
                        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=4,
                        init_std=0.3, init_xavier_std=3.0)
    return DetrForObjectDetection(config).double().eval()


def test_a_detector_is_read_at_its_query(seed):
    network, pixels = detector(), torch.randn(2, 3, 96, 130).double()  # 3 x 5 positions, the last ones cut
    maps = [explain(network, pixels, Token(1, position=query), method="generic-attention",
                    options={"undefined": "keep"}).map for query in (2, 3)]
    assert maps[0].shape == (2, 96, 130) and maps[0][:, ::32, ::32].all()
    assert torch.equal(maps[0], maps[0][:, ::32, ::32].repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :, :130])
    assert (maps[0] - maps[1]).abs().max() > 0.01 * maps[0].max()


def test_text_and_patches_in_one_sequence(seed):
    from transformers import ViltConfig, ViltForQuestionAnswering

    network = ViltForQuestionAnswering(ViltConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=24,
        patch_size=8, num_labels=3, max_position_embeddings=16, initializer_range=0.5)).double().eval()
    given = {"input_ids": GIVEN["input_ids"], "attention_mask": GIVEN["attention_mask"],
             "pixel_values": torch.randn(2, 3, 24, 24).double()}
    found = explain(network, given, 1, method="generic-attention")
    assert found.map.shape == (2, 6) and found.inputs["pixel_values"].shape == (2, 24, 24)
    assert not found.map[1, 4:].any() and not found.map[:, 0].any() and found.map[:, 1:4].any()
    assert found.inputs["pixel_values"].any()


def test_a_probe_that_pools_is_a_stream_of_its_own(seed):
    from transformers import SiglipConfig, SiglipModel

    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    network = SiglipModel(SiglipConfig(
        text_config=dict(vocab_size=40, max_position_embeddings=16, projection_size=16, pad_token_id=0, bos_token_id=1,
                         eos_token_id=2, **shape), vision_config=dict(image_size=24, patch_size=8, **shape)))
    given = {"input_ids": GIVEN["input_ids"], "pixel_values": torch.randn(2, 3, 24, 24).double()}
    found = explain(network.double().eval(), given, pairs, method="generic-attention", options={"undefined": "keep"})
    assert found.map.shape == (2, 6) and found.map.any()
    assert found.inputs["pixel_values"].shape == (2, 24, 24) and found.inputs["pixel_values"].any()


def test_two_towers_equal_the_loop(seed):
    about, tensors, _ = case("clip")
    network, given = clip(about, tensors)
    given["pixel_values"] = torch.randn(2, 3, 24, 24).double()
    whole = explain(network, given, pairs, method="generic-attention")
    for row in range(2):
        alone = explain(network, {name: t[row:row + 1] for name, t in given.items()}, pairs, method="generic-attention")
        for name in ("input_ids", "pixel_values"):
            torch.testing.assert_close(whole.inputs[name][row], alone.inputs[name][0], rtol=1e-5, atol=1e-7)


def test_text_and_pictures_are_given_by_name(seed):
    from transformers import CLIPImageProcessorPil

    about, tensors, _ = case("clip")
    network, given = clip(about, tensors)
    processor = SimpleNamespace(tokenizer=Spelling(), image_processor=CLIPImageProcessorPil())
    found = explain((network, processor), given, pairs, method="generic-attention")
    assert found.units.tokens[0][0] == f"<{int(given['input_ids'][0, 0])}>" and found.map.any()
    torch.testing.assert_close(found.image, found.inputs["pixel_values"])
    with pytest.raises(ValueError, match="explains one input"):
        explain((network, processor), given, pairs, method="rollout")
    with pytest.raises(ValueError, match="SimpleNamespace cannot read the batch"):
        explain((network, processor), "a cat", pairs, method="generic-attention")


class Spelling:
    """As much of a tokenizer as spells ids."""

    bos_token_id, eos_token_id, cls_token_id, sep_token_id, pad_token_id, model_max_length = 1, 49, None, None, 0, 9

    def get_vocab(self) -> dict[str, int]:
        return {f"<{i}>": i for i in range(50)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


# At the door ---------------------------------------------------------------------------------------------------------


def test_the_model_is_given_back(seed):
    network = t5().train()
    before = {name: p.clone() for name, p in network.named_parameters()}
    explain(network, GIVEN, 7, method="generic-attention")
    assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize("options, said", [({"undefined": "nan"}, "undefined is 'drop' or 'keep'"),
                                           ({"rules": "attnlrp"}, "no rules 'attnlrp'"),
                                           ({"start_layer": 3}, "start_layer 3 is not one of the 3 layers")])
def test_options_are_checked(seed, options, said):
    with pytest.raises(ValueError, match=said):
        rows_of(bert(), text([2, 5, 6, 3]), **options)


def test_no_attention_and_no_reading(seed):
    batch = Batch((torch.randn(2, 4),), {}, 2, TensorUnits((2, 4)))
    with pytest.raises(ValueError, match="no attention was found"):
        rows_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), batch)
