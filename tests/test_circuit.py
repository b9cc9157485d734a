"""The value: what is kept, in which order, and that it comes back from a file as it went."""
from __future__ import annotations

import json

import pytest
import torch
import transformers

import relprop
from relprop.circuit import METHODS, Method, Task, circuit
from relprop.errors import Undefined
from relprop.result import Circuit

NODES = {"L0.attn.H0": -2.0, "L0.attn.H1": 0.1, "L1.attn.H0": 1.5, "L1.attn.H1": -0.1}
EDGES = {("embed", "L0.attn.H0.q"): -1.0, ("embed", "L0.attn.H1.v"): 3.0, ("L0.attn.H0", "logits"): -0.5,
         ("L0.attn.H1", "L1.attn.H0.k"): 2.0, ("L1.attn.H0", "logits"): 0.25, ("embed", "logits"): 0.0}


@pytest.fixture
def nodes() -> Circuit:
    return Circuit.of(NODES, level="heads", method="eap", about={"clean": 3.0, "corrupted": -1.0})


@pytest.fixture
def edges() -> Circuit:
    return Circuit.of(EDGES, level="edges", method="eap")


def test_all_is_kept_at_first(nodes, edges):
    assert len(nodes) == 4 and nodes.total == -4.0 and set(nodes) == set(NODES)
    assert len(edges) == 6 and "L0.attn.H0 -> logits" in edges and ("embed", "logits") in edges
    assert "L1.attn.H0" in edges and "L1.attn.H7" not in edges


def test_rankings_by_size_and_by_sign(nodes):
    assert nodes.ranking() == ["L0.attn.H0", "L1.attn.H0", "L0.attn.H1", "L1.attn.H1"]  # equal ones in their own order
    assert nodes.ranking(absolute=False) == ["L0.attn.H0", "L1.attn.H1", "L0.attn.H1", "L1.attn.H0"]
    turned = Circuit.of(NODES, level="heads", about={"clean": 0.0, "corrupted": 2.0})  # such as KL: what helps is up
    assert turned.ranking(absolute=False) == nodes.ranking(absolute=False)[::-1]


def test_narrowed(nodes):
    assert list(nodes.top(2)) == ["L0.attn.H0", "L1.attn.H0"] and nodes.top(0).members == ()
    assert nodes.threshold(1.5).kept == nodes.top(2).kept
    assert nodes.top(2).complement.kept == {"L0.attn.H1", "L1.attn.H1"}
    assert nodes.top(2).top(4).kept == nodes.kept  # what was left out is not forgotten
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="0 to 4"):
            nodes.top(wrong)
    with pytest.raises(ValueError, match="L9.attn.H9 is kept, and is none of the 4 nodes"):
        nodes.keep(["L9.attn.H9"])


def test_prune_leaves_ways_from_the_input_to_the_logits(edges):
    cut = edges.keep([edge for edge in EDGES if edge != ("embed", "L0.attn.H0.q")])
    assert cut.prune().kept == cut.kept - {("L0.attn.H0", "logits")}  # nothing reaches that head any more
    dead = edges.keep([("embed", "L0.attn.H1.v"), ("L0.attn.H1", "L1.attn.H0.k"), ("embed", "logits")])
    assert dead.prune().kept == {("embed", "logits")}  # and nothing leaves this one
    assert edges.prune().kept == edges.kept
    nameless = Circuit.of({("a", "b"): 1.0}, level="edges")
    with pytest.raises(ValueError, match="no address"):
        nameless.prune()


def test_prune_of_edges_inside_heads():
    inside = Circuit.of({("embed@0", "L0.attn.H0.k@0"): 1.0, ("L0.attn.H0.k@0", "L0.attn.H0@1"): 1.0,
                         ("L0.attn.H0.k@1", "L0.attn.H0@1"): 1.0, ("L0.attn.H0@1", "logits@1"): 1.0}, level="edges")
    assert inside.prune().kept == inside.kept - {("L0.attn.H0.k@1", "L0.attn.H0@1")}  # nothing comes to that key
    assert "L0.attn.H0.k@0" in inside.members and inside.graph().number_of_edges() == 4


def test_positions_together():
    found = Circuit.of({"L0.attn.H0@1": 2.0, "L0.attn.H0@2": -3.0, "L1.attn.H0@1": 0.5}, level="heads at positions")
    assert found.whole().nodes == {"L0.attn.H0": -1.0, "L1.attn.H0": 0.5}
    assert found.whole("max").nodes == {"L0.attn.H0": -3.0, "L1.attn.H0": 0.5} and found.whole().level == "heads"
    assert found.top(1).whole().kept == {"L0.attn.H0"}
    with pytest.raises(ValueError, match="sum or max"):
        found.whole("mean")


def test_scores_that_are_none_and_scores_that_are_no_numbers(nodes):
    manual = Circuit.of(["L0.attn.H0"], level="heads", method="manual")
    assert not manual.scored and nodes.scored and len(manual) == 1
    with pytest.raises(ValueError, match="L0.attn.H0 has no score by manual"):
        manual.top(1)
    with pytest.raises(ValueError, match="score of L0.mlp by flow is nan"):
        Circuit.of({"L0.mlp": float("nan")}, level="mlps", method="flow")


@pytest.mark.parametrize("which", ["nodes", "edges"])
def test_comes_back_from_a_file(which, tmp_path, request):
    one = request.getfixturevalue(which).top(2)
    back = relprop.open(one.save(tmp_path / "a.json"))
    assert isinstance(back, Circuit) and back.to_dict() == one.to_dict() and back.kept == one.kept
    assert dict(back.scores) == dict(one.scores) and json.loads(one.to_json())["kind"] == "circuit"
    frame = one.frame()
    assert len(frame) == len(one.scores) and frame.kept.sum() == 2
    assert one.save(tmp_path / "a.csv").read_text().count("\n") == len(frame) + 1


def test_graphs(edges, tmp_path):
    from networkx import parse_graphml

    one = edges.top(3)
    found = parse_graphml(one.save(tmp_path / "a.graphml").read_text())
    assert set(found.nodes) == {"embed", "L0.attn.H0", "L0.attn.H1", "L1.attn.H0"} and found.number_of_edges() == 3
    assert {(u, v, known["input"], known["score"]) for u, v, known in found.edges(data=True)} == {
        ("embed", "L0.attn.H1", "v", 3.0), ("L0.attn.H1", "L1.attn.H0", "k", 2.0), ("embed", "L0.attn.H0", "q", -1.0)}
    dot = one.save(tmp_path / "a.dot").read_text()
    assert dot.startswith("digraph") and '"L0.attn.H1" -> "L1.attn.H0" [label="k 2"]' in dot and dot.count("->") == 3
    with pytest.raises(ValueError, match=r"\.json, \.graphml, \.dot, \.csv"):
        one.save(tmp_path / "a.png")


def test_what_is_no_circuit_is_told(tmp_path, nodes):
    data = nodes.to_dict()
    with pytest.raises(ValueError, match="damaged"):
        Circuit.from_dict({**data, "kept": [17]})
    with pytest.raises(ValueError, match="not a 'circuit'"):
        Circuit.from_dict({**data, "kind": "effects"})


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval()


def _task(**changed) -> Task:
    given = {"clean": torch.tensor([[1, 2, 3]]), "corrupted": torch.tensor([[1, 4, 3]]), "metric": 5} | changed
    return Task("words", **given)


def test_scores_of_a_method_with_their_provenance(model):
    modes = [one.training for one in model.modules()]
    found = circuit(model, _task(), "random", level="heads and mlps", seed=3)
    assert set(found.nodes) == {f"L{layer}.{part}" for layer in (0, 1) for part in ("attn.H0", "attn.H1", "mlp")}
    assert found.about["seed"] == 3 and found.about["task"]["name"] == "words" and found.method == "random"
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1, 5] for ids in ([1, 2, 3], [1, 4, 3])]
    assert [found.about[name] for name in ("clean", "corrupted")] == pytest.approx([float(one) for one in logits])
    assert dict(circuit(model, _task(), "random", level="heads and mlps", seed=3).nodes) == dict(found.nodes)
    assert dict(circuit(model, _task(), "random", level="heads and mlps", seed=4).nodes) != dict(found.nodes)
    assert [one.training for one in model.modules()] == modes


def test_edges_and_levels_of_a_methods_own(model):
    found = circuit(model, _task(), "random", level="edges")
    assert ("embed", "L0.attn.H0.q") in found and ("L1.mlp", "logits") in found and found.level == "edges"
    assert len(found) == 2 * 3 + 3 + 2 * 3 * 4 + 6 + 7  # q, k, v of each head of both layers, MLPs, logits
    assert circuit(model, _task(), "random").level == "heads" and circuit(model, _task(), "acdc").level == "edges"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_where_the_table_says(method):
    assert callable(METHODS[method].run()) and METHODS[method].levels and METHODS[method].ablations


@pytest.mark.parametrize("given, said", [
    ({"method": "magic"}, "no method 'magic' of circuits; there are .*random"),
    ({"level": "layers"}, "random has no level 'layers'; it has heads"),
    ({"ablation": "noise"}, "no ablation 'noise'; there are resample"),
    ({"options": {"steps": 5}}, "random has no option steps; it has none"),
    ({"task": _task(corrupted=torch.tensor([[1, 2, 3, 4]]))}, "row 0: the base has 3 tokens"),
    ({"task": _task(corrupted=torch.tensor([[1, 2, 3]]))}, "base and counterfactual are equal"),
    ({"task": _task(metric=relprop.mediation.LogOdds([1, 2], [3]))}, "answers are several tokens"),
    ({"level": ["L7.attn.H0"]}, "no layer 7"),
    ({"level": "heads at positions", "task": Task("words", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), 5,
                                                  groups=[1, 2])}, "2 groups for 1 rows"),
])  # fmt: skip
def test_what_cannot_be_asked_is_told(model, given, said):
    given = {"task": _task(), "method": "random", **given}
    with pytest.raises(ValueError, match=said):
        circuit(model, given.pop("task"), given.pop("method"), **given)


def test_a_metric_that_is_equal_on_both_is_told(model):
    constant = relprop.Function(lambda output: output.logits[:, 0, 5])  # the first token is the same
    with pytest.raises(Undefined, match="corrupt what the answer depends on"):
        circuit(model, _task(metric=constant), "random")


def test_a_level_that_the_model_does_not_have_is_told():
    class Attends(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(9, 8)
            self.layers = torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)])
            self.head = torch.nn.Linear(8, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.words(ids)
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return self.head(x[:, -1])

    torch.manual_seed(0)
    task = Task("ids", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), 5)
    model = Attends().eval()
    assert len(circuit(model, task, "random", level="heads")) == 4
    for level in ("mlps", "neurons"):
        with pytest.raises(ValueError, match=f"has no {level}"):
            circuit(model, task, "random", level=level)


def test_a_method_of_ones_own_plugs_in(model, monkeypatch):
    def flat(prepared, *, level, ablation, size: float = 1.0):
        return Circuit.of(dict.fromkeys(prepared.nodes(level), size), level=level, about={"forwards": 0})

    monkeypatch.setitem(METHODS, "flat", Method("chance:random", ablations=("zero",)))
    monkeypatch.setattr(Method, "run", lambda self: flat)
    found = circuit(model, _task(), "flat", ablation="zero", options={"size": 2.0})
    assert set(found.nodes.values()) == {2.0} and found.about["forwards"] == 0 and found.method == "flat"
    with pytest.raises(ValueError, match="there is zero"):
        circuit(model, _task(), "flat")


def test_weights_that_are_no_numbers_are_named():
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight[1, 3] = float("nan")
    clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    task = Task("words", clean, corrupted, metric=5)
    for asked in (lambda: circuit(model, task, "relp"), lambda: circuit(model, task, "exact"),
                  lambda: relprop.decompose(model, clean, "heads", target=5),
                  lambda: relprop.effects(model, clean, corrupted, 5)):
        with pytest.raises(ValueError, match="wte.weight of GPT2LMHeadModel has 1 NaN"):
            asked()
