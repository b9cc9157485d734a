"""Decompositions of every family: the whole is all relevant, nothing is nothing, rows stand alone."""
from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from families import FAMILIES, model
from torch import nn

import relprop
from relprop import division
from relprop.decompose import Run, Source, decompose, sources
from relprop.errors import UnruledOp
from relprop.intervene import Resample, Zero, intervened
from relprop.ops import norm, share
from relprop.trace import live

F64 = torch.float64
EXACT = 1e-12
INSIDE = 1e-6
"""Relative to the largest entry: where transformers computes norms and softmax in float32 inside a float64 run."""
INSIDE32 = {"t5-encoder", "t5-encoder-gated", "llama", "llama-eager", "mistral", "qwen2", "qwen3", "gemma2", "gemma3",
            "phi3", "modernbert", "bloom", "opt", "opt-post-norm", "gpt-neox", "gpt-neox-sequential"}
WHOLE = {"deberta-v2": "L1.in"}
"""Where the stream is all there is, if not before layer 0: there a convolution reads the embeddings beside it."""
BESIDE = {"timm-cait"}
"""Whose last layers bring in a class token beside the stream."""
PADDED_ZERO = {"deberta-v2", "deberta-v3"}
"""Whose padding is exactly zero, so that biases there are shared out between nothing and nothing."""
FEW = {"gpt2", "bert", "llama", "timm-vit"}
"""Families that are tried under every set of rules in a run of all tests; the others under the published ones."""
OFTEN = {"bloom", "timm-swin", "gemma2", "deberta-v2", "timm-beit", "t5-encoder-gated", "torch-encoder", *FEW}
"""Families for the slower tests."""


def _try(name, how, often):
    return pytest.param(name, how, marks=() if often else pytest.mark.slow)


everything = pytest.mark.parametrize("name, how", [
    _try(name, how, how == "cdt" or name in FEW) for name in FAMILIES for how in division.NAMES])
by_rows = pytest.mark.parametrize("name, how", [
    _try(name, how, how == "cdt" and name in OFTEN) for name in FAMILIES for how in ("cdt", "cdt-held")])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers and timm, on tiny configs


@cache
def ready(name, how, row=None, **options):
    family = FAMILIES[name]
    args, kwargs = family.inputs(F64) if row is None else family.row(row, F64)
    return Run(model(name, F64), args, kwargs, division.get(how), **options)


def real(run, part):
    """Where positions are not padding, (B, P), of a part."""
    mask = run.kwargs.get("attention_mask")
    same = mask is not None and mask.shape == part.total.shape[:2]
    return mask.bool() if same else torch.ones(part.total.shape[:2], dtype=torch.bool)


def inside(run, *patterns):
    return dict(place for pattern in patterns for place in run.placing.places(pattern))


# -- all and nothing ---------------------------------------------------------------------------------------------------

@everything
def test_the_whole_stream_is_all_relevant(name, how):
    if name in BESIDE:
        pytest.skip("a class token is brought in beside the stream")
    run = ready(name, how)
    whole = WHOLE.get(name, "L0.in")
    looks = inside(run, "L*", "L*.attn.H*", "L*.mlp") if whole == "L0.in" else inside(run, "L1", "L1.attn.H*")
    found = run.of(sources(run.placing, whole), FAMILIES[name].value, looks)
    close = INSIDE if name in INSIDE32 else EXACT
    assert (found.total - found.rel[0]).abs().max() <= close * found.total.abs().max()
    for where, part in found.at.items():
        rest = part.irrel[0][real(run, part)] if name in PADDED_ZERO else part.irrel[0]
        assert rest.abs().max() <= close * part.total.abs().max(), where


@everything
def test_nothing_is_nothing_and_the_total_is_the_models_own(name, how):
    run, family = ready(name, how), FAMILIES[name]
    (place,) = sources(run.placing, "L0.in")[0].places
    none = torch.zeros(run.placing.rows, run.placing.count(place.tap), dtype=torch.bool)
    looks = inside(run, "L*", "L*.attn.H*", "L*.mlp")
    found = run.of([Source("none", (replace(place, where=none),))], family.value, looks)
    assert found.rel.abs().max() <= EXACT * found.total.abs().max()
    assert all(part.rel.abs().max() <= EXACT * part.total.abs().max() for part in found.at.values())
    with torch.no_grad():
        plain = family.value(run.model(*run.args, **run.kwargs))
    assert (found.total - plain).abs().max() <= EXACT * plain.abs().max()  # torch's own attention is run in its parts


@by_rows
def test_rows_stand_alone_and_sources_too(name, how):
    run, family = ready(name, how), FAMILIES[name]
    written = ["L0.attn.H1", "L1.attn.H0", "L1.mlp.N3", "L0"]
    looks = ["L1", "L1.attn.H1"]
    found = run.of(sources(run.placing, written), family.value, inside(run, *looks))
    assert found.rel.abs().max() > 0
    alone = ready(name, how, row=1)
    single = [alone.of([one], family.value, inside(alone, *looks)) for one in sources(alone.placing, written)]
    scale = found.total.abs().max()
    assert (torch.cat([part.rel for part in single])[:, 0] - found.rel[:, 1]).abs().max() <= 1e-9 * scale
    for where in looks:
        whole, rows = found.at[where], len(single[0].at[where].total)
        part = torch.cat([one.at[where].rel for one in single])
        own = whole.rel.unflatten(1, (-1, rows))[:, 1]
        assert (part - own).abs().max() <= 1e-9 * whole.total.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bloom", "timm-vit", "gpt-neox", "t5-encoder-gated"])
def test_rows_of_zeros_are_left_out_without_a_difference(name, monkeypatch):
    run = ready(name, "cdt")
    written = ["L0.in@2", "L0.in@3", "L0.attn.H1@3"]
    looks = inside(run, "L*", "L*.mlp")
    plain = run.of(sources(run.placing, written), FAMILIES[name].value, looks)
    monkeypatch.setattr(live, "LEAST", 0)
    counted, of = [], live.Live.of
    monkeypatch.setattr(live.Live, "of", staticmethod(lambda rel: counted.append(of(rel)) or counted[-1]))
    found = run.of(sources(run.placing, written), FAMILIES[name].value, looks)
    assert any(one is not None for one in counted)
    assert (found.rel - plain.rel).abs().max() <= EXACT * plain.total.abs().max()
    for where, part in found.at.items():
        assert (part.rel - plain.at[where].rel).abs().max() <= EXACT * part.total.abs().max(), where


@pytest.mark.parametrize("how", division.NAMES)
def test_a_kernel_and_its_parts_are_split_alike(how):
    fused, eager = ready("bert", how), ready("bert-eager", how)
    written = ["L0.attn.H1@2", "L0.in@1"]
    value = FAMILIES["bert"].value
    found, other = (run.of(sources(run.placing, written), value, inside(run, "L1.attn.H0.q", "L1.attn.H0.k",
                                                                         "L1.attn.H0.v")) for run in (fused, eager))
    assert found.rel.abs().max() > 0
    assert (found.rel - other.rel).abs().max() <= EXACT
    for name, part in found.at.items():
        assert part.rel.abs().max() > 0, name
        assert (part.rel - other.at[name].rel).abs().max() <= EXACT, name


def test_the_model_is_given_back():
    run = ready("gpt2", "cdt")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.model.modules()]
    run.model.train()
    try:
        run.of(sources(run.placing, "heads"), FAMILIES["gpt2"].value)
        with pytest.raises(ZeroDivisionError):
            run.of(sources(run.placing, "heads"), lambda output: 1 / 0)
        assert run.model.training
    finally:
        run.model.eval()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


ABLATED = division.get("difference").but("ablation", rules={"norm": norm.by_difference}, share=share.aside)
"""Every op by what its output loses, norms too, and no constant relevant: irrel is the run with the source ablated."""
HELD = {"deberta-v2", "deberta-v3"}
"""Which divide by a scale that is held."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
                                  for name in FAMILIES if name not in HELD])
def test_all_by_difference_is_exact_ablation(name):
    run, family = Run(model(name, F64), *FAMILIES[name].inputs(F64), ABLATED), FAMILIES[name]
    written = ["L0.attn.H1", "L1.attn.H0", "L0.mlp.N4", "L1.mlp"]
    found = run.of(sources(run.placing, written), family.value)
    with torch.no_grad():
        for source, rel in zip(written, found.rel, strict=True):
            with intervened(run.model, {source: Zero()}):
                taken = found.total - family.value(run.model(*run.args, **run.kwargs))
            assert taken.abs().max() > 0
            close = INSIDE if name in INSIDE32 else 1e-11
            assert (rel - taken).abs().max() <= close * found.total.abs().max(), source


# -- the public function -----------------------------------------------------------------------------------------------

class Linear(nn.Module):
    """A layer whose every op is linear, so that each rule gives what a linear map gives."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation=nn.Identity())])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_linear_parts_are_what_ablation_takes(seed):
    """With norms left out and the pattern held, all is linear: rel is what zeroing the source takes from the output."""
    network = Linear().double().eval()
    network.layers[0].norm1, network.layers[0].norm2 = nn.Identity(), nn.Identity()
    x = torch.randn(2, 5, 8, dtype=F64)
    how = division.get("cdt-held").but("linear", normalized={}, share=share.aside)
    found = decompose(network, x, ["L0.attn.H0", "L0.attn.H1@2", "L0.mlp.N4"], target=1, rules=how)
    with torch.no_grad():
        plain = network(x)[:, 1]
        for name in found.sources:
            with intervened(network, {name: Zero()}):
                taken = plain - network(x)[:, 1]
            assert taken.abs().max() > 0
            assert torch.allclose(found[name], taken, atol=1e-12), name


def test_what_a_resampled_source_makes_up(seed):
    network = Linear().double().eval()
    network.layers[0].norm1, network.layers[0].norm2 = nn.Identity(), nn.Identity()
    x, y = torch.randn(2, 2, 5, 8, dtype=F64)
    how = division.get("cdt-held").but("linear", normalized={}, share=share.aside)
    found = decompose(network, x, "L0.attn.H*", target=0, rules=how, ablation="resample", reference=y)
    mean = decompose(network, x, "L0.attn.H*", target=0, rules=how, ablation="mean", reference=y)
    with torch.no_grad():
        plain = network(x)[:, 0]
        with intervened(network, {"L0.attn.H1": Resample((y,))}):
            taken = plain - network(x)[:, 0]
    assert torch.allclose(found["L0.attn.H1"], taken, atol=1e-12)
    assert not torch.allclose(mean["L0.attn.H1"], taken) and mean["L0.attn.H1"].abs().max() > 0


def test_sets_and_lists_and_patterns():
    network = model("gpt2", F64)
    _, kwargs = FAMILIES["gpt2"].inputs(F64)
    found = decompose(network, kwargs, {"early": "L0.attn.H*", "both": ["L0.attn.H0", "L0.attn.H1"]}, target=5)
    assert found.sources == ("early", "both") and torch.allclose(found["early"], found["both"], atol=EXACT)
    listed = decompose(network, kwargs, [["L0.attn.H0", "L0.attn.H1"], "L1.mlp"], target=5)
    assert torch.allclose(listed.rel[0], found["early"], atol=EXACT) and listed.sources[1] == "L1.mlp"
    assert len(decompose(network, kwargs, "heads", target=5).sources) == 4
    assert len(decompose(network, kwargs, "heads at positions", target=5).sources) == 28
    assert len(decompose(network, kwargs, "mlps", target=5).sources) == 2
    table = found.frame()
    assert len(table) == 6 and torch.allclose(torch.tensor(table["rel"] + table["irrel"]), torch.tensor(table["total"]))
    assert found.top(1).keys() <= set(found.sources) and "early" in repr(found)


@pytest.mark.parametrize("options, said", [
    ({"source": []}, "means no source"), ({"source": "L9.attn.H0"}, "no layer 9"), ({"source": "L0.attn.H7"}, "no H7"),
    ({"source": "nonsense"}, "is no (site|address)"), ({"source": "L0.attn.H0.pattern"}, "has no relevant part"),
    ({"source": "L0.in@99"}, "has 7 positions"), ({"rules": "best"}, "unknown rules 'best'"),
    ({"ablation": "noise"}, "unknown ablation"), ({"ablation": "mean"}, "needs reference"),
    ({"unruled": "gradient"}, "unruled must be"), ({"chunk": 0}, "chunk must be"), ({"at": "L0.foo"}, "is no"),
    ({"source": "patches"}, "only a picture")])
def test_bad_input_says_what_to_do(options, said):
    _, kwargs = FAMILIES["gpt2"].inputs(F64)
    options = {"source": "heads", "target": 5, **options}
    with pytest.raises(ValueError, match=said):
        decompose(model("gpt2", F64), kwargs, options.pop("source"), **options)


class Odd(Linear):
    """A model with a function that is not in the table."""

    def forward(self, x):
        return super().forward(x) + torch.special.i0(x).mean((1, 2))[:, None] if self.quiet else \
            torch.special.i0(super().forward(x))


def test_an_op_without_a_rule_is_an_error_or_a_difference(seed):
    network = Odd().double().eval()
    network.quiet = False
    x = torch.randn(2, 5, 8, dtype=F64)
    with pytest.raises(UnruledOp, match="special_i0.*unruled='difference'"):
        decompose(network, x, "L0.attn.H0", target=0)
    found = decompose(network, x, "L0.attn.H0", target=0, unruled="difference")
    assert found.rel.abs().max() > 0
    network.quiet = True  # no source reaches it there
    assert decompose(network, x, "L0.attn.H0", target=0).rel.abs().max() > 0


# -- local importance --------------------------------------------------------------------------------------------------

def test_a_map_of_words_and_of_patches():
    text = relprop.explain("reviews-bert", ["A wonderful film.", "Dull."], "POSITIVE", method="cdt")
    assert text.map.shape == (2, 6) and text.target == ["POSITIVE - NEGATIVE"] * 2
    whole = decompose("reviews-bert", ["A wonderful film.", "Dull."], "tokens", target="POSITIVE", rules="cdt-held")
    other = decompose("reviews-bert", ["A wonderful film.", "Dull."], "tokens", target="NEGATIVE", rules="cdt-held")
    assert torch.allclose(text.map, (whole.rel - other.rel).T, atol=1e-5)
    wide = relprop.explain("reviews-bert", "A wonderful film.", "POSITIVE", method="cdt", options={"skip": 4})
    assert torch.allclose(wide.map[0, 4], wide.map[0, 5]) and torch.allclose(wide.map[0, 0], wide.map[0, 3])


def test_words_against_the_target_are_seen_where_signs_are_not_settled():
    text = "a wonderful film with a brilliant cast and a dull ending"
    explained = lambda **options: dict(relprop.explain("reviews-bert", text, "POSITIVE", method="cdt", options=options
                                                       ).words(0))
    settled, free = explained(), explained(rules="shapley")
    assert settled["wonderful"] > 10 * abs(settled["dull"]) and free["wonderful"] > -free["dull"] > 0.5


def test_it_is_compared_with_others():
    found = relprop.compare("reviews-bert", ["A wonderful film.", "Dull and long."], "POSITIVE", steps=2, randoms=2,
                            methods=["cdt", "rollout"]).table()
    assert found.loc["cdt", "area"] > found.loc["rollout", "area"] and found.loc["cdt", "forwards"] > 8


@pytest.mark.parametrize("name", ["timm-vit-registers", "hf-vit", "timm-swin"])
def test_a_map_of_patches(name):
    args, _ = FAMILIES[name].inputs()
    found = relprop.explain(model(name), args[0], 1, method="cdt")
    assert found.map.shape == (3, FAMILIES[name].size, FAMILIES[name].size)
    assert (found.map.flatten(1).abs().amax(1) > 0).all()
    alone = relprop.explain(model(name), args[0][1:2], 1, method="cdt")
    assert torch.allclose(alone.map[0], found.map[1], atol=1e-6)

