"""Subsets of mediators: equal to sets that are run one by one."""
from __future__ import annotations

from itertools import combinations

import pytest
import torch
from test_effects import CLOSE, model, two
from torch.testing import assert_close

from relprop.errors import Undefined
from relprop.mediation import (
    LogOdds,
    Value,
    by_layer,
    effects,
    subset,
    subsets,
    susceptible,
)
from relprop.target import Probability, Token

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
