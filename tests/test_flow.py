"""Attention flow against the least cut by brute force and another library, and the laws of flows."""
from __future__ import annotations

import itertools
import sys

import pytest
import torch
from tiny import CLS, SEP, bert, gpt2, images, targets, text, vit
from torch import Tensor

from relprop import attention, explain
from relprop.subject import Subject
from relprop.trace import attention_patterns

flow = sys.modules["relprop.attention.flow"]


def patterns(layers: int, batch: int, heads: int, length: int, sharp: float = 1.0) -> list[Tensor]:
    return [(sharp * torch.randn(batch, heads, length, length, dtype=torch.float64)).softmax(-1)
            for _ in range(layers)]


def capacities(given: list[Tensor], row: int = 0) -> list[list[list[float]]]:
    """Half the mean over heads and half the skip connection, by layer."""
    eye = torch.eye(given[0].shape[-1], dtype=torch.float64)
    return [((pattern[row].mean(0) + eye) / 2).tolist() for pattern in given]


def least_cut(given: list[Tensor], read: list[float], sink: int) -> float:
    """The least capacity that parts the source from the sink, over all ways to part the nodes."""
    mixed = capacities(given)
    length, layers = len(read), len(given)
    edges = {((layer + 1, t), (layer, s)): mixed[layer][t][s]
             for layer, t, s in itertools.product(range(layers), range(length), range(length))}
    edges |= {("source", (layers, t)): weight for t, weight in enumerate(read)}
    between = [node for node in itertools.product(range(layers + 1), range(length)) if node != (0, sink)]
    return min(sum(c for (u, v), c in edges.items() if u in above and v not in above)
               for size in range(len(between) + 1)
               for above in ({"source", *chosen} for chosen in itertools.combinations(between, size)))


@pytest.mark.parametrize("read", [[1.0, 0.0, 0.0], [0.5, 0.2, 0.3], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("sharp", [1.0, 5.0])
def test_the_maximum_flow_is_the_least_cut(seed, read, sharp):
    given = patterns(2, 1, 2, 3, sharp)
    found = attention.maximum_flow(given, torch.tensor([read], dtype=torch.float64))
    expected = [least_cut(given, read, sink) for sink in range(3)]
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-7, atol=0)
    assert 0 < found.min() < 1


def test_it_equals_another_library(seed):
    networkx = pytest.importorskip("networkx")
    given, length = patterns(4, 1, 2, 6, 4.0), 6
    graph = networkx.DiGraph()
    for layer, mixed in enumerate(capacities(given)):
        for t, s in itertools.product(range(length), repeat=2):
            graph.add_edge((layer + 1, t), (layer, s), capacity=mixed[t][s])
    found = attention.maximum_flow(given, torch.eye(length)[2:3])[0]
    expected = [networkx.maximum_flow_value(graph, (4, 2), (0, s)) for s in range(length)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
    assert found.unique().numel() > 3


def test_flows_are_conserved_within_the_capacities(seed):
    given = patterns(3, 1, 2, 4, 3.0)
    mixed = torch.tensor(capacities(given), dtype=torch.float64)
    graph = flow._graph(mixed, torch.eye(4)[1])
    assert graph.nnz == 3 * 16 + 1 and graph.shape == (17, 17)
    for sink in range(4):
        result = flow._flow(graph, sink)
        moved = result.flow.toarray()
        assert (moved <= graph.toarray()).all() and (moved == -moved.T).all()
        leaving = moved.sum(1)
        assert leaving[16] == -leaving[sink] == result.flow_value > 0
        assert (leaving[[node for node in range(16) if node != sink]] == 0).all()


def test_it_is_no_less_than_the_rollout_and_no_more_than_all(seed):
    given = patterns(3, 2, 2, 5, 3.0)
    for t in range(5):
        read = torch.eye(5, dtype=torch.float64)[[t, t]]
        found, paths = attention.maximum_flow(given, read), attention.rollout(given)[:, t]
        assert (found >= paths - 1e-8).all() and (found <= 1).all() and not torch.allclose(found, paths)


def test_more_attention_is_no_less_flow(seed):
    """What moves attention to a token, from tokens that lead elsewhere, does not lower its flow."""
    given, read = patterns(2, 1, 1, 4, 2.0), torch.eye(4)[:1]
    before = attention.maximum_flow(given, read)[0]
    given[0][..., 2] += 0.5 * given[0][..., 3]  # the lowest layer, where column 3 leads to token 3 alone
    given[0][..., 3] *= 0.5
    after = attention.maximum_flow(given, read)[0]
    assert after[2] >= before[2] - 1e-8 and after[3] <= before[3] + 1e-8 and not torch.equal(before, after)


def test_simple_graphs_by_hand():
    eye, even = torch.eye(3)[None, None], torch.full((1, 1, 3, 3), 1 / 3)
    read = torch.tensor([[0.0, 1.0, 0.0]])
    assert attention.maximum_flow([eye, eye], read).tolist() == [[0, 1, 0]]  # nothing is passed on
    one = attention.maximum_flow([even], read)[0]
    torch.testing.assert_close(one, torch.tensor([1 / 6, 2 / 3, 1 / 6]).double(), rtol=1e-6, atol=0)
    assert torch.equal(attention.maximum_flow([even, even], read, start_layer=1)[0], one)
    two = attention.maximum_flow([even, even], read)[0]  # by way of each position, 1/6 or 2/3 up and down
    torch.testing.assert_close(two, torch.tensor([1 / 2, 1.0, 1 / 2]).double(), rtol=1e-6, atol=0)


def test_fusion_is_that_of_rollout(seed):
    given, read = patterns(2, 1, 3, 4), torch.eye(4)[:1]
    by_max = [one / one.sum(-1, keepdim=True) for one in [p.amax(1, keepdim=True) + torch.eye(4) for p in given]]
    by_max = [2 * one - torch.eye(4) for one in by_max]  # so that half of it and half the skip connection are that
    torch.testing.assert_close(attention.maximum_flow(given, read, head_fusion="max"),
                               attention.maximum_flow(by_max, read), rtol=1e-7, atol=0)


# Maps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, batch, at", [
    (bert, text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP]), [0, 0]), (gpt2, text([5, 6, 7, 8], [9, 10]), [3, 1])])
def test_a_map_is_the_share_of_each_flow(seed, model, batch, at):
    network = model()
    labels = 3 if model is bert else None
    map = attention.attention_flow(Subject(network), batch, targets(None, batch, labels=labels)).map
    _, given = attention_patterns(network, batch.args, batch.kwargs)
    for row, ids in enumerate(batch.kwargs["attention_mask"].sum(1).tolist()):
        own = [p[row:row + 1, :, :ids, :ids].detach() for p in given]
        expected = attention.maximum_flow(own, torch.eye(ids)[at[row]][None])[0]
        torch.testing.assert_close(map[row, :ids], (expected / expected.sum()).float())
        assert (map[row, ids:] == 0).all() and (expected > 0).all()


def test_an_average_of_patches_is_read_from_a_source_above_them(seed):
    network, batch = vit(global_pool="avg", class_token=False), images(torch.randn(1, 3, 24, 24).double(), 6)
    map = attention.attention_flow(Subject(network), batch, targets(1, batch)).map[0]
    _, given = attention_patterns(network, batch.args, batch.kwargs)
    expected = attention.maximum_flow([p.detach() for p in given], torch.full((1, 16), 1 / 16))[0]
    torch.testing.assert_close(map[::6, ::6].flatten() * 36, (expected / expected.sum()).float())


def test_what_takes_too_long_is_an_error_with_the_estimate():
    given, read = [torch.full((1, 1, 60, 60), 1 / 60)] * 3, torch.eye(60)[:1]
    with pytest.raises(ValueError, match=r"about 0.0648 seconds \(60 maximum flows over up to 10800 edges\)"):
        attention.maximum_flow(given, read, max_seconds=0.05)
    assert attention.maximum_flow(given, read, max_seconds=None).min() > 0
    with pytest.raises(ValueError, match="rollout, which is instant, or allow it with max_seconds=None"):
        explain(bert(), torch.tensor([[CLS, 5, 6, SEP]]), 1, method="attention-flow", options={"max_seconds": 0})


def test_progress_is_shown_and_it_can_be_stopped(seed, capsys, monkeypatch):
    given, read = patterns(2, 1, 2, 4), torch.eye(4)[:1]
    attention.maximum_flow(given, read, show_progress=True)
    assert "attention-flow" in capsys.readouterr().err
    attention.maximum_flow(given, read)
    assert capsys.readouterr().err == ""

    def stopped(graph: object, sink: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "_flow", stopped)
    with pytest.raises(KeyboardInterrupt):
        attention.maximum_flow(given, read)


def test_unknown_options_are_errors(seed):
    given, read = patterns(2, 1, 2, 4), torch.eye(4)[:1]
    with pytest.raises(ValueError, match="no head fusion 'median'"):
        attention.maximum_flow(given, read, head_fusion="median")
    with pytest.raises(ValueError, match="start_layer 2 is not one of the 2 layers"):
        attention.maximum_flow(given, read, start_layer=2)
    with pytest.raises(ValueError, match="no attention was found"):
        attention.maximum_flow([], read)
