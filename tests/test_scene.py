"""What reports show of the first example: pictures, and patterns of the strongest heads as the model has them."""
from __future__ import annotations

import numpy
import pytest
import torch
from test_view_effects import Document, made, said
from torch.testing import assert_close

import relprop
from relprop import data, view
from relprop.mediation import LogOdds, scene
from relprop.result import Effects
from relprop.result.number import printed
from relprop.view import patch, pattern
from relprop.view.mediation import maps

PATCHES = ["cls", *(f"p{at}" for at in range(81))]
ONE, OTHER = ["A wonderful film.", "It is wonderful."], ["A terrible film.", "It is terrible."]


@pytest.fixture(scope="module")
def heads():
    return relprop.effects("reviews-bert", ONE, OTHER, "POSITIVE", at="L*.attn.H*", resamples=99)


@pytest.fixture(scope="module")
def patches():
    subject = relprop.load("digits-vit")
    pairs = data.matched(subject, data.pairs("digits-swap", count=2))
    return relprop.effects(subject, pairs.base, pairs.counterfactual, LogOdds(*pairs.continuations), resamples=99,
                           at=[f"L{layer}@{at}" for layer in (3, 4) for at in PATCHES])


def attended(texts):
    """Patterns of all layers, (L, H, T, T), as transformers gives them."""
    from transformers import BertForSequenceClassification

    subject = relprop.load("reviews-bert")
    plain = BertForSequenceClassification(subject.model.config)
    plain.load_state_dict(subject.model.state_dict())
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(plain.eval()(**subject.tokenizer(texts, return_tensors="pt"), output_attentions=True)
                           .attentions)[:, 0]


def test_patterns_are_those_of_the_model(heads):
    kept = heads.about["patterns"]
    assert [one["head"] for one in kept] == heads.top(scene.HEADS) and len(kept) == 3
    for one in kept:
        layer, head = (int(part[1:]) for part in one["head"].split(".attn."))
        for side, text in (("base", ONE[0]), ("counterfactual", OTHER[0])):
            assert_close(pattern.weights(one, side).float(), attended(text)[layer, head], rtol=0, atol=1e-4)
    assert kept[0]["tokens"][0] == ["[CLS]", "a", "wonderful", "film", ".", "[SEP]"]
    assert kept[0]["base"] != kept[0]["counterfactual"]


def test_patterns_stand_in_figure_and_page(heads, tmp_path):
    words = said(view.patterns(heads))
    assert {"wonderful", "terrible", f"{heads.top(1)[0]}, base"} <= set(words)
    text = view.account(Effects.from_dict(heads.to_dict()))
    page = Document(text)
    assert page.tags.count("image") == 6 and "wonderful" in page.said and "terrible" in page.said
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    painted = pattern.painted(torch.tensor([[0.0, 0.2]]), 0.2)
    assert f"up to {printed(pattern.end(heads.about['patterns'][0]), 2)}" in words
    assert painted[0, 0].min() > 245 and painted[0, 1].max() < 150  # white and dark


def test_there_are_none_of_long_texts_and_of_what_is_no_head():
    find = lambda one, other, at: relprop.effects("reviews-bert", one, other, "POSITIVE", at=at, resamples=99).about
    assert "patterns" not in find(ONE[0], OTHER[0], "L*.mlp")
    assert "patterns" not in find(ONE[0] * 20, OTHER[0] * 20, "L*.attn.H*")
    assert "patterns" in find(ONE[0], OTHER[0], "L*.attn.H*@0")
    with pytest.raises(ValueError, match="no attention patterns"):
        view.patterns(made())


def test_patches_lie_over_their_picture(patches):
    (board,) = [part for part in maps(patches) if patch.over_patches(patches, part)]
    base, other = patch.sides(patches)
    shown = {name: (rest, pixels) for name, rest, pixels in patch.panels(patches, board, "indirect")}
    assert list(shown) == ["base", "counterfactual", *(f"L{layer}" for layer in (3, 4))]
    assert numpy.array_equal(shown["base"][1], base.images[0].numpy()) and not torch.equal(base.images, other.images)
    at = patches.mediators.index
    for layer in (3, 4):
        rest, pixels = shown[f"L{layer}"]
        assert rest.startswith("@cls ")
        own = torch.tensor([float(patches.indirect[at(f"L{layer}@p{one}"), 0]) for one in range(81)])
        reddest = torch.tensor(pixels).double()
        excess = (reddest[..., 0] - reddest[..., 2]).view(9, 6, 9, 6).mean((1, 3)).flatten()
        assert int(excess.argmax()) == int(own.argmax()) and own.max() > 1
    changed = (base.images[0] != other.images[0]).any(-1).view(9, 6, 9, 6).any(3).any(1).flatten()
    where = patches.indirect[[at(f"L3@p{one}") for one in range(81)], 0].abs().argmax()
    assert changed[where] and changed.sum() < 40  # where the digit is swapped


def test_patches_stand_in_figure_and_page(patches):
    words = said(view.mediation(patches))
    assert "base" in words and "counterfactual" in words and any(word.startswith("L3  @cls") for word in words)
    page = Document(view.account(Effects.from_dict(patches.to_dict())))
    assert page.tags.count("img") == 4 and any("example 0 of 2" in word for word in page.said)


def test_heads_of_pictures_have_their_pictures():
    pairs = data.pairs("digits-swap", count=1)
    found = relprop.effects("digits-vit", pairs.bases, pairs.counterfactuals, at="L5.attn.H*")
    page = Document(view.account(found))
    assert page.tags.count("img") == 2 and "The first example" in page.said
