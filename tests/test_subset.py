"""Subsets of mediators: equal to Vig et al.'s repaired code, and to sets that are run one by one."""
from __future__ import annotations

from itertools import combinations

import pytest
import torch
from conftest import SHARED
from test_effects import CLOSE, model, two
from test_mediation_parity import case, keeps, prompts, rows_of, same
from torch.testing import assert_close

from relprop.errors import Undefined
from relprop.mediation import (
    LogOdds,
    Ratio,
    Value,
    by_layer,
    by_mediator,
    effects,
    subset,
    subsets,
    susceptible,
)
from relprop.target import Probability, Token

needs_reference = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: reference outputs do not ship")


def professions(one):
    """All sentences of a case, of both templates: base, the counterfactual of the other gender, outcome, and which
    count.
    """
    female, count = len(one.about["female_words"]), len(one.about["female_words"] + one.about["male_words"])
    names = one.about["female_words"] + one.about["male_words"]
    bases, others, kept, tokens = [], [], [], []
    for template in range(2):
        (base, man, woman), (he, she), position = rows_of(one, template)
        bases.append(base)
        others.append(torch.cat([man[:female], woman[female:]]))
        kept.append(keeps(one, base, (he, she), names))
        tokens += [(he, she)] * female + [(she, he)] * (count - female)
    ask = Ratio([[a] for a, _ in tokens], [[b] for _, b in tokens])
    return torch.cat(bases), torch.cat(others), ask, torch.cat(kept), position


@needs_reference
@pytest.mark.parametrize("name", ["neuron_subset", "neuron_subset_b"])
def test_neurons_are_those_of_the_reference(name):
    one = case(name, "text-generation")
    base, other, ask, keep, position = professions(one)
    assert 0 < keep.sum() < len(keep)
    sites = [f"embed[*]@{position}", f"L*.mlp[*]@{position}"]
    options = dict(scale="ratio", keep=keep, toward="up", batch_size=256)
    L, N = one.output("marg_odds_ratio").shape
    names = lambda nodes, first: tuple(f"embed[{n}]@{position}" if layer == first else
                                       f"L{layer - first - 1}.mlp[{n}]@{position}" for layer, n in nodes.tolist())
    few = len(one.output("topk_fixed"))
    top = subset(one.subject, base, other, ask, at=sites, how="top-k", k=12, **options)
    same(top.alone.mean(1).view(L, N) + 1, one.output("marg_odds_ratio"))
    assert top.chosen == names(one.output("ranked"), 0)
    same(top.effects[:few].mean(1), one.output("topk_fixed"))
    greedy = subset(one.subject, base, other, ask, at=sites, how="greedy", k=few, **options)
    assert greedy.chosen == names(one.output("greedy_nodes_fixed"), -1)
    same(greedy.effects.mean(1), one.output("greedy_fixed"))
    layer = one.about["layer_for_by_layer"]
    for how in ("top-k", "greedy"):
        found = subsets(one.subject, base, other, ask, at=sites[1].replace("*", str(layer), 1), how=how, k=few,
                        **options)[f"L{layer}"]
        same(found.effects.mean(1), one.output(f"{how.replace('-', '')}_layer_fixed"))
        if how == "greedy":
            assert found.chosen == names(torch.tensor([[layer, n] for n in
                                                       one.output("greedy_layer_neurons_fixed").tolist()]), -1)
    same(found.whole.mean(), one.output("all_neurons_layer")[layer + 1])
    with pytest.raises(AssertionError):  # examples that are left out matter
        same(subset(one.subject, base, other, ask, at=sites, how="top-k", k=few, scale="ratio", toward="up",
                    batch_size=256).effects.mean(1), one.output("topk_fixed"))


@needs_reference
def test_heads_and_examples_are_those_of_the_reference():
    one = case("attn_winobias_gpt2", "text-generation")
    pair, (c1, c2) = prompts(one, len(one.output("odds_ratio_all")))
    total = effects(one.subject, *pair, Ratio(c2, c1), at="L0", kind="total", scale="ratio", resamples=9)
    same(total.total + 1, one.output("odds_ratio_all"))
    keep = susceptible(total)
    assert torch.equal(keep, one.output("filter_kept").bool()) and 0 < keep.sum() < len(keep)
    meaning = one.about["outputs"]["sel_mean_effect_head"]["meaning"]
    first = torch.arange(len(keep)) < int(meaning.split("the first ")[1].split()[0])
    for how in ("top-k", "greedy"):
        k = len(one.output("topk_effect"))
        found = subset(one.subject, *pair, Ratio(c2, c1), at="L*.attn.H*.pattern", how=how, k=k, scale="ratio",
                       keep=first, prompt_only=True, toward="up")
        name = how.replace("-", "")
        assert found.chosen == tuple(f"L{layer}.attn.H{head}.pattern" for layer, head in
                                     one.output(f"{name}_heads").tolist())
        same(found.effects.mean(1), one.output(f"{name}_effect"))
    same(found.alone.mean(1).view_as(one.output("sel_mean_effect_head")), one.output("sel_mean_effect_head"))
    same(found.whole.mean()[None], one.output("sel_mean_effect_model"))


@needs_reference
def test_aggregates_of_neurons_are_those_of_the_reference():
    """Their table keeps the professions that are gendered by definition."""
    one = case("neurons_gpt2", "text-generation")
    about = one.about
    rows = [(i, abs(d) > 0.75, d + s < 0) for i, (d, s) in enumerate(zip(about["definitional"],
                                                                         about["stereotypical"]))]
    parts = []
    for template in range(3):
        (base, man, woman), (he, she), position = rows_of(one, template)
        keep = torch.tensor([kept for _, kept, _ in rows])
        female = torch.tensor([woman for *_, woman in rows])
        other = torch.where(female[:, None], man, woman)
        ask = Ratio([[he if woman else she] for *_, woman in rows], [[she if woman else he] for *_, woman in rows])
        differs = (base != other).any(1)
        assert differs.all() and keep.any()
        parts.append(effects(one.subject, base, other, ask, at=[f"embed[*]@{position}", f"L*.mlp[*]@{position}"],
                             kind=["total", "direct", "indirect"], scale="ratio", keep=keep, resamples=9))
    joined = type(parts[0])(parts[0].mediators, *(torch.cat([getattr(part, name) for part in parts], -1) for name in
                            ("base", "counterfactual", "indirect_outcome", "direct_outcome")), None, "ratio", "")
    table = by_mediator(joined)
    wanted = one.output("agg_table")
    for column, name in ((2, "indirect"), (4, "direct")):
        same(torch.tensor(table[f"{name} mean"].to_numpy()) + 1, wanted[:, column])
        same(torch.tensor(table[f"{name} std"].to_numpy()), wanted[:, column + 1])
    both = joined.indirect + joined.direct + 1
    same(both.mean(1), wanted[:, 6])


# -- identities ------------------------------------------------------------------------------------------------------


def outcomes_of(base, other, ask, sets):
    return effects(model("gpt2"), base, other, ask, at=sets, kind="indirect", resamples=9).indirect


def test_sets_are_run_together_and_not_added_up():
    base, other = two("gpt2")
    ask = LogOdds(5, 6)
    found = subset(model("gpt2"), base, other, ask, at=["L*.attn.H*", "L*.mlp"], how="greedy", k=4, batch_size=7)
    sets = {str(k): list(found.chosen[:k]) for k in range(1, 5)}
    assert_close(found.effects, outcomes_of(base, other, ask, sets), **CLOSE)
    assert_close(found.parts[2], sum(outcomes_of(base, other, ask, {n: [n] for n in found.chosen[:3]})), **CLOSE)
    assert found.synergy[0].abs().max() < 1e-12 < 1e-4 < found.synergy[-1].abs().max()
    assert_close(found.whole_synergy, found.whole - found.alone.sum(0))
    pairs = outcomes_of(base, other, ask, {"".join(pair): [found.chosen[0], *pair] for pair in
                                           combinations(found.mediators, 1) if pair[0] != found.chosen[0]})
    sign = 1 if found.total.mean() > 0 else -1
    assert_close(sign * found.effects[1].mean(), (sign * pairs.mean(1)).max())  # the second is the best of all


def test_greedy_among_all_is_all():
    base, other = two("gpt2")
    found = subset(model("gpt2"), base, other, LogOdds(5, 6), k=99, how="greedy")
    assert sorted(found.chosen) == sorted(found.mediators) and len(found.chosen) == 4
    assert_close(found.effects[-1], found.whole, **CLOSE)
    assert found.reaches() is not None and found.reaches(1e9) is None
    count = found.reaches(0.5)
    assert found.effects[count - 1].mean() / found.whole.mean() >= 0.5
    assert count == 1 or found.effects[count - 2].mean() / found.whole.mean() < 0.5
    table = found.table()
    assert list(table.index) == [1, 2, 3, 4] and table["share"].iloc[-1] == pytest.approx(1)
    few = subset(model("gpt2"), base, other, LogOdds(5, 6), k=2, among=2)
    assert set(few.chosen) == set(subset(model("gpt2"), base, other, LogOdds(5, 6), k=2, how="top-k").chosen)


def test_within_layers():
    base, other = two("gpt2")
    found = subsets(model("gpt2"), base, other, LogOdds(5, 6), at=["embed", "L*.attn.H*"], k=2)
    assert list(found) == ["", "L0", "L1"] and found["L1"].mediators == ("L1.attn.H0", "L1.attn.H1")
    assert_close(found["L0"].whole[None], outcomes_of(base, other, LogOdds(5, 6), {"all": "L0.attn.H*"}), **CLOSE)
    assert_close(found[""].whole, found[""].total, **CLOSE)
    exact = effects(model("gpt2"), base, other, LogOdds(5, 6), at=["embed", "L*.attn.H*"], resamples=9)
    table = by_layer(exact, share=0.5)
    assert list(table.index) == ["", "L0", "L1"] and list(table["count"]) == [1, 2, 2]
    assert table["top"]["L1"] == pytest.approx(float(exact.indirect[3:].mean(1).max()))


def test_toward():
    base, other = two("gpt2")
    up, down = (subset(model("gpt2"), base, other, LogOdds(5, 6), k=4, how="top-k", toward=way) for way in
                ("up", "down"))
    assert up.chosen == down.chosen[::-1]


@pytest.mark.parametrize("options, error, said", [
    (dict(how="best"), ValueError, "chosen by greedy or top-k"), (dict(k=0), ValueError, "k is 0"),
    (dict(toward="left"), ValueError, "toward total, up, down"),
    (dict(keep=torch.zeros(3).bool()), ValueError, "keep="),
    (dict(keep=torch.ones(2).bool()), ValueError, "which of the 3 pairs"),
    (dict(at={"both": ["L0.attn.H0", "L1.attn.H0"]}), ValueError, "both has places in 2 layers")])
def test_bad_input(options, error, said):
    base, other = two("gpt2")
    with pytest.raises(error, match=said):
        subsets(model("gpt2"), base, other, LogOdds(5, 6), **options)


def test_no_example_is_susceptible():
    base, other = two("gpt2")
    found = effects(model("gpt2"), base, other, Value(Probability(Token(5))), kind="total", at="L0", resamples=9)
    down = type(found)(("x",), found.base, found.base / 2, None, None, None, "ratio", "")
    with pytest.raises(Undefined, match="no example is susceptible"):
        susceptible(down)
