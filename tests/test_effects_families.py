"""Effects on every family: every kind of place carries some, the books of total, direct and indirect effects are kept,
and what carries all carries all.
"""
from __future__ import annotations

from functools import cache

import pytest
import torch
from families import FAMILIES
from test_address import EXPERTS, MORE, PARALLEL
from test_address import found as examined
from test_effects import CLOSE, answered, two
from torch.testing import assert_close

import relprop
from relprop import mediation
from relprop.intervene import Resample, intervened
from relprop.mediation import LogOdds
from relprop.mediation.outcome import outcome
from relprop.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EVERY = [*FAMILIES, *MORE]
EXACT = 1e-9
"""Of the total effect: how far that of what carries every path, and of none, may be from it, and from zero. What is
above the mediator is computed in other batches, and transformers computes norms in float32 inside."""


@cache
def built(name):
    model = (FAMILIES.get(name) or MORE[name]).model().double()
    if getattr(getattr(model, "config", None), "_experts_implementation", None) == "grouped_mm":
        model.config._experts_implementation = "eager"  # the grouped products know no float64
    return model


def asked(name):
    """The subject, a base, a counterfactual, and an outcome that goes with it."""
    family = FAMILIES.get(name) or MORE[name]
    base, other = two(name if name in FAMILIES else "gpt2" if family.modality == "text" else "timm-vit")
    if name in ("t5", "bart"):  # begun alike
        base, other = ({**side, "decoder_input_ids": base["input_ids"][:, :5].clamp_min(1)} for side in (base, other))
    subject = Subject.from_module(built(name), task="feature-extraction" if name.startswith("t5-") else None)
    ask = LogOdds(5, 6) if subject.task == "text-generation" else relprop.Function(family.value)
    return subject, base, other, ask


def places(name):
    """One of each kind of place, of the first layer and of a decoder's."""
    layers = examined(name)[-1].layers
    first = ["embed", "L0.in", "L0.attn", "L0.attn.H1", "L0.attn.H0.pattern", "L0"]
    first += ["L0.mlp"] if name in EXPERTS else ["L0.mlp", "L0.mlp.N1"]
    first += [] if name in PARALLEL else ["L0.mid"]
    number = next((number for number, layer in enumerate(layers) if layer.cross), None)
    cross = [] if number is None else [f"L{number}.{part}" for part in ("cross", "cross.H1", "cross.H0.pattern")]
    return first + cross + {"image": ["L0.attn@cls", "L0.mlp@p5"]}.get(
        "image" if "vit" in name or "deit" in name or "dinov2" in name else "", [])


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_place_carries_effects(name):
    subject, base, other, ask = asked(name)
    last = f"L{len(examined(name)[-1].layers) - 1}"
    at = {place: place for place in places(name)} | {"last": last, "heads": "L*.attn.H*"}
    found = mediation.effects(subject, base, other, ask, at=at, kind=["total", "direct", "indirect"], resamples=9)
    size = found.total.abs().amax()
    assert size > 1e-6 and "interaction" in found.kinds
    assert_close(found.direct + found.indirect + found.interaction, found.total.expand_as(found.direct))
    reach = found.indirect.abs().amax(1) / size
    assert reach.min() > 1e-9, dict(zip(found.mediators, reach.tolist()))
    where = found.mediators.index("last")
    if name != "timm-cait":  # whose last layers change the class token alone
        assert (found.indirect[where] - found.total).abs().amax() <= EXACT * size
        assert found.direct[where].abs().amax() <= EXACT * size
    one = found.mediators[-3]  # and one of them is what a plain run says, of the counterfactual too
    index = found.mediators.index(one)
    for which, outcomes in ((0, found.indirect_outcome), (1, found.direct_outcome)):
        answers = []
        for pair in outcome(ask).pairs(subject, subject.prepare(base), subject.prepare(other)):
            mine, theirs = pair[which], pair[1 - which]
            with torch.no_grad(), intervened(subject.model, {one: Resample(theirs.batch)}):
                answers.append(answered(mine, subject.forward(mine.batch)))
        assert_close(outcomes[index], outcome(ask).value(answers), **CLOSE)


def test_experts_that_see_some_tokens_have_no_neurons():
    """Their rows are not those of the batch: what was put there would be of another text."""
    subject, base, other, ask = asked("mixtral")
    for place in ("L1.mlp.N1", "L*.mlp.N*"):
        with pytest.raises(ValueError, match="no neurons that every token passes"):
            mediation.effects(subject, base, other, ask, at=place)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "bloom", "opt", "falcon"])
def test_what_no_path_leaves_carries_nothing(name):
    """Of a causal model that is read at one position, the last layer at the others, and all behind that one."""
    subject, base, other, _ = asked(name)
    last = len(examined(name)[-1].layers) - 1
    at = [f"L{last}.mlp@1", f"L{last}@0", f"L{last}.attn.H0@2", "L0@3", "L0.attn.H1@3"]
    found = mediation.effects(subject, base, other, relprop.Token(5, position=2), at=at[:2], kind=["total", "indirect"],
                              resamples=9)
    later = mediation.effects(subject, base, other, relprop.Token(5, position=2), at=at[3:], kind="indirect",
                              resamples=9)
    size = found.total.abs().amax()
    assert size > 1e-6
    assert found.indirect.abs().amax() <= EXACT * size and later.indirect.abs().amax() <= EXACT * size
    read = mediation.effects(subject, base, other, relprop.Token(5, position=2), at=at[2], resamples=9)
    assert read.indirect.abs().amax() > 1e-6 * size  # while the position that is read carries some


def test_the_families_are_those_that_are_promised():
    promised = ("bert roberta distilbert electra gpt2 gpt-neox opt bloom llama mistral qwen2 qwen3 gemma2 gemma3 phi3 "
                "modernbert deberta-v2 t5 bart mixtral hf-vit hf-deit hf-dinov2 timm-vit timm-deit timm-beit timm-cait "
                "timm-eva02 timm-swin")
    assert set(promised.split()) <= set(EVERY)
