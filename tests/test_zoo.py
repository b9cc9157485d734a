"""The bundled models do what their cards say, and the data makers draw what they label."""
from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from relprop import zoo
from relprop.zoo.digits import SIZE, TEST_INSTANCES, Canvases, _handwriting, canvases

SST = Path(__file__).parents[2] / "shared" / "data" / "sst"
FRESH = 77  # a seed no training or model selection used


@pytest.fixture(scope="module")
def drawn() -> Canvases:
    return canvases(300, seed=FRESH)


@pytest.fixture(scope="module")
def vit():
    return zoo.build("digits-vit")[0]


@pytest.fixture(scope="module")
def bert():
    return zoo.build("reviews-bert")


def normalised(images):
    about = zoo.config("digits-vit")
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    return (images - mean) / std


def reviews(count=None):
    """Sentences of SST's test split and whether people call them positive; neutral ones left out."""
    if not SST.exists():
        pytest.skip(f"no {SST}: the sentences are research data and do not ship with relprop")
    with gzip.open(SST / "test.jsonl.gz", "rt") as lines:
        trees = [tree for tree in map(json.loads, lines) if tree["label"] != 2]
    return [(" ".join(tree["tokens"]), tree["label"] > 2) for tree in trees[:count]]


@torch.no_grad()
def positive(bert, texts):
    """Probability of POSITIVE for each text."""
    model, tokenizer = bert
    batches = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    inputs = [tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt") for batch in batches]
    return torch.cat([model(**batch).logits.softmax(-1)[:, 1] for batch in inputs])


def test_names():
    assert zoo.names() == ["digits-vit", "reviews-bert", "tasks-gpt2"]
    with pytest.raises(ValueError, match="digits-vit, reviews-bert, tasks-gpt2"):
        zoo.path("digits")


def test_all_of_it_is_small_and_plain():
    files = [file for name in zoo.names() for file in zoo.path(name).rglob("*")]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}  # nothing that could run code
    assert all((zoo.path(name) / "README.md").exists() for name in zoo.names())


def test_digits_vit_is_a_plain_timm_model(vit):
    from timm.models.vision_transformer import Block, VisionTransformer

    assert type(vit) is VisionTransformer and {type(block) for block in vit.blocks} == {Block}
    assert not vit.training and vit.cls_token is not None
    assert 0.5e6 < sum(p.numel() for p in vit.parameters()) < 2e6
    assert {p.dtype for p in vit.parameters()} == {torch.float32}


def test_digits_vit_reads_unseen_handwriting(vit, drawn):
    with torch.no_grad():
        right = (vit(normalised(drawn.images)) > 0) == drawn.labels
    assert right.float().mean() >= 0.97
    assert right.all(1).float().mean() >= 0.8  # naming none would have 0.75 of the labels right, and no canvas


def test_digits_vit_sees_the_digit_where_it_is(vit, drawn):
    """Painting a digit over with ground takes its label away; so the mask is where the reason is."""
    row, label = drawn.labels.nonzero().unbind(1)
    rim = F.max_pool2d(drawn.masks[row, label][:, None].float(), 5, stride=1, padding=2) > 0  # its edge can be read
    ground = drawn.images[row].flatten(1).median(1).values[:, None, None, None]
    erased = torch.where(rim, ground, drawn.images[row])
    with torch.no_grad():
        before, after = vit(normalised(drawn.images[row])), vit(normalised(erased))
    said = before.gather(1, label[:, None]) > 0
    assert (after.gather(1, label[:, None])[said] < 0).float().mean() > 0.8


def test_masks_agree_with_labels(drawn):
    assert drawn.images.shape == (300, 1, SIZE, SIZE) and drawn.images.dtype == torch.float32
    assert drawn.images.min() >= 0 and drawn.images.max() <= 1
    assert (drawn.masks.any((2, 3)) == drawn.labels).all()
    assert set(drawn.labels.sum(1).tolist()) == {2, 3}
    assert drawn.masks.sum(1).max() == 1  # no pixel belongs to two digits


def test_masks_contain_ink(drawn):
    row, label = drawn.labels.nonzero().unbind(1)
    masks, images = drawn.masks[row, label], drawn.images[row, 0]
    assert masks.sum((1, 2)).min() > 30
    inside, outside = ((images * part).sum((1, 2)) / part.sum((1, 2)) for part in (masks, ~drawn.masks[row].any(1)))
    assert (inside > outside + 0.2).all()


def test_canvases_are_drawn_by_seed():
    first, again, other = canvases(20, seed=3), canvases(20, seed=3), canvases(20, seed=4)
    assert all(torch.equal(getattr(first, part), getattr(again, part)) for part in ("images", "labels", "masks"))
    assert not torch.equal(first.images, other.images)
    assert not torch.equal(first.images, canvases(20, seed=3, split="train").images)


def test_splits_share_no_handwriting():
    glyphs = {split: _handwriting(split).glyphs for split in ("train", "test")}
    seen = {split: {tuple(glyph.flatten().tolist()) for glyph in drawn} for split, drawn in glyphs.items()}
    assert len(glyphs["test"]) == TEST_INSTANCES == len(seen["test"])  # no two of the digits are equal
    assert len(glyphs["train"]) == 1797 - TEST_INSTANCES and not seen["train"] & seen["test"]


@pytest.mark.parametrize("digits, size", [((0, 0), 48), ((1, 1), 24), ((4, 4), 64), ((10, 10), 128)])
def test_other_numbers_of_digits(digits, size):
    other = canvases(5, digits=digits, size=size)
    assert other.images.shape == (5, 1, size, size) and other.masks.shape == (5, 10, size, size)
    assert (other.labels.sum(1) == digits[0]).all()


def test_no_canvas():
    assert canvases(0).masks.shape == (0, 10, SIZE, SIZE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(split="validation"), "there are train, test"),
        (dict(count=-1), "must not be negative"),
        (dict(digits=(3, 2)), "least <= most"),
        (dict(digits=(2, 11)), "least <= most"),
        (dict(digits=(9, 9)), "do not fit on 54 x 54"),
        (dict(digits=(4, 4), size=36), "do not fit on 36 x 36"),
        (dict(clutter=2.0), "clutter must be in"),
        (dict(size=10), "do not fit on 10 x 10"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        canvases(**{"count": 2, **arguments})


def test_reviews_bert_is_a_plain_bert(bert):
    model, tokenizer = bert
    assert type(model).__name__ == "BertForSequenceClassification" and not model.training
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert 0.5e6 < model.num_parameters() < 5e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size


def test_reviews_bert_tells_good_from_bad(bert):
    good, bad = positive(bert, ["A wonderful film.", "A dull, lifeless mess."])
    assert good > 0.8 and bad < 0.2


@pytest.mark.parametrize("count, least", [(200, 0.75), pytest.param(None, 0.80, marks=pytest.mark.slow)])
def test_reviews_bert_on_unseen_sentences(bert, count, least):
    texts, labels = zip(*reviews(count), strict=True)
    right = (positive(bert, list(texts)) > 0.5) == torch.tensor(labels)
    assert right.float().mean() >= least


@pytest.mark.parametrize("words", [1, 3, 10, 30])
def test_reviews_bert_says_nothing_of_nothing(bert, words):
    """Ablation hides words; with all of them hidden the model must not take sides."""
    assert 0.2 < positive(bert, [" ".join(["[MASK]"] * words)]).item() < 0.8
    assert 0.2 < positive(bert, [""]).item() < 0.8


def test_reviews_bert_offsets(bert):
    tokenizer, text = bert[1], "Unforgettably GOOD, isn't it?"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.is_fast and tokenizer.mask_token == "[MASK]"
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]  # empty for [CLS] and [SEP]
    assert "".join(pieces) == text.replace(" ", "") and "GOOD" in pieces
