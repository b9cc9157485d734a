"""ACDC: one edge after the other, as an oracle that runs each alone, and as two original codes."""
from __future__ import annotations

import pytest
import torch
from peers import CASES, case, place
from test_circuit_run import asked, prepared

from relprop.circuit import circuit
from relprop.circuit.acdc import _Search, acdc
from relprop.circuit.run import Pieces, outcomes
from relprop.mediation import KL
from relprop.mediation.task import ready
from relprop.result.circuit import owner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def one_by_one(task, tau: float, sign: float = 1.0) -> tuple[set, dict]:
    """What is kept, and the change by each edge that was tried, with a run of the model for each."""
    with ready(task.model):
        edges, pieces = _Search.of(task, "resample", "metric", None).order(), Pieces(task, hold=True)
        kept, scores, now = set(edges), {}, float(task.measured[0].mean())
        for edge in edges:
            if owner(edge[1]) != "logits" and not any(u == owner(edge[1]) for u, _ in kept):
                kept.discard(edge)
                continue
            changed = float(pieces.run(pieces.cuts([kept - {edge}])).mean())
            scores[edge] = changed - now
            if sign * scores[edge] < tau:
                kept, now = kept - {edge}, changed
    return kept, scores


@pytest.mark.parametrize(("name", "tau"), [
    ("gpt2", 1e-3), pytest.param("gpt2", 3e-5, marks=pytest.mark.slow),
    pytest.param("gpt-neox", 1e-4, marks=pytest.mark.slow), ("bert", 1e-4)])
def test_edges_are_tried_one_by_one(name, tau):
    task = prepared(name)
    by_kl = KL()
    divergence = type(task)(task.task, task.subject, task.clean, task.corrupted, by_kl,
                            by_kl.pairs(task.subject, task.clean, task.corrupted)[0])
    kept, scores = one_by_one(divergence, tau)
    found = acdc(task, level="edges", ablation="resample", tau=tau)
    assert found.kept == kept and 0 < len(kept) < len(found.scores)
    assert found.about["tried"] == len(scores)
    for edge, score in found.scores.items():
        assert score == pytest.approx(scores.get(edge, 0.0), abs=1e-12)
    circuit_alone = outcomes(divergence, [kept])
    assert found.about["of the circuit"] == pytest.approx(float(circuit_alone.mean()), abs=1e-12)


@pytest.mark.slow
def test_the_metric_is_worse_nearer_to_the_corrupted_one():
    task = prepared("gpt2")
    clean, corrupted = (float(one.mean()) for one in task.measured)
    kept, scores = one_by_one(task, 1e-3, sign=-1.0 if clean > corrupted else 1.0)
    found = acdc(task, level="edges", ablation="resample", tau=1e-3, measure="metric")
    assert found.kept == kept and 0 < len(kept) < len(found.scores)
    for edge, score in scores.items():
        assert found.scores[edge] == pytest.approx(score, abs=1e-12)


def test_the_order_is_fixed_and_the_batch_is_nothing_to_it():
    task = prepared("llama")
    first = acdc(task, level="edges", ablation="resample", tau=1e-3)
    again = acdc(task, level="edges", ablation="resample", tau=1e-3, batch_size=1)
    assert first.kept == again.kept and 0 < len(first.kept) < len(first.scores)
    for edge, score in first.scores.items():
        assert score == pytest.approx(again.scores[edge], abs=1e-9)
    with ready(task.model):
        order = _Search.of(task, "resample", "KL", None).order()
    assert order[0] == ("L1.mlp", "logits") and order[-1] == ("embed", "L0.attn.H0.q")
    ends = list(dict.fromkeys(v for _, v in order))
    assert ends[:5] == ["logits", "L1.mlp", "L1.attn.H1.v", "L1.attn.H1.k", "L1.attn.H1.q"]
    assert [u for u, v in order if v == "L1.mlp"] == ["L1.attn.H1", "L1.attn.H0", "L0.mlp", "L0.attn.H1", "L0.attn.H0",
                                                      "embed"]


def test_all_goes_or_stays():
    task = prepared("gpt2")
    nothing = circuit(task.subject, task.task, "acdc", level="edges", options={"tau": 1e9})
    assert not nothing.kept and nothing.about["tried"] == 7  # those into the logits; nothing else leads anywhere
    everything = circuit(task.subject, task.task, "acdc", level="edges", options={"tau": 1e-30}, ablation="zero")
    assert len(everything.kept) > 30


@pytest.mark.parametrize(("options", "message"), [
    ({"tau": 0.0}, "tau is 0.0; give a number above 0"),
    ({"measure": "accuracy"}, "no measure 'accuracy'; there are KL, metric"),
    ({"order": [("embed", "logits")]}, "an order of 1 edges of a model of 46; give each once"),
])
def test_what_cannot_be_searched(options, message):
    with pytest.raises(ValueError, match=message):
        acdc(prepared("gpt2"), level="edges", ablation="resample", **options)


# -- against the original codes ---------------------------------------------------------------------------------------

FAST = {"circuits_gpt2_a": (0.1,), "circuits_llama_a": (0.03,), "circuits_neox_a": (0.03,)}


def kept_by_auto_circuit(folder, name: str, taus) -> None:
    """The edges that auto-circuit keeps in the order in which it happened to visit them."""
    one = case(folder, name)
    sources, destinations = one.names
    order = [(sources[u], destinations[v]) for u, v in one.out["ac.acdc.visit_order"].tolist()]
    known = one.out["ac.acdc_kl.taus"].tolist()
    for tau in taus:
        which = min(range(len(known)), key=lambda index: abs(known[index] - tau))
        theirs = {(sources[u], destinations[v]) for u, v in one.out["ac.acdc_kl.kept"][which].nonzero().tolist()}
        found = acdc(asked(one), level="edges", ablation="resample", tau=known[which], order=order)
        assert found.kept == theirs and len(theirs) < len(order)


@pytest.mark.parametrize("name", CASES)
def test_auto_circuit_keeps_the_same_edges(shared, name):
    kept_by_auto_circuit(shared / "reference", name, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_auto_circuit_keeps_the_same_edges_at_every_threshold(shared, name):
    kept_by_auto_circuit(shared / "reference", name, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0))


HOOKS = {"hook_q_input": ".q", "hook_k_input": ".k", "hook_v_input": ".v", "hook_q": ".q", "hook_k": ".k",
         "hook_v": ".v"}


def theirs(hook: str, head: int | None) -> str:
    """The address of a place of theirs, "blocks.1.attn.hook_q" and a head."""
    layer, name = hook.split(".")[1], hook.split(".")[-1]
    if name.startswith("hook_resid"):
        return "logits" if name == "hook_resid_post" else place("input")
    return f"L{layer}.mlp" if name.startswith("hook_mlp") else f"L{layer}.attn.H{head}{HOOKS.get(name, '')}"


@pytest.mark.parametrize("which", range(4))
def test_each_step_of_the_original_code(shared, which):
    """Every effect that it measured, on top of what it had removed. Where it puts a head's whole query, key or value of
    the other run, that is all edges into it.
    """
    one = case(shared / "reference", "circuits_gpt2_a")
    about, rows = one.about["info_acdc"][which], one.about["info_acdc_edges"]["rows"]
    order, effect, kept = (one.out[f"acdc.{which}.{name}"] for name in ("order", "effect", "kept"))
    task = asked(one, KL() if about["metric"] == "kl" else None)
    sign = 1 if about["metric"] == "kl" else -1
    with ready(one.model):
        pieces = Pieces(task)
        sources, destinations = pieces.wired.graph.names
        state, cuts, before, expected = torch.zeros_like(pieces.wired.graph.edges.T), [], [], []
        last = -1
        for row in sorted((row for row in range(len(rows)) if order[row] >= 0), key=lambda row: int(order[row])):
            child, head, parent, other, kind = rows[row]
            cut = state.clone()
            v = destinations.index(theirs(child, head))
            if kind == "DIRECT_COMPUTATION":
                cut[v] = pieces.wired.graph.edges[:, v]
            else:
                cut[v, sources.index(theirs(parent, other))] = True
            before.append(last)
            cuts.append(cut)
            expected.append(float(effect[row]))
            assert bool(kept[row]) == (expected[-1] >= about["threshold"])
            if not kept[row]:
                state, last = cut, len(cuts) - 1
        found = sign * pieces.run(torch.stack(cuts)).mean(1)
    plain = sign * float(task.measured[0].mean())
    changes = [float(value) - (plain if index < 0 else float(found[index])) for value, index in zip(found, before)]
    assert len(changes) == int((order >= 0).sum()) > 70
    torch.testing.assert_close(torch.tensor(changes), torch.tensor(expected), rtol=0,
                               atol=1e-5 * max(1.0, max(map(abs, expected))))
