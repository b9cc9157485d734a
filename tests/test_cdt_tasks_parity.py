"""The tasks of CD-T's notebooks (Hsu et al. 2024): greater-than, docstring and the search for IOI's circuit, equal to
what their own code found on the same weights.
"""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SHARED
from test_cdt_parity import address, case, close
from torch import nn

import relprop
from relprop import division
from relprop.circuit import Task, contextual
from relprop.circuit.run import outcomes
from relprop.decompose import sources
from relprop.intervene import Mean, Resample
from relprop.mediation import Margin, Mass
from relprop.result import Circuit
from relprop.subject import Subject
from relprop.target import Contrast, Token

pytestmark = [
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: reference outputs do not ship with relprop"),
    pytest.mark.filterwarnings("ignore::UserWarning")]


# -- greater-than and docstring ----------------------------------------------------------------------------------------

def of_heads(run, one, value, targets):
    """Each head at all positions, by itself, to a value and to the target heads."""
    looks = {f"L{layer}.attn.H{head}": place for layer, head in targets
             for _, place in run.placing.places(f"L{layer}.attn.H{head}")}
    return [run.of([head], value, looks) for head in sources(run.placing, "heads")], list(looks)


def sizes(part, of):
    """mean |rel| or mean |irrel| at each position of a target, (P,)."""
    return getattr(part, of)[0].abs().mean((0, 2))


def test_greater_than():
    one = case("greater_than")
    chosen = one.input("sample_idxs")
    run = one.run(input_ids=one.input("input_ids")[chosen])
    run.ablation = Mean(run.kwargs, per_position=True)
    run.there |= {layer.attention: one.input("mean_acts")[number].flatten(-2)[None]
                  for number, layer in enumerate(run.known.layers)}
    parts, targets = of_heads(run, one, lambda output: output.logits[:, -1], one.input("target_heads").tolist())
    close(torch.cat([part.rel for part in parts]), one.output("rel_last_logits"))

    good = one.input("good_mask")[chosen].bool()

    def mass(z):
        years = z.softmax(-1)[:, one.input("year_ids")]
        return (years * good).sum(-1).mean() - (years * ~good).sum(-1).mean()

    scores = torch.stack([mass(part.rel[0]) / mass(part.total) for part in parts])
    close(scores, one.output("logit_scores").flatten(), 1e-6)  # over the original's total of some one run
    layers = torch.arange(4).repeat_interleave(4).tolist()
    close(contextual.by_layer(scores, layers, "magnitude"), one.output("logit_scores_norm").flatten(), 1e-6)

    def mixed(part):  # the original pairs each target's rel with every target's irrel
        rel, irrel = (torch.cat([sizes(part.at[name], of) for name in targets]) for of in ("rel", "irrel"))
        return (rel[:, None] / (rel[:, None] + irrel)).sum() / len(rel)

    heads = [source.name for source in sources(run.placing, "heads")]
    found = torch.stack([torch.zeros(()).double() if name in targets else mixed(part)
                         for name, part in zip(heads, parts)])
    close(found, one.output("target_scores").flatten())
    close(contextual.by_layer(found, layers, "net"), one.output("target_scores_norm").flatten())


class Attentions(nn.Module):
    """An attention-only model, as anyone would write it, with the weights of a GPT-2 whose MLPs are nothing."""

    def __init__(self, weights, heads):
        super().__init__()
        self.wte, self.wpe = (nn.Embedding.from_pretrained(weights[f"transformer.{name}.weight"].double())
                              for name in ("wte", "wpe"))
        width = self.wte.weight.shape[1]
        count = sum(name.endswith("attn.c_attn.weight") for name in weights)
        self.blocks = nn.ModuleList([Attending(width, heads) for _ in range(count)])
        self.norm = nn.LayerNorm(width, eps=1e-8)
        self.head = nn.Linear(width, len(weights["lm_head.weight"]), bias=False)
        for number, block in enumerate(self.blocks):
            own = {name.removeprefix(f"transformer.h.{number}."): value.double() for name, value in weights.items()}
            block.norm.load_state_dict({"weight": own["ln_1.weight"], "bias": own["ln_1.bias"]})
            block.mixed.load_state_dict({"weight": own["attn.c_attn.weight"].T, "bias": own["attn.c_attn.bias"]})
            block.out.load_state_dict({"weight": own["attn.c_proj.weight"].T, "bias": own["attn.c_proj.bias"]})
        self.norm.load_state_dict({name: weights[f"transformer.ln_f.{name}"] for name in ("weight", "bias")})
        self.head.load_state_dict({"weight": weights["lm_head.weight"]})

    def forward(self, input_ids):
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Attending(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width, eps=1e-8), heads
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.mixed(self.norm(x)).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(z.transpose(1, 2).flatten(2))


def test_docstring_by_an_attention_only_model():
    gpt2 = case("docstring")
    weights = {key.removeprefix("model."): value for key, value in gpt2.tensors.items() if key.startswith("model.")}
    one = replace(gpt2, model=Attentions(weights, 4).double().eval())
    ids, rows = one.input("input_ids"), 6
    with torch.no_grad():
        close(one.model(ids)[:, -1], one.output("logits"))
    run = one.run(input_ids=ids[:rows])
    run.ablation = Resample({"input_ids": one.input("corrupt_ids")[:rows]})
    parts, targets = of_heads(run, one, lambda output: output[:, -1], one.input("target_heads").tolist())
    given = one.input("corrupt_z")
    assert all((value - given[:, number].flatten(-2)).abs().max() < 1e-9
               for number, value in enumerate(run.there[layer.attention] for layer in run.known.layers))
    rel = torch.cat([part.rel for part in parts])
    close(rel, one.output("rel_last_logits"))
    right, wrong = ids[:rows, int(one.input("answer_pos"))], ids[:rows, one.input("wrong_pos")]
    margins = torch.stack([(z.gather(1, right[:, None]) - z.gather(1, wrong)).amin(1) for z in rel]).sum(1)
    close(margins, one.output("logit_scores").flatten())
    layers = torch.arange(4).repeat_interleave(4).tolist()
    close(contextual.by_layer(margins, layers, "magnitude"), one.output("logit_scores_norm").flatten())
    heads = [source.name for source in sources(run.placing, "heads")]
    found = torch.stack([torch.zeros(()).double() if name in targets else
                         sum(contextual.l1(part.at[target])[0] for target in targets)
                         for name, part in zip(heads, parts)])
    close(found, one.output("target_scores").flatten())
    close(contextual.by_layer(found, layers, "magnitude"), one.output("target_scores_norm").flatten())
    best = sorted(range(16), key=lambda i: -contextual.by_layer(margins, layers, "magnitude")[i])[:2]
    assert [[0 if at == 1 else i for at, i in enumerate((best[k] // 4, 0, best[k] % 4))] for k in range(2)] == \
        one.output("loop_selected")[0].tolist()


# -- discovery ---------------------------------------------------------------------------------------------------------

def found_back(one, rules, level="heads at positions"):
    """A search as the original's for IOI, without its sums: see `contextual.Search`."""
    io, s, end = (int(one.input(name)) for name in ("io_id", "s_id", "end_pos"))
    task = Task("ioi", {"input_ids": one.input("input_ids")}, {"input_ids": one.input("abc_ids")[:1]},
                Contrast(Token(io, end), Token(s, end)), reference={"input_ids": one.input("abc_ids")})
    prepared = task.prepared(Subject.from_module(one.model, task="text-generation"))
    return contextual.Search(prepared, level, "mean by position", rules, normalize="signed")


def grid(scores, like):
    found = torch.full_like(like, torch.nan)
    for name, score in scores.items():
        place = relprop.Address.parse(name)
        found[place.layer, int(place.position), place.index] = score
    return found


@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_discovery_back_to_the_first_layer(most):
    one = case("ioi_discovery")
    search = found_back(one, division.get("cdt"))
    rounds = search.rounds(most)
    assert [[list(map(int, (a.layer, a.position, a.index))) for a in map(relprop.Address.parse, found.kept)]
            for found in rounds] == one.output("selected")[:most].tolist()
    for number, found in enumerate(rounds):
        expected = one.output(f"iter{number}_scores")
        close(grid(found.scores, expected), expected, 5e-3)  # heads of width 2: shares of biases near zero
    if most is not None:
        return
    search.score = "l1"
    expected = one.output("iter1_scores_l1")
    close(grid(search.against(rounds[0].kept).scores, expected), expected, 5e-3)


def test_discovery_under_the_published_eps():
    one = case("ioi_discovery")
    some = ((0, 1, 2), (3, 5, 7), (8, 14, 3), (9, 14, 9), (11, 14, 0))
    level = [f"L{layer}.attn.H{head}@{at}" for layer, at, head in some]
    search = found_back(one, division.get("cdt").published(), level)
    expected = one.output("iter0_scores")
    found = grid(search.first().scores, expected)
    known = ~found.isnan()
    assert int(known.sum()) == len(level)
    close(found[known], expected[known], 1e-7)


@pytest.mark.slow
def test_scores_of_a_layer_against_targets_under_the_published_eps():
    """They are divided by the sum of their layer, so that one layer by itself can be told."""
    one = case("ioi_discovery")
    search = found_back(one, division.get("cdt").published(), [f"L1.attn.H*@{at}" for at in range(16)])
    targets = [address(node) for node in one.output("selected")[0].tolist()]
    for score in ("dot", "l1"):
        search.score = score
        expected = one.output("iter1_scores" + ("_l1" if score == "l1" else ""))
        found = grid(search.against(targets).scores, expected)
        close(found[1], expected[1], 1e-6)


@pytest.mark.slow
def test_every_score_of_discovery_under_the_published_eps():
    one = case("ioi_discovery")
    search = found_back(one, division.get("cdt").published())
    for number, found in enumerate(search.rounds()):
        expected = one.output(f"iter{number}_scores")
        close(grid(found.scores, expected), expected, 1e-6)


# -- circuits found, put to the test by ablation -----------------------------------------------------------------------

def of_rows(one, ids, reference, right, wrong, ends, groups=None):
    """A task of logit(right) - logit(wrong) in each row, heads replaced by means over reference inputs of its group."""
    metric = [Contrast(Token(int(a), int(end)), Token(int(b), int(end)))
              for a, b, end in zip(one.input(right), one.input(wrong), one.input(ends))]
    task = Task("ioi", {"input_ids": one.input(ids)}, {"input_ids": one.input(reference)}, metric, groups=groups)
    return task.prepared(Subject.from_module(one.model, task="text-generation"))


@pytest.mark.slow
def test_the_discovered_circuit_and_what_pruning_leaves():
    one = case("ioi_discovery")
    prepared = of_rows(one, "test_ids", "test_abc_ids", "test_io", "test_s", "test_end")
    nodes = list(prepared.nodes("heads at positions"))
    named = lambda picked: [address(node) for node in picked.reshape(-1, 3).tolist()]
    kept = [nodes, [], named(one.output("selected")), named(one.input("random_circuit"))]
    found = outcomes(prepared, kept, among=nodes, ablation="mean by position")
    close(found, one.output("eval_logit_diff"))
    start = Circuit.of(dict.fromkeys(nodes), level="heads at positions", kept=named(one.input("prune_start")),
                       about={"ablation": "mean by position"})
    left = contextual.pruned(prepared.subject, prepared, start)
    assert sorted(left) == sorted(named(one.output("prune_kept")))
    scores = outcomes(prepared, [list(start), list(left)], among=nodes, ablation="mean by position").mean(1)
    close(scores, one.output("prune_scores"))


def test_faithfulness_of_heads_in_order():
    one = case("ioi_discovery")
    groups = one.input("fe_group").tolist()
    prepared = of_rows(one, "fe_ids", "fe_abc_ids", "fe_io", "fe_s", "fe_end", groups)
    nodes = list(prepared.nodes("heads"))
    order = [f"L{layer}.attn.H{head}" for layer, head in one.input("head_order").tolist()]
    found = outcomes(prepared, [order[:count] for count in (*range(1, 145, 13), 144, 0)], among=nodes,
                     ablation="mean by position").mean(1)
    full, empty = found[-2:]
    close(torch.stack([full, empty]), one.output("faithfulness_clean_null"))
    expected = one.output("faithfulness_curve")[[*range(0, 144, 13), 143]]
    close((found[:-1] - empty) / (full - empty), expected)


def kept_best(prepared, ranked, ablation):
    """The metric of the whole model, of nothing, and of the first 3, the first 6 and the last 6 heads."""
    nodes = list(prepared.nodes("heads"))
    names = [f"L{layer}.attn.H{head}" for layer, head in ranked]
    kept = [nodes, [], names[:3], names[:6], names[-6:]]
    return outcomes(prepared, kept, among=nodes, ablation=ablation)


class Likeliest(Margin):
    """Whether the year of the largest logit is a right one: positive where it is."""

    def combined(self, right, wrong):
        return right.nan_to_num(-torch.inf).amax(-1) - wrong.nan_to_num(-torch.inf).amax(-1)


def test_circuits_of_greater_than():
    one = case("greater_than")
    good, years = one.input("good_mask").bool(), one.input("year_ids")
    metric = Mass([years[row].tolist() for row in good], [years[~row].tolist() for row in good])
    inputs = {"input_ids": one.input("input_ids")}
    other = {"input_ids": one.input("input_ids").roll(1, 0)}  # of which nothing is asked
    prepared = Task("greater-than", inputs, other, metric, reference=inputs).prepared(
        Subject.from_module(one.model, task="text-generation"))
    found = kept_best(prepared, one.output("ranked_heads").tolist(), "mean by position")
    close(found.mean(1), one.output("circuit_eval")[:, 0])
    likeliest = kept_best(replace(prepared.task, metric=Likeliest(metric.right, metric.wrong)).prepared(
        prepared.subject), one.output("ranked_heads").tolist(), "mean by position")
    close((likeliest > 0).double().mean(1), one.output("circuit_eval")[:, 1])


def test_circuits_of_docstring():
    one = case("docstring")
    inputs = {name: {"input_ids": one.input(f"{name}_ids")[:6]} for name in ("input", "corrupt")}
    ids, expected = inputs["input"]["input_ids"], one.output("circuit_last_logits")
    right, wrong = ids[:, one.input("answer_pos")], ids[:, one.input("wrong_pos")]
    prepared = Task("docstring", inputs["input"], inputs["corrupt"], Margin(right.tolist(), wrong.tolist())).prepared(
        Subject.from_module(one.model, task="text-generation"))
    found = kept_best(prepared, one.output("ranked_heads").tolist(), "resample")[:4]
    # of the original's logits: its scores read the wrong names of the first row for all rows
    margins = expected.gather(2, right.expand(4, -1, -1)) - expected.gather(2, wrong.expand(4, -1, -1))
    close(found, margins.amin(2))
