"""Edges at positions: sums of those of all positions, and heads evaluated again by hand."""
from __future__ import annotations

import pytest
import torch
from test_circuit_run import prepared

from relprop.circuit import Task, circuit
from relprop.circuit.gradient import eap
from relprop.circuit.plan import plan
from relprop.circuit.position import _factor, crossed, peap
from relprop.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def alike(name, length=6, **task):
    """A task whose rows are of one length."""
    ids = torch.randint(3, 40, (3, length), generator=torch.Generator().manual_seed(4))
    clean, other = ({"input_ids": one} for one in (ids, (ids + 7) % 37 + 3))
    return Task("words", clean, other, 7, **task).prepared(prepared(name).subject)


def bounded():
    """A task of a model whose scores go through a tanh."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, attn_logit_softcapping=0.01, attn_implementation="eager", pad_token_id=0)
    whole = transformers.Gemma2ForCausalLM(config).double()
    whole.model.layers[0].self_attn.q_proj.weight.data *= 100
    subject = Subject.from_module(whole)
    return alike("gpt2").task.prepared(subject)


def parted(edges):
    """Edges of the stream by (source, end) without positions, and those inside heads."""
    streams, inside = {}, {}
    for (u, v), score in edges.items():
        (a, _, at), (b, _, there) = u.partition("@"), v.partition("@")
        if a.rpartition(".")[0] == b:
            inside[u, v] = score
        else:
            assert at == there
            streams[a, b] = streams.get((a, b), 0.0) + score
    return streams, inside


@pytest.mark.parametrize("name", ["gpt2", "llama-eager", "gpt-neox", "bloom"])
def test_positions_add_up_to_the_edge(name):
    task = alike(name)
    streams, inside = parted(peap(task).edges)
    edges = eap(task).edges
    assert streams.keys() == edges.keys()
    scale = max(map(abs, edges.values()))
    assert scale > 0 and all(abs(streams[edge] - score) < 1e-5 * scale for edge, score in edges.items())
    heads = 2 * task.model.config.num_attention_heads
    assert len(inside) == heads * (6 + 2 * 21)  # each query, and each key and value that it sees


def test_patches_have_positions_behind_the_class_token():
    task = prepared("timm-vit")
    spans = {"cls": [0], "patches": list(range(1, 17))}
    task = Task("pictures", task.task.clean, task.task.corrupted, task.task.metric, spans=spans).prepared(task.subject)
    streams, inside = parted(peap(task).edges)
    edges = eap(task).edges
    scale = max(map(abs, edges.values()))
    assert all(abs(streams[edge] - score) < 1e-9 * scale for edge, score in edges.items())
    found = peap(task).edges
    assert found["embed@cls", "L0.mlp@cls"] == 0 != found["embed@patches", "L0.mlp@patches"]
    assert ("L0.attn.H0.k@patches", "L0.attn.H0@cls") in inside


@pytest.mark.parametrize("masked", [False, True])
def test_heads_are_evaluated_again(masked):
    """The closed form against attention with one key, value or query of the other run, and a bias on its scores."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    R, H, T, S, K, factor = 2, 3, 4, 4, 5, 0.7
    now, then = ({"q": draw(R, H, T, K) * 2, "k": draw(R, H, S, K) * 2, "v": draw(R, H, S, K)} for _ in range(2))
    g, bias = draw(R, H, T, K), draw(H, T, S)
    if masked:
        bias = bias.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1), -torch.inf)

    def attend(q, k, v):
        return (q @ k.mT * factor + bias).softmax(-1) @ v

    pattern = (now["q"] @ now["k"].mT * factor + bias).softmax(-1)
    z, found = attend(**now), crossed(pattern, now, then, g, factor)
    changed = 0
    for name in ("k", "v"):
        for j in range(S):
            other = {**now, name: now[name].clone()}
            other[name][:, :, j] = then[name][:, :, j]
            expected = ((attend(**other) - z) * g).sum(-1)  # (R, H, T)
            torch.testing.assert_close(found[name][..., j], expected)
            changed += int((expected.abs() > 1e-3).sum())
    torch.testing.assert_close(found["q"], ((attend(then["q"], now["k"], now["v"]) - z) * g).sum(-1))
    assert changed > R * H * T


def test_scores_that_overflow_are_told():
    one = lambda value: torch.full((1, 1, 2, 1), value, dtype=torch.float32)
    pattern = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]])
    now = {"q": one(1.0), "k": one(0.0), "v": torch.tensor([[[[1.0], [3.0]]]])}
    for far, z in ((500.0, 1.0), (-500.0, 3.0)):
        found = crossed(pattern, now, {**now, "k": one(far)}, one(1.0), 1.0)
        assert found["k"][0, 0, 0, 0] == pytest.approx(z - 2.0)  # all, or nothing, to the first key


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-eager", "bert-eager"])
def test_what_scores_are_multiplied_by_is_seen(name):
    task = prepared(name)
    made = plan(task)
    found = made.record(task, patterns=True)
    assert [_factor(found, made, block, layer) for layer, block in enumerate(made.wired.blocks)] == pytest.approx(
        [8 ** -0.5] * 2, rel=1e-4)


def test_spans_are_joined_as_is_asked():
    numbers = peap(alike("gpt2")).edges
    spans = {"a": [0, 1], "b": [[2], [3], [2]]}
    found = {how: peap(alike("gpt2", spans=spans), spans=how).edges for how in ("sum", "mean", "max-abs")}
    edge = ("L0.mlp@a", "L1.attn.H1.v@a")
    total = sum(numbers[f"L0.mlp@{t}", f"L1.attn.H1.v@{t}"] for t in (0, 1))
    assert total
    assert found["sum"][edge] == pytest.approx(total) and found["mean"][edge] == pytest.approx(total / 2)
    inside = ("L0.attn.H1.k@a", "L0.attn.H1@b")  # of the last layer nothing but the last position counts
    assert found["mean"][inside] == pytest.approx(found["sum"][inside] / 2) != 0
    assert abs(found["max-abs"][edge]) <= sum(abs(numbers[f"L0.mlp@{t}", f"L1.attn.H1.v@{t}"]) for t in (0, 1)) * 3
    assert {end.partition("@")[2] for pair in found["sum"] for end in pair} == {"a", "b"}


def test_rows_run_apart_have_the_same_mean():
    whole, apart = (peap(alike("gpt2"), batch_size=size).edges for size in (None, 2))
    assert whole.keys() == apart.keys() and all(apart[edge] == pytest.approx(score) for edge, score in whole.items())


def test_edges_at_positions_are_called_by_name():
    task = alike("gpt2")
    found = circuit(task.subject, task.task, "peap", level="edges", options={"crossing": False})
    assert found.method == "peap" and not parted(found.edges)[1] and found.about["clean"] != found.about["corrupted"]
    assert ("embed@2", "logits@2") in found.edges


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="become one by sum, mean, max-abs, not 'median'"):
        peap(alike("gpt2"), spans="median")
    with pytest.raises(ValueError, match="scores are not queries times keys times a number.*crossing=False"):
        peap(bounded())
    assert peap(bounded(), crossing=False).edges
    with pytest.raises(ValueError, match="have 4 to 7 tokens"):
        peap(prepared("gpt2"))
