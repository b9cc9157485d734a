"""Relevance averaged over the way from a text that says nothing: against autograd; its books."""
from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch.testing import assert_close

import relprop
from relprop import composite, way

TEXTS = ["A gripping, beautifully acted story.", "Dull."]
GRADIENT = replace(composite.gradient(), name="gradient-path", points=(0.2, 0.7, 1.0))


@pytest.fixture(scope="module")
def reviews():
    """A model of its own, in float64."""
    subject = relprop.load("reviews-bert")
    subject.model.double()
    return subject


def by_hand(subject, texts, points, index):
    """Steps (B, T, D), and at each place on the way the value (B,) and the plain gradient (B, T, D)."""
    batch = subject.prepare(texts)
    ids, special = batch.kwargs["input_ids"], torch.tensor(batch.units.special) | torch.tensor(batch.units.padding)
    table = subject.model.get_input_embeddings().weight.detach()
    start = table[torch.where(special, ids, subject.tokenizer.mask_token_id)]
    step, found = table[ids] - start, []
    for at in points:
        x = (start + at * step).requires_grad_()
        rest = {name: value for name, value in batch.kwargs.items() if name != "input_ids"}
        value = subject.model(inputs_embeds=x, **rest).logits[:, index]
        found.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    return step, found


def test_the_plain_gradient_on_the_way_is_that_of_autograd(reviews):
    found = relprop.explain(reviews, TEXTS, 1, method=GRADIENT)
    step, places = by_hand(reviews, TEXTS, GRADIENT.points, 1)
    expected = (step * sum(slope for _, slope in places) / len(places)).sum(-1)
    assert expected.abs().amax(1).min() > 1e-3
    assert_close(found.map, expected.float(), rtol=1e-4, atol=1e-6)
    assert (found.forwards, found.backwards) == (3, 3)


def test_of_many_places_they_are_integrated_gradients(reviews):
    many = replace(GRADIENT, points=tuple((k + 0.5) / 24 for k in range(24)))
    found = relprop.explain(reviews, TEXTS[0], 1, method=many)
    whole = relprop.explain(reviews, TEXTS[0], 1, method="integrated-gradients", options={"n_steps": 24})
    assert_close(found.map, whole.map, rtol=0, atol=0.01 * whole.map.abs().max().item())
    assert not torch.allclose(found.map, relprop.explain(reviews, TEXTS[0], 1, method=GRADIENT).map, atol=0.01)


@pytest.mark.parametrize("rules", ["attnlrp-path", GRADIENT], ids=["attnlrp-path", "gradient-path"])
def test_the_books_balance_and_say_what_the_way_took(reviews, rules):
    found = relprop.explain(reviews, TEXTS, 1, method=rules)
    _, places = by_hand(reviews, TEXTS, composite.get(rules).points, 1)
    assert (found.ledger.error < 1e-6).all()
    assert_close(found.ledger.input.float(), found.map.sum(1), rtol=1e-4, atol=1e-6)
    lacking = found.ledger.value - sum(value for value, _ in places) / len(places)
    assert lacking.abs().min() > 1e-3
    assert_close(found.ledger.absorbed[way.WAY], lacking, rtol=1e-4, atol=1e-6)
    whole = relprop.explain(reviews, TEXTS, 1, method=rules, spread_bias=True)
    assert_close(whole.map.sum(1), whole.value, rtol=1e-4, atol=1e-5)


def test_what_is_no_word_gets_nothing_and_a_row_is_explained_as_alone(reviews):
    found = relprop.explain(reviews, TEXTS, method="attnlrp-path")
    special = torch.tensor(found.units.special) | torch.tensor(found.units.padding)
    assert not found.map[special].any() and found.map[~special].all()
    for row, text in enumerate(TEXTS):
        alone = relprop.explain(reviews, text, method="attnlrp-path").map[0]
        assert_close(found.map[row, :len(alone)], alone, rtol=1e-4, atol=1e-6)


def test_inside_the_model_it_is_the_mean_of_the_places(reviews):
    one = lambda at: replace(composite.attnlrp_path(), points=(at,))
    points = composite.attnlrp_path().points
    assert len(points) > 1
    for address in ("L1", "L0.attn.H1"):
        parts = [relprop.explain(reviews, TEXTS, 1, method=one(at)).at(address) for at in points]
        found = relprop.explain(reviews, TEXTS, 1, method="attnlrp-path").at(address)
        assert found.any() and not torch.allclose(parts[0], parts[1], rtol=0.01)
        assert_close(found, sum(parts) / len(parts), rtol=1e-4, atol=1e-6)


def test_the_prediction_is_that_of_the_text_itself(reviews):
    found = relprop.explain(reviews, TEXTS, method=replace(composite.attnlrp_path(), points=(0.01,)))
    assert found.target == relprop.explain(reviews, TEXTS, method="attnlrp").target == ["POSITIVE", "NEGATIVE"]
    assert_close(found.value, relprop.explain(reviews, TEXTS, method="attnlrp").value)


def test_where_nothing_says_nothing_the_rules_are_applied_at_the_input():
    torch.manual_seed(0)
    for model, batch in ((tiny.bert(), {"input_ids": torch.tensor([[4, 9, 7]])}),
                         (tiny.vit(), torch.randn(1, 3, 24, 24, dtype=torch.float64))):
        there, here = (relprop.explain(model, batch, 1, method=name) for name in ("attnlrp-path", "attnlrp"))
        assert here.map.any() and torch.equal(there.map, here.map)
        assert there.forwards == here.forwards and "points" not in there.provenance["rules"]


@pytest.mark.parametrize("points", [(), (0.0,), (0.5, 1.5)])
def test_points_are_on_the_way(points):
    with pytest.raises(ValueError, match=r"points are places on the way to the input, in \(0, 1\]"):
        composite.attnlrp_path(points)
