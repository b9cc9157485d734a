"""Products of groups of rows, as mixtures of experts make them, against a linear layer for each group."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relprop
from relprop import composite
from relprop.relevance import propagate

ENDS = (2, 2, 7)  # the second of three experts has no row


class Experts(nn.Module):
    """Rows (N, K) in groups, each with a matrix of its own; `fused` in one product."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        weights = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))
        self.reads, self.weight = nn.Parameter(weights[0, :4]), nn.Parameter(weights[1:])
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        flat = F.linear(x, self.reads).flatten(0, 1)
        if self.fused:
            y = F.grouped_mm(flat, self.weight.mT, offs=torch.tensor(ENDS, dtype=torch.int32))
        else:
            starts = (0, *ENDS)
            y = torch.cat([F.linear(flat[a:b], W) for a, b, W in zip(starts, ENDS, self.weight)])
        return F.gelu(y).unflatten(0, (1, -1)).sum(1)


def inputs() -> Tensor:
    return torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", composite.NAMES)
def test_a_group_is_a_linear_layer(name):
    """float32, since the kernel takes no float64."""
    found, expected = (propagate(Experts(fused=fused), (inputs(),), {}, lambda y: y[:, 1], name)
                       for fused in (True, False))
    assert (expected.relevance["0"] != 0).float().mean() > 0.9
    torch.testing.assert_close(found.relevance["0"], expected.relevance["0"], rtol=1e-4, atol=1e-6)
    assert found.ledger.error.max() < 1e-5
    assert found.ledger.absorbed.keys() == expected.ledger.absorbed.keys()


@pytest.mark.parametrize("name", ["attnlrp", "gamma", "deep-taylor"])
def test_a_mixture_of_experts_is_explained_as_expert_by_expert(name):
    found, expected = (propagate(mixtral(way), (), {"input_ids": tokens()}, lambda out: out.logits[:, -1, 7], name)
                       for way in ("grouped_mm", "eager"))
    torch.testing.assert_close(found.relevance["input_ids"], expected.relevance["input_ids"], rtol=1e-3, atol=1e-6)
    assert found.ledger.error.max() < 1e-4 and expected.relevance["input_ids"].abs().max() > 0


def test_a_mixture_of_experts_is_decomposed_as_expert_by_expert():
    found, expected = (relprop.decompose(mixtral(way), {"input_ids": tokens()}, source="L0.attn.H1",
                                         target=lambda out: out.logits[:, -1, 7]) for way in ("grouped_mm", "eager"))
    torch.testing.assert_close(found.rel, expected.rel, rtol=1e-4, atol=1e-6)
    assert expected.rel.abs().min() > 0


def tokens() -> Tensor:
    return torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(2))


def mixtral(way: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, initializer_range=0.3, experts_implementation=way)).eval()
