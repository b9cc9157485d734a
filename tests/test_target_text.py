"""Targets of models that read a text: tags of tokens, answers in a context, several labels, regressions, masks."""
from __future__ import annotations

import re

import pytest
import torch
from lexicon import WORDS, reading

import relprop
from relprop import Class, Contrast, End, Probability, Regression, Span, Start, Tag, Token, explain, load

SMALL = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=64, initializer_range=0.5, pad_token_id=0)
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
TEXTS = ["alice saw bob in paris", "the dog saw alice"]
PAIRS = [("who saw bob", "alice saw bob in paris"), ("where is the dog", "bob saw the dog in london today")]


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every model here is random, the same each time."""


def model(head: str, **config):
    import transformers

    kind = getattr(transformers, head)
    made = kind(kind.config_class(**SMALL | config)).double().eval()
    for parameter in made.parameters():  # biases start at zero, at which errors hide
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return load(made, reading())


def tagger(**config):
    return model("BertForTokenClassification", id2label=dict(enumerate(TAGS)), num_labels=len(TAGS), **config)


def reader():
    return model("BertForQuestionAnswering")


def balanced(r) -> bool:
    return bool((r.ledger.error < 1e-9).all())


def rowwise(subject, inputs, targets, **options):
    """Maps of the rows by themselves, padded to the length of the longest."""
    alone = [explain(subject, [one], [target], **options) for one, target in zip(inputs, targets, strict=True)]
    width = max(r.map.shape[1] for r in alone)
    return torch.cat([torch.nn.functional.pad(r.map, (0, width - r.map.shape[1])) for r in alone])


# -- tags -------------------------------------------------------------------------------------------------------------

def test_a_tag_is_the_logit_of_the_words_first_token():
    subject = tagger()
    batch = subject.prepare(TEXTS)
    z = subject.forward(batch).logits
    for where, at in [({"word": "paris"}, 5), ({"word": 4}, 5), ({"chars": (17, 22)}, 5), ({"token": 5}, 5),
                      ({"token": -2}, 5), ({"word": "alice"}, 1), ({"word": -5}, 1)]:
        r = explain(subject, TEXTS[:1], Tag("B-LOC", **where))
        assert torch.allclose(r.value.double(), z[0, at, 3], atol=1e-6), where
        assert balanced(r)
    assert r.target == ["B-LOC of 'alice'"]


def test_a_word_of_several_tokens():
    subject = tagger()
    text = "unseen paris"  # un ##seen
    batch = subject.prepare(text)
    assert batch.units.tokens[0] == ["[CLS]", "un", "##seen", "paris", "[SEP]"]
    z = subject.forward(batch).logits[0, :, 1]
    first, mean = (explain(subject, text, Tag(1, word="unseen", over=over)) for over in ("first", "mean"))
    assert torch.allclose(first.value.double(), z[1], atol=1e-6)
    assert torch.allclose(mean.value.double(), z[1:3].mean(), atol=1e-6)
    parts = [explain(subject, text, Tag(1, token=t)).map for t in (1, 2)]
    assert torch.allclose(mean.map, sum(parts) / 2, atol=1e-5) and balanced(mean)
    several = explain(subject, "bob saw paris", Tag(1, word="saw paris", over="mean"))
    assert several.target == ["B-PER of 'saw paris'"]


def test_tags_of_a_batch_are_those_of_its_rows():
    subject = tagger()
    targets = [Tag("B-LOC", word="paris"), Contrast(Tag("B-PER", word="alice"), Tag("O", word="alice"))]
    r = explain(subject, TEXTS, targets)
    assert balanced(r) and torch.allclose(r.map, rowwise(subject, TEXTS, targets), atol=1e-5)
    a, b = (explain(subject, TEXTS[1:], Tag(tag, word="alice")).map for tag in ("B-PER", "O"))
    assert torch.allclose(r.map[1, :6], (a - b)[0], atol=1e-5)
    assert r.target[1] == "B-PER of 'alice' - O of 'alice'"


def test_a_predicted_tag_stays_when_the_input_changes():
    subject = tagger()
    r = explain(subject, TEXTS, Tag(word="alice"))
    z = subject.forward(subject.prepare(TEXTS)).logits
    best = [int(z[0, 1].argmax()), int(z[1, 4].argmax())]
    assert r.target == [f"{TAGS[tag]} of 'alice'" for tag in best]
    p = explain(subject, TEXTS, Probability(Tag(word="alice")))
    assert torch.allclose(p.value.double(), torch.stack([z[0, 1], z[1, 4]]).softmax(1).amax(1), atol=1e-6)
    curve = r.check(steps=3, randoms=2)
    assert torch.allclose(curve.value, r.value)
    assert not torch.equal(curve.morf[:, 0], curve.morf[:, -1])


def test_without_a_word_the_model_says_which_there_are():
    subject = tagger()
    z = subject.forward(subject.prepare(TEXTS[0])).logits
    for target in (None, "B-LOC", 3, Tag()):
        with pytest.raises(ValueError, match=r"say which one to explain: Tag\(word='...'\).* In row 0 it says"):
            explain(subject, TEXTS[0], target)
    said = [TAGS[tag] for tag in z[0, 1:6].argmax(1)]
    usual = max(said, key=said.count)
    with pytest.raises(ValueError) as raised:
        explain(subject, TEXTS[0])
    for word, tag in zip(TEXTS[0].split(), said, strict=True):
        assert (f"{word!r} {tag}" in str(raised.value)) == (tag != usual)


@pytest.mark.parametrize("target, said", [
    (Tag("B-LOC", word="rome"), "'rome' does not stand in the text of row 0; its words are 0 'alice', 1 'saw'"),
    (Tag("B-LOC", word=9), "no word 9 in row 0, which has 5"),
    (Tag("B-LOC", token=7), "no position 7 in row 0, which has 7 tokens"),
    (Tag("B-LOC", chars=(20, 40)), r"no characters \(20, 40\) in the text of row 0, which has 22"),
    (Tag("B-LOC", chars=(5, 6)), "' ' of row 0 is not among the tokens"),
    (Tag("B-ORG", word=0), "no label 'B-ORG'; there are O, B-PER"),
    (Tag(9, word=0), r"no tag index 9; the model has 0 to 3 \(O"),
    (Tag("O", word=0, token=1), "give one of them"),
    (Tag("O", word=0, over="last"), "'first' token or the 'mean' of them, not 'last'"),
])
def test_tags_that_are_not_there(target, said):
    with pytest.raises(ValueError, match=said):
        explain(tagger(), TEXTS[0], target)


def test_a_word_that_stands_twice():
    subject = tagger()
    with pytest.raises(ValueError, match=r"'bob' stands 2 times .* chars= one of \(0, 3\), \(8, 11\)"):
        explain(subject, "bob saw bob", Tag(1, word="bob"))
    z = subject.forward(subject.prepare("bob saw bob")).logits
    for chars, at in (((0, 3), 1), ((8, 11), 3)):
        assert torch.allclose(explain(subject, "bob saw bob", Tag(1, chars=chars)).value.double(), z[0, at, 1])


def test_a_pipeline_of_named_entities():
    from transformers import pipeline

    own = tagger()
    subject = load(pipeline("ner", model=own.model, tokenizer=own.processor))
    assert subject.task == "token-classification"
    assert explain(subject, TEXTS[0], Tag("B-LOC", word="paris")).target == ["B-LOC of 'paris'"]


def test_tags_of_a_module_of_ones_own():
    """What takes a tensor has positions, and no words."""
    module = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).double()
    own = torch.nn.Sequential(module, torch.nn.Linear(16, 4).double())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    r = explain(own, x, [Tag(1, token=3), Contrast(Tag(2, token=-1), Tag(0, token=0))])
    z = own.eval()(x)
    assert torch.allclose(r.value.double(), torch.stack([z[0, 3, 1], z[1, 4, 2] - z[1, 0, 0]]), atol=1e-6)
    assert balanced(r) and r.target[0] == "class 1 of token 3"
    with pytest.raises(ValueError, match="the input is none; give text or token ids, or the position of a token"):
        explain(own, x, Tag(1, word=3))


def test_a_classifier_has_no_tags():
    with pytest.raises(ValueError, match=r"\(1, 3\) are not \(rows, positions, tags\); give the index or the label"):
        explain(model("BertForSequenceClassification", num_labels=3), TEXTS[0], Tag(1, word=0))


# -- answers in a context ---------------------------------------------------------------------------------------------

def test_an_answer_is_its_start_and_end():
    subject = reader()
    out = subject.forward(subject.prepare(PAIRS[:1]))
    # [CLS] who saw bob [SEP] alice saw bob in paris [SEP]
    for target, at in [(Span("bob in paris"), (7, 9)), (Span(chars=(10, 22)), (7, 9)), (Span(tokens=(7, 9)), (7, 9)),
                       (Span("bob"), (7, 7)), (Span(tokens=(0, 0)), (0, 0))]:
        r = explain(subject, PAIRS[:1], target)
        assert torch.allclose(r.value.double(), out.start_logits[0, at[0]] + out.end_logits[0, at[1]], atol=1e-5)
        assert balanced(r)
    assert explain(subject, PAIRS[:1], "bob in paris").target == ["answer 'bob in paris'"]
    span, start, end = (explain(subject, PAIRS[:1], kind("bob in paris")) for kind in (Span, Start, End))
    assert torch.allclose(start.value.double(), out.start_logits[0, 7], atol=1e-6)
    assert torch.allclose(end.value.double(), out.end_logits[0, 9], atol=1e-6)
    assert torch.allclose(span.map, start.map + end.map, atol=1e-5)
    assert span.target == ["answer 'bob in paris'"] and start.target == ["start of 'bob in paris'"]
    p = explain(subject, PAIRS[:1], Probability(Start("bob in paris")))
    assert torch.allclose(p.value.double(), out.start_logits.softmax(1)[0, 7], atol=1e-6) and balanced(p)


def test_the_predicted_answer_lies_in_the_context():
    subject = reader()
    r = explain(subject, PAIRS)
    out = subject.forward(subject.prepare(PAIRS))
    for row, (question, context) in enumerate(PAIRS):
        first = len(question.split()) + 2
        places = range(first, first + len(context.split()))
        values = {(s, e): (out.start_logits[row, s] + out.end_logits[row, e]).item()
                  for s in places for e in places if s <= e}
        s, e = max(values, key=values.get)
        assert abs(float(r.value[row]) - values[s, e]) < 1e-5
        assert r.target[row] == f"answer {' '.join(context.split()[s - first:e - first + 1])!r}"
    assert balanced(r) and torch.allclose(r.map, rowwise(subject, PAIRS, [None, None]), atol=1e-5)
    assert torch.equal(r.map, explain(subject, PAIRS, Span()).map)
    assert torch.allclose(r.check(steps=2, randoms=2).value, r.value)


def test_an_answer_from_ids_without_texts():
    """Where only ids are known, the context stands behind the special token that ends the question."""
    subject = reader()
    ids = subject.prepare(PAIRS[:1]).kwargs
    r = explain(subject, dict(ids), None)
    assert torch.allclose(r.value, explain(subject, PAIRS[:1]).value)


def test_the_best_answer_is_not_the_best_start_and_the_best_end(monkeypatch):
    """An end before the start is no answer, however large the logits are."""
    from types import SimpleNamespace

    from relprop.target import Vocabulary

    subject = reader()
    batch = subject.prepare(PAIRS[:1])
    starts, ends = torch.zeros(1, 11), torch.zeros(1, 11)
    starts[0, 9], ends[0, 6], starts[0, 1], ends[0, 2], starts[0, 5], ends[0, 7] = 5.0, 5.0, 99.0, 99.0, 3.0, 3.0
    output = SimpleNamespace(start_logits=starts, end_logits=ends)
    fixed = Vocabulary(task="question-answering").targets(None, 1).fixed(output, batch)
    assert fixed.targets[0].tokens == (5, 6)  # 3 + 5; (9, 9) has 5, (5, 7) 6, and (9, 6) ends before it starts


@pytest.mark.parametrize("target, said", [
    (Span("who saw"), "'who saw' does not stand in the context of row 0"),
    (Span("rome"), "'rome' does not stand in the context"),
    (Span(chars=(10, 50)), r"no characters \(10, 50\) in the context of row 0, which has 22"),
    (Span(tokens=(3, 40)), "no position 40 in row 0, which has 11 tokens"),
    (Span(tokens=(9, 7)), "from token 9 to token 7 of row 0 ends before it starts"),
    (Span("bob", chars=(1, 2)), "give one of them"),
    (Probability(Span("bob")), "a probability is of a class or a token"),
    (Class(0), r"give Span\(\), Start\(\) or End\(\)"),
])
def test_answers_that_are_not_there(target, said):
    with pytest.raises((ValueError, TypeError), match=said):
        explain(reader(), PAIRS[:1], target)


def test_an_answer_of_a_model_that_gives_none():
    with pytest.raises(TypeError, match="no start logits in an output"):
        explain(tagger(), TEXTS[0], Start(token=1))


# -- several labels, regressions --------------------------------------------------------------------------------------

def test_each_label_of_a_multilabel_model():
    subject = model("BertForSequenceClassification", problem_type="multi_label_classification", num_labels=3,
                    id2label={0: "toxic", 1: "rude", 2: "fine"})
    z = subject.forward(subject.prepare(TEXTS)).logits
    r = explain(subject, TEXTS, ["toxic", Probability("rude")])
    assert torch.allclose(r.value.double(), torch.stack([z[0, 0], z[1, 1].sigmoid()]), atol=1e-6) and balanced(r)
    assert r.target == ["toxic", "P(rude)"]
    assert torch.allclose(r.map, rowwise(subject, TEXTS, ["toxic", Probability("rude")]), atol=1e-5)


def test_a_regression_has_one_output_or_is_asked_which():
    one = model("BertForSequenceClassification", problem_type="regression", num_labels=1)
    r = explain(one, TEXTS)
    assert torch.allclose(r.value.double(), one.forward(one.prepare(TEXTS)).logits[:, 0]) and balanced(r)
    assert r.target == ["output 0"] * 2
    assert torch.equal(r.map, explain(one, TEXTS, Regression()).map)
    with pytest.raises(ValueError, match="not of an output of a regression"):
        explain(one, TEXTS, Probability())
    several = model("BertForSequenceClassification", problem_type="regression", num_labels=2,
                    id2label={0: "valence", 1: "arousal"})
    with pytest.raises(ValueError, match=r"this regression has 2 outputs \(valence, arousal\), .* say which"):
        explain(several, TEXTS)
    r = explain(several, TEXTS, ["arousal", Regression("valence")])
    z = several.forward(several.prepare(TEXTS)).logits
    assert torch.allclose(r.value.double(), torch.stack([z[0, 1], z[1, 0]])) and r.target == ["arousal", "valence"]
    with pytest.raises(ValueError, match="no class index 2; the model has 0 to 1"):
        explain(several, TEXTS, 2)


# -- masks ------------------------------------------------------------------------------------------------------------

def test_several_masks_by_position():
    subject = model("BertForMaskedLM")
    text = "alice saw [MASK] in [MASK]"
    z = subject.forward(subject.prepare(text)).logits
    with pytest.raises(ValueError, match="row 0 has no mask token, or several"):
        explain(subject, text, "bob")
    for position in (3, 5):
        r = explain(subject, text, Token("bob", position=position))
        assert torch.allclose(r.value.double(), z[0, position, subject.tokenizer.convert_tokens_to_ids("bob")])
        assert balanced(r)
    both = explain(subject, [text] * 2, [Token("bob", position=3), Token("paris", position=5)])
    assert torch.allclose(both.map[1], explain(subject, text, Token("paris", position=5)).map[0], atol=1e-5)


# -- effects and other methods ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("head, base, other, target", [
    ("BertForTokenClassification", "alice saw bob", "alice saw paris", Tag(1, word=2)),
    ("BertForTokenClassification", "alice saw bob", "alice saw paris",
     Contrast(Tag(1, word="bob"), Tag(0, word="bob"))),
    ("BertForQuestionAnswering", ("who saw bob", "alice saw bob"), ("who saw paris", "alice saw bob"), None),
    ("BertForQuestionAnswering", ("who saw bob", "alice saw bob"), ("who saw paris", "alice saw bob"), Start("alice")),
])
def test_targets_are_outcomes(head, base, other, target):
    subject = model(head)
    found = relprop.effects(subject, base, other, target, kind="total")
    batch = subject.prepare([base])
    fixed = subject.targets(target, 1).fixed(subject.forward(batch), batch)
    there = subject.prepare([other])
    expected = fixed.value(subject.forward(there), there) - fixed.value(subject.forward(batch), batch)
    assert torch.allclose(found.total.double().flatten(), expected.double().detach(), atol=1e-6)
    assert expected.abs() > 1e-6


@pytest.mark.parametrize("method", ["rollout", "integrated-gradients", "occlusion", "gradient", "attention-gradcam"])
def test_every_kind_of_method_takes_them(method):
    r = explain(tagger(), TEXTS, [Tag("B-LOC", word="paris"), Tag("O", word="dog")], method=method)
    assert r.map.abs().sum() > 0 and re.match("B-LOC of 'paris'", r.target[0])
    assert explain(reader(), PAIRS, method=method).map.abs().sum() > 0
