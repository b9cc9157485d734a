"""Data with a ground truth: what is drawn follows its rule, what is read is read right, marks come to their places."""
from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from relprop import data
from relprop.data import Data, Example
from relprop.data.alignment import aligned, prepared, word_of_tokens
from relprop.data.sequence import BRACKETS, END, START, balanced
from relprop.load import load
from relprop.pixels import Pixels, plain
from relprop.subject import Subject
from relprop.target import Token
from relprop.zoo.digits import Handwriting, canvases

DRAWN = list(data.MAKERS)


@pytest.fixture(scope="module")
def reviews():
    return load("reviews-bert")


def written(path, *lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


# Drawn data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_data_is_the_same_for_the_same_seed(name):
    first, again, other = (data.get(name, count=6, seed=seed) for seed in (1, 1, 2))
    assert len(first) == 6 and first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert all(one.marked.any() and not one.marked.all() for one in first.examples)
    assert first.name == name and all(one.group is None for one in first.examples)


def test_palindromes_are_repaired_where_they_are_marked_and_only_there(seed):
    found = data.palindromes(60, seed=3, length=8, mismatches=(1, 2))
    wrong = set()
    for one in found.examples:
        ids = torch.tensor(one.input)
        assert ids[0] == START and ids[-1] == END and one.target == 0
        inner, marked = ids[1:-1], one.marked[1:-1]
        assert torch.equal(marked, inner != inner.flip(0)) and not one.marked[[0, -1]].any()
        wrong.add(int(marked.sum()) // 2)
        repaired = torch.where(marked & (torch.arange(8) < 4), inner.flip(0), inner)  # one of each pair is enough
        assert torch.equal(repaired, repaired.flip(0))
    assert wrong == {1, 2}
    with pytest.raises(ValueError, match="even length"):
        data.palindromes(1, length=7)


def test_brackets_are_balanced_once_a_marked_one_is_turned():
    for one in data.brackets(40, seed=1, length=(4, 10)).examples:
        assert one.input[0] == BRACKETS["start"] and one.input[-1] == BRACKETS["end"]
        string = [1 if token == BRACKETS["("] else -1 for token in one.input[1:-1]]
        assert not balanced(string) and len(string) in (4, 6, 8, 10)
        repairs = [balanced([*string[:at], -string[at], *string[at + 1:]]) for at in range(len(string))]
        assert repairs == one.marked[1:-1].tolist() and any(repairs)


def test_balanced_strings_are_all_drawn_alike():
    from collections import Counter

    from relprop.data.sequence import _balanced_string

    rng = torch.Generator().manual_seed(0)
    counts = Counter(tuple(_balanced_string(6, rng)) for _ in range(2000))
    assert len(counts) == 5 and all(map(balanced, map(list, counts)))  # the Catalan number of 3
    assert min(counts.values()) > 320 and max(counts.values()) < 480


def test_sorted_lists_ask_for_the_next_element():
    places = set()
    for one in data.sorted_lists(50, seed=1, length=5).examples:
        given, behind = one.input[:5], one.input[6:]
        assert one.input[5] == 51 and behind == sorted(given)[:len(behind)]
        assert one.target == Token(sorted(given)[len(behind)])
        marked = one.marked.nonzero().flatten().tolist()
        assert [one.input[at] for at in marked[:-1]] == [one.target.token] and marked[-1] == len(one.input) - 1
        places.add(len(behind))
    assert places == set(range(5))


@pytest.mark.parametrize("name, maker", [("gpt2-palindrome", data.palindromes), ("gpt2-sorted-list", data.sorted_lists),
                                         ("gpt2-palindrome-hard", data.palindromes)])
def test_the_models_of_the_algorithms_know_the_answers(shared, name, maker):
    subject, drawn = load(shared / "models" / name), maker(200, seed=5)
    batch = prepared(subject, drawn)
    targets = subject.targets([one.target for one in drawn.examples], batch.rows)
    with torch.no_grad():
        output = subject.forward(batch)
        right = [target.choices(reading)[row].argmax() == target.index for row, target in enumerate(targets.targets)
                 for reading in [targets._reading(output, batch, list(range(batch.rows)))]]
    assert np.mean(right) > 0.9  # the hardest ones, with a single pair that differs, are among them
    truths = aligned(subject, batch, drawn.examples)
    for row, (one, truth) in enumerate(zip(drawn.examples, truths)):
        ids = truth.units(batch.kwargs["input_ids"][row].float())
        assert ids.tolist() == one.input and torch.equal(truth.marked, one.marked)


class Brackets(nn.Module):
    """The bracket model of the shared folder as a torch encoder."""

    def __init__(self, weights: dict[str, torch.Tensor], layers: int, heads: int) -> None:
        super().__init__()
        vocabulary, width = weights["embed.W_E"].shape
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(*weights["pos_embed.W_pos"].shape)
        self.tokens.weight.data, self.places.weight.data = weights["embed.W_E"], weights["pos_embed.W_pos"]
        block = nn.TransformerEncoderLayer(width, heads, weights["blocks.0.mlp.W_in"].shape[1], 0.0, batch_first=True,
                                           norm_first=True, activation="relu")
        self.encoder = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)
        self.load_state_dict(self._converted(weights, layers), strict=False)

    @staticmethod
    def _converted(w: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
        found = {"encoder.norm.weight": w["ln_final.w"], "encoder.norm.bias": w["ln_final.b"],
                 "head.weight": w["unembed.W_U"].T, "head.bias": w["unembed.b_U"]}
        for i in range(layers):
            ours, theirs = f"encoder.layers.{i}", f"blocks.{i}"
            flat = lambda name, at=theirs: w[f"{at}.attn.{name}"]
            found |= {
                f"{ours}.self_attn.in_proj_weight": torch.cat([flat(f"W_{x}").transpose(1, 2).flatten(0, 1)
                                                               for x in "QKV"]),
                f"{ours}.self_attn.in_proj_bias": torch.cat([flat(f"b_{x}").flatten() for x in "QKV"]),
                f"{ours}.self_attn.out_proj.weight": flat("W_O").flatten(0, 1).T,
                f"{ours}.self_attn.out_proj.bias": flat("b_O"),
                f"{ours}.linear1.weight": w[f"{theirs}.mlp.W_in"].T, f"{ours}.linear1.bias": w[f"{theirs}.mlp.b_in"],
                f"{ours}.linear2.weight": w[f"{theirs}.mlp.W_out"].T, f"{ours}.linear2.bias": w[f"{theirs}.mlp.b_out"],
                f"{ours}.norm1.weight": w[f"{theirs}.ln1.w"], f"{ours}.norm1.bias": w[f"{theirs}.ln1.b"],
                f"{ours}.norm2.weight": w[f"{theirs}.ln2.w"], f"{ours}.norm2.bias": w[f"{theirs}.ln2.b"]}
        return found

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        return self.head(self.encoder(x, src_key_padding_mask=attention_mask == 0)[:, 0])


def test_the_bracket_model_knows_what_is_not_balanced(shared):
    from safetensors.torch import load_file

    folder = shared / "models" / "tl-brackets"
    model = Brackets(load_file(folder / "model.safetensors"), 3, 2).eval()
    with np.load(folder / "examples.npz") as held, torch.no_grad():
        ids = torch.from_numpy(held["tokens"][:200]).long()
        torch.testing.assert_close(model(ids, (ids != BRACKETS["pad"]).long()), torch.from_numpy(held["logits"][:200]),
                                   atol=2e-4, rtol=1e-4)
    subject = Subject(model, modality="text")
    drawn = data.brackets(200, seed=2)
    batch = prepared(subject, drawn)
    with torch.no_grad():
        assert (subject.forward(batch).argmax(1) == 0).float().mean() > 0.97


def test_digits_mark_the_ink_of_the_digit_that_is_asked_for():
    found, drawn = data.digits(8, seed=2), canvases(8, seed=2)
    for row, one in enumerate(found.examples):
        assert torch.equal(one.marked, drawn.masks[row, int(one.target)])
        there = {str(digit) for digit in drawn.labels[row].nonzero().flatten().tolist()}
        assert there == {one.target, *one.others} and all(mask.any() for mask in one.others.values())
        assert one.input.dtype == np.uint8 and (one.input[one.marked.numpy()] > 40).mean() > 0.9
    assert len({one.target for one in found.examples}) > 3


def test_canvases_by_another_hand():
    glyphs, labels = torch.zeros(20, 8, 8), torch.arange(20) % 10
    glyphs[:, 2:6, 2:6] = 1  # squares
    drawn = canvases(3, seed=1, clutter=0, handwriting=Handwriting(glyphs, labels))
    assert 0 < drawn.masks.sum((2, 3))[drawn.labels].float().std() < 30  # squares of about one size
    assert not torch.equal(drawn.images, canvases(3, seed=1, clutter=0).images)
    with pytest.raises(ValueError, match="label each, of 0 to 9"):
        Handwriting(glyphs, torch.zeros(20).long())


def test_mnist_is_read_and_labelled(shared, tmp_path):
    found = data.mnist(shared / "data" / "mnist", 60, seed=1)
    subject = load("digits-vit")
    batch = prepared(subject, found)
    with torch.no_grad():
        right = subject.targets([one.target for one in found.examples], 60).value(subject.forward(batch), batch) > 0
    assert right.float().mean() > 0.5  # nothing near that without the right labels: three classes of ten are there
    with pytest.raises(ValueError, match="t10k.npz"):
        data.mnist(tmp_path)


# Data that is read ---------------------------------------------------------------------------------------------------


def test_reviews_are_read_as_their_files_say(tmp_path):
    written(tmp_path / "movies_test_passages.jsonl.gz",
            {"doc": "a", "words": ["bad", "very", "bad"], "evidence": [[1, 3]], "label": 0})
    one = data.movies(tmp_path).examples[0]
    assert one.input == "bad very bad" and one.target == "NEGATIVE" and one.group == "a"
    assert one.marked.tolist() == [False, True, True] and one.words[2] == (9, 12)
    sentences = written(tmp_path / "sst2_test_words.jsonl",
                        {"words": ["not", "bad"], "label": 1, "leaf_labels": [2, 0]},
                        {"words": ["dull", "!"], "label": 0, "leaf_labels": [1, 2]})
    first, second = data.sst(sentences).examples
    assert first.labels.tolist() == [0, -2] and not first.marked.any()
    assert second.labels.tolist() == [1, 0] and second.marked.tolist() == [True, False]  # it speaks for NEGATIVE
    trees = written(tmp_path / "test.jsonl", {"tokens": ["fine"], "label": 3, "leaf_labels": [4]},
                    {"tokens": ["so", "so"], "label": 2, "leaf_labels": [2, 2]})
    only, = data.sst(trees).examples
    assert only.target == "POSITIVE" and only.labels.tolist() == [2]
    with pytest.raises(ValueError, match="no movies_test_passages.jsonl or test.jsonl"):
        data.movies(tmp_path / "nowhere")


def test_documents_are_cut_between_sentences(tmp_path):
    words = [f"w{i}" for i in range(12)]
    path = written(tmp_path / "test.jsonl", {"id": "d", "label": "POS", "tokens": words, "sent_ends": [3, 5, 10],
                                             "evidence": [[4, 6], [11, 11], [11, 12]]})
    found = data.movies(path, length=5).examples
    assert [one.input.split() for one in found] == [words[:5], words[5:10], words[10:]]
    assert [one.marked.nonzero().flatten().tolist() for one in found] == [[4], [0], [1]]
    assert all(one.group == "d" and one.target == "POSITIVE" for one in found)


def test_shared_reviews_align_word_by_word(shared, reviews):
    for found in (data.movies(shared / "data" / "rationale_eval", 40), data.sst(shared / "data" / "sst", 40),
                  data.movies(shared / "data" / "eraser_movies", 20, length=60)):
        batch = prepared(reviews, found)
        for row, (one, truth) in enumerate(zip(found.examples, aligned(reviews, batch, found.examples))):
            inside = [t for t, group in enumerate(truth.groups.tolist()) if group >= 0]
            said = [batch.units.tokens[row][t].removeprefix("##") for t in inside]
            spelled = {}
            for t, piece in zip(inside, said):
                spelled.setdefault(int(truth.groups[t]), []).append(piece)
            spelled.pop(max(spelled))  # the last may be cut
            for word, pieces in spelled.items():
                start, end = one.words[word]
                told = one.input[start:end].isascii() and "[UNK]" not in pieces  # accents are stripped
                assert not told or "".join(pieces) == one.input[start:end].lower()


def test_lines_of_the_users_own(tmp_path):
    path = written(tmp_path / "mine.jsonl",
                   {"text": "A dull, endless hour.", "spans": [[2, 6], [9, 11]], "target": "NEGATIVE", "group": "g"},
                   {"words": ["fine", "film"], "spans": [[0, 1]], "labels": [2, 0]}, {"text": "Nothing marked."})
    first, second, third = data.get(path).examples
    assert first.words == ((0, 1), (2, 7), (8, 15), (16, 21)) and first.marked.tolist() == [False, True, True, False]
    assert (first.target, first.group) == ("NEGATIVE", "g")
    assert second.input == "fine film" and second.labels.tolist() == [2, 0] and second.target is None
    assert third.marked is None and third.words == ((0, 7), (8, 15))


@pytest.mark.parametrize("line, message", [
    ({"words": ["a", "b"], "labels": [1]}, r"line 1: labels of shape \(1,\) for 2 words; they do not align"),
    ({"words": ["a"], "spans": [[0, 2]]}, r"line 1: span \[0, 2\) of 1 words"),
    ({"text": "abc", "spans": [[2, 9]]}, r"span \[2, 9\) of a text of 3 characters"), ({}, "line 1: no 'text'"),
    ([], "line 1: a list, expected an object")])
def test_lines_that_do_not_align_say_so(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        data.texts(written(tmp_path / "mine.jsonl", line))


def test_a_line_that_is_no_json_has_its_number(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n\n{text')
    with pytest.raises(ValueError, match="mine.jsonl, line 3: no JSON"):
        data.texts(tmp_path / "mine.jsonl")


def test_a_folder_of_pictures_with_masks(tmp_path):
    picture, mask = np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8), np.uint8)
    mask[1:3, 2:5] = 7
    mask[5, 5] = 2
    for name in ("a.png", "b.jpg"):
        Image.fromarray(picture).save(tmp_path / name)
        Image.fromarray(mask).save(tmp_path / f"{name[0]}_mask.png")
    Image.fromarray(picture).save(tmp_path / "without.png")
    found = data.get(tmp_path)
    assert [one.input.rsplit("/")[-1] for one in found.examples] == ["a.png", "b.jpg"] and found.modality == "image"
    assert torch.equal(found.examples[0].marked, torch.from_numpy(mask != 0))
    written(tmp_path / "annotations.jsonl", {"image": "a.png", "mask": "a_mask.png", "target": "cat", "value": 7})
    only, = data.get(tmp_path).examples
    assert only.target == "cat" and only.marked.sum() == 6
    Image.fromarray(mask[:, :5]).save(tmp_path / "a_mask.png")
    with pytest.raises(ValueError, match="a_mask.png is 6 x 5 pixels and a.png 6 x 8; a mask has the size"):
        data.get(tmp_path)


@pytest.mark.parametrize("what, message", [
    ("digitz", "no data 'digitz': neither a folder of pictures, nor a .jsonl file, nor one of digits, palindromes"),
    ("mnist", "give mnist:FOLDER"), ("movies:nowhere", "no movies_test_passages.jsonl")])
def test_unknown_data_lists_the_known(what, message):
    with pytest.raises(ValueError, match=message):
        data.get(what)


def test_an_empty_folder_holds_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="a mask of NAME.jpg is NAME_mask.png"):
        data.get(tmp_path)


def test_a_count_draws_by_the_seed(tmp_path):
    path = written(tmp_path / "mine.jsonl", *({"text": f"text {i}"} for i in range(50)))
    first, again, other = (data.texts(path, 5, seed=seed) for seed in (0, 0, 1))
    texts = [[one.input for one in each.examples] for each in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 5
    numbers = [int(text.split()[1]) for text in texts[0]]
    assert numbers == sorted(numbers) and len(data.texts(path)) == 50
    with pytest.raises(ValueError, match="at least 1"):
        data.texts(path, 0)


# Marks to their places -----------------------------------------------------------------------------------------------


def test_tokens_belong_to_the_word_they_share_most_with():
    words = [(0, 4), (5, 9)]
    assert word_of_tokens([(0, 0), (0, 2), (2, 6), (4, 9), (9, 10)], words) == [-1, 0, 0, 1, -1]
    assert word_of_tokens([(0, 3)], []) == [-1]


def test_relevance_of_words_is_the_sum_over_their_tokens(reviews):
    text, words = "a thoroughly unwatchable film", ((0, 1), (2, 12), (13, 24), (25, 29))
    example = Example(input=text, words=words, marked=torch.tensor([False, False, True, False]))
    batch = prepared(reviews, Data("one", "text", [example]))
    truth, = aligned(reviews, batch, [example])
    relevance = torch.arange(1.0, 1 + len(truth.groups))
    found = truth.units(relevance)
    assert len(found) == 4 and truth.groups[0] == truth.groups[-1] == -1
    assert found.sum() == relevance[1:-1].sum()
    for word in range(4):
        assert found[word] == relevance[truth.groups == word].sum() > 0


def test_words_behind_the_end_of_a_cut_text_are_left_out(reviews):
    words = ["film"] * 200
    example = Example(input=" ".join(words), words=tuple((5 * i, 5 * i + 4) for i in range(200)),
                      marked=torch.arange(200) % 2 == 0, labels=torch.arange(200.0))
    with pytest.warns(UserWarning, match="cut off"):
        batch = prepared(reviews, Data("long", "text", [example]))
    truth, = aligned(reviews, batch, [example])
    assert len(truth.marked) == len(truth.labels) == 126 == len(truth.units(torch.zeros(128)))


def test_a_word_without_a_token_does_not_align(reviews):
    example = Example(input="fine \x01 film", words=((0, 4), (5, 6), (7, 11)), marked=torch.ones(3).bool())
    batch = prepared(reviews, Data("odd", "text", [example]))
    with pytest.raises(ValueError, match="word 1 of row 0, '.x01', has no token of its own"):
        aligned(reviews, batch, [example])


def test_masks_move_with_the_picture():
    subject = Subject(nn.Identity(), modality="image", pixels=plain(3, (4, 4), (0.5,) * 3, (0.2,) * 3))
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, 8:] = True  # the right half; the middle square is cut out
    example = Example(input=np.zeros((8, 16, 3), np.uint8), marked=mask, others={"left": ~mask})
    batch = prepared(subject, Data("wide", "image", [example]))
    truth, = aligned(subject, batch, [example])
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[:, 2:] = True
    assert torch.equal(truth.marked, wanted) and torch.equal(truth.others["left"], ~wanted)
    assert truth.units(wanted.float()).shape == (4, 4)


def test_a_picture_of_the_right_size_may_still_be_cropped():
    cropped = Pixels(1, (4, 4), (0.0,), (1.0,), lambda image: torch.from_numpy(
        np.array(image.resize((8, 8)), dtype="float32") / 255)[None, 2:6, 2:6])
    subject = Subject(nn.Identity(), modality="image", pixels=cropped)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True  # outside of what the model sees but for a row
    example = Example(input=np.zeros((4, 4), np.uint8), marked=mask)
    truth, = aligned(subject, prepared(subject, Data("same", "image", [example])), [example])
    assert truth.marked.sum() < 4 * 4 / 3 and not truth.marked[1:].any()


def test_what_does_not_fit_says_so(reviews):
    vit = Subject(nn.Identity(), modality="image", pixels=plain(1, (4, 4), (0.5,), (0.2,)))
    example = Example(input=np.zeros((4, 4), np.uint8), marked=torch.zeros(4, 5).bool())
    with pytest.raises(ValueError, match=r"a mask of \(4, 5\) for a picture of \(4, 4\)"):
        aligned(vit, prepared(vit, Data("off", "image", [example])), [example])
    with pytest.raises(ValueError, match="data 'digits' is of image, and reviews-bert reads text"):
        prepared(reviews, data.digits(1))
    with pytest.raises(ValueError, match="labels of shape"):
        Example(input="a b", words=((0, 1), (2, 3)), labels=torch.zeros(3))
    with pytest.raises(ValueError, match="give one for each token"):
        Example(input=[1, 2], marked=torch.ones(3).bool())
    with pytest.raises(ValueError, match="has no example"):
        Data("none", "text", [])
    with pytest.raises(ValueError, match="modality 'sound'"):
        Data("noise", "sound", [example])
