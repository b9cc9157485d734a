"""Bad input of effects: a message says what was given, what was expected and what to do."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from families import FAMILIES
from test_effects import model, subject, two
from test_pairs import reader
from torch import nn

import relprop
from relprop import mediation
from relprop.data.pair import Pair, Pairs
from relprop.errors import Undefined
from relprop.intervene import Given, Resample, intervened
from relprop.mediation import KL, Difference, LogOdds, Ratio, path_effects, subset, subsets

effects = partial(mediation.effects, resamples=9)
TEXTS = "The nurse said that", "The cook said that"
ASK = LogOdds(5, 6)
SWEEPS = {"effects": effects, "paths": lambda *args, at, **options: path_effects(*args, sender=at, receiver="L1"),
          "subset": subset, "subsets": subsets}
each_sweep = pytest.mark.parametrize("kind", SWEEPS)


@pytest.mark.parametrize("ask", [" footballer", relprop.Token(" footballer"), relprop.Contrast(" footballer", " he"),
                                 relprop.Probability(relprop.Token(" footballer"))],
                         ids=lambda one: type(one).__name__)
def test_several_tokens_where_one_is_needed(ask):
    with pytest.raises(ValueError) as said:
        effects(reader(), *TEXTS, ask, at="L0.mlp")
    pieces = ["Ġ", *"footballer"]
    assert str(said.value) == (f"' footballer' is 11 tokens, {pieces}, where one is needed; give one of them, or its "
                               "id, or Answer(' footballer') for all of them")


def test_a_continuation_outside_of_the_vocabulary():
    """It would be the probability of any unknown word."""
    with pytest.raises(ValueError) as said:
        effects("tasks-gpt2", *TEXTS, LogOdds(" astronaut", " he"), at="L0.mlp")
    assert str(said.value) == ("' astronaut' is read as ['<unk>'], <unk> for what is not in the vocabulary; give words "
                               "that are in it, or token ids")
    assert effects("tasks-gpt2", *TEXTS, LogOdds("<unk>", " he"), at="L0.mlp").total.any()  # asked for by its name


def test_pairs_outside_of_the_vocabulary():
    pair = partial(Pair, "The astronaut said that", "The man said that")
    with pytest.warns(UserWarning, match="1 of 1 pairs have words that are not in the vocabulary of tasks"):
        effects("tasks-gpt2", Pairs("mine", "text", [pair(continuations=(" he", " she"))]), at="L0.mlp")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="' astronauts' is read as .*<unk>"):
        effects("tasks-gpt2", Pairs("mine", "text", [pair(continuations=(" astronauts", " she"))]), at="L0.mlp")


@each_sweep
def test_a_base_equal_to_its_counterfactual(kind):
    with pytest.raises(ValueError) as said:
        SWEEPS[kind](reader(), [TEXTS[0], TEXTS[0]], [TEXTS[1], TEXTS[0]], " he", at="L0.mlp")
    assert str(said.value) == ("row 1: base and counterfactual are equal, The | Ġnurse | Ġsaid | Ġthat, so that "
                               "nothing has an effect; change in the counterfactual what the effect is of, or leave "
                               "the pair out")
    pixels, _ = two("timm-vit")
    with pytest.raises(ValueError, match="row 0: base and counterfactual are equal, so that nothing has an effect; "):
        SWEEPS[kind](model("timm-vit"), pixels, pixels, 1, at="L0.mlp")


@each_sweep
@pytest.mark.parametrize("ask", [relprop.Function(lambda output: output.logits[:, 0, 0] * 0 + 3),
                                 relprop.Token(5, position=0)], ids=["constant", "before the change"])
def test_an_outcome_that_never_changes_has_no_effect(kind, ask):
    """Nor one of zero, nor one of inf, whatever it is divided by."""
    with pytest.raises(Undefined, match=r"the outcome, .*, is [0-9.]+ whatever is changed, in the counterfactual too, "
                                        "so that no effect is defined; take another outcome, or a counterfactual that"):
        SWEEPS[kind](model("gpt2"), *two("gpt2"), ask, at="L0.mlp")


def test_one_pair_that_never_changes_is_an_effect_of_zero():
    base, other = two("gpt2")
    ids = other["input_ids"].clone()
    ids[1, :4] = base["input_ids"][1, :4]
    ids[1, 3] = (ids[1, 3] + 1) % 30 + 3
    ask = relprop.Token(5, position=2)  # of row 1 the change comes behind it
    found = effects(model("gpt2"), base, {**other, "input_ids": ids}, ask, at=["L0.mlp", "L1"], scale="ratio")
    assert found.total[1] == 0 and found.indirect[:, 1].abs().max() < 1e-12 and found.total[0].abs() > 1e-3
    assert found.table().notna().all().all() and found.indirect.isfinite().all()


def test_an_outcome_that_is_zero_or_no_number():
    base, other = two("gpt2")
    with pytest.raises(Undefined, match="the outcome of base 0 is zero, so that a ratio to it is undefined; take"):
        effects(model("gpt2"), base, other, KL(), at="L0.mlp", scale="ratio")
    for wild in (float("nan"), float("inf")):
        ask = relprop.Function(lambda output, wild=wild: output.logits[:, 0, 5] * torch.tensor([1.0, wild, 1.0])
                               if len(output.logits) == 3 else output.logits[:, 0, 5])
        with pytest.raises(Undefined, match="is no number in example 1 .*, so that effects on it are undefined; of a "):
            effects(model("gpt2"), base, other, ask, at="L0.mlp")


@pytest.mark.parametrize("ask, said", [(Ratio(6, 5), "5 has probability zero in row 0"),
                                       (LogOdds(5, 6), "5 has probability zero in row 0"),
                                       (Ratio([6, 7], [7, 5]), "candidate b has probability zero in row 0")])
def test_a_probability_of_zero_is_in_no_ratio(ask, said):
    one = FAMILIES["gpt2"].model()
    one.lm_head = nn.Linear(16, 40, bias=True)
    nn.init.constant_(one.lm_head.bias, 0.0)
    one.lm_head.bias.data[5] = float("-inf")
    with pytest.raises(Undefined, match=f"{said}, so that the ratio of the two is undefined; take their Difference"):
        effects(one.eval(), *two("gpt2"), ask)
    found = effects(one.eval(), *two("gpt2"), Difference(6, 5), at="L0.mlp")  # as it says
    assert found.indirect.isfinite().all() and found.indirect.any()


@each_sweep
@pytest.mark.parametrize("at, said", [
    ("L3.attn.H0", "L3.attn.H0 is no place of GPT2LMHeadModel: no layer 3; the model has layers 0 to 1"),
    (["L0.mlp", "L1.attn.H7"], "L1.attn.H7 is no place of .*: no H7 in layer 1, which has 2 heads"),
    ("L1.mlp.N999", "L1.mlp.N999 is no place of .*: no N999 in layer 1, which has 64 neurons"),
    ("L1.mlp[16]", r"no entry 16 of the vectors at transformer.h.1.mlp.c_proj, which have 16; give \[0\] to \[15\]"),
    ("L1.cross.H0", "L1.cross.H0 is no place of .*: .* has no attention to an encoder")])
def test_mediators_of_another_model(kind, at, said):
    with pytest.raises(ValueError, match=said):
        SWEEPS[kind](model("gpt2"), *two("gpt2"), ASK, at=at)


def test_mediators_that_another_model_gave():
    found = effects(model("gpt2"), *two("gpt2"), ASK, at="L*.mlp.N*")
    with pytest.raises(ValueError, match="mediator L0.mlp.N24 is no place of LlamaForCausalLM: no N24 in layer 0"):
        effects(model("llama"), *two("llama"), ASK, at=found.mediators)
    with pytest.raises(ValueError, match="L1.mid is no place of GPTNeoXForCausalLM: .*beside each other"):
        effects(model("gpt-neox"), *two("gpt-neox"), ASK, at="L1.mid")
    with pytest.raises(TypeError, match="places are sites or patterns of sites, such as .*; not int"):
        effects(model("gpt2"), *two("gpt2"), ASK, at=5)
    with pytest.raises(ValueError, match="'heads' is no address; write L5"):
        effects(model("gpt2"), *two("gpt2"), ASK, at="heads")


@each_sweep
@pytest.mark.parametrize("at, said", [
    ("L0.mlp@7", "@7: row 0 has 7 positions, so 7 is not one of them; give 0 to 6, or -1 to -7 from the end"),
    ("L0.attn.H0@-6", "@-6: row 1 has 4 positions, so -6 is not one of them; give 0 to 3, or -1 to -4"),
    ({"both": ["L0.mlp@1", "L0.mlp@5"]}, "@5: row 1 has 4 positions, so 5 is not"),
    ("L0@job", "@job: no span of this name was given; there is none"), ("L0@p3", "only a picture has patches")])
def test_positions_out_of_range(kind, at, said):
    with pytest.raises(ValueError, match=said):
        SWEEPS[kind](model("gpt2"), *two("gpt2"), ASK, at=at)


def test_patches_out_of_range():
    with pytest.raises(ValueError, match="@p16: row 0 has 17 positions, so 17 is not one of them; give p0 to p15"):
        effects(model("hf-vit"), *two("hf-vit"), 1, at="L0@p16")
    assert effects(model("hf-vit"), *two("hf-vit"), 1, at="L0@p15").indirect.any()


@pytest.mark.parametrize("ask, said", [
    (LogOdds(5, 40), "no token 40 in GPT2LMHeadModel, whose vocabulary has 40; give ids of 0 to 39"),
    (Ratio([-1], 5), "no token -1 in"), (LogOdds([5, 99], 6), "no token 99 in"),
    (LogOdds(5, 6, following="all"), "what follows a mask is 'nothing', 'tokens' or 'masks', not 'all'"),
    (relprop.Token(5, position=9), "no position 9 in row 0, which has 7 tokens; give 0 to 6, or -1 to -7 from")])
def test_outcomes_that_cannot_be(ask, said):
    with pytest.raises(ValueError, match=said):
        effects(model("gpt2"), *two("gpt2"), ask, at="L0.mlp")


def test_masks_need_a_tokenizer():
    with pytest.raises(ValueError, match="without a tokenizer that has a mask token, .*; load it with its tokenizer"):
        effects(model("bert-masked-lm"), *two("bert-masked-lm"), ASK, at="L0")


@pytest.mark.parametrize("site, one", [("L0.mlp[16]", Given(0.0)), ("L0.mlp[99]", Resample(two("gpt2")[1]))])
def test_an_entry_that_is_not_there_is_no_place_of_an_intervention(site, one):
    with pytest.raises(ValueError, match=r"of the vectors at transformer.h.0.mlp.c_proj, which have 16; give \[0\]"):
        with torch.no_grad(), intervened(model("gpt2"), {site: one}):
            model("gpt2")(**two("gpt2")[0])


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-eager", "timm-vit", "t5-encoder"])
def test_what_puts_back_what_is_there_changes_nothing_bit_for_bit(name):
    """Also where rows are run together, modules are not run again, and positions come from the cache."""
    base, other = two(name)
    ask = ASK if subject(name).task == "text-generation" else relprop.Function(FAMILIES[name].value)
    one = subject(name)
    pairs = mediation.outcome.outcome(ask).pairs(one, one.prepare(base), one.prepare(other))
    with torch.no_grad():
        found = mediation.mediators_of(one, one.prepare(base), ["L0.attn.H1", "L1.mlp", "L0", "L1.attn"])
        spots = [spot for spots in found.values() for spot in spots]
        made = mediation.experiment(one, mediation.outcome.outcome(ask), pairs, spots)
        stage = made.stages[0][0]
        taps = {spot.tap for spot in spots}
        run = lambda intervention: mediation.sweep.sweep(
            stage, list(found.values()), intervention, {tap: stage.there(tap) for tap in taps}, batch_size=24,
            places=made.places)
        kept, nothing = run(Resample(None)), run(Nothing())
    assert torch.equal(kept, nothing) and kept.shape[0] == 4
    assert not torch.equal(run(Moved()), nothing)


class Nothing(relprop.intervene.Intervention):
    """Changes nothing."""

    def value(self, now, there):
        return now


class Moved(Nothing):
    """Changes all."""

    def value(self, now, there):
        return now + 1
