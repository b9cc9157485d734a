"""Exact effects of nodes and edges: against runs with one thing changed, the original codes, and compiled programs."""
from __future__ import annotations

import json

import pytest
import torch
import transformers
from peers import CASES, case, place
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from test_circuit_run import asked, prepared
from torch import Tensor, nn

from relprop.circuit import METHODS, Task, circuit
from relprop.circuit.exact import edge_outcomes, exact
from relprop.circuit.run import Pieces, outcomes
from relprop.intervene import Zero, intervened
from relprop.mediation.outcome import Outcome, Question
from relprop.mediation.task import ready
from relprop.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "bert", "hf-vit"])
def test_each_edge_is_a_run_with_that_edge_cut(name):
    task = prepared(name)
    with ready(task.model):
        pieces = Pieces(task)
        found = edge_outcomes(pieces)
        pairs = list(pieces.wired.graph.pairs())
    some = range(0, len(pairs), 5)
    alone = outcomes(task, [[other for other in pairs if other != pairs[index]] for index in some])
    torch.testing.assert_close(found[list(some)], alone, rtol=0, atol=1e-12)
    assert len(found) == len(pairs) and float((found - task.measured[0]).abs().max()) > 1e-4


def test_scores_are_changes_of_the_metric():
    task = prepared("gpt2")
    clean, corrupted = (float(one.mean()) for one in task.measured)
    found = exact(task, level=["embed", "L*.attn.H*", "L*.mlp"], ablation="resample")
    assert found.scores["embed"] == pytest.approx(corrupted - clean)  # nothing else of the input comes in
    back = exact(task, level=["embed"], ablation="resample", direction="denoise")
    assert back.scores["embed"] == pytest.approx(corrupted - clean)
    edges = exact(task, level="edges", ablation="resample")
    assert edges.scores["L1.mlp", "logits"] == pytest.approx(found.scores["L1.mlp"])  # its only edge
    assert found.about["direction"] == "noise" and found.scored and len(edges) == 46


def test_denoising_an_edge_is_noising_it_backwards():
    task = prepared("gpt-neox")
    back = Task("back", task.corrupted, task.clean, task.task.metric).prepared(task.subject)
    found = exact(task, level="edges", ablation="resample", direction="denoise")
    turned = exact(back, level="edges", ablation="resample")
    for edge, score in found.scores.items():
        assert score == pytest.approx(-turned.scores[edge], abs=1e-12)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_of_nodes_and_edges_agree(ablation):
    task = prepared("gpt2")
    nodes = exact(task, level="mlps", ablation=ablation)
    edges = exact(task, level="edges", ablation=ablation)
    assert edges.scores["L1.mlp", "logits"] == pytest.approx(nodes.scores["L1.mlp"], abs=1e-12)
    assert nodes.scores["L1.mlp"] != pytest.approx(exact(task, level="mlps", ablation="resample").scores["L1.mlp"])


def test_by_name():
    task = prepared("gpt2")
    found = circuit(task.subject, task.task, "exact", level="heads and mlps")
    assert found.method == "exact" and len(found) == 6 and found.about["direction"] == "noise"
    assert {"exact", "acdc"} <= set(METHODS)
    with pytest.raises(ValueError, match="no direction 'up'; there are noise, denoise"):
        circuit(task.subject, task.task, "exact", options={"direction": "up"})
    with pytest.raises(ValueError, match="zero ablation has none of"):
        circuit(task.subject, task.task, "exact", ablation="zero", options={"direction": "denoise"})


# -- against the original codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_nodes_of_the_original_codes(shared, name):
    one = case(shared / "reference", name)
    task = asked(one)
    for direction, key, sign in (("noise", "node_scores", 1), ("denoise", "node_scores_denoise", -1)):
        found = exact(task, level=["embed", "L*.attn.H*", "L*.mlp"], ablation="resample", direction=direction)
        _close([found.scores[node] for node in one.names[0]], sign * one.out[f"exact.{key}"])


@pytest.mark.parametrize("name", CASES)
def test_edges_of_the_original_codes(shared, name):
    one = case(shared / "reference", name)
    real = one.out["real_edge_mask"]
    edges = [(one.names[0][u], one.names[1][v]) for u, v in real.nonzero().tolist()]
    found = exact(asked(one), level="edges", ablation="resample")
    _close([found.scores[edge] for edge in edges], one.out["exact.edge_scores"][real])
    zero = exact(asked(one), level="edges", ablation="zero").scores
    # there the embedding is zero with its positions, which are learned in GPT-2; here it is the words alone
    same = [index for index, (u, _) in enumerate(edges) if u != "embed" or "gpt2" not in name]
    assert len(same) >= len(edges) - 40
    _close([zero[edges[index]] for index in same], one.out["ac.exact_zero.edge_scores"][real][same])


@pytest.mark.parametrize("name", [CASES[1], *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[::2])])
def test_patches_of_transformer_lens(shared, name):
    """Heads' outputs, patterns, MLPs and streams; queries, keys and values as all the edges that lead there."""
    one = case(shared / "reference", name)
    task = asked(one)
    L, H = one.model.config.num_hidden_layers, one.model.config.num_attention_heads
    T = one.clean.shape[1]
    for direction, word, sign in (("noise", "noise", 1), ("denoise", "denoise", -1)):
        score = lambda level, direction=direction: exact(task, level=level, ablation="resample", direction=direction)
        heads = score(["L*.attn.H*", "L*.attn.H*.pattern"]).scores
        reference = sign * one.out[f"tl.head_all_pos_every_{word}"]
        _close([[heads[f"L{layer}.attn.H{h}"] for h in range(H)] for layer in range(L)], reference[0])
        _close([[heads[f"L{layer}.attn.H{h}.pattern"] for h in range(H)] for layer in range(L)], reference[4])
        streams = score([f"L{layer}.{part}@{t}" for part in ("in", "attn", "mlp") for layer in range(L)
                         for t in range(T)]).scores
        _close([[[streams[f"L{layer}.{part}@{t}"] for t in range(T)] for layer in range(L)]
                for part in ("in", "attn", "mlp")], sign * one.out[f"tl.block_every_{word}"])
    positions = exact(task, level="heads at positions", ablation="resample", direction="denoise").scores
    _close([[[positions[f"L{layer}.attn.H{h}@{t}"] for h in range(H)] for t in range(T)] for layer in range(L)],
           -one.out["tl.head_out_by_pos_denoise"])


@pytest.mark.parametrize("name", CASES)
def test_all_edges_into_an_input_are_its_value_of_the_other_run(shared, name):
    """Of heads that share a key the reference has each query head's own, and only the first of them."""
    one = case(shared / "reference", name)
    task, H = asked(one), one.model.config.num_attention_heads
    K = getattr(one.model.config, "num_key_value_heads", H)
    reference = one.out["tl.head_all_pos_every_noise"]
    with ready(one.model):
        pieces = Pieces(task)
        names, edges = pieces.wired.graph.names[1], pieces.wired.graph.edges.T
        for layer in range(one.model.config.num_hidden_layers):
            cut = torch.zeros(3, H, *edges.shape, dtype=torch.bool)
            for which, inner in enumerate("qkv"):
                for h in range(H):
                    at = names.index(f"L{layer}.attn.H{h}.{inner}")
                    cut[which, h, at] = edges[at]
            found = (pieces.run(cut.flatten(0, 1)).mean(1) - task.measured[0].mean()).view(3, H)
            _close(found[0], reference[1, layer])
            _close(found[1:, :K], reference[2:4, layer, :K])


def _close(found: object, reference: Tensor) -> None:
    found = torch.as_tensor(found, dtype=torch.float64)
    assert float(reference.abs().max()) > 0
    torch.testing.assert_close(found, reference.double(), rtol=0, atol=1e-5 * float(reference.abs().max()))


# -- compiled programs, whose circuit is known ------------------------------------------------------------------------


ROWS = 16


class Bidirectional(nn.Module):
    """A language model that sees both ways, as compiled programs do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        return self.model(tokens, attention_mask=self.model.lm_head.weight.new_zeros(B, 1, T, T)).logits


class Moves(Outcome):
    """sum over positions from 1 on and outputs of sign(y(clean) - y(corrupted)) y: linear in the output."""

    def __init__(self, signs: Tensor) -> None:
        self.signs = signs

    def pairs(self, subject, base, counterfactual):
        D = self.signs.shape[-1]
        answer = lambda y, rows: (self.signs[rows] * y[:, 1:, :D]).sum((1, 2))
        return [tuple(Question(batch, None, answer, None) for batch in (base, counterfactual))]

    def name(self, subject):
        return "moves"


def program(folder, name: str):
    about, tensors = json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**about["hf_config"]))
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    model.transformer.ln_f = nn.Identity()
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")}, strict=False)
    model = Bidirectional(model).double().eval()
    clean, corrupted = tensors["input.clean"][:ROWS], tensors["input.corrupt"][:ROWS]
    with torch.no_grad():
        y, other = model(clean), model(corrupted)
    D = about["output_dim"]
    torch.testing.assert_close(y[:, 1:, :D], tensors["out.clean_output"][:ROWS, 1:].double(), rtol=0, atol=1e-5)
    signs = (y - other)[:, 1:, :D].sign()
    task = Task(name, clean, corrupted, Moves(signs)).prepared(Subject.from_module(model))
    return about, tensors, task


@pytest.mark.parametrize("name", ["tracr_reverse", "tracr_frac_prevs"])
def test_true_nodes_and_edges_of_compiled_programs(shared, name):
    """ROC AUC 1 of all nodes and edges that do anything when they are resampled."""
    about, tensors, task = program(shared / "reference", name)
    sources, destinations = about["index"]["sources"], about["index"]["destinations"]
    nodes = exact(task, level=["embed", "L*.attn.H*", "L*.mlp"], ablation="resample").scores
    active = set(about["truth"]["nodes_resample_active"])
    assert 0 < len(active) < len(nodes)
    ours = {one: nodes[place(one)] for one in sources if one != "pos"}  # positions are no source here
    assert roc_auc_score([one in active for one in ours], [abs(score) for score in ours.values()]) == 1
    edges = exact(task, level="edges", ablation="resample").scores
    valid, true = tensors["truth.valid_edges"], tensors["truth.resample_active"]
    ends = [(u, v) for u, v in valid.nonzero().tolist() if sources[u] != "pos"]
    scores = [abs(edges[place(sources[u]), place(destinations[v])]) for u, v in ends]
    assert len(ends) == len(edges) and roc_auc_score([bool(true[u, v]) for u, v in ends], scores) == 1


def test_true_nodes_without_an_effect(shared):
    """Of list reversal the parts that find out the length do nothing when another list of that length is put in: the
    structural nodes a0.h0, m0, m1 and m2 have an effect of rounding alone, by resampling; by zero each has one.
    """
    about, tensors, task = program(shared / "reference", "tracr_reverse")
    resample = exact(task, level=["L*.attn.H*", "L*.mlp"], ablation="resample").scores
    zero = exact(task, level=["embed", "L*.attn.H*", "L*.mlp"], ablation="zero").scores
    idle = set(about["truth"]["nodes_structural"]) - set(about["truth"]["nodes_resample_active"]) - {"pos"}
    assert idle == {"a0.h0", "m0", "m1", "m2"}
    with ready(task.model):
        whole = outcomes(task, [[]], among=[place(one) for one in idle])  # nor all of them together
    scale = float((task.measured[0] - task.measured[1]).abs().max())
    assert float((whole[0] - task.measured[0]).abs().max()) < 1e-6 * scale
    assert all(abs(resample[place(one)]) < 1e-6 * scale for one in idle)
    # lists of these inputs are all of one length, which a0.h0 finds without its values: zero leaves all as it is
    with intervened(task.model, {"L0.attn.H0": Zero()}), torch.no_grad():
        y = task.subject.forward(task.clean)
    with torch.no_grad():
        assert torch.equal(y[:, 1:], task.subject.forward(task.clean)[:, 1:])
    true = {place(one) for one in about["truth"]["nodes_zero_active"] if one not in ("pos", "a0.h0")}
    assert len(true) == 5
    assert roc_auc_score([node in true for node in zero], [abs(score) for score in zero.values()]) == 1


def test_the_previous_token_head_is_read_by_the_keys_of_the_induction_heads(shared):
    """A trained model whose circuit is known (tl-induction): K-composition, and neither queries nor values, nor the
    idle head.
    """
    from test_mechanisms import FIRST, IDLE, INDUCTION, induction, repeated

    clean, other, asked = repeated(shared)
    rows = 8
    task = Task("induction", {name: value[:rows] for name, value in clean.items()},
                {name: value[:rows] for name, value in other.items()}, asked[:rows])
    found = circuit(induction(shared)[0], task, "exact", level="edges")
    from_it = {v: score for (u, v), score in found.scores.items() if u == FIRST}
    assert set(sorted(from_it, key=lambda v: abs(from_it[v]), reverse=True)[:3]) == {f"{head}.k" for head in INDUCTION}
    largest = min(abs(from_it[f"{head}.k"]) for head in INDUCTION)
    assert largest > 0.1 * abs(found.total) and all(from_it[f"{head}.k"] < 0 for head in INDUCTION)
    assert all(abs(from_it[f"{IDLE}.{inner}"]) < 0.05 * largest for inner in "qkv")
    assert all(abs(from_it[f"{head}.{inner}"]) < 0.25 * largest for head in INDUCTION for inner in "qv")
    into_logits = {u: abs(score) for (u, v), score in found.scores.items() if v == "logits"}
    assert set(sorted(into_logits, key=into_logits.get, reverse=True)[:3]) == set(INDUCTION)
