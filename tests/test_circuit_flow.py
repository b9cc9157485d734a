"""Information flow: equal to two original codes, and to the definition read aloud."""
from __future__ import annotations

import copy

import pytest
import torch
from peers import CASES, case
from test_circuit_graph import Attentions
from test_circuit_run import prepared

from relprop.circuit import Task, circuit
from relprop.circuit.flow import contributions, information_flow, nearness
from relprop.mediation import LogOdds
from relprop.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ALL = ["embed", "L*.attn.H*", "L*.mlp"]


def of_peers(folder, name):
    one = case(folder, name)
    good, bad = ([[int(label)] for label in column] for column in one.labels.T)
    task = Task(name, {"input_ids": one.clean}, {"input_ids": one.corrupted}, LogOdds(good, bad))
    return one, task.prepared(Subject.from_module(one.model))


@pytest.mark.parametrize("name", CASES)
def test_shares_are_those_of_the_original_code(shared, name):
    one, task = of_peers(shared / "reference", name)
    edges, (sources, ends) = information_flow(task).edges, one.names
    expected = one.out["ifr_eapig.edge_scores"].double()
    there = (one.out["real_edge_mask"] & ~expected.isnan()).nonzero().tolist()
    assert len(there) > 100
    found = torch.tensor([edges[sources[u], ends[v]] for u, v in there], dtype=torch.float64)
    assert (found - torch.stack([expected[u, v] for u, v in there])).abs().max() < 1e-6 * expected.nan_to_num().max()


@pytest.mark.parametrize("name", ["circuits_gpt2_a", "circuits_llama_a"])
def test_contributions_are_those_of_the_authors_tool(shared, name):
    """But for the 1e-6 that torch's pairwise_distance adds to each of 32 entries of a difference."""
    one, task = of_peers(shared / "reference", name)
    found = contributions(task.subject, {"input_ids": one.clean}, floor=1e-5)
    for key, ours in (("attn", found.heads), ("attn_resid", found.kept), ("mlp", found.mlp), ("mlp_resid", found.past)):
        assert (ours - one.out[f"ifr_ltt.{key}"]).abs().max() < 2e-5 * one.out[f"ifr_ltt.{key}"].max()


def test_shares_by_definition():
    """Of one destination, position by position, from the model's own modules; padding does not count."""
    task = prepared("gpt2")
    gpt2, kwargs = copy.deepcopy(task.model).transformer, task.clean.kwargs  # transformers marks it for good
    states = []
    with torch.no_grad():
        hook = gpt2.h[0].attn.c_proj.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        gpt2(**kwargs)
        hook.remove()
        x = gpt2.wte(kwargs["input_ids"])
        whole = gpt2(**kwargs, output_hidden_states=True).hidden_states
        W, (z,) = gpt2.h[0].attn.c_proj.weight, states
        middle = whole[0] + z @ W + gpt2.h[0].attn.c_proj.bias
        parts = {"embed": x, "L0.attn.H0": z[..., :8] @ W[:8], "L0.attn.H1": z[..., 8:] @ W[8:],
                 "L0.mlp": gpt2.h[0].mlp(gpt2.h[0].ln_2(middle))}
    norm = lambda t: t.abs().sum(-1)
    near = {name: (norm(whole[1]) - norm(whole[1] - part)).clamp_min(0) for name, part in parts.items()}
    real = kwargs["attention_mask"].double()
    edges = information_flow(task).edges
    for name in parts:
        share = near[name] / sum(near.values())
        expected = ((share * real).sum(1) / real.sum(1)).mean()
        assert edges[name, "L1.attn.H1.k"] == pytest.approx(float(expected), rel=1e-9) and expected > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "timm-vit"])
def test_shares_and_flows_are_whole(name):
    task = prepared(name)
    edges = information_flow(task).edges
    sums = {}
    for (_, end), share in edges.items():
        assert share >= 0
        sums[end] = sums.get(end, 0.0) + share
    # where nothing is near, as at a class token before the first layer, there is no share
    least = 1 if name in ("gpt2", "llama") else 0.9
    assert all(least - 1e-6 < total < 1 + 1e-6 for total in sums.values())
    nodes = information_flow(task, level=ALL).nodes
    assert least - 0.1 * (least < 1) - 1e-6 < nodes["embed"] < 1 + 1e-6  # all that flows comes from there
    assert nodes["L1.mlp"] == pytest.approx(edges["L1.mlp", "logits"])
    assert 0 < min(nodes.values()) and max(nodes.values()) == nodes["embed"]


def test_rows_run_apart_have_the_same_shares():
    task = prepared("gpt2")
    whole, apart = (information_flow(task, batch_size=size).edges for size in (None, 1))
    assert whole.keys() == apart.keys() and all(apart[edge] == pytest.approx(share) for edge, share in whole.items())


def test_attentions_alone_have_shares():
    clean, other = ({"input_ids": torch.tensor([ids])} for ids in ([1, 2, 3], [1, 4, 3]))
    found = circuit(Attentions().double(), Task("words", clean, other, lambda y: y[:, -1, 0]), "information-flow",
                    level="edges")
    assert len(found) == 9 + 9 * 4 + 7 and found.method == "information-flow"
    whole = contributions(Attentions().double(), clean)
    assert not whole.mlp.any() and (whole.past == 1).all()


def test_contributions_are_whole_and_causal():
    found = contributions(prepared("gpt2").subject, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
    assert found.heads.shape == (2, 1, 4, 4, 2)
    torch.testing.assert_close(found.heads.sum((3, 4)) + found.kept, torch.ones(2, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(found.mlp + found.past, torch.ones(2, 1, 4, dtype=torch.float64))
    assert not found.heads[:, :, 1, 2:].any() and found.heads[:, :, 2, :3].sum() > 0


def test_routes_lead_back_from_a_token():
    found = contributions(prepared("gpt2").subject, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
    every, few = (found.routes(0, threshold=threshold) for threshold in (1e-9, 0.1))
    assert set(few) < set(every) and all(share >= 0.1 for *_, share in few)
    assert any(end == "L1@3" for _, end, _ in few) and not any(end == "L1@2" for _, end, _ in every)
    shares = {}
    for start, end, share in every:
        if end == "L1.mid@3":
            shares[start] = share
    assert sum(shares.values()) < 1 + 1e-9 and "L0@3" in shares
    alone = found.routes(0, position=0, threshold=1e-9)  # the first token sees nothing but itself
    assert len(alone) > 4 and all(end.endswith("@0") for edge in alone for end in edge[:2])


def test_nearness():
    whole = torch.tensor([3.0, -1.0])
    assert nearness(whole, whole) == 4 and nearness(-whole, whole) == 0
    assert nearness(torch.tensor([1.0, 0.0]), whole) == 1


@pytest.mark.parametrize("name", ["bert", "gemma2", "hf-dinov2"])
def test_streams_that_are_no_sums_have_no_shares(name):
    with pytest.raises(ValueError, match="layer 0: the residual stream is not the sum"):
        information_flow(prepared(name))


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="whole heads and MLPs at all positions, not of L0.mlp.N0"):
        information_flow(prepared("gpt2"), level="neurons")
    with pytest.raises(ValueError, match="MLPs run beside the attention"):
        contributions(prepared("gpt-neox").subject, {"input_ids": torch.tensor([[5, 6]])})
    with pytest.raises(ValueError, match="information-flow has no level 'neurons'"):
        circuit(prepared("gpt2").subject, prepared("gpt2").task, "information-flow", level="neurons")
