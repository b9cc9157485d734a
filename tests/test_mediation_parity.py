"""Effects equal to those that Vig et al.'s own code computed, on the same weights in unmodified transformers models."""
from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import SHARED
from torch import Tensor

from relprop.intervene import Intervention
from relprop.mediation import Ratio, effects, experiment, mediators_of
from relprop.mediation.outcome import outcome
from relprop.subject import Subject
from relprop.target import Probability, Token

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: reference outputs do not ship with relprop")
CAUSAL = ["winobias_gpt2", "winobias_distilgpt2", "winogender_gpt2"]
MASKED = {"winobias_bert": [1, 2, 5, 6], "winobias_roberta": [1, 4]}
FOLLOWING = {1: "nothing", 2: "tokens", 0: "masks"}


@dataclass(frozen=True)
class Case:
    """A reference case: the model, what went in and what came out."""

    subject: Subject
    about: dict
    tensors: dict[str, Tensor]

    def input(self, name):
        return self.tensors[f"input.{name}"]

    def output(self, name):
        return self.tensors[f"out.{name}"]


def case(name, task):
    import transformers
    from safetensors.torch import load_file

    about = json.loads((SHARED / "reference" / f"vig_{name}.json").read_text())
    tensors = load_file(SHARED / "reference" / f"vig_{name}.safetensors")
    kind = getattr(transformers, about["model_class"])
    model = kind(kind.config_class(**about["config"]))
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    tokenizer = words(about) if "special_ids" in about or task == "fill-mask" else None
    return Case(Subject.from_module(model.double().eval(), tokenizer, task=task), about, tensors)


def words(about):
    """A tokenizer that knows which ids are special."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = about["vocab"]
    named = {"[PAD]": "pad_token", "[UNK]": "unk_token", "[CLS]": "cls_token", "[SEP]": "sep_token", "[MASK]":
             "mask_token", "<s>": "cls_token", "<pad>": "pad_token", "</s>": "sep_token", "<unk>": "unk_token",
             "<mask>": "mask_token"}
    special = {role: word for word, role in named.items() if word in vocab}
    level = models.WordLevel({word: index for index, word in enumerate(vocab)}, unk_token=special["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level), **special)


def padded(rows, pad):
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])}


def prompts(one, count, *, wrapped=False):
    """x and x' of the first examples, and their candidates c1 and c2."""
    ends = one.about.get("special_ids", {})
    wrap = lambda ids: [ends["cls"], *ids, ends["sep"]] if wrapped else ids
    pair = [padded([wrap(one.input(f"context_{i}")[side].tolist()) for i in range(count)],
                   0 if one.subject.tokenizer is None else one.subject.pad_token_id) for side in (0, 1)]
    candidates = [[one.input(f"{name}_{i}").tolist() for i in range(count)] for name in ("cand1", "cand2")]
    return pair, candidates


def same(found, wanted, layout=None):
    """Equal to 1e-9 of the largest; the reference is float64, and 1e-5 would do."""
    found = found if layout is None else found.T.reshape(layout)
    assert wanted.abs().max() > 1e-6
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def heads(one, pair, ask, prefix, **options):
    """All comparisons of a case of attention patterns."""
    n, L, H = one.output(f"{prefix}indirect_effect_head").shape
    at = {f"{layer}.{head}": f"L{layer}.attn.H{head}.pattern" for layer in range(L) for head in range(H)}
    at |= {f"L{layer}": f"L{layer}.attn.pattern" for layer in range(L)} | {"all": "L*.attn.pattern"}
    found = effects(one.subject, *pair, ask, at=at, kind=["total", "indirect", "direct"], scale="ratio", resamples=99,
                    **options)
    same(found.total, one.output(f"{prefix}total_effect"))
    for kind in ("indirect", "direct"):
        effect = found.effect(kind)
        same(effect[:L * H], one.output(f"{prefix}{kind}_effect_head"), (n, L, H))
        same(effect[L * H:-1], one.output(f"{prefix}{kind}_effect_layer"), (n, L))
        same(effect[-1], one.output(f"{prefix}{kind}_effect_model"))
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_heads_of_causal_models(name):
    one = case(f"attn_{name}", "text-generation")
    count = len(one.output("total_effect"))
    pair, (c1, c2) = prompts(one, count)
    found = heads(one, pair, Ratio(c2, c1), "", prompt_only=True)
    same(found.base, one.output("odds_base"))
    same(found.counterfactual, one.output("odds_alt"))
    if name == "winobias_gpt2":  # of the whole prompt with what follows it is something else
        other = effects(one.subject, *pair, Ratio(c2, c1), at="L*.attn.pattern", scale="ratio", resamples=99)
        assert not torch.allclose(other.indirect.T, one.output("indirect_effect_layer"), rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_sets_of_heads(name):
    """The effect of the first of the ranked heads together, and of the greedily grown set."""
    one = case(f"attn_{name}", "text-generation")
    if "out.topk_heads" not in one.tensors:
        pytest.skip("the case has no sets")
    count = one.about["outputs"]["sel_mean_effect_head"]["meaning"].split("the first ")[1].split()[0]
    pair, (c1, c2) = prompts(one, int(count))
    for how in ("topk", "greedy"):
        order = one.output(f"{how}_heads").tolist()
        sets = {str(k): [f"L{layer}.attn.H{head}.pattern" for layer, head in order[:k + 1]] for k in range(len(order))}
        found = effects(one.subject, *pair, Ratio(c2, c1), at=sets, kind="indirect", scale="ratio", prompt_only=True,
                        resamples=99)
        same(found.indirect.mean(1), one.output(f"{how}_effect").double())


@pytest.mark.parametrize("name, approach", [(name, approach) for name, each in MASKED.items() for approach in each])
def test_heads_of_masked_models(name, approach):
    one = case(f"attn_{name}", "fill-mask")
    if f"out.a{approach}_total_effect" not in one.tensors:
        pytest.skip("not in this case")
    pair, (c1, c2) = prompts(one, len(one.output(f"a{approach}_total_effect")), wrapped=approach > 3)
    heads(one, pair, Ratio(c2, c1, following=FOLLOWING[approach % 3]), f"a{approach}_")


def rows_of(one, template):
    """Sentences with the profession, with "man" and with "woman", and the ids of he and she."""
    ids = one.input(f"ids_{template}")
    mask = one.tensors.get("input.mask_id")
    if mask is not None:
        ids = torch.cat([ids, mask.expand(*ids.shape[:2], 1)], 2)
    return ids.unbind(1), one.input("cand_ids").tolist(), int(one.input("position"))


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_neurons_of_causal_models(name):
    one = case(f"neurons_{name}", "text-generation")
    templates, words, layers, width = one.output("nie_man").shape
    for template in range(templates):
        (base, man, woman), (he, she), position = rows_of(one, template)
        at = [f"embed[*]@{position}", f"L*.mlp[*]@{position}"]
        for who, other, ask in (("man", man, Ratio(he, she)), ("woman", woman, Ratio(she, he))):
            found = effects(one.subject, base, other, ask, at=at, kind=["total", "direct", "indirect"], scale="ratio",
                            batch_size=256, resamples=99)
            same(found.total, one.output(f"te_{who}")[template])
            same(found.indirect, one.output(f"nie_{who}")[template], (words, layers, width))
            same(found.direct, one.output(f"nde_{who}")[template], (words, layers, width))


class Added(Intervention):
    """What is there, and a value more."""

    def value(self, now, there):
        return now + there


def test_a_difference_added_to_neurons():
    one = case("neurons_gpt2", "text-generation")
    (base, man, woman), (he, _), position = rows_of(one, 0)
    ask = outcome(Probability(Token(he)))
    prepared = [one.subject.prepare(ids) for ids in (base, man, woman)]
    with torch.no_grad():
        mediators = list(mediators_of(one.subject, prepared[0], [f"embed[*]@{position}", f"L*.mlp[*]@{position}"]
                                      ).values())
        spots = [spot for mediator in mediators for spot in mediator]
        runs = [experiment(one.subject, ask, ask.pairs(one.subject, prepared[0], other), spots, natural=False)
                for other in prepared[1:]]
        (to_man, to_woman) = (run.stages[0][1] for run in runs)
        there = {spot.tap: to_man.there(spot.tap) - to_woman.there(spot.tap) for spot in spots}
        found = runs[0].controlled(mediators, Added(), there)[0]
    wanted = one.output("p_he_man_minus_woman")[0]
    same(found, wanted, wanted.shape)


def test_neurons_of_masked_models():
    one = case("neurons_bert", "fill-mask")
    templates, words, layers, width = one.output("p_he_man_indirect").shape
    for template in range(templates):
        (base, man, woman), tokens, position = rows_of(one, template)
        at = [f"embed[*]@{position}", f"L*[*]@{position}"]
        for who, other in (("man", man), ("woman", woman)):
            for said, token in zip(("he", "she"), tokens):
                found = effects(one.subject, base, other, Probability(Token(token)), at=at,
                                kind=["indirect", "direct"], batch_size=256, resamples=99)
                for kind in ("indirect", "direct"):
                    wanted = one.output(f"p_{said}_{who}_{kind}")[template]
                    same(getattr(found, f"{kind}_outcome"), wanted, wanted.shape)


@pytest.mark.parametrize("name", ["neuron_subset", "neuron_subset_b"])
def test_all_neurons_together(name):
    """Every neuron of a layer: mean odds ratio over the professions of both stereotypes, those left out as the case
    says.
    """
    one = case(name, "text-generation")
    found = []
    for template in range(2):
        (base, man, woman), (he, she), position = rows_of(one, template)
        words = one.about["female_words"] + one.about["male_words"]
        female = len(one.about["female_words"])
        layers = one.output("all_neurons_layer").shape[0] - 1
        at = {"embed": f"embed@{position}", **{f"L{i}": f"L{i}.mlp@{position}" for i in range(layers)},
              "all": f"L*.mlp@{position}"}
        for rows, other, ask in ((slice(0, female), man, Ratio(he, she)), (slice(female, None), woman, Ratio(she, he))):
            effect = effects(one.subject, base[rows], other[rows], ask, at=at, kind="indirect", scale="ratio",
                             resamples=99)
            kept = [bool(p) for p in keeps(one, base[rows], (he, she), words[rows])]
            found.append(effect.indirect[:, kept])
    mean = torch.cat(found, 1).mean(1)
    same(mean[:-1], one.output("all_neurons_layer").double())
    same(mean[-1:], one.output("all_neurons_blocks").double())


def keeps(one, ids, tokens, words):
    with torch.no_grad():
        p = one.subject.model(ids).logits[:, -1].softmax(-1)[:, list(tokens)]
    gendered = torch.tensor([abs(one.about["definitional"][word]) >= 0.75 for word in words])
    return (p > 0.01).all(1) & ~gendered


def test_a_wrong_definition_is_caught():
    """A difference is no ratio, and the way there is not the way back."""
    one = case("neurons_gpt2", "text-generation")
    (base, man, _), (he, she), position = rows_of(one, 0)
    wanted = one.output("nie_man")[0]
    for pair, options in (((base, man), dict(scale="difference")), ((man, base), dict(scale="ratio"))):
        found = effects(one.subject, *pair, Ratio(he, she), at=f"L*.mlp[*]@{position}", kind="indirect", **options)
        with pytest.raises(AssertionError):
            same(found.indirect, wanted[:, 1:], wanted[:, 1:].shape)


