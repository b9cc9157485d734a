"""Words and tokens stay what they are, batched or alone, and every unit survives JSON."""

from __future__ import annotations

import json

import pytest
import torch

from relprop.tokens import Batch, ImageUnits, TensorUnits, encode, from_ids, units

TEXTS = ["Mary didn't see it: Mary, or 3.14 of her ...", "Once upon a time"]
FOLDERS = {"bert": "models/minilm-sentiment", "gpt2": "data/gpt2-tokenizer", "llama": "models/stories260k"}


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request):
    return _tokenizer(request.param)


def _tokenizer(name):
    from conftest import SHARED
    from transformers import AutoTokenizer

    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: real tokenizers do not ship with relprop")
    return AutoTokenizer.from_pretrained(SHARED / FOLDERS[name])


def words_of(read, row):
    """What the tokens of each word spell in the text, put together by the ids."""
    spelled = {}
    for word, (start, end) in zip(read.word_ids[row], read.offsets[row], strict=True):
        if word is not None:
            low, high = spelled.get(word, (start, end))
            spelled[word] = (min(low, start), max(high, end))
    return [read.texts[row][slice(*spelled[word])].strip() for word in sorted(spelled)]


def test_words_are_read_the_same_by_every_tokenizer(tokenizer):
    _, read = encode(tokenizer, TEXTS, pad_id=0)
    assert read.words[0] == ["Mary", "didn't", "see", "it", ":", "Mary", ",", "or", "3.14", "of", "her", "..."]
    assert read.words[1] == TEXTS[1].split()
    assert read.texts == TEXTS


def test_tokens_of_a_word_spell_it(tokenizer):
    _, read = encode(tokenizer, TEXTS, pad_id=0)
    for row in range(2):
        assert words_of(read, row) == read.words[row]
        ids = [word for word in read.word_ids[row] if word is not None]
        assert ids == sorted(ids) and set(ids) == set(range(len(read.words[row])))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_read_the_same_in_a_batch(tokenizer, side):
    kept, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        tensors, read = encode(tokenizer, TEXTS, pad_id=0)
        alone, one = encode(tokenizer, TEXTS[1:], pad_id=0)
    finally:
        tokenizer.padding_side = kept
    real = tensors["attention_mask"][1].bool()
    assert real.sum() < len(real) and real[-1] == (side == "left" and tokenizer.cls_token is None)
    assert torch.equal(tensors["input_ids"][1][real], alone["input_ids"][0])
    assert [word for word, kept in zip(read.word_ids[1], real, strict=True) if kept] == one.word_ids[0]
    assert read.words[1] == one.words[0]
    assert read.padding[1] == (~real).tolist() and not any(read.padding[0])
    assert all(word is None for word, pad in zip(read.word_ids[1], read.padding[1], strict=True) if pad)


def test_special_tokens_are_no_words(tokenizer):
    _, read = encode(tokenizer, TEXTS[1:], pad_id=0)
    assert [word is None for word in read.word_ids[0]] == read.special[0]
    assert sum(read.special[0]) == {"[CLS]": 2, "<s>": 1}.get(read.tokens[0][0], 0)


def test_tokenizer_is_left_as_it_is(tokenizer):
    before = (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side)
    encode(tokenizer, TEXTS, pad_id=0, limit=5)
    assert before == (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side)


def test_ids_alone_are_read_as_the_text_was(tokenizer):
    tensors, read = encode(tokenizer, TEXTS, pad_id=tokenizer.pad_token_id or 0)
    again = from_ids(tensors["input_ids"], tensors["attention_mask"], tokenizer)
    assert again.tokens == read.tokens and again.padding == read.padding and again.special == read.special
    lower = tokenizer.mask_token is not None  # this one also forgets where spaces were not
    if not lower:
        assert again.texts == read.texts
        assert again.words == read.words and again.word_ids == read.word_ids
    else:
        assert again.words[1] == [word.lower() for word in read.words[1]]


def test_ids_without_tokenizer_are_words_of_their_own():
    read = from_ids(torch.tensor([[31, 5, 5, 0]]), torch.tensor([[1, 1, 1, 0]]))
    assert read.tokens == [["31", "5", "5", "0"]] and read.words == [["31", "5", "5"]]
    assert read.word_ids == [[0, 1, 2, None]] and read.special == read.padding and read.texts == ["31 5 5"]


def test_newlines_and_emoji_are_units_too():
    _, read = encode(_tokenizer("gpt2"), ["Hi \U0001f600!\nBye"], pad_id=0)
    assert read.words == [["Hi", "\U0001f600", "!", "\n", "Bye"]]


def test_scripts_without_spaces_are_read_by_character():
    _, read = encode(_tokenizer("bert"), ["很好 film"], pad_id=0)
    assert read.words == [["很", "好", "film"]]


def test_pair_is_one_text():
    _, read = encode(_tokenizer("bert"), [("Who came?", "Mary came.")], pad_id=0)
    assert read.texts == ["Who came? Mary came."] and read.words == [["Who", "came", "?", "Mary", "came", "."]]
    assert words_of(read, 0) == read.words[0]


def test_a_slow_tokenizer_is_read_by_its_spelling():
    from transformers import ByT5Tokenizer

    tensors, read = encode(ByT5Tokenizer(), ["It is", "so"], pad_id=0)
    assert tensors["attention_mask"].sum(1).tolist() == [6, 3]  # a token a byte, and the end
    assert read.words == [["It", "is"], ["so"]]
    assert read.word_ids == [[0, 0, 1, 1, 1, None], [0, 0, None, None, None, None]]


def test_text_without_tokens(tokenizer):
    with pytest.raises(ValueError, match="no token"):
        encode(tokenizer, ["" if tokenizer.mask_token is None else "\u200b"], pad_id=0)


def _every_kind():
    read = from_ids(torch.tensor([[3, 4], [5, 0]]), torch.tensor([[1, 1], [1, 0]]))
    images = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3)
    return [
        read,
        ImageUnits((4, 6), (2, 2), (2, 3), images),
        ImageUnits((4, 6), None, None, images),
        TensorUnits((2, 7)),
    ]


@pytest.mark.parametrize("one", _every_kind(), ids=lambda one: type(one).__name__)
def test_units_survive_json(one):
    again = units(json.loads(json.dumps(one.to_dict())))
    assert again == one and type(again) is type(one)
    assert again.take([1]) != one and again.take([1]).rows == 1
    assert again.take([0, 1]) == one


def test_unknown_units():
    with pytest.raises(ValueError, match="'sound'"):
        units({"kind": "sound"})


def test_batch_takes_rows():
    read = _every_kind()[0]
    batch = Batch(
        (), {"input_ids": torch.tensor([[3, 4], [5, 0]]), "scale": torch.tensor(2.0)}, 2, read, torch.tensor([1, 0])
    )
    taken = batch.take(torch.tensor([1, 1, 0]))
    assert taken.rows == 3 and taken.kwargs["input_ids"].tolist() == [[5, 0], [5, 0], [3, 4]]
    assert taken.last.tolist() == [0, 0, 1] and taken.read is None and taken.kwargs["scale"] == 2
    assert taken.units == read.take([1, 1, 0])
    assert batch.real(2).tolist() == [[True, True], [True, False]] and batch.real(5).all()
