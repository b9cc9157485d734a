"""Relevance of positions: a map that sums to the ledger's entry, however a model encodes them."""
from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from families import _SMALL, _T5, FAMILIES, _text, model
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner
from written import D, Written, tokens

import relprop
from relprop import cli, explain
from relprop.ops.journal import POSITIONS
from relprop.positions import OTHER
from relprop.relevance import propagate

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LEARNED = ["bert", "bert-eager", "roberta", "distilbert", "electra", "gpt2", "opt", "deberta-v2", "hf-vit", "hf-dinov2",
           "hf-dinov2-registers", "timm-vit", "timm-vit-registers", "timm-deit", "timm-cait", "torchvision-vit"]
ROTARY = ["gpt-neox", "llama", "llama-eager", "mistral", "qwen3", "gemma3", "phi3", "modernbert", "timm-eva02"]
BIASES = ["t5-encoder", "bloom", "timm-beit"]
MORE = {
    "gpt-j": _text("GPTJForCausalLM", n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4),
    "phi": _text("PhiForCausalLM", **_SMALL),
    "mpt": _text("MptForCausalLM", d_model=16, n_heads=2, n_layers=2, max_seq_len=32),
    "falcon-alibi": _text("FalconForCausalLM", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True,
                          parallel_attn=False)}
KINDS = {**dict.fromkeys(LEARNED, "added"), **dict.fromkeys(BIASES + ["mpt", "falcon-alibi"], "bias"),
         **dict.fromkeys(ROTARY + ["gpt-j", "phi"], "rotary")}


def family(name):
    return FAMILIES.get(name) or MORE[name]


@cache
def built(name):
    return model(name, F64) if name in FAMILIES else MORE[name].model().double()


@cache
def explained(name, method="attnlrp", positions="apart", **options):
    args, kwargs = family(name).inputs(F64)
    return explain(built(name), kwargs or args[0], family(name).value, method=method, positions=positions, **options)


def total(t):
    """A row's sum, (B,)."""
    return t.double().flatten(1).sum(1)


def close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape and expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# -- the map and the ledger --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", KINDS)
def test_positions_sum_to_the_ledger_s_entry(name):
    r = explained(name)
    assert r.positions.shape == r.map.shape and r.positions.abs().max() > 0
    close(total(r.positions), r.ledger.absorbed[POSITIONS])
    close(total(r.map), r.ledger.input)
    assert r.ledger.error.max() < 1e-9 and r.provenance["positions"] == "apart"


@pytest.mark.parametrize("name", KINDS)
def test_added_they_are_one_map(name):
    """Token and position together, and nothing else has changed hands."""
    apart, added = explained(name), explained(name, positions="added")
    close(added.map, apart.map + apart.positions)
    assert POSITIONS not in added.ledger.absorbed
    close(added.ledger.input, total(added.map))
    close(added.ledger.input, apart.ledger.input + apart.ledger.absorbed[POSITIONS])
    assert added.ledger.error.max() < 1e-9 and torch.equal(added.positions, apart.positions)


@pytest.mark.parametrize("name", ["bert", "gpt2", "timm-vit"])
@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp", "epsilon", "deep-taylor"])
def test_added_embeddings_cost_nothing_to_ask_for(name, method):
    """The map is as ever, and positions are known in any case."""
    apart, plain = explained(name, method), explained(name, method, None)
    assert torch.equal(apart.map, plain.map) and torch.equal(apart.positions, plain.positions)
    close(total(plain.positions), plain.ledger.absorbed[POSITIONS])


@pytest.mark.parametrize("name", ["hf-vit", "timm-vit-registers", "timm-deit"])
def test_class_tokens_stand_nowhere_in_a_picture(name):
    """What their positions took is in the ledger, and none of it in the map: each pixel has its share of its patch."""
    r = explained(name)
    whole = propagate(built(name), *family(name).inputs(F64), family(name).value, "attnlrp")
    close(r.ledger.absorbed[POSITIONS] + r.ledger.absorbed[OTHER], whole.ledger.absorbed[POSITIONS])
    (length, places), = whole.positions.items()
    patches = r.positions.unflatten(2, (4, 6)).unflatten(1, (4, 6)).sum((2, 4)).flatten(1)  # of 6 x 6 pixels
    close(patches, places[:, length - 16:].float())


def test_a_batch_is_the_loop_over_its_rows():
    for name in ("bert", "llama", "bloom", "timm-vit"):
        r = explained(name)
        args, kwargs = family(name).inputs(F64)
        given = kwargs or args[0]
        parts = explain(built(name), given, family(name).value, method="attnlrp", positions="apart", batch_size=1)
        close(parts.positions, r.positions, 1e-5)
        assert torch.equal(r.row(1).positions, r.positions[1:2])


def test_a_decoder_has_positions_of_its_own():
    seq2seq = _text("T5ForConditionalGeneration", **_T5, num_decoder_layers=2, decoder_start_token_id=0)
    _, kwargs = seq2seq.inputs()
    whole = seq2seq.model().double()
    given = {**kwargs, "decoder_input_ids": kwargs["input_ids"][:, :5].clone()}
    r = explain(whole, given, seq2seq.value, method="attnlrp", positions="apart")
    close(total(r.positions), r.ledger.absorbed[POSITIONS])
    assert r.ledger.absorbed[OTHER].abs().min() > 0
    given["decoder_input_ids"] = kwargs["input_ids"].clone()  # of one length: which is which is not known
    r = explain(whole, given, seq2seq.value, method="attnlrp", positions="apart")
    assert r.positions is None and "cannot be told apart" in r.provenance["positions"]


# -- oracles -----------------------------------------------------------------------------------------------------------

class Encoded(Written):
    """States with positions that are added, or put into the attention that follows."""

    def __init__(self, forward):
        super().__init__(forward)
        self.position_embeddings = nn.Parameter(torch.randn(5, D, dtype=F64))
        self.register_buffer("pe", torch.randn(1, 5, D, dtype=F64))


def attended(self, q, k, bias=0.0):
    scores = q @ k.mT / D ** 0.5 + bias
    return self.head(scores.softmax(-1) @ self.second(self.norm(k))).sum(1)


@pytest.mark.parametrize("which", ["position_embeddings", "pe"])
def test_added_embeddings_have_their_share_of_the_sum(which):
    """Against their gradient: R_p = p dy/dp where no rule differs from the gradient."""
    whole = Encoded(lambda self, x: self.head(self.norm(x + getattr(self, which))).sum(1))
    whole.norm = nn.Identity()
    r = explain(whole, tokens(), lambda output: output[:, 1], method="attnlrp", positions="apart")
    p = getattr(whole, which).detach().expand(2, 5, D)
    expected = (p @ whole.head.weight[1]).detach()
    close(r.positions, expected.float())


def turned(x, angle):
    """x rotated by position, as Llama writes it."""
    half = torch.cat([-x[..., D // 2:], x[..., :D // 2]], -1)
    return x * angle.cos() + half * angle.sin()


def test_rotated_queries_and_keys_give_half():
    """Against the relevance that reaches them where rotations are left alone, R_p = R(q')/2 + R(k')/2; the other half
    goes down, and what does not pass the scores stays as it was.
    """
    angle = torch.outer(torch.arange(5.0, dtype=F64), torch.rand(D // 2, dtype=F64)).repeat(1, 2)

    whole = Written(lambda self, x: attended(self, turned(self.first(x), angle), turned(self.second(x), angle)))
    apart = explain(whole, tokens(), lambda output: output[:, 1], method="attnlrp", positions="apart")
    plain = explain(whole, tokens(), lambda output: output[:, 1], method="attnlrp")
    assert plain.positions is None and POSITIONS not in plain.ledger.absorbed

    grads = []

    def watched(self, x):
        q, k = turned(self.first(x), angle), turned(self.second(x), angle)
        for t in (q, k):  # k' is the values' operand too, and half of that is its position's as well
            t.register_hook(lambda g, t=t: grads.append((g * t.detach()).sum(-1)))
        return attended(self, q, k)

    whole.steps = watched
    propagate(whole, (tokens(),), {}, lambda output: output[:, 1], "attnlrp")
    assert len(grads) == 2 and not torch.allclose(apart.map, plain.map)
    close(apart.positions, (sum(grads) / 2).float())


def test_a_bias_among_the_scores_is_its_keys():
    bias = torch.randn(5, 5, dtype=F64)

    class Biased(Written):
        def __init__(self, forward):
            super().__init__(forward)
            self.relative_bias = nn.Parameter(bias.clone())

    whole = Biased(lambda self, x: attended(self, self.first(x), self.second(x), self.relative_bias))
    r = explain(whole, tokens(), lambda output: output[:, 1], method="attnlrp", positions="apart")
    scores, x = [], tokens()
    with torch.no_grad():
        q, k = whole.first(x), whole.second(x)
        values = whole.second(whole.norm(k))
        scores = q @ k.mT / D ** 0.5 + bias
    scores.requires_grad_()
    y = (scores.softmax(-1) @ values @ whole.head.weight[1]).sum()
    g, = torch.autograd.grad(y, scores)
    close(r.positions, (bias * g / 2).sum(1).float())  # half of the product is the pattern's


def test_a_mask_is_no_position():
    """Adding one to the scores, in whatever way a model writes it, leaves positions out of the books."""
    for low in (-10000.0, torch.finfo(torch.float32).min, -float("inf")):
        mask = torch.zeros(5, 5, dtype=F64).masked_fill(torch.ones(5, 5).triu(1).bool(), low)
        whole = Written(lambda self, x, mask=mask: attended(self, self.first(x), self.second(x), mask))
        r = explain(whole, tokens(), lambda output: output[:, 1], method="attnlrp", positions="apart")
        assert r.positions is None and POSITIONS not in r.ledger.absorbed, low


def test_a_fused_bias_is_found():
    """And the map does not change, only what the ledger calls it."""
    bias = torch.randn(1, 1, 5, 5, dtype=F64)

    def forward(self, x):
        q, k = self.first(x)[:, None], self.second(x)[:, None]
        return self.head(F.scaled_dot_product_attention(q, k, k, attn_mask=bias)[:, 0]).sum(1)

    whole = Written(forward)
    apart, plain = (explain(whole, tokens(), lambda output: output[:, 1], method="attnlrp", positions=choice)
                    for choice in ("apart", None))
    close(apart.map, plain.map)
    assert plain.positions is None
    close(apart.ledger.absorbed[POSITIONS] + apart.ledger.absorbed["softmax"], plain.ledger.absorbed["softmax"])


def test_a_wrong_share_is_caught(monkeypatch):
    """A rotation whose relevance is all kept, and booked as well, does not balance."""
    monkeypatch.setattr("relprop.trace.interception.scaled", lambda x, factor: x.clone())
    with pytest.raises(relprop.LedgerError):
        args, kwargs = family("llama").inputs(F64)
        explain(built("llama"), kwargs, family("llama").value, method="attnlrp", positions="apart")


def test_a_sum_of_scaled_terms_is_no_rotation():
    whole = Written(lambda self, x: self.head(x * self.norm.weight.detach() + x.flip(-1) * 2).sum(1))
    r = explain(whole, tokens(), lambda output: output[:, 1], method="attnlrp", positions="apart")
    assert r.positions is None


# -- none --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "t5-encoder", "bloom", "timm-beit"])
@pytest.mark.parametrize("method", ["cp-lrp", "epsilon"])
def test_held_patterns_pass_nothing_to_positions(name, method):
    r = explained(name, method)
    assert r.positions is None and "holds attention patterns" in r.provenance["positions"]
    assert torch.equal(r.map, explained(name, method, None).map)


@pytest.mark.parametrize("name", ["torch-encoder", "timm-swin"])
def test_where_there_is_no_map_there_is_a_reason(name):
    r = explained(name)
    reason = {"torch-encoder": "no position embedding", "timm-swin": "positions of windows"}[name]
    assert r.positions is None and reason in r.provenance["positions"]


def test_spread_relevance_has_no_positions_left():
    r = explained("bert", spread_bias=True)
    assert r.positions is None


@pytest.mark.parametrize("options, said", [
    ({"positions": "both"}, "positions are 'apart' or 'added', or None, got 'both'"),
    ({"positions": "apart", "method": "rollout"}, "rollout has no positions: it does not pass through the layers")])
def test_what_cannot_be_asked(options, said):
    _, kwargs = family("bert").inputs()
    with pytest.raises(ValueError, match=said):
        explain(model("bert"), kwargs, family("bert").value, **options)


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_positions_are_shown_beside_the_map(suffix, tmp_path):
    subject = relprop.load("digits-vit")
    r = explain(subject, torch.rand(2, 1, 54, 54), 7)
    path = r.save(tmp_path / f"r.{suffix}", row=0, positions=True)
    plain = r.save(tmp_path / f"plain.{suffix}", row=0)
    assert path.stat().st_size > 0 and path.read_bytes() != plain.read_bytes()
    if suffix == "html":
        assert "7, positions" in path.read_text()
    assert len(r.show(0, positions=True).axes) > 0


def test_the_command_line_asks_for_positions(tmp_path):
    def run(*options):
        given = ["explain", "A dull film.", *options, "--json"]
        return CliRunner().invoke(cli.app, given, prog_name="relprop")

    plain, apart, added = (json.loads(run("--method", "attnlrp", *how).stdout)
                           for how in ((), ("--positions", "apart"), ("--positions", "added")))
    assert apart["map"] == plain["map"] and apart["positions"] == plain["positions"]
    close(torch.tensor(added["map"]), torch.tensor(plain["map"]) + torch.tensor(plain["positions"]))
    wrong = run("--positions", "both")
    assert wrong.exit_code == 2 and "positions are 'apart' or 'added'" in wrong.stderr


def test_positions_that_are_not_there_are_not_shown():
    with pytest.raises(ValueError, match="no map of positions: no position embedding"):
        explained("torch-encoder").show(positions=True)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_positions_are_saved(suffix, tmp_path):
    r = explained("bert")
    opened = relprop.open(r.save(tmp_path / f"r.{suffix}"))
    assert opened.equals(r) and torch.equal(opened.positions, r.positions)
    plain = explained("torch-encoder")
    assert relprop.open(plain.save(tmp_path / f"p.{suffix}")).positions is None
