"""One tiny model of every kind of architecture, in float64: books that balance to rounding, and nothing lost unnamed.

Built by the census, whose rules for configs and inputs are tested with it. `test_families` has the usual ones; here are
mixtures of experts, state spaces, recurrences, and attention that is not just a softmax of scores.
"""
from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relprop.census import auto
from relprop.census.architecture import value
from relprop.relevance import Propagation, propagate

F64 = torch.float64
KINDS = {
    "experts, softmax router": "text-generation/mixtral",
    "experts, shared and routed": "text-generation/qwen2_moe",
    "experts, groups of them, latent attention": "text-generation/deepseek_v3",
    "experts of an encoder and decoder": "text2text-generation/switch_transformers",
    "selective state space": "text-generation/mamba",
    "state space by segments": "text-generation/mamba2",
    "state space and attention side by side": "text-generation/falcon_h1",
    "state space, attention and experts": "text-generation/jamba",
    "shared attention among state spaces": "text-generation/zamba2",
    "gated linear recurrence": "text-generation/recurrent_gemma",
    "time mixing, a state written over": "text-generation/rwkv",
    "matrix memory": "text-generation/xlstm",
    "gated delta rule": "text-generation/qwen3_next",
    "linear attention": "text-generation/minimax",
    "short convolutions": "text-generation/lfm2",
    "sinks": "text-generation/gpt_oss",
    "soft caps": "text-generation/gemma2",
    "ALiBi": "text-generation/mpt",
    "differences of attention": "text-generation/diffllama",
    "rotary, part of a head": "text-generation/gptj",
    "relative embeddings, time first": "text-generation/xlnet",
    "relative biases, cross-attention": "text2text-generation/t5",
    "cross-attention, learned positions": "text2text-generation/bart",
    "windows and global tokens": "fill-mask/longformer",
    "blocks chosen at random": "fill-mask/big_bird",
    "buckets by hashes, reversible layers": "fill-mask/reformer",
    "landmarks and a pseudo-inverse": "fill-mask/nystromformer",
    "hashes in the place of a softmax": "fill-mask/yoso",
    "Fourier transforms": "fill-mask/fnet",
    "convolutions of spans": "fill-mask/convbert",
    "pooled between layers": "fill-mask/funnel",
    "latent queries": "fill-mask/perceiver"}
CONSTANTS = {"biases", "position embeddings", "token type embeddings", "other constants", "activations", "rounding",
             "mask token"}
LOSSES = {"attnlrp": {"softmax"}, "cp-lrp": set()}
"""As in `test_families`: what composites may lose to, the constants of any, and what each loses by its rules."""

QUICK = ("experts, softmax router", "selective state space", "gated delta rule", "sinks", "ALiBi",
         "relative embeddings, time first", "relative biases, cross-attention", "Fourier transforms")
"""Those that are always tested."""

kinds = pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS])
composites = pytest.mark.parametrize("composite", LOSSES)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@cache
def built(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in float64 with what it reads. Experts one by one: torch has no product of groups in float64."""
    start = f"transformers/{KINDS[kind]}/"
    architecture = next(one for one in auto.architectures() if one.key.startswith(start))
    model = architecture.model()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    inputs = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
              for name, t in architecture.inputs(model).items()}
    return model.double(), inputs


@cache
def explained(kind: str, composite: str) -> Propagation:
    model, inputs = built(kind)
    return propagate(model, (), inputs, value, composite)


@composites
@kinds
def test_books_balance(kind, composite):
    found = explained(kind, composite)
    assert found.ledger.error.max() <= 1e-9, f"\n{found.ledger}"
    assert found.value.abs().min() > 0 and all(r.abs().sum() > 0 for r in found.relevance.values())
    assert any(r.shape[:2] == built(kind)[1]["input_ids"].shape for r in found.relevance.values())


@composites
@kinds
def test_what_is_lost_is_lost_by_name(kind, composite):
    """Rounding too: it is no name for a rule that leaks in a part of less precision."""
    books = explained(kind, composite).ledger
    assert set(books.absorbed) <= CONSTANTS | LOSSES[composite]
    largest = torch.stack([e.abs() for e in (books.value, books.input, *books.absorbed.values())]).amax(0)
    assert (books.absorbed.get("rounding", torch.zeros(1)).abs() <= 1e-5 * largest).all(), f"\n{books}"


@kinds
def test_the_output_is_the_model_s_own(kind):
    model, inputs = built(kind)
    with torch.no_grad():
        plain = value(model(**inputs))
    assert (explained(kind, "attnlrp").value - plain).abs().max() <= 1e-6 * plain.abs().max()  # parts are in float32
