"""The graph of a model: what adds to the residual stream, what reads it, and in which order."""
from __future__ import annotations

import pytest
import torch
from families import FAMILIES, model
from peers import CASES, case
from test_address import MORE, PARALLEL
from torch import nn
from written import state

from relprop.circuit.graph import graph
from relprop.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def found(name):
    family = FAMILIES.get(name) or MORE[name]
    args, kwargs = family.inputs()
    whole = model(name) if name in FAMILIES else family.model()
    return whole, graph(whole, kwargs or args[0])


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_that_of_the_original_codes(shared, name):
    one = case(shared / "reference", name)
    made = graph(one.model, {"input_ids": one.clean})
    sources, destinations = one.names
    assert (list(made.names[0]), list(made.names[1])) == (sources, destinations)
    assert torch.equal(made.edges, one.out["real_edge_mask"]) and len(made) == one.about["index"]["n_edges"]


def test_gpt2_small_has_its_edges():
    import transformers

    config = transformers.GPT2Config(n_layer=12, n_head=12, n_embd=12, vocab_size=9, n_positions=4)
    made = graph(transformers.GPT2LMHeadModel(config), {"input_ids": torch.tensor([[1, 2]])})
    assert (len(made.sources), len(made.destinations), len(made)) == (157, 445, 32491)
    assert made.destinations[made.layer(3)][0].layer == made.destinations[made.layer(3)][-1].layer == 3
    assert made.layer(3).stop - made.layer(3).start == 37


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox-sequential", "timm-vit", *sorted(PARALLEL)])
def test_heads_feed_the_mlp_of_their_layer_if_it_reads_them(name):
    whole, made = found(name)
    edges = set(made.pairs())
    assert {("L0.attn.H1", "L0.mlp") in edges, ("L1.attn.H0", "L1.mlp") in edges} == {name not in PARALLEL}
    assert ("L0.attn.H1", "L1.attn.H0.q") in edges and ("L1.mlp", "logits") in edges and ("embed", "L0.mlp") in edges
    assert ("L1.attn.H0", "L1.attn.H1.q") not in edges and ("L1.mlp", "L1.mlp") not in edges


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-bigcode", "mixtral"])
def test_heads_of_one_key_have_keys_of_their_own(name):
    whole, made = found(name)
    assert [str(one) for one in made.destinations if one.inner == "k" and one.layer == 1] == [
        f"L1.attn.H{head}.k" for head in range(whole.config.num_attention_heads)]


class Attentions(nn.Module):
    """A stack of attentions without MLPs."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attend = nn.LayerNorm(6), nn.MultiheadAttention(6, 3, batch_first=True)

        def forward(self, x):
            y = self.norm(x)
            return x + self.attend(y, y, y, need_weights=False)[0]

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(7, 6), nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_attentions_alone_are_a_graph_without_mlps():
    made = graph(Attentions(), {"input_ids": torch.tensor([[1, 2, 3]])})
    assert [str(one) for one in made.sources] == ["embed", *(f"L{n}.attn.H{h}" for n in range(2) for h in range(3))]
    assert len(made) == 9 + 9 * 4 + 7


def test_scores_are_named():
    made = graph(Attentions(), {"input_ids": torch.tensor([[1, 2, 3]])})
    scores = torch.arange(float(made.edges.numel())).view(made.edges.shape)
    named = made.named(scores)
    assert len(named) == len(made) and named["L1.attn.H2", "logits"] == float(scores[6, -1])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_two_streams_have_no_graph(name):
    family = MORE[name]
    kwargs = family.inputs()[1]
    with pytest.raises(ValueError, match="an encoder's and a decoder's; take a level of nodes"):
        graph(family.model(), {**kwargs, "decoder_input_ids": kwargs["input_ids"]})


def test_the_model_is_given_back():
    whole = model("gpt-neox").train()
    before = state(whole)
    graph(Subject.from_module(whole), FAMILIES["gpt-neox"].inputs()[1])
    assert state(whole) == before
