"""Tests of circuits: equal to the originals on the same numbers, and right where the answer is known."""
from __future__ import annotations

from itertools import product
from math import comb

import pytest
import torch
import transformers
from safetensors.torch import load_file

from relprop.circuit import Task, circuit
from relprop.circuit.evaluation import faithfulness
from relprop.circuit.sample import inflated, random_circuits
from relprop.circuit.statistic import (
    _hsic,
    _kernels,
    against_random,
    binomial_p,
    equivalence,
    equivalence_p,
    hsic,
    hsic_test,
    independence,
    minimality,
    partial_necessity,
    random_curve,
    sufficiency,
    verdicts,
)
from relprop.errors import Undefined
from relprop.mediation import LogOdds
from relprop.result import Circuit

# -- the numbers ------------------------------------------------------------------------------------------------------


def test_hsic_is_that_of_its_definition(seed):
    x, y = torch.randn(2, 9, dtype=torch.float64)
    H = torch.eye(9, dtype=torch.float64) - 1 / 9
    kernel = lambda one: torch.exp(-(one[:, None] - one[None]) ** 2 / (2 * 0.7**2))
    wanted = torch.trace(H @ kernel(x) @ H @ H @ kernel(y) @ H) / 64
    assert hsic(x, y, sigma=0.7) == pytest.approx(float(wanted), rel=1e-12)
    with pytest.raises(Undefined, match="width of the kernel is zero"):
        hsic(torch.ones(5), torch.ones(5))


def test_hsic_is_that_of_the_original(shared):
    stored = load_file(shared / "reference" / "circuit_stats_a.safetensors")
    x, orders = stored["input.x"], stored["input.permutations"]
    for kind in ("linear", "dependent", "independent"):
        y = stored[f"input.y_{kind}"]
        wanted, _, chance = stored[f"out.hsic_{kind}"].tolist()
        assert hsic(x, y) == pytest.approx(wanted, rel=1e-4)
        K, L = _kernels(x.double(), y.double(), None)
        again = torch.stack([_hsic(K, L[order][:, order]) for order in orders])
        torch.testing.assert_close(again.float(), stored[f"out.hsic_perm_{kind}"], rtol=1e-4, atol=1e-7)
        assert float((again >= hsic(x, y)).double().mean()) == pytest.approx(chance, abs=1e-6)
        ours = hsic_test(x, y, permutations=200)[1]  # counts the order as it is, so that it is never zero
        assert ours > 0 and abs(ours - chance) < 0.12 and (ours < 0.05) == (kind != "independent")


def test_equivalence_is_that_of_the_original(shared):
    stored = load_file(shared / "reference" / "circuit_stats_a.safetensors")["out.equivalence_pval"].tolist()
    assert len(stored) > 50
    lost = 0
    for count, epsilon, observed, p in stored:
        n = int(count)
        ours = equivalence_p(n, epsilon, observed)
        assert ours == pytest.approx(equivalence_p(int(n), epsilon, 1 - observed))  # as far from a half
        if ours != pytest.approx(p, abs=1e-9):  # rounding: the original takes |14/20 - 1/2| for less than |0.3 - 1/2|
            k = round(n * max(observed, 1 - observed))
            alike = [comb(n, one) * (0.5 + epsilon) ** one * (0.5 - epsilon) ** (n - one) for one in (k, n - k)]
            assert any(ours - p == pytest.approx(one, abs=1e-9) for one in (*alike, sum(alike))), (n, epsilon, observed)
            lost += 1
    assert lost < len(stored) / 3


def test_binomial_is_that_of_the_original(shared):
    stored = load_file(shared / "reference" / "circuit_stats_a.safetensors")["out.binom_pval"].tolist()
    assert len(stored) > 20
    for n, q, k, less, greater in stored:
        assert binomial_p(int(k), int(n), q, "less") == pytest.approx(less, abs=1e-12)
        assert binomial_p(int(k), int(n), q, "greater") == pytest.approx(greater, abs=1e-12)


def test_equivalence_is_the_sum_of_its_formula():
    for n, epsilon, share in product((1, 5, 8), (0.0, 0.1), (0.0, 0.4, 0.5, 1.0)):
        wanted = sum(comb(n, k) * (0.5 + epsilon) ** k * (0.5 - epsilon) ** (n - k) for k in range(n + 1)
                     if abs(k / n - 0.5) >= abs(share - 0.5) - 1e-12)
        assert equivalence_p(n, epsilon, share) == pytest.approx(wanted)


# -- on a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=12, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval().double()
    for parameter in model.parameters():
        parameter.data *= 4
    return model


@pytest.fixture(scope="module")
def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    clean, other = torch.randint(0, 12, (2, 12, 5), generator=generator)
    corrupt = torch.cat([other[:, :3], clean[:, 3:]], 1)
    return Task("words", clean, corrupt, LogOdds(*(torch.randint(0, 12, (2, 12, 1), generator=generator) + 0).tolist()))


@pytest.fixture(scope="module")
def best(model, task) -> Circuit:
    """Heads ranked by what each alone keeps of the metric: the half of them that keeps most."""
    heads = circuit(model, task, "random", level="heads")
    without = faithfulness(model, task, {head: heads.keep(set(heads) - {head}) for head in heads})
    lost = dict(zip(without.names, (without.share - 1).tolist()))
    return Circuit.of(lost, level="heads", about={"ablation": "resample"}).top(4, absolute=False)


def test_against_random_counts_those_that_are_less_faithful(model, task, best):
    found = against_random(model, task, best, count=40)
    others = random_circuits(best, 40, size=4)
    measured = faithfulness(model, task, [best, *(best.keep(one) for one in others)])
    assert found.value == pytest.approx(float(measured.share[0]))
    torch.testing.assert_close(found.random, measured.share[1:])
    beaten = float((measured.share[1:] < measured.share[0]).double().mean())
    assert found.beaten == beaten and found.low <= found.beaten <= found.high
    assert found.p == pytest.approx((1 + int((found.random >= found.value).sum())) / 41) and found.size == 4
    worst = against_random(model, task, best.complement, count=40)
    assert worst.beaten < found.beaten and found.random.std() > 0


def test_random_curve_is_of_rising_sizes(model, task, best):
    found = random_curve(model, task, best, count=5, fractions=[0.25, 1.0])
    assert [one.size for one in found] == [2, 8] and found[0].beaten >= found[1].beaten
    torch.testing.assert_close(found[1].random, torch.ones(5).double())  # all of the model is the model
    with pytest.raises(ValueError, match="above 0"):
        random_curve(model, task, best, fractions=[0.0])


def test_sufficiency_and_necessity_of_a_good_and_a_bad_circuit(model, task, best):
    good = sufficiency(model, task, best, count=60, quantile=0.5)
    bad = sufficiency(model, task, best.complement, count=60, quantile=0.5)
    assert good.statistic == against_random(model, task, best, count=60).beaten
    assert good.passed() and not bad.passed() and good.p == binomial_p(round(good.statistic * 60), 60, 0.5, "greater")
    hurts = partial_necessity(model, task, best, count=60, quantile=0.3)
    needless = partial_necessity(model, task, best.complement, count=60, quantile=0.3)
    others = [best.keep(set(best.scores) - one) for one in random_circuits(best, 60, size=4)]
    left = faithfulness(model, task, [best.complement, *others]).share
    assert hurts.statistic == float((left[1:] > left[0]).double().mean())
    assert hurts.low <= hurts.statistic <= hurts.high
    assert hurts.statistic > needless.statistic and hurts.passed() and not needless.passed()


def test_equivalence_of_the_whole_model_and_of_a_part(model, task, best):
    whole = equivalence(model, task, best.keep(set(best.scores)))
    assert whole.statistic == 0.5 and whole.p == pytest.approx(1) and whole.passed()
    part = equivalence(model, task, best.top(1))
    measured = faithfulness(model, task, best.top(1))
    share = float((measured.outcome[0] > measured.full).double().mean())
    assert part.statistic == pytest.approx(share) and part.p == equivalence_p(12, 0.1, share)
    assert part.low <= part.statistic <= part.high


def test_what_is_left_of_nothing_depends_and_of_all_but_nothing_does_not(model, task, best):
    left_all = independence(model, task, best.keep([]), permutations=200)  # the complement is the model
    assert left_all.p < 0.01 and not left_all.passed()
    found = independence(model, task, best, permutations=200)
    measured = faithfulness(model, task, best.complement)
    assert found.statistic == pytest.approx(hsic(measured.full, measured.outcome[0]))
    with pytest.raises(ValueError, match="the circuit is everything"):
        independence(model, task, best.keep(set(best.scores)))
    with pytest.raises(ValueError, match="give at least 4"):
        independence(model, Task("few", task.clean[:3], task.corrupted[:3], 5), best)


def test_minimality_by_hand(model, task, best):
    found = minimality(model, task, best, count=3)
    more = inflated(best, 3)
    assert len(more) == 3 and all(one == best.kept | {added} and added not in best.kept for one, added in more)
    kept = {"whole": best, **{item: best.keep(best.kept - {item}) for item in best},
            **{f"+{added}": best.keep(one) for one, added in more}}
    mean = dict(zip(kept, faithfulness(model, task, kept).outcome.mean(1)))
    random = torch.stack([(mean[f"+{added}"] - mean["whole"]).abs() for _, added in more])
    for item, change, beaten, p in zip(found.items, found.change, found.beaten, found.p):
        assert float(change) == pytest.approx(float((mean["whole"] - mean[item]).abs()))
        assert float(beaten) == pytest.approx(float((random < change).double().mean()))
        assert float(p) == binomial_p(round(float(beaten) * 3), 3, 0.9, "less")
    assert (found.p_holm >= found.p).all() and (found.low <= found.change + 1e-12).all() and len(found.frame()) == 4
    assert found.needless(1.1) == list(best) and found.needless(0.0) == []


def test_a_needless_head_is_found(model, task):
    """A head at a position that nobody reads changes nothing, and every addition changes more."""
    heads = circuit(model, task, "random", level=["L1.attn.H0@0", "L*.attn.H*@4"])
    found = minimality(model, task, heads.keep(["L1.attn.H0@0", "L0.attn.H0@4"]), count=7)
    row = found.items.index("L1.attn.H0@0")
    assert "L1.attn.H0@0" in found.needless() and float(found.change[row]) < 1e-12 and float(found.beaten[row]) == 0
    assert float(found.p[row]) == pytest.approx(0.1**7) and float(found.beaten.max()) > 0


def test_verdicts_are_those_of_the_tests(model, task, best):
    found = verdicts(model, task, best, count=20)
    assert list(found.index) == ["equivalence", "independence", "sufficiency", "partial necessity", "minimality"]
    assert found.statistic["sufficiency"] == sufficiency(model, task, best, count=20).statistic
    assert found.p["minimality"] == pytest.approx(float(minimality(model, task, best, count=20).p_holm.min()))
    assert bool(found.passed["equivalence"]) == equivalence(model, task, best).passed()


@pytest.mark.parametrize("test", [against_random, equivalence, sufficiency, partial_necessity, minimality])
def test_an_empty_circuit_is_told(test, model, task, best):
    with pytest.raises(ValueError, match="the circuit is empty: it keeps none of 8 nodes; narrow it with top"):
        test(model, task, best.keep([]))


@pytest.mark.parametrize("test", [against_random, sufficiency, partial_necessity, minimality])
def test_a_full_circuit_is_told(test, model, task, best):
    with pytest.raises(ValueError, match="the circuit is all of 8 nodes"):
        test(model, task, best.keep(set(best.scores)))
    if test is not minimality:
        with pytest.raises(ValueError, match="random circuits of 99 of 8"):
            test(model, task, best, size=99)


# -- random circuits --------------------------------------------------------------------------------------------------

EDGES = [("embed", "L0.attn.H0.v"), ("embed", "L0.attn.H1.v"), ("embed", "logits"), ("L0.attn.H0", "L1.mlp"),
         ("L0.attn.H1", "L1.mlp"), ("L0.attn.H0", "logits"), ("L0.attn.H1", "logits"), ("L1.mlp", "logits")]


def test_random_ways_lead_from_the_input_to_the_logits():
    known = Circuit.of(EDGES, level="edges")
    for one in random_circuits(known, 50, size=6, paths=True):
        assert len(one) == 6
    whole = [one for one in random_circuits(known, 200, size=3, paths=True)
             if known.keep(one).prune().kept == one]
    assert len(whole) > 100  # the last way may be cut
    assert all(len(one) == 3 for one in random_circuits(known, 20, size=3))
    with pytest.raises(ValueError, match="circuit of nodes"):
        random_circuits(Circuit.of(["L0.mlp"], level="mlps"), 2, size=1, paths=True)


def test_additions_are_ways_with_something_new():
    known = Circuit.of(EDGES, level="edges").keep([("embed", "logits")])
    for one, added in inflated(known, 30):
        assert added in one and added not in known.kept and known.keep(one).prune().kept == one
    with pytest.raises(ValueError, match="all of 8 edges"):
        inflated(Circuit.of(EDGES, level="edges"), 3)


def test_edges_are_tested_as_nodes_are(model, task):
    from relprop.circuit.graph import graph
    from relprop.load import load

    found = graph(load(model), task.prepared(load(model)).clean)
    edges = [(str(found.sources[u]), str(found.destinations[v])) for u, v in torch.as_tensor(found.edges).nonzero()
             .tolist()]
    generator = torch.Generator().manual_seed(0)
    known = Circuit.of(dict(zip(edges, torch.randn(len(edges), generator=generator).tolist())), level="edges")
    chance = against_random(model, task, known.top(40), count=5, paths=True)
    assert chance.random.shape == (5,) and chance.size == 40
    assert len(minimality(model, task, known.top(3), count=4).items) == 3
