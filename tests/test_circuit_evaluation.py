"""Faithfulness, completeness, minimality, curves and recovery: against the model run by hand, and the originals."""
from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

import relprop
from relprop.circuit import Task, circuit
from relprop.circuit.evaluation import FRACTIONS, completeness, curve, faithfulness, minimality
from relprop.circuit.manual import manual
from relprop.circuit.recovery import recovery
from relprop.errors import Undefined
from relprop.intervene import Mean, Resample, Zero, intervened
from relprop.mediation import KL, LogOdds
from relprop.result import Circuit, Faithfulness

CLEAN = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 2, 9, 1]])
CORRUPT = torch.tensor([[1, 8, 3, 4], [5, 6, 1, 8], [4, 2, 9, 1]])
GOOD, BAD = [[3], [4], [5]], [[6], [7], [8]]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=3, n_embd=12, vocab_size=10, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval().double()
    for parameter in model.parameters():
        parameter.data *= 4  # else attention is uniform, and no head matters
    return model


@pytest.fixture(scope="module")
def task() -> Task:
    return Task("words", CLEAN, CORRUPT, LogOdds(GOOD, BAD))


@pytest.fixture
def heads(model, task) -> Circuit:
    return circuit(model, task, "random", level="heads")


def _differences(model) -> torch.Tensor:
    z = model(CLEAN).logits[:, -1]
    return z.gather(1, torch.tensor(GOOD))[:, 0] - z.gather(1, torch.tensor(BAD))[:, 0]


# -- faithfulness -----------------------------------------------------------------------------------------------------


VALUES = {"zero": Zero(), "resample": Resample((CORRUPT,)), "mean": Mean((CORRUPT,)),
          "mean by position": Mean((CORRUPT,), per_position=True)}


@pytest.mark.parametrize("ablation", VALUES)
def test_all_that_a_circuit_leaves_out_is_ablated(model, task, heads, ablation):
    found = heads.top(2)
    measured = faithfulness(model, task, {"top": found, "rest": found.complement}, ablation=ablation)
    ablated = lambda nodes: intervened(model, dict.fromkeys(nodes, VALUES[ablation]))
    with torch.no_grad():
        full = _differences(model)
        outcomes = []
        for left in (found.complement, found, heads):
            with ablated(left):
                outcomes.append(_differences(model))
    torch.testing.assert_close(measured.full, full)
    torch.testing.assert_close(measured.outcome, torch.stack(outcomes[:2]))
    torch.testing.assert_close(measured.empty, outcomes[2])
    assert (measured.full - measured.outcome).abs().max() > 1e-3 and measured.kept.tolist() == [2, 4]
    shares = [(one - outcomes[2]) / (full - outcomes[2]) for one in outcomes[:2]]
    torch.testing.assert_close(measured.mean_of_shares, torch.stack([one.mean() for one in shares]))
    torch.testing.assert_close(measured.share[0], (outcomes[0] - outcomes[2]).mean() / (full - outcomes[2]).mean())
    torch.testing.assert_close(measured.recovered[0], outcomes[0].mean() / full.mean())
    assert measured.about["ablation"] == ablation


def test_all_is_faithful_and_nothing_is_not(model, task, heads):
    measured = faithfulness(model, task, {"all": heads, "none": heads.top(0)})
    torch.testing.assert_close(measured.share, torch.tensor([1.0, 0.0]).double(), atol=1e-12, rtol=0)
    assert measured.low[0] == pytest.approx(1) and measured.high[1] == pytest.approx(0)
    torch.testing.assert_close(measured.empty, task.prepared(relprop.load(model)).measured[1])  # the corrupted run's:
    # the last tokens are the same, so that all that differs comes there by heads


def test_kl_is_another_metric_of_the_same_circuits(model, task, heads):
    found = heads.top(3)
    measured = faithfulness(model, task, found, metric=KL())
    with torch.no_grad(), intervened(model, dict.fromkeys(found.complement, VALUES["resample"])):
        now = model(CLEAN).logits[:, -1].log_softmax(-1)
    before = model(CLEAN).logits[:, -1].detach().log_softmax(-1)
    torch.testing.assert_close(measured.outcome[0], (before.exp() * (before - now)).sum(-1))
    assert measured.full.abs().max() < 1e-12
    torch.testing.assert_close(measured.share[0], 1 - measured.outcome[0].mean() / measured.empty.mean())


def test_intervals_hold_the_value_and_shrink_with_more_inputs(model, task, heads):
    measured = faithfulness(model, task, heads.top(3))
    assert measured.low[0] <= measured.share[0] <= measured.high[0] and measured.low[0] < measured.high[0]
    one = faithfulness(model, Task("one", CLEAN[:1], CORRUPT[:1], LogOdds(GOOD[:1], BAD[:1])), heads.top(3))
    assert one.low is None and one.frame().low.isna().all()


def test_comes_back_from_a_file(model, task, heads, tmp_path):
    measured = curve(model, task, heads, fractions=[0.5, 1.0])
    back = relprop.open(measured.save(tmp_path / "a.json"))
    assert isinstance(back, Faithfulness)
    assert back.to_dict() == measured.to_dict() and back.cpr == measured.cpr and "share" in back.frame()
    assert measured.save(tmp_path / "a.csv").read_text().count("\n") == 3 and "faithfulness" in measured.summary()


def test_circuits_that_cannot_be_compared_are_told(model, task, heads):
    other = Circuit.of({"L0.mlp": 1.0}, level="mlps")
    with pytest.raises(ValueError, match="one is of 6 nodes, another of 1"):
        faithfulness(model, task, [heads, other])
    zero = circuit(model, task, "random", level="heads", ablation="zero")
    with pytest.raises(ValueError, match="found with the ablations resample, zero; say ablation="):
        faithfulness(model, task, [heads, zero])
    with pytest.raises(ValueError, match="no circuit to evaluate"):
        faithfulness(model, task, [])
    first = Circuit.of({"L1.attn.H0@0": 1.0}, level="heads at positions")  # nobody reads what it gives there
    with pytest.raises(Undefined, match="take another level, ablation or metric"):
        faithfulness(model, task, first)


# -- curves -----------------------------------------------------------------------------------------------------------


def test_curves_are_faithfulness_of_the_ranking(model, task, heads):
    measured = curve(model, task, heads, fractions="all")
    assert measured.kept.tolist() == list(range(7)) and measured.fractions[-1] == 1
    for size in (2, 5):
        torch.testing.assert_close(measured.outcome[size], faithfulness(model, task, heads.top(size)).outcome[0])
    torch.testing.assert_close(measured.cpr, float(torch.trapezoid(measured.share, dx=1 / 6)))
    assert measured.cmd >= 0 and measured.smallest(0.999) is not None and measured.smallest(1e9) is None
    signed = curve(model, task, heads, fractions=[0.5], absolute=False)
    torch.testing.assert_close(signed.outcome, faithfulness(model, task, heads.top(3, absolute=False)).outcome)
    for wrong in ([0.5, 0.1], [-0.1, 1.0], [], [0.5, 0.5]):
        with pytest.raises(ValueError, match="rising shares"):
            curve(model, task, heads, fractions=wrong)
    with pytest.raises(ValueError, match="without sizes"):
        _ = faithfulness(model, task, heads).cpr


def _place(name: str) -> str:
    """An address from a name of the reference files: "a0.h1<q>" as "L0.attn.H1.q"."""
    head = re.fullmatch(r"a(\d+)\.h(\d+)(?:<([qkv])>)?", name)
    if head is None:
        return {"input": "embed", "logits": "logits"}.get(name, f"L{name[1:]}.mlp")
    return f"L{head[1]}.attn.H{head[2]}" + (f".{head[3]}" if head[3] else "")


def _original(shared, name: str):
    """Model, task, stored outputs, and a function that makes a circuit of a matrix of edge scores."""
    about = json.loads((shared / "reference" / f"{name}.json").read_text())
    stored = load_file(shared / "reference" / f"{name}.safetensors")
    kind = about["model_class"]
    config = getattr(transformers, kind.replace("LMHeadModel", "Config").replace("ForCausalLM", "Config"))
    model = getattr(transformers, kind)(config(**about["hf_config"])).eval()
    weights = {key.removeprefix("model."): value for key, value in stored.items() if key.startswith("model.")}
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and not [key for key in left.missing_keys if "bias" not in key and "lm_" not in key]
    labels = stored["input.labels"]
    task = Task(name, stored["input.clean"], stored["input.corrupt"],
                LogOdds(labels[:, :1].tolist(), labels[:, 1:].tolist()))
    ends = [list(map(_place, about["index"][side])) for side in ("sources", "destinations")]

    def made(scores: torch.Tensor) -> Circuit:
        real = stored["out.real_edge_mask"].nonzero().tolist()
        edges = {(ends[0][u], ends[1][v]): float(scores[u, v]) for u, v in real}
        return Circuit.of(edges, level="edges", about={"clean": float(stored["out.metric_clean"]),
                                                       "corrupted": float(stored["out.metric_corrupt"])})

    return model.double(), task, stored, made


@pytest.mark.parametrize("name", ["circuits_gpt2_a", "circuits_llama_a", "circuits_neox_a"])
def test_curves_are_those_of_mib(shared, name):
    model, task, stored, made = _original(shared, name)
    methods = sorted({key.split(".")[2] for key in stored if key.startswith("out.mib.")})
    assert methods
    for method in methods:
        found = made(stored[f"out.{method}.edge_scores"])
        for absolute in (False, True):
            wanted, given = f"out.mib.{method}.abs{int(absolute)}", {"rtol": 2e-4, "atol": 2e-4}
            measured = curve(model, task, found, absolute=absolute)
            torch.testing.assert_close(measured.share.float(), stored[f"{wanted}.faithfulness"], **given)
            area = torch.tensor([measured.cpr, measured.cmd])
            torch.testing.assert_close(area, stored[f"{wanted}.cpr_cmd_avg"][:2], **given)
            assert len(measured.fractions) == len(FRACTIONS)


def test_pruned_circuits_are_those_of_the_original(shared):
    model, task, stored, made = _original(shared, "circuits_gpt2_a")
    found = made(stored["out.eap_ig_inputs.edge_scores"])
    number = json.loads((shared / "reference" / "circuits_gpt2_a.json").read_text())["checks"]["topn_n"]
    kept = made(stored["out.topn.eap_ig_inputs.in_graph"].double()).threshold(0.5).kept
    top = found.top(number).prune()
    assert top.kept == kept and len(kept)
    measured = faithfulness(model, task, top)
    torch.testing.assert_close(measured.outcome[0].float(), stored["out.topn.eap_ig_inputs.metric_per_example"],
                               rtol=2e-4, atol=2e-4)
    by_kl = faithfulness(model, task, top, metric=KL())
    torch.testing.assert_close(by_kl.outcome[0].float(), stored["out.topn.eap_ig_inputs.kl_per_example"], rtol=2e-4,
                               atol=2e-4)


# -- completeness and minimality --------------------------------------------------------------------------------------


def test_completeness_compares_with_the_model_that_lacks_the_same(model, task, heads):
    found = heads.top(4)
    sets = [list(found)[:1], list(found)[1:3]]
    measured = completeness(model, task, found, sets=sets)
    for index, one in enumerate(sets):
        circuit_without = faithfulness(model, task, found.keep(found.kept - set(one))).outcome[0]
        model_without = faithfulness(model, task, found.keep(set(heads) - set(one))).outcome[0]
        torch.testing.assert_close(measured.circuit[index], circuit_without)
        torch.testing.assert_close(measured.model[index], model_without)
        torch.testing.assert_close(measured.gap[index], (circuit_without.mean() - model_without.mean()).abs())
    whole = completeness(model, task, heads, count=5)
    assert whole.gap.max() < 1e-12 and measured.gap.max() > 1e-3 and len(whole.sets) == 5 and all(whole.sets)
    assert measured.worst in map(frozenset, sets) and len(measured.frame()) == 2
    for wrong, said in ((heads.top(0), "keeps none of 6"), (found, "to knock out")):
        with pytest.raises(ValueError, match=said):
            completeness(model, task, wrong, sets=[list(found.complement)[:1]])


def test_minimality_is_the_change_that_an_item_makes(model, task, heads):
    found = heads.top(4)
    alone = minimality(model, task, found, count=0)
    whole = faithfulness(model, task, found)
    for item, change in zip(alone.items, alone.alone.tolist()):
        without = faithfulness(model, task, found.keep(found.kept - {item})).share[0]
        assert change == pytest.approx(abs(float(without - whole.share[0])))
    more = minimality(model, task, found, count=4)
    torch.testing.assert_close(more.alone, alone.alone)
    assert (more.change >= alone.alone - 1e-12).all() and (more.change > alone.alone + 1e-6).any()
    assert set(more.needless(1e9)) == found.kept and more.needless(0.0) == [] and len(more.frame()) == 4
    with pytest.raises(ValueError, match="minimality is of the items"):
        minimality(model, task, heads.top(0))


def test_an_item_that_nobody_reads_is_needless(model, task):
    found = Circuit.of({"L1.attn.H0@0": 1.0, "L1.attn.H0@3": 1.0}, level="heads at positions")
    measured = minimality(model, task, found, count=2)
    assert measured.needless(1e-9) == ["L1.attn.H0@0"]


# -- a known circuit --------------------------------------------------------------------------------------------------


def test_recovery_by_hand():
    found = Circuit.of({"a": -4.0, "b": 3.0, "c": 2.0, "d": 1.0}, level="heads")
    known = lambda *names: Circuit.of(names, level="heads")
    assert recovery(found, known("a", "b")).auc == 1 and recovery(found, known("c", "d")).auc == 0
    one = recovery(found, known("a", "d"))  # of four pairs of right and wrong two are in order
    assert (one.auc, one.positives, one.items) == (0.5, 2, 4)
    assert one.average_precision == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert recovery(found, known("b"), absolute=False).auc == 0  # what helps goes down
    assert recovery(Circuit.of(dict.fromkeys("abcd", 1.0), level="heads"), known("a")).auc == 0.5


def test_recovery_of_nodes_by_edges_and_by_positions():
    edges = Circuit.of({("embed", "logits"): 9.0, ("L0.attn.H0", "logits"): 2.0, ("L0.attn.H0", "L1.mlp"): -1.9,
                        ("L0.attn.H1", "logits"): 1.0, ("L1.mlp", "logits"): 0.01}, level="edges")
    found = recovery(edges, Circuit.of(["L0.attn.H1"], level="heads"))
    assert found.items == 3 and found.auc == 1  # the sum over edges of head 0 is 0.1, and the input is no node
    assert recovery(edges, Circuit.of([("L0.attn.H0", "logits")], level="edges")).items == 5
    placed = Circuit.of({"L0.attn.H0@1": 2.0, "L0.attn.H0@2": -2.0, "L0.attn.H1@1": 1.0}, level="heads at positions")
    head = Circuit.of(["L0.attn.H0"], level="heads")
    assert recovery(placed, head).auc == 1 and recovery(placed, head, positions="sum").auc == 0
    with pytest.raises(ValueError, match="take level='edges'"):
        recovery(placed, Circuit.of([("L0.attn.H0", "logits")], level="edges"))


def test_a_known_circuit_that_says_nothing_is_told():
    found = Circuit.of({"L0.attn.H0": 1.0, "L0.attn.H1": 2.0}, level="heads", method="eap")
    with pytest.raises(ValueError, match="is all of 2 items"):
        recovery(found, found)
    with pytest.raises(ValueError, match="is none of 2 items"):
        recovery(found, found.top(0))
    with pytest.raises(ValueError, match="L7.attn.H0 is in the known circuit, and eap has no score"):
        recovery(found, Circuit.of(["L7.attn.H0"], level="heads"))


def test_circuits_by_hand_are_those_on_record(shared):
    stored = json.loads((shared / "reference" / "manual_circuits.json").read_text())
    heads = lambda listed: {f"L{layer}.attn.H{head}" for layer, head in listed}
    ioi = stored["ioi"]["classes"]
    assert set(manual("ioi")) == set().union(*(heads(one["heads"]) for one in ioi.values()))
    at = {"S+1": "S1_next"}
    assert set(manual("ioi", level="heads at positions")) == {
        f"{head}@{at.get(one['position'], one['position'])}" for one in ioi.values() for head in heads(one["heads"])}
    greater = stored["greater_than"]
    assert set(manual("greater-than")) == heads(greater["cdt_heads"]["heads"])
    named = [key for key in greater["acdc"] if key.startswith("attention")]
    mlps = {f"L{layer}.mlp" for key in ("early MLPs", "late MLPs") for layer in greater["acdc"][key]}
    assert set(manual("greater-than", level="heads and mlps")) == mlps.union(
        *(heads(greater["acdc"][key]) for key in named))
    assert set(manual("docstring")) == heads(stored["docstring"]["heads_all_positions (cdt)"]["base"])
    roles = [(key, place.replace(",_", "comma_")) for key, places in
             stored["docstring"]["head_positions (auto-circuit node circuit)"].items()
             if re.fullmatch(r"\d\.\d", key) for place in places]
    assert set(manual("docstring", level="heads at positions")) == {
        f"L{key[0]}.attn.H{key[2]}@{place}" for key, place in roles}


def test_edges_by_hand_go_forward():
    for name in ("ioi", "greater-than", "docstring"):
        found = manual(name, level="edges")
        assert len(found) and found.prune().kept == found.kept  # nothing hangs loose
        assert set(manual(name)) & set(found.members)
    inner = {v for _, v in manual("docstring", level="edges") if v != "logits"}
    assert len(manual("docstring", level="edges")) + len(inner) == 37  # ACDC counts the links inside of heads, too
    with pytest.raises(ValueError, match="no circuit by hand of 'ioi' at the level 'neurons'"):
        manual("ioi", level="neurons")
