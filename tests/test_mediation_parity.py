"""Effects equal to those that Vig et al.'s own code computed, on the same weights in unmodified transformers models."""
from __future__ import annotations

import json
import os
from dataclasses import dataclass

import pytest
import torch
from conftest import SHARED
from safetensors import safe_open
from torch import Tensor

from relprop.data import pairs
from relprop.intervene import Intervention
from relprop.mediation import (
    Effects,
    Ratio,
    by_mediator,
    effects,
    experiment,
    mediators_of,
    subset,
    subsets,
    susceptible,
)
from relprop.mediation.outcome import outcome
from relprop.mediation.stage import read
from relprop.subject import Subject
from relprop.target import Probability, Token

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: reference outputs do not ship with relprop")
CAUSAL = ["winobias_gpt2", "winobias_distilgpt2", "winogender_gpt2"]
MASKED = {"winobias_bert": [1, 2, 5], "winobias_roberta": [1, 4]}
COMPARED: dict[str, set[str]] = {}
"""Arrays that were compared, by case, as the tests run."""
FOLLOWING = {1: "nothing", 2: "tokens", 0: "masks"}


@dataclass(frozen=True)
class Case:
    """A reference case: the model, what went in and what came out."""

    name: str
    subject: Subject
    about: dict
    tensors: dict[str, Tensor]

    def input(self, name):
        return self.tensors[f"input.{name}"]

    def output(self, name):
        COMPARED.setdefault(self.name, set()).add(name)
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
    return Case(name, Subject.from_module(model.double().eval(), tokenizer, task=task), about, tensors)


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


def candidates(one, pair, ask, prefix):
    """Comparison of the probabilities of both candidates, c2 before c1 in the ratio, on x and x'."""
    pairs = ask.pairs(one.subject, *map(one.subject.prepare, pair))
    with torch.no_grad():
        for side, said in enumerate(("base", "alt")):
            answers = [read(asked[side], one.subject.forward(asked[side].batch), asked[side].at) for asked in pairs]
            for number, value in zip((2, 1), sum(answers).exp().T):
                same(value, one.output(f"{prefix}candidate{number}_{said}_prob"))


@pytest.mark.parametrize("name", CAUSAL)
def test_heads_of_causal_models(name):
    one = case(f"attn_{name}", "text-generation")
    count = len(one.output("total_effect"))
    pair, (c1, c2) = prompts(one, count)
    found = heads(one, pair, Ratio(c2, c1), "", prompt_only=True)
    same(found.base, one.output("odds_base"))
    same(found.counterfactual, one.output("odds_alt"))
    candidates(one, pair, Ratio(c2, c1), "")
    H = one.output("indirect_effect_head").shape[1:].numel()
    same(found.indirect[:H].sum(0).mean()[None], one.output("mean_sum_nie_head"))
    same(torch.stack([found.total.mean(), found.indirect[-1].mean(), found.direct[-1].mean()]), one.output("means"))
    if name == "winobias_gpt2":  # of the whole prompt with what follows it is something else
        other = effects(one.subject, *pair, Ratio(c2, c1), at="L*.attn.pattern", scale="ratio", resamples=99)
        assert not torch.allclose(other.indirect.T, one.output("indirect_effect_layer"), rtol=1e-4)


@pytest.mark.parametrize("name, approach", [(name, approach) for name, each in MASKED.items() for approach in each])
def test_heads_of_masked_models(name, approach):
    one = case(f"attn_{name}", "fill-mask")
    pair, (c1, c2) = prompts(one, len(one.output(f"a{approach}_total_effect")), wrapped=approach > 3)
    ask = Ratio(c2, c1, following=FOLLOWING[approach % 3])
    heads(one, pair, ask, f"a{approach}_")
    candidates(one, pair, ask, f"a{approach}_")


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
        chances(one, template, (base, man, woman), (he, she), at)


def chances(one, template, sentences, tokens, at):
    """Comparison of p(he) and p(she) on each sentence, and after every intervention on a neuron."""
    base, *others = sentences
    layout = one.output("p_he_man_indirect").shape[1:]
    for column, (said, token) in enumerate(zip(("he", "she"), tokens)):
        for row, (who, other) in enumerate(zip(("man", "woman"), others)):
            found = effects(one.subject, base, other, Probability(Token(token)), at=at, kind=["indirect", "direct"],
                            batch_size=256, resamples=9)
            plain = one.output("p_plain")[template]
            same(found.base, plain[:, 0, column])
            same(found.counterfactual, plain[:, row + 1, column])
            for kind in ("indirect", "direct"):
                same(getattr(found, f"{kind}_outcome"), one.output(f"p_{said}_{who}_{kind}")[template], layout)


class Added(Intervention):
    """What is there, and a value more."""

    def value(self, now, there):
        return now + there


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_a_difference_added_to_neurons(name):
    one = case(f"neurons_{name}", "text-generation")
    for template in range(len(one.output("p_plain"))):
        (base, man, woman), tokens, position = rows_of(one, template)
        at = [f"embed[*]@{position}", f"L*.mlp[*]@{position}"]
        for said, token in zip(("he", "she"), tokens):
            ask = outcome(Probability(Token(token)))
            prepared = [one.subject.prepare(ids) for ids in (base, man, woman)]
            with torch.no_grad():
                mediators = list(mediators_of(one.subject, prepared[0], at).values())
                spots = [spot for mediator in mediators for spot in mediator]
                runs = [experiment(one.subject, ask, ask.pairs(one.subject, prepared[0], other), spots, natural=False)
                        for other in prepared[1:]]
                (to_man, to_woman) = (run.stages[0][1] for run in runs)
                there = {spot.tap: to_man.there(spot.tap) - to_woman.there(spot.tap) for spot in spots}
                found = runs[0].controlled(mediators, Added(), there)[0]
            wanted = one.output(f"p_{said}_man_minus_woman")[template]
            same(found, wanted, wanted.shape)


def test_neurons_of_masked_models():
    one = case("neurons_bert", "fill-mask")
    for template in range(len(one.output("p_plain"))):
        sentences, tokens, position = rows_of(one, template)
        chances(one, template, sentences, tokens, [f"embed[*]@{position}", f"L*[*]@{position}"])


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


# -- subsets, examples that count, and aggregates ---------------------------------------------------------------------


def professions(one):
    """All sentences of a case, of both templates: base, the counterfactual of the other gender, outcome, and which
    count.
    """
    female, count = len(one.about["female_words"]), len(one.about["female_words"] + one.about["male_words"])
    names = one.about["female_words"] + one.about["male_words"]
    bases, others, kept, tokens = [], [], [], []
    for template in range(2):
        (base, man, woman), (he, she), position = rows_of(one, template)
        bases.append(base)
        others.append(torch.cat([man[:female], woman[female:]]))
        kept.append(keeps(one, base, (he, she), names))
        tokens += [(he, she)] * female + [(she, he)] * (count - female)
    ask = Ratio([[a] for a, _ in tokens], [[b] for _, b in tokens])
    return torch.cat(bases), torch.cat(others), ask, torch.cat(kept), position


@pytest.mark.parametrize("name", ["neuron_subset", "neuron_subset_b"])
def test_neurons_are_those_of_the_reference(name):
    one = case(name, "text-generation")
    base, other, ask, keep, position = professions(one)
    assert 0 < keep.sum() < len(keep)
    sites = [f"embed[*]@{position}", f"L*.mlp[*]@{position}"]
    options = dict(scale="ratio", keep=keep, toward="up", batch_size=256)
    L, N = one.output("marg_odds_ratio").shape
    names = lambda nodes, first: tuple(f"embed[{n}]@{position}" if layer == first else
                                       f"L{layer - first - 1}.mlp[{n}]@{position}" for layer, n in nodes.tolist())
    few = len(one.output("topk_fixed"))
    top = subset(one.subject, base, other, ask, at=sites, how="top-k", k=12, **options)
    same(top.alone.mean(1).view(L, N) + 1, one.output("marg_odds_ratio"))
    assert top.chosen == names(one.output("ranked"), 0)
    same(top.effects[:few].mean(1), one.output("topk_fixed"))
    greedy = subset(one.subject, base, other, ask, at=sites, how="greedy", k=few, **options)
    assert greedy.chosen == names(one.output("greedy_nodes_fixed"), -1)
    same(greedy.effects.mean(1), one.output("greedy_fixed"))
    layer = one.about["layer_for_by_layer"]
    for how in ("top-k", "greedy"):
        found = subsets(one.subject, base, other, ask, at=sites[1].replace("*", str(layer), 1), how=how, k=few,
                        **options)[f"L{layer}"]
        same(found.effects.mean(1), one.output(f"{how.replace('-', '')}_layer_fixed"))
        if how == "greedy":
            assert found.chosen == names(torch.tensor([[layer, n] for n in
                                                       one.output("greedy_layer_neurons_fixed").tolist()]), -1)
    same(found.whole.mean(), one.output("all_neurons_layer")[layer + 1])
    with pytest.raises(AssertionError):  # examples that are left out matter
        same(subset(one.subject, base, other, ask, at=sites, how="top-k", k=few, scale="ratio", toward="up",
                    batch_size=256).effects.mean(1), one.output("topk_fixed"))


@pytest.mark.parametrize("name", CAUSAL)
def test_heads_and_examples_are_those_of_the_reference(name):
    one = case(f"attn_{name}", "text-generation")
    pair, (c1, c2) = prompts(one, len(one.output("odds_ratio_all")))
    total = effects(one.subject, *pair, Ratio(c2, c1), at="L0", kind="total", scale="ratio", resamples=9)
    same(total.total + 1, one.output("odds_ratio_all"))
    keep = susceptible(total)
    assert torch.equal(keep, one.output("filter_kept").bool()) and 0 < keep.sum() < len(keep)
    ratio = total.total + 1
    same(torch.quantile(ratio[ratio > 1], 0.25)[None], one.output("filter_threshold"))
    meaning = one.about["outputs"]["sel_mean_effect_head"]["meaning"]
    first = torch.arange(len(keep)) < int(meaning.split("the first ")[1].split()[0])
    for how in ("top-k", "greedy"):
        k = len(one.output("topk_effect"))
        found = subset(one.subject, *pair, Ratio(c2, c1), at="L*.attn.H*.pattern", how=how, k=k, scale="ratio",
                       keep=first, prompt_only=True, toward="up")
        said = how.replace("-", "")
        assert found.chosen == tuple(f"L{layer}.attn.H{head}.pattern" for layer, head in
                                     one.output(f"{said}_heads").tolist())
        same(found.effects.mean(1), one.output(f"{said}_effect"))
    same(found.alone.mean(1).view_as(one.output("sel_mean_effect_head")), one.output("sel_mean_effect_head"))
    same(found.whole.mean()[None], one.output("sel_mean_effect_model"))
    whole = {f"L{i}": f"L{i}.attn.pattern" for i in range(len(one.output("sel_mean_effect_layer")))}
    layers = effects(one.subject, *pair, Ratio(c2, c1), at=whole, kind="indirect", scale="ratio", keep=first,
                     prompt_only=True, resamples=9)
    same(layers.indirect.mean(1), one.output("sel_mean_effect_layer"))


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_aggregates_of_neurons_are_those_of_the_reference(name):
    """Their table keeps the professions that are gendered by definition."""
    one = case(f"neurons_{name}", "text-generation")
    about = one.about
    rows = [(i, abs(d) > 0.75, d + s < 0) for i, (d, s) in enumerate(zip(about["definitional"],
                                                                         about["stereotypical"]))]
    parts = []
    for template in range(len(one.output("p_plain"))):
        (base, man, woman), (he, she), position = rows_of(one, template)
        keep = torch.tensor([kept for _, kept, _ in rows])
        female = torch.tensor([woman for *_, woman in rows])
        other = torch.where(female[:, None], man, woman)
        ask = Ratio([[he if woman else she] for *_, woman in rows], [[she if woman else he] for *_, woman in rows])
        differs = (base != other).any(1)
        assert differs.all() and keep.any()
        parts.append(effects(one.subject, base, other, ask, at=[f"embed[*]@{position}", f"L*.mlp[*]@{position}"],
                             kind=["total", "direct", "indirect"], scale="ratio", keep=keep, resamples=9))
    joined = type(parts[0])(parts[0].mediators, *(torch.cat([getattr(part, name) for part in parts], -1) for name in
                            ("base", "counterfactual", "indirect_outcome", "direct_outcome")), None, "ratio", "")
    table = by_mediator(joined)
    wanted = one.output("agg_table")
    for column, kind in ((2, "indirect"), (4, "direct")):
        same(torch.tensor(table[f"{kind} mean"].to_numpy()) + 1, wanted[:, column])
        same(torch.tensor(table[f"{kind} std"].to_numpy()), wanted[:, column + 1])
    both = joined.indirect + joined.direct + 1
    same(both.mean(1), wanted[:, 6])
    same(both.std(1), wanted[:, 7])
    width = one.output("nie_man").shape[-1]
    names = [f"{'embed' if layer == 0 else f'L{layer - 1}.mlp'}[{neuron}]" for layer, neuron in
             wanted[:, :2].int().tolist()]
    assert [name.split("@")[0] for name in joined.mediators] == names and len(names) % width == 0


@pytest.mark.parametrize("name", ["distilgpt2", "gpt2"])
def test_what_the_authors_recorded_of_real_weights(name):
    """Their examples are pairs of ours, and their total effects are the ratio of the probabilities that they give."""
    published = json.loads((SHARED / "reference" / "vig_published_gpt2.json").read_text())
    examples = published["examples"][f"winobias/{name}_filtered_dev"]
    about = published["summary"][f"winobias/{name}_filtered_dev"]
    bare = lambda text: "".join(text.split())
    ours = {(one.base, one.counterfactual, *map(bare, one.continuations[::-1])) for one in
            pairs(f"winobias:{SHARED / 'data' / 'winobias'}").pairs}
    assert len(ours) == about["loaded"] == 160 and len(examples) == about["n"]
    assert {(one["x"], one["x_alt"], bare(one["c1"]), bare(one["c2"])) for one in examples} <= ours
    p = torch.tensor([one["p"] for one in examples], dtype=torch.float64)  # to six decimals
    found = Effects(("all",), p[:, 1] / p[:, 0], p[:, 3] / p[:, 2], None, None, None, "ratio", "P(c2) / P(c1)")
    torch.testing.assert_close(found.total, torch.tensor([one["TE"] for one in examples]).double(), rtol=0, atol=1e-3)
    assert abs(float(found.total.mean()) - about["mean_TE"]) < 1e-4
    assert float(found.total.min()) + 1 > about["threshold"] - 1e-4  # those that count are above the quantile


# -- all of it -------------------------------------------------------------------------------------------------------


def test_every_array_of_the_reference_is_compared(request):
    """But what the original computes wrongly on purpose of the record, "peer", beside which it has what is right."""
    known = {name for name in globals() if name.startswith("test_")}
    ran = {item.function.__name__ for item in request.session.items if getattr(item, "module", None) is not None
           and item.module.__name__ == __name__}
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("other processes make some of the comparisons; run this file in one: pytest " + __file__)
    if known - ran or len(COMPARED) < 2:
        pytest.skip(f"some of the comparisons were left out: {sorted(known - ran)[:3]}")
    cases = {path.stem.removeprefix("vig_") for path in (SHARED / "reference").glob("vig_*.safetensors")}
    assert cases == set(COMPARED) and len(cases) == 10
    for name in cases:
        with safe_open(SHARED / "reference" / f"vig_{name}.safetensors", "pt") as file:
            there = {key.removeprefix("out.") for key in file.keys() if key.startswith("out.")}  # noqa: SIM118
        assert {key for key in there - COMPARED[name] if not key.endswith("_peer")} == set(), name
