"""Decompositions equal to those of CD-T's own code (Hsu et al. 2024), on the same weights in unmodified models.

The original's share weights |r| / (|r| + |i| + 1e-8) lose a part of every bias, from the first layer on, so that its
rel and irrel do not sum to the model's output (off by 1e-8 to 5e-6). `Division.published` does the same, and is held to
the original's numbers; the rules as they are by default, which lose nothing, come within `LOST` of them.
"""
from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from conftest import SHARED
from torch import Tensor

import relprop
from relprop import division
from relprop.decompose import Run, Source, sources
from relprop.decompose.place import Place
from relprop.intervene import Mean, Zero
from relprop.ops import share
from relprop.subject import Subject
from relprop.trace import Tap, attention_patterns

pytestmark = [
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: reference outputs do not ship with relprop"),
    pytest.mark.filterwarnings("ignore::UserWarning")]
CLOSE = 1e-9
"""Of the largest entry: the same rules, in float64."""
LOST = 1e-4
"""Of the largest entry: what the original's lost biases come to, where a share's denominator is near its eps."""
GPT2 = ["gpt2_sources_raw", *(pytest.param(f"gpt2_sources_{which}", marks=pytest.mark.slow)
                              for which in ("raw_3l", "proc", "eps1e-5"))]
BASIC = ["bert_basic_a", "bert_basic_b_pad_relu"]


@dataclass(frozen=True, eq=False)
class Case:
    """A reference case: the model, what went in and what came out."""

    model: torch.nn.Module
    about: dict
    tensors: dict[str, Tensor]

    def input(self, name):
        return self.tensors[f"input.{name}"]

    def output(self, name):
        return self.tensors[f"out.{name}"]

    def kwargs(self):
        return {name: self.input(name) for name in ("input_ids", "attention_mask", "token_type_ids")
                if f"input.{name}" in self.tensors}

    def run(self, rules="cdt", *, published=True, **kwargs):
        if isinstance(rules, str):
            rules = division.get(rules).published() if published else division.get(rules)
        return Run(self.model, (), kwargs or self.kwargs(), rules)


@cache
def case(name, **options):
    import transformers
    from safetensors.torch import load_file

    about = json.loads((SHARED / "reference" / f"cdt_{name}.json").read_text())
    tensors = load_file(SHARED / "reference" / f"cdt_{name}.safetensors")
    kind = getattr(transformers, about["model_class"])
    config = dict(about["config"])
    if "layer_norm_epsilon" in config:
        config["layer_norm_epsilon"] = 1e-8  # what the original computes with, whatever the model's own is
    model = kind(kind.config_class(**config, bos_token_id=None, eos_token_id=None) if kind.__name__.startswith("GPT2")
                 else kind.config_class(**config))
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "lm_head" not in key]
    return Case(model.double().eval(), about, tensors)


def address(node, inner=""):
    layer, position, head = node
    return f"L{layer}.attn.H{head}{inner}@{position}"


def means(one, run):
    """Sets the means that the original was given, of its own run of the bank, and returns the mean ablation."""
    for number, layer in enumerate(run.known.layers):
        run.there[layer.attention] = one.input("mean_acts")[number].flatten(-2)[None]
    return Mean({"input_ids": one.input("bank")}, per_position=True)


def close(found, expected, tolerance=CLOSE):
    assert expected.abs().max() > 0
    assert found.shape == expected.shape
    worst = float((found - expected).abs().max() / expected.abs().max())
    assert worst <= tolerance, f"{worst} of the largest entry"


def swept(run, written, value, looks=None):
    """Each source by itself: relevant values and parts at places, and totals, which go with the source."""
    found = [run.of([one], value, looks) for one in sources(run.placing, written)]
    return found


# -- GPT-2 -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("name", GPT2)
def test_single_heads_at_positions_to_logits_and_heads(name, ablation):
    one = case(name)
    run = one.run()
    if ablation == "mean":
        run.ablation = means(one, run)
    written = [address(node) for node in one.input("source_nodes").tolist()]
    inners = [("residual", "")] + ([] if ablation == "zero" else [("value", ".v"), ("query", ".q"), ("key", ".k")])
    targets = one.input("target_nodes").tolist()
    looks = {f"{kind} {node}": place for kind, inner in inners for node in targets
             for _, place in run.placing.places(address(node, inner))}
    found = swept(run, written, lambda output: output.logits, looks)
    close(torch.stack([part.rel[0] for part in found]), one.output(f"rel_logits_{ablation}"))
    if ablation == "mean":
        irrel = torch.stack([part.total - part.rel[0] for part in found])
        close(irrel, one.output("irrel_logits_mean").double(), 1e-6)  # which is kept in float32
    for kind, _ in inners:
        parts = [[part.at[f"{kind} {node}"] for node in targets] for part in found]
        rel = torch.stack([torch.stack([p.rel[0, :, 0] for p in row]) for row in parts])
        irrel = torch.stack([torch.stack([p.irrel[0, :, 0] for p in row]) for row in parts])
        close(rel, one.output(f"target_rel_{kind}_{ablation}"))
        close(irrel, one.output(f"target_irrel_{kind}_{ablation}"))


@pytest.mark.parametrize("name", GPT2)
def test_what_loses_nothing_is_near(name):
    one = case(name)
    run = one.run(published=False)
    run.ablation = means(one, run)
    found = run.of(sources(run.placing, [address(node) for node in one.input("source_nodes").tolist()]),
                   lambda output: output.logits)
    close(found.rel, one.output("rel_logits_mean"), LOST)
    with torch.no_grad():
        assert torch.equal(found.total, one.model(**one.kwargs()).logits)


@pytest.mark.parametrize("name", GPT2)
def test_heads_at_all_positions(name):
    one = case(name)
    run = one.run()
    run.ablation = means(one, run)
    found = swept(run, "heads", lambda output: output.logits[:, -1])
    close(torch.cat([part.rel for part in found]), one.output("rel_logits_headsets_mean"))


@pytest.mark.parametrize("name", GPT2)
def test_words_by_the_heads_of_the_first_layer(name):
    one = case(name)
    ids = one.input("input_ids")[:1]
    run = one.run(input_ids=ids)
    words = {str(at): f"L0.attn.H*@{at}" for at in range(ids.shape[1])}
    found = swept(run, words, lambda output: output.logits[:, -2])
    rel = torch.cat([part.rel[:, 0] for part in found])
    close(rel, one.output("word_rel_logits_zero"))
    total = torch.cat([part.total for part in found])
    size = (total[0, 3] - total[0, 5]).abs()  # of the first word's run
    close(((rel[:, 3] - rel[:, 5]) / size)[:-1], one.output("word_rel_scores"))
    irrel = total - rel
    close(((irrel[:, 3] - irrel[:, 5]) / size)[:-1], one.output("word_irrel_scores"))


# -- BERT --------------------------------------------------------------------------------------------------------------

HELD = division.get("cdt-held").published()
HELD = HELD.but(HELD.name, paths={f"*.{part}": {"share": share.proportional} for part in ("query", "key")})
"""The pattern that is held is the original's plain one, whose queries and keys lose nothing."""


def subsets(run, one, level=0):
    """One source for each subset of tokens, at the stream before a layer."""
    place = next(run.placing.places(f"L{level}.in"))[1]
    masks = one.input("subset_mask").bool()
    return [Source(str(i), (replace(place, where=mask[None]),)) for i, mask in enumerate(masks)]


def apart(run, found, value, looks=None):
    parts = [run.of([one], value, looks) for one in found]
    return torch.cat([part.rel for part in parts])[:, 0], torch.cat([part.total - part.rel[0] for part in parts]), parts


@pytest.mark.parametrize("name", BASIC)
def test_subsets_of_tokens(name):
    one = case(name)
    run = one.run(HELD)
    looks = dict(run.placing.places("L*"))
    rel, irrel, parts = apart(run, subsets(run, one), lambda output: output.logits, looks)
    close(rel, one.output("rel_logits"))
    close(irrel, one.output("irrel_logits"))
    states = torch.stack([torch.stack([part.at[layer].rel[0, 0] for part in parts]) for layer in looks])
    close(states, one.output("rel_states").double(), 1e-6)  # which are kept in float32
    states = torch.stack([torch.stack([part.at[layer].irrel[0, 0] for part in parts]) for layer in looks])
    close(states, one.output("irrel_states").double(), 1e-6)
    rel, irrel, _ = apart(run, subsets(run, one, 1), lambda output: output.logits)
    close(irrel, one.output("irrel_logits_level1"))
    if one.output("rel_logits_level1").abs().max():
        close(rel, one.output("rel_logits_level1"))


@contextmanager
def attending(one, patterns):
    """The case with a BERT whose attention patterns are these, (layers, 1, H, T, T)."""
    from transformers import AttentionInterface

    def given(module, query, key, value, *args, **kwargs):
        return torch.matmul(torch.softmax(patterns[module.layer_idx].log(), -1), value).transpose(1, 2), None

    one = replace(one, model=copy.deepcopy(one.model))
    AttentionInterface.register("relprop_test_given", given)
    try:
        one.model.set_attn_implementation("relprop_test_given")
        for number, layer in enumerate(one.model.bert.encoder.layer):
            layer.attention.self.layer_idx = number
        yield one
    finally:
        AttentionInterface._global_mapping.pop("relprop_test_given")


@pytest.mark.parametrize("name", BASIC)
def test_subsets_of_tokens_under_the_attention_of_another_text(name):
    with attending(case(name), case(name).input("foreign_attention")) as one:
        run = one.run(HELD)
        rel, irrel, _ = apart(run, subsets(run, one), lambda output: output.logits)
    close(rel, one.output("rel_logits_foreign_att"))
    close(irrel, one.output("irrel_logits_foreign_att"))


@pytest.mark.parametrize("name", BASIC)
def test_local_importance(name):
    one = case(name)
    real = one.input("attention_mask")[0].bool()
    wanted = {"": {}, "_level1": {"level": 1}, "_skip2": {"skip": 2}, "_label2": {}}
    for suffix, options in wanted.items():
        label = one.about["targets"]["label2" if suffix == "_label2" else "label"]
        found = relprop.explain(Subject.from_module(one.model, task="text-classification"), one.kwargs(), label,
                                method="cdt", options={"rules": HELD, **options})
        scores = found.map[0, real].double()
        expected = one.output(f"local_scores{suffix}")
        if suffix == "_skip2":
            scores = torch.stack([part.sum() for part in scores.split(2)])
        close(scores, expected, 1e-6)  # a map is float32


@pytest.mark.parametrize("name", BASIC)
def test_local_importance_of_all_else(name):
    """What the rest of the text makes up of the same contrasts."""
    one = case(name)
    real, about, run = one.input("attention_mask")[0].bool(), one.about["targets"], one.run(HELD)
    windows = {1: real.nonzero().split(1), 2: real.nonzero().split(2)}
    for suffix, level, skip, number in [("", 0, 1, ""), ("_level1", 1, 1, ""), ("_skip2", 0, 2, ""),
                                        ("_label2", 0, 1, "2")]:
        place = next(run.placing.places(f"L{level}.in"))[1]
        tokens = [Source(str(at), (replace(place, where=torch.zeros_like(real).scatter(0, at.flatten(), True)[None]),))
                  for at in windows[skip]]
        rel, irrel, _ = apart(run, tokens, lambda output: output.logits)
        a, b = about[f"label{number}"], about[f"closest_competitor{number}"]
        close(rel[:, a] - rel[:, b], one.output(f"local_scores{suffix}"))
        close(irrel.flatten(0, -2)[:, a] - irrel.flatten(0, -2)[:, b], one.output(f"local_irrel_scores{suffix}"))



# -- BERT, heads -------------------------------------------------------------------------------------------------------

SLICES = ["bert_sources_sep2024_a", pytest.param("bert_sources_sep2024_b", marks=pytest.mark.slow)]
HEADS = ["bert_sources_head_a", pytest.param("bert_sources_head_b", marks=pytest.mark.slow)]


def nodes(run, one, tap_of):
    """A source for each node, the tap of its layer given."""
    heads, (rows, length) = run.known.layers[0].heads, one.input("input_ids").shape
    found = []
    for layer, position, head in one.input("source_nodes").tolist():
        where = torch.zeros(rows, length, dtype=torch.bool)
        where[:, position] = True
        found.append(Source(str((layer, position, head)), (Place(tap_of(layer), head, heads, where),)))
    return found


def residual_sum(layer):
    return Tap(f"bert.encoder.layer.{layer}.attention.output", "add")


def compared(run, one, tap_of, tolerance=CLOSE):
    """The case's every output: single sources to logits and to slices of the residual sum, both ablations; and words.
    """
    heads = run.known.layers[0].heads
    looks = {}
    for node in one.input("target_nodes").tolist():
        where = torch.zeros(*one.input("input_ids").shape, dtype=torch.bool)
        where[:, node[1]] = True
        looks[str(node)] = Place(residual_sum(node[0]), node[2], heads, where)
    for ablation in ("zero", "mean"):
        if ablation == "mean":
            run.ablation = Mean(one.kwargs(), per_position=True)
            run.there |= {tap_of(layer): one.input("mean_acts")[layer][None] for layer in range(len(run.known.layers))}
        rel, irrel, parts = apart(run, nodes(run, one, tap_of), lambda output: output.logits, looks)
        close(rel, one.output(f"rel_logits_{ablation}"), tolerance)
        close(irrel, one.output(f"irrel_logits_{ablation}"), tolerance)
        inside = [torch.stack([part.at[name].rel[0, 0, 0] for name in looks]) for part in parts]
        close(torch.stack(inside), one.output(f"target_rel_{ablation}"), tolerance)
        inside = [torch.stack([part.at[name].irrel[0, 0, 0] for name in looks]) for part in parts]
        close(torch.stack(inside), one.output(f"target_irrel_{ablation}"), tolerance)
    words = [Source(str(at), tuple(place for name, place in zip(one.input("source_nodes").tolist(), (
        source.places[0] for source in nodes(run, one, tap_of))) if name[0] == 0 and name[1] == at))
        for at in range(one.input("input_ids").shape[1])]
    run.ablation = Zero()
    rel, irrel, _ = apart(run, words, lambda output: output.logits)
    close(rel, one.output("local_rel"), tolerance)
    close(irrel, one.output("local_irrel"), tolerance)


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_bert(name):
    one = case(name)
    run = one.run("cdt")
    compared(run, one, lambda layer: run.known.layers[layer].attention)


@pytest.mark.parametrize("name", SLICES)
def test_slices_of_the_residual_sum_of_bert(name):
    plain = case(name)
    with torch.no_grad():
        _, patterns = attention_patterns(plain.model, (), plain.kwargs())
    with attending(plain, torch.stack(patterns)) as one:
        # the original holds the pattern of the first source's run, which has lost a little of its biases
        compared(one.run(HELD), one, residual_sum, 1e-6)
