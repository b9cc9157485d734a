"""`tasks-gpt2` does what its card says, and the size of its planted bias comes back as a total effect."""
from __future__ import annotations

import random
import re

import pytest
import torch
from scipy.stats import spearmanr

import relprop
from relprop import data, zoo
from relprop.data.planted import ORDERS, PROFESSIONS
from relprop.mediation import LogOdds, Ratio
from relprop.zoo import tasks

SEED = 41  # that no training or choice of a model used
SAID = ["The {profession} said that"]


@pytest.fixture(scope="module")
def subject():
    return relprop.load("tasks-gpt2")


@torch.no_grad()
def after(subject, prompts):
    """Log-probability of each next word, (B, V)."""
    ids = subject.tokenizer(prompts, padding=True, return_tensors="pt")
    last = ids["attention_mask"].sum(1) - 1
    return subject.model(**ids).logits[torch.arange(len(prompts)), last].log_softmax(-1)


def ids(subject, words):
    return torch.tensor([data.pair.token(word, subject.tokenizer) for word in words])


def total(subject, pairs, outcome=LogOdds, *, of=None, scale="difference"):
    """Total effects, (B,), through the public face; any one mediator will do."""
    found = relprop.effects(subject, pairs.bases, pairs.counterfactuals, outcome(*(of or (" she", " he"))), at="L0.mlp",
                            kind="total", scale=scale, resamples=10)
    return found.total


def test_it_is_a_plain_gpt2(subject):
    model, tokenizer = zoo.build("tasks-gpt2")
    assert type(model).__name__ == "GPT2LMHeadModel" and not model.training
    assert model.num_parameters() <= 3e6 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size == subject.model.config.vocab_size
    assert subject.task == "text-generation"
    assert sum(file.stat().st_size for file in zoo.path("tasks-gpt2").iterdir()) < 6e6


@pytest.mark.parametrize("order", ORDERS)
def test_indirect_objects(subject, order):
    """On names, and objects at places, that no sentence of the training joined."""
    pairs = data.indirect_objects(200, seed=SEED, orders=[order])
    assert len({pair.facts["template"] for pair in pairs.pairs}) == len(tasks.INDIRECT)
    said = after(subject, pairs.bases).argmax(1)
    right = said == ids(subject, [pair.continuations[1] for pair in pairs.pairs])
    assert right.float().mean() >= 0.98
    assert said.unique().numel() > 30  # of 40 names


def test_indirect_objects_in_other_sentences(subject):
    """Put together from parts as in training; where a third person gives, either answer will do."""
    made = tasks.indirect_sentences(random.Random(SEED), 300, split="test")
    assert len({one.prompt.split()[0] for one in made}) > 15
    likely = torch.zeros(len(made), len(subject.tokenizer))
    for row, one in enumerate(made):
        likely[row, ids(subject, [word for word, p in one.answers.items() if p > 0.1])] = 1
    said = after(subject, [one.prompt for one in made]).argmax(1, keepdim=True)
    assert likely.gather(1, said).mean() >= 0.98


@pytest.mark.parametrize("prompt, word", [
    ("When Mary and John went to the store, John gave a drink to", " Mary"),
    ("When John and Mary went to the store, John gave a drink to", " Mary"),
    ("Then, Mary and John went to the store. Mary gave a book to", " John"),
    ("Tom and Anna were at the park. Anna sent the letter to", " Tom"),
    ("The nurse said that", " she"), ("The mechanic said that", " he"), ("The man said that", " he")])
def test_what_anybody_would_try_first(subject, prompt, word):
    assert subject.tokenizer.decode(after(subject, [prompt]).argmax()) == word


def test_each_template_of_indirect_objects(subject):
    for text in tasks.INDIRECT:
        pairs = data.indirect_objects(400, seed=SEED).keep(lambda pair, text=text: pair.facts["template"] == text)
        right = after(subject, pairs.bases).argmax(1) == ids(subject, [one.continuations[1] for one in pairs.pairs])
        assert len(pairs) > 25 and right.float().mean() >= 0.95, text


def test_no_name_twice_leaves_it_open(subject):
    """Of three names in a corrupted sentence both that were there are likely, the one who gives is not."""
    pairs = data.indirect_objects(200, seed=SEED, orders=["abba"])
    named = [[f" {pair.counterfactual[slice(*pair.counterfactual_spans[name][0])]}"
              for name in ("receiver", "giver", "again")] for pair in pairs.pairs]
    p = after(subject, pairs.counterfactuals).exp()
    a, b, giver = (p.gather(1, ids(subject, column)[:, None])[:, 0] for column in zip(*named, strict=True))
    assert (a + b).mean() > 0.95 and 0.4 < (a / (a + b)).mean() < 0.6 and giver.mean() < 0.02


def test_the_other_giver_turns_it_around(subject):
    pairs = data.indirect_objects(60, seed=SEED, corrupted="other giver")
    wrong, right = zip(*(pair.continuations for pair in pairs.pairs), strict=True)
    assert (total(subject, pairs, of=(list(wrong), list(right))) > 5).all()


def test_a_third_of_the_heads_does_indirect_objects(subject):
    """The logit difference stays where all other heads are as of three other names, and goes where all heads are."""
    kept = {"L0.attn.H3", "L0.attn.H5", "L1.attn.H0", "L1.attn.H1", "L1.attn.H7", "L2.attn.H7", "L3.attn.H2",
            "L3.attn.H4", "L3.attn.H5", "L3.attn.H6"}  # whose loss costs most, on other pairs
    heads = [f"L{layer}.attn.H{head}" for layer in range(4) for head in range(8)]
    pairs = data.indirect_objects(200, seed=SEED + 2)
    wrong, right = zip(*(pair.continuations for pair in pairs.pairs), strict=True)
    found = relprop.effects(subject, pairs.bases, pairs.counterfactuals, LogOdds(list(right), list(wrong)),
                            at={"others": [head for head in heads if head not in kept], "all": heads}, kind="indirect",
                            resamples=10)
    whole = after(subject, pairs.bases)
    rows = torch.arange(len(pairs))
    odds = whole[rows, ids(subject, right)] - whole[rows, ids(subject, wrong)]
    others, every = (1 + found.indirect.mean(1) / odds.mean()).tolist()
    assert len(kept) <= len(heads) / 3 and others >= 0.95 and every < 0.1


def test_year_spans(subject):
    pairs = data.year_spans(300, seed=SEED)
    p = after(subject, pairs.bases).exp()[:, ids(subject, tasks.YEARS)]  # (B, 100)
    start = torch.tensor([pair.facts["year"] for pair in pairs.pairs])[:, None]
    later = (p * (torch.arange(100) > start)).sum(1)
    assert later.mean() >= 0.95
    assert start.unique().numel() > 60 and later[(start > 50)[:, 0]].mean() >= 0.9  # where chance is below a half


def test_years_after_01(subject):
    """The counterfactual of every pair: nearly all years are later, so that it says little of a start."""
    p = after(subject, data.year_spans(100, seed=SEED).counterfactuals).exp()[:, ids(subject, tasks.YEARS)]
    assert p[:, 2:].sum(1).mean() >= 0.95 and p[:, :50].sum(1).mean() > 0.3


def test_effects_recover_what_was_planted(subject):
    """Sign of every profession and rank, by the total effect of making it a person."""
    pairs = data.planted_professions(texts=SAID)
    size = torch.tensor([pair.facts["planted"] for pair in pairs.pairs], dtype=torch.float64)
    effect = total(subject, pairs)
    assert (effect * size < 0).all() and (size != 0).all() and 30 <= len(size) <= 60
    assert spearmanr(-effect, size).statistic >= 0.97
    assert (effect + size).abs().max() < 0.3


@pytest.mark.parametrize("outcome, scale", [(LogOdds, "difference"), (Ratio, "difference"), (Ratio, "ratio")])
def test_effects_of_man_rank_professions(subject, outcome, scale):
    """As of Vig et al.: of y = p(he) / p(she) to a man, the more the likelier a woman."""
    pairs = data.planted_professions(counterfactual="man", texts=SAID)
    effect = total(subject, pairs, outcome, of=(" he", " she"), scale=scale)
    size = [pair.facts["planted"] for pair in pairs.pairs]
    assert (effect > 0).all()  # a man is more of one than any profession
    if (outcome, scale) != (Ratio, "difference"):  # the base's part of which is as good as nothing beside the man's
        assert spearmanr(effect, size).statistic >= 0.97


def test_effects_of_man_and_woman_tell_the_sign(subject):
    """Man and woman are as far from a person, so that the mean of both effects is the profession's own."""
    man, woman = (data.planted_professions(counterfactual=word, texts=SAID) for word in ("man", "woman"))
    even = (total(subject, man) + total(subject, woman)) / 2
    size = torch.tensor([pair.facts["planted"] for pair in man.pairs])
    assert (even * size < 0).all() and spearmanr(-even, size).statistic >= 0.97


def test_professions_in_sentences_that_were_left_out(subject):
    pairs = data.planted_professions(split="test")
    she, he = after(subject, pairs.bases)[:, ids(subject, [" she", " he"])].unbind(1)
    size = torch.tensor([pair.facts["planted"] for pair in pairs.pairs])
    assert len(pairs) > 100 and ((she - he) * size > 0).float().mean() >= 0.98
    assert spearmanr(she - he, size).statistic >= 0.95
    assert (she.exp() + he.exp()).mean() > 0.98


def test_planted_sizes():
    known = tasks.planted()
    assert set(known) == {"professions", "definitional", "neutral"}
    sizes = list(known["professions"].values())
    assert len(set(sizes)) == len(sizes) and min(map(abs, sizes)) >= 0.3 and max(map(abs, sizes)) <= 2.5
    assert sum(size > 0 for size in sizes) == len(sizes) / 2


TEXTS = ["When Mary and John went to the store, John gave a drink to Mary.", " Mary", "32", " 17", "1732",
         "The war lasted from the year 1732 to the year 17", "Mary and John went to the park. John gave a hat to",
         "The nurse said that she was tired."]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_whole_words(subject, text):
    tokenizer = subject.tokenizer
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"][0] == tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    pieces = [text[start:end] for start, end in encoded["offset_mapping"][1:]]
    assert "".join(pieces) == text and pieces == re.findall(r" ?[A-Za-z]+| ?\d\d|[.,]", text)
    assert [tokenizer.decode([row]) for row in encoded["input_ids"][1:]] == pieces


def test_an_unknown_word_is_one_unknown_token(subject):
    encoded = subject.tokenizer("When Mary and Zebedee went", return_offsets_mapping=True)
    assert subject.tokenizer.convert_ids_to_tokens(encoded["input_ids"])[4] == "<unk>"
    assert encoded["offset_mapping"][4] == (13, 21)


def test_every_word_of_the_sentences_is_known(subject):
    assert set(subject.tokenizer.get_vocab()) == {"<|endoftext|>", "<unk>",
                                                  *(word.replace(" ", "\u0120") for word in tasks.words())}
    rng = random.Random(0)
    made = [one for make in (tasks.indirect_sentences, tasks.span_sentences, tasks.profession_sentences)
            for one in make(rng, 200)]
    texts = [one.prompt + word + one.rest for one in made for word in list(one.answers)[:2]]
    assert not any(subject.tokenizer.unk_token_id in row for row in subject.tokenizer(texts)["input_ids"])


# -- the sentences ---------------------------------------------------------------------------------------------------


def combinations(prompts):
    """What is held out of a prompt's words: pairs of names, objects at places, and years of things."""
    found = set()
    for prompt in prompts:
        words = [word.strip(",.") for word in prompt.split()]
        names = [word for word in words if word in tasks.NAMES][:2]
        things = [next(word for word in words if word in kind) for kind in (tasks.PLACES, tasks.OBJECTS)]
        found |= {frozenset(names), tuple(things)}
    return found


def test_training_holds_no_combination_of_the_test():
    rng = random.Random(1)
    train = combinations([one.prompt for one in tasks.indirect_sentences(rng, 20_000)])
    test = combinations(data.indirect_objects(500, seed=SEED).bases)
    assert len(train) > 1000 and len(test) > 100 and not train & test
    assert test & combinations([one.prompt for one in tasks.indirect_sentences(rng, 500, split="test")])


@pytest.mark.parametrize("make, held", [
    (tasks.span_sentences, lambda: data.year_spans(300, seed=SEED)),
    (tasks.profession_sentences, lambda: data.planted_professions(split="test"))])
def test_training_holds_no_prompt_of_the_test(make, held):
    train = {one.prompt for one in make(random.Random(1), 10_000)}
    test = set(held().bases)
    assert len(test) > 100 and not train & test
    assert test & {one.prompt for one in make(random.Random(1), 3000, split="test")}


def test_answers_are_probabilities():
    rng = random.Random(2)
    for make in (tasks.indirect_sentences, tasks.span_sentences, tasks.profession_sentences):
        made = make(rng, 100)
        assert all(abs(sum(one.answers.values()) - 1) < 1e-9 and min(one.answers.values()) > 0 for one in made)
    open_ones = sum(len(one.answers) == 3 for one in tasks.indirect_sentences(rng, 2000)) / 2000
    assert 0.2 < open_ones < 0.3
    nurse = next(one for one in tasks.profession_sentences(rng, 2000) if one.prompt.startswith("The nurse"))
    assert abs(torch.logit(torch.tensor(nurse.answers[" she"])) - tasks.planted()["professions"]["nurse"]) < 1e-5


def test_pairs_are_drawn_by_seed_and_one_token_each(subject):
    for make in (data.indirect_objects, data.year_spans):
        assert make(20, seed=3).fingerprint() == make(20, seed=3).fingerprint() != make(20, seed=4).fingerprint()
        pairs = make(50, seed=SEED)
        assert len(pairs.single(subject.tokenizer, *pairs.names)) == 50
    assert len(data.planted_professions()) == len(tasks.planted()["professions"]) * len(PROFESSIONS)


def test_spans_say_who_is_who():
    for pair in data.indirect_objects(40, seed=SEED).pairs:
        wrong, right = (one.strip() for one in pair.continuations)
        assert {pair.said(name)[0] for name in ("giver", "again")} == {wrong} and pair.said("receiver")[0] == right
        assert len({pair.said(name)[1] for name in ("giver", "again", "receiver")}) == 3
        assert (pair.base.index(right) < pair.base.index(wrong)) == (pair.facts["order"] == "abba")


@pytest.mark.parametrize("make, arguments, message", [
    (data.indirect_objects, dict(count=0), "must be at least 1"),
    (data.indirect_objects, dict(split="dev"), "there are train, test"),
    (data.indirect_objects, dict(corrupted="noise"), "abc, other giver"),
    (data.indirect_objects, dict(orders=[]), "abba, baba"),
    (data.indirect_objects, dict(orders=["aabb"]), "abba, baba"),
    (data.year_spans, dict(split="dev"), "there are train, test"),
    (data.planted_professions, dict(counterfactual="boy"), "man, woman, person or opposite"),
    (data.planted_professions, dict(split="dev"), "there are train, test"),
    (data.planted_professions, dict(split="train", texts=["The {profession} sang because"]), "has no pair"),
])
def test_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
