"""Targets and pairs as a command takes them."""
from __future__ import annotations

import json

import pytest
import torch
from lexicon import WORDS, WRITTEN, reading, writing
from test_cli import run

from relprop import Answer, Contrast, End, Probability, Similarity, Span, Start, Tag, explain, load
from relprop.cli.spoken import spoken


@pytest.mark.parametrize("text, target", [
    ("POSITIVE", "POSITIVE"), (" she", " she"), ("10:30", "10:30"), (":", ":"), ("p:POSITIVE", Probability("POSITIVE")),
    ("p:1", Probability(1)), ("tag:B-LOC@Paris", Tag("B-LOC", word="Paris")), ("tag:@3", Tag(word=3)),
    ("tag:2@New York", Tag(2, word="New York")), ("span:two words", Span("two words")), ("span:", Span()),
    ("start:Paris", Start("Paris")), ("end:", End()), ("answer: Paris", Answer(" Paris")), ("answer:", Answer()),
    ("POSITIVE - NEGATIVE", Contrast("POSITIVE", "NEGATIVE")), ("1 - 0", Contrast(1, 0)),
    ("answer: Paris - answer: Rome", Contrast(Answer(" Paris"), Answer(" Rome"))),
    (" he -  she", Contrast(" he", " she")),
])
def test_what_a_text_means(text, target):
    assert spoken(text) == target


def test_a_similarity_is_one():
    assert isinstance(spoken("similarity:"), Similarity) and spoken("similarity:a cat").to == "a cat"


@pytest.mark.parametrize("text", ["tag:B-LOC", "tag:B-LOC@", "tag:"])
def test_a_tag_has_a_word(text):
    with pytest.raises(ValueError, match="which word has the tag"):
        spoken(text)


def saved(folder, head, tokenizer, **config):
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, head)
    model = kind(kind.config_class(initializer_range=0.5, pad_token_id=0, **config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


BERT = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32)


def told(*arguments):
    result = run("explain", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_question_with_its_context(tmp_path):
    model = saved(tmp_path / "reader", "BertForQuestionAnswering", reading(), **BERT)
    found = told("who saw bob", "--pair", "alice saw bob", "-m", model, "-t", "span:alice")
    r = explain(load(model), [("who saw bob", "alice saw bob")], Span("alice"))
    assert found["target"] == ["answer 'alice'"] and found["value"] == r.value.tolist()
    (tmp_path / "contexts.txt").write_text("alice saw bob\nthe dog saw bob\n")
    (tmp_path / "questions.txt").write_text("who saw bob\nwho saw\n")
    assert len(told(tmp_path / "questions.txt", "--pair", tmp_path / "contexts.txt", "-m", model)["target"]) == 2


def test_a_tag_of_a_word(tmp_path):
    model = saved(tmp_path, "BertForTokenClassification", reading(), num_labels=2, id2label={0: "O", 1: "PER"}, **BERT)
    assert told("alice saw bob", "-m", model, "-t", "tag:PER@alice")["target"] == ["PER of 'alice'"]
    result = run("explain", "alice saw bob", "-m", model)
    assert result.exit_code == 2 and "say which one to explain: Tag(word='...')" in result.stderr


def test_two_texts(tmp_path):
    model = saved(tmp_path, "BertModel", reading(), **BERT)
    found = told("alice saw bob", "--pair", "a cat", "-m", model, "-t", "similarity:")
    r = explain(load(model), [("alice saw bob", "a cat")], Similarity())
    assert found["value"] == r.value.tolist() and len(r.words(0)) == 5


def test_an_answer(tmp_path):
    model = saved(tmp_path, "GPT2LMHeadModel", writing(), vocab_size=len(WRITTEN), n_embd=16, n_layer=1, n_head=2,
                  n_positions=32, bos_token_id=2, eos_token_id=3)
    result = run("explain", "alice was born in", "-m", model, "-t", "answer: paris in london")
    assert result.exit_code == 0 and "log P of ' paris in london'" in result.stdout
    assert "\u0120paris" in result.stdout  # what it said is listed behind the words


@pytest.mark.parametrize("arguments, said", [
    (["alice", "--pair", "no.txt"], "no file no.txt"),
    (["alice", "--pair", "a\nb"], "a pair of texts and POSITIVE has no"),
])
def test_pairs_that_are_none(arguments, said, tmp_path):
    if "\n" in arguments[-1]:
        (tmp_path / "two.txt").write_text(arguments[-1])
        arguments, said = [*arguments[:-1], tmp_path / "two.txt"], "2 second texts for 1 texts"
    result = run("explain", *arguments)
    assert result.exit_code == 2 and said in result.stderr
