"""CD-T as a method of circuits: scores, rounds back to the first layer, and what pruning leaves."""
from __future__ import annotations

import pytest
import torch
from peers import place
from sklearn.metrics import roc_auc_score
from test_circuit_exact import program
from test_circuit_run import prepared
from test_decompose import ABLATED

import relprop
from relprop.circuit import circuit, contextual
from relprop.circuit.contextual import Search, by_layer, cdt, pruned
from relprop.circuit.exact import exact
from relprop.circuit.run import outcomes
from relprop.result import Circuit
from relprop.result.decomposition import Part

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


PLACES = tuple(f"L*.attn.H*@{position}" for position in range(4))
"""Heads at positions that all rows have."""


# -- scores ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, level, ablation", [
    ("gpt2", "heads", "resample"), ("gpt2", PLACES, "mean by position"), ("gpt2", "mlps", "zero"),
    ("gpt-neox", "heads and mlps", "mean"), ("bert", "heads", "resample"), ("hf-vit", "heads", "resample"),
    ("llama", "heads", "resample")])
def test_by_difference_throughout_scores_are_exact_effects(name, level, ablation):
    """The one division whose irrelevant parts are the ablated run: scores and signs of all methods."""
    task = prepared(name)
    found = cdt(task, level=level, ablation=ablation, rules=ABLATED, metric="difference").nodes
    expected = exact(task, level=level, ablation=ablation).nodes
    assert list(found) == list(expected)
    found, expected = (torch.tensor(list(scores.values())) for scores in (found, expected))
    assert expected.abs().max() > 1e-5
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_metric_of_relevant_logits_is_the_metrics_part_where_it_is_linear():
    task = prepared("gpt2")
    found, other = (cdt(task, level="heads", ablation="zero", metric=metric).nodes for metric in ("relevant",
                                                                                                   "difference"))
    for name, score in found.items():
        assert score == pytest.approx(other[name], abs=1e-12)


@pytest.mark.parametrize("name", ["tracr_reverse", "tracr_frac_prevs"])
@pytest.mark.parametrize("rules", ["cdt", "cdt-held", "difference", "shapley"])
def test_true_nodes_of_compiled_programs(shared, name, rules):
    about, _, task = program(shared / "reference", name)
    nodes = cdt(task, level=["embed", "L*.attn.H*", "L*.mlp"], ablation="resample", rules=rules).nodes
    active = {place(one) for one in about["truth"]["nodes_resample_active"]}
    assert 0 < len(active) < len(nodes)
    assert roc_auc_score([node in active for node in nodes], [abs(score) for score in nodes.values()]) == 1


def test_scores_against_targets(seed):
    part = Part(torch.randn(3, 2, 4, 5), torch.randn(2, 4, 5))
    mean = torch.randn(1, 4, 5)
    expected = [sum(float(part.rel[s, b, p] @ (part.total[b, p] - mean[0, p])) for b in range(2) for p in range(4)) / 2
                for s in range(3)]
    assert contextual.dot(part, mean).tolist() == pytest.approx(expected, abs=1e-5)
    share = lambda s, p: float(part.rel[s, :, p].abs().mean() / (part.rel[s, :, p].abs().mean()
                                                                 + part.irrel[s, :, p].abs().mean()))
    assert contextual.l1(part).tolist() == pytest.approx([sum(share(s, p) for p in range(4)) for s in range(3)])


def test_scores_over_those_of_a_layer():
    scores, layers = torch.tensor([1.0, -3.0, 2.0, 0.0]), [0, 0, 1, 2]
    assert by_layer(scores, layers, "magnitude").tolist() == [0.25, -0.75, 1.0, 0.0]
    assert by_layer(scores, layers, "net").tolist() == [0.5, -1.5, 1.0, 0.0]
    assert by_layer(scores, layers, "signed").tolist() == [-0.5, 1.5, 1.0, 0.0]
    assert by_layer(scores, layers, None) is scores


# -- rounds ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("through", ["output", "q", ["q", "k", "v"]])
@pytest.mark.parametrize("score", contextual.SCORES)
def test_rounds_go_back_to_the_first_layer(through, score):
    task = prepared("gpt2")
    found = circuit(task.model, task, "cdt", level=PLACES, ablation="mean by position",
                    options={"discover": True, "through": through, "score": score, "rounds": 3})
    first, *rounds = found.about["rounds"]
    assert first["targets"] == [] and len(first["kept"]) == 2 and len(found.nodes) > len(found)
    assert all(one["targets"] == before["kept"] for before, one in zip([first, *rounds], rounds))
    assert set(found) == {name for one in (first, *rounds) for name in one["kept"]}
    ranked = sorted(found.nodes, key=found.nodes.get)
    assert first["kept"] == ranked[:2]  # what makes up most, whose loss lowers the metric most


def test_a_round_scores_what_reaches_its_targets_and_no_target():
    task = prepared("gpt2")
    search = Search(task, "heads", "resample", relprop.division.get("cdt"), score="l1", normalize=None)
    with torch.no_grad():
        found = search.against(["L1.attn.H0"])
    assert found.scores["L1.attn.H0"] == found.scores["L1.attn.H1"] == 0  # beside it, not before
    assert all(found.scores[f"L0.attn.H{head}"] > 0 for head in range(2))


def test_what_a_search_does_without(seed):
    """Each node that pruning drops raises the metric by its loss, and no other would."""
    task = prepared("gpt2")
    nodes = list(task.nodes("heads"))
    whole = Circuit.of(dict.fromkeys(nodes, 0.0), level="heads", about={"ablation": "resample"})
    left = pruned(task.subject, task, whole)
    value = lambda kept: float(outcomes(task, [list(kept)], among=nodes, ablation="resample").mean())
    assert value(left) >= value(nodes)
    assert all(value([one for one in left if one != node]) <= value(left) for node in left)
    assert set(pruned(task.subject, task, whole, protected=nodes)) == set(nodes)
    down = pruned(task.subject, task, whole, down=True)
    assert value(down) <= value(nodes)


@pytest.mark.parametrize("options, said", [
    ({"score": "l2"}, "score is of dot, l1"), ({"normalize": "max"}, "normalize is of"), ({"keep": 0}, "at least one"),
    ({"through": "x"}, "through is of output, q, k, v"), ({"through": []}, "through is of"),
    ({"metric": "irrelevant"}, "metric is of"), ({"rules": "best"}, "unknown rules")])
def test_bad_options_say_what_to_do(options, said):
    task = prepared("gpt2")
    with pytest.raises(ValueError, match=said):
        circuit(task.model, task, "cdt", options=options)
