"""How alike two texts are, or an image and a text: the map is of both, and the books close."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from lexicon import WORDS, reading
from written import closes, run, same, tokens

import relprop
from relprop import Contrast, Similarity, explain, load

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
PAIRS = [("alice saw bob", "bob saw the dog in london"), ("who was born in paris ?", "a cat")]


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every model here is random, the same each time."""


def sharpened(model):
    for parameter in model.parameters():  # biases start at zero, at which errors hide
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


@pytest.fixture
def encoder():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.5,
                                 pad_token_id=0, **SMALL))
    return load(sharpened(model), reading())


def clip(kind="CLIP"):
    """A model of images and texts, and a batch of two of each."""
    import transformers

    config, model = (getattr(transformers, kind + name) for name in ("Config", "Model"))
    text = dict(SMALL, vocab_size=40, max_position_embeddings=16, projection_dim=16, bos_token_id=1, eos_token_id=39,
                pad_token_id=0)
    vision = dict(SMALL, image_size=24, patch_size=6, projection_dim=16)
    made = sharpened(model(config(text_config=text, vision_config=vision)))
    ids = torch.tensor([[1, 5, 6, 7, 39], [1, 8, 39, 0, 0]])
    return made, {"input_ids": ids, "attention_mask": (ids > 0).long(),
                  "pixel_values": torch.randn(2, 3, 24, 24, dtype=torch.float64)}


def embedding(subject, text, pool="mean"):
    """Of a text by itself, (D,), by hand."""
    inputs = subject.tokenizer(text, return_tensors="pt")
    out = subject.model(inputs["input_ids"])
    states = out.last_hidden_state[0]
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1], "pooler": out.pooler_output[0]}[pool]


# -- the ops -----------------------------------------------------------------------------------------------------------

def test_a_cosine_shares_by_halves_and_holds_the_lengths():
    """Oracle: R_1i = R_2i = R x1_i x2_i / (2 x1 . x2), for every row."""
    x1, x2 = tokens(3)[:, 0], tokens(3)[:, 1]
    found = run(lambda _, a, b: F.cosine_similarity(a, b, dim=-1)[:, None], x1, x2, value=lambda y: y[:, 0])
    cosine = F.cosine_similarity(x1, x2, dim=-1)
    expected = cosine[:, None] * x1 * x2 / (2 * (x1 * x2).sum(-1, keepdim=True))
    assert same(found.value, cosine) and closes(found)
    assert same(found.relevance["0"], expected) and same(found.relevance["1"], expected)
    assert torch.allclose(found.ledger.input, cosine)  # nothing is lost


def test_a_cosine_with_a_constant_gives_all():
    x, c = tokens(3)[:, 0], tokens(3)[0, 1]
    found = run(lambda _, a: F.cosine_similarity(a, c.expand_as(a), dim=-1)[:, None], x, value=lambda y: y[:, 0])
    cosine = F.cosine_similarity(x, c.expand_as(x), dim=-1)
    assert same(found.relevance["0"], cosine[:, None] * x * c / (x * c).sum(-1, keepdim=True)) and closes(found)


@pytest.mark.parametrize("dim", [1, -1, 2])
def test_cosines_of_any_dimension_are_torchs_own(dim):
    x1, x2 = tokens(3), tokens(3).roll(1, 0)
    found = run(lambda _, a, b: F.cosine_similarity(a, b, dim), x1, x2, value=lambda y: y.sum(1))
    assert same(found.value, F.cosine_similarity(x1, x2, dim).sum(1)) and closes(found)


def test_normalize_holds_the_length():
    x, w = tokens(3)[:, 0], tokens(3)[0, 1]
    found = run(lambda _, a: (F.normalize(a, dim=-1) * w).sum(-1, keepdim=True), x, value=lambda y: y[:, 0])
    assert same(found.value, (F.normalize(x, dim=-1) * w).sum(-1))
    assert same(found.relevance["0"], x * w / x.norm(dim=-1, keepdim=True)) and closes(found)


def test_the_gradient_of_a_cosine_is_not_held():
    """Gradient x input of a function that does not depend on the length is zero in all."""
    x1, x2 = tokens(3)[:, 0], tokens(3)[:, 1]
    found = run(lambda _, a, b: F.cosine_similarity(a, b, dim=-1)[:, None], x1, x2, value=lambda y: y[:, 0],
                composite="gradient")
    leaf = x1.clone().requires_grad_()
    g, = torch.autograd.grad(F.cosine_similarity(leaf, x2, dim=-1).sum(), leaf)
    assert same(found.relevance["0"], x1 * g) and closes(found)
    assert found.relevance["0"].sum(-1).abs().max() < 1e-12 * found.relevance["0"].abs().max() * 100


# -- two texts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["cosine", "dot"])
@pytest.mark.parametrize("pool", ["mean", "cls", "last", "pooler"])
def test_a_similarity_is_that_of_both_embeddings(encoder, pool, by):
    r = explain(encoder, PAIRS, Similarity(pool=pool, by=by))
    for row, pair in enumerate(PAIRS):
        a, b = (embedding(encoder, text, pool) for text in pair)
        expected = F.cosine_similarity(a, b, dim=0) if by == "cosine" else a @ b
        assert torch.allclose(r.value[row].double(), expected, atol=1e-6)
    assert (r.ledger.error < 1e-9).all() and r.target == ["similarity"] * 2


def test_the_map_is_of_both_texts(encoder):
    r = explain(encoder, PAIRS, Similarity())
    assert [word for word, _ in r.words(0)] == " ".join(PAIRS[0]).split()
    assert all(value != 0 for _, value in r.words(0))
    assert torch.allclose(r.map.sum(1).double(), r.ledger.input, atol=1e-5)
    assert r.forwards == explain(encoder, PAIRS[0][0], Similarity(to=PAIRS[0][1])).forwards + 1
    first = (torch.tensor(r.units.offsets)[..., 0] < torch.tensor(r.units.seconds)[:, None]) & (r.map != 0)
    first &= torch.arange(r.map.shape[1]) < r.map.shape[1] // 2  # special tokens have no place in the text
    sides = [(r.map * first).sum(1), (r.map * ~first).sum(1)]
    for name, side in zip(("first text", "second text"), sides, strict=True):
        assert torch.allclose(r.ledger.parts[name], side.double(), atol=1e-5)
    swapped = explain(encoder, [pair[::-1] for pair in PAIRS], Similarity())
    first = len(PAIRS[0][0].split())
    own, other = ([value for _, value in each.words(0)] for each in (r, swapped))
    assert torch.allclose(torch.tensor(own), torch.tensor(other[-first:] + other[:-first]), atol=1e-5)
    assert relprop.view.page(r, 0).count('<p class="words"') == 2  # each text on a line of its own
    from relprop.view import words as drawn

    assert [" ".join(word for word, _ in text) for text in drawn.texts(r, 1)] == list(PAIRS[1])
    assert len(drawn.text_lines(r, 0, 1000.0, 1.0)) == 2
    r.row(0).to_json()


def test_each_text_has_its_half_with_the_other_held(encoder):
    """The map of a text is that of half the similarity to the other's embedding, which `to` holds."""
    r = explain(encoder, PAIRS, Similarity())
    for row, (a, b) in enumerate(PAIRS):
        first, second = explain(encoder, a, Similarity(to=b)), explain(encoder, b, Similarity(to=a))
        assert torch.allclose(first.value, r.value[row]) and torch.allclose(second.value, r.value[row])
        halves = [value / 2 for each in (first, second) for _, value in each.words(0)]
        assert torch.allclose(torch.tensor([v for _, v in r.words(row)]), torch.tensor(halves), atol=1e-5)
        assert (first.ledger.error < 1e-9).all() and first.target == [f"similarity to {b!r}"]


def test_pairs_of_a_batch_are_those_of_its_rows(encoder):
    r = explain(encoder, PAIRS, Similarity())
    for row, pair in enumerate(PAIRS):
        alone = explain(encoder, [pair], Similarity())
        assert torch.allclose(alone.value, r.value[row:row + 1])
        assert torch.allclose(torch.tensor([v for _, v in alone.words(0)]), torch.tensor([v for _, v in r.words(row)]),
                              atol=1e-5)
    assert torch.allclose(explain(encoder, PAIRS, Similarity(), batch_size=1).map, r.map, atol=1e-5)


def test_the_check_takes_words_of_both_texts(encoder):
    r = explain(encoder, PAIRS, Similarity())
    curve = r.check(steps=3, randoms=2)
    assert torch.allclose(curve.value, r.value, atol=1e-6)
    masks = [tuple(" ".join("[MASK]" for _ in text.split()) for text in pair) for pair in PAIRS]
    gone = explain(encoder, masks, Similarity()).value
    assert torch.allclose(curve.morf[:, -1], gone, atol=1e-5)


@pytest.mark.parametrize("method", ["rollout", "integrated-gradients", "occlusion", "gradient"])
def test_other_methods(encoder, method):
    r = explain(encoder, PAIRS, Similarity(), method=method)
    assert r.map.abs().sum() > 0 and torch.allclose(
        r.value.float(), explain(encoder, PAIRS, Similarity()).value, atol=1e-6)


def test_similarities_are_compared(encoder):
    found = relprop.compare(encoder, PAIRS, Similarity(), methods=["attnlrp", "occlusion"], steps=2, randoms=2)
    assert found.table()["area"].notna().all() and found.results[0].target == ["similarity"] * 2


def test_a_similarity_to_one_picture():
    from transformers import ViTConfig, ViTModel

    model = sharpened(ViTModel(ViTConfig(image_size=24, patch_size=6, **SMALL)))
    x = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    r = explain(model, x[:2], Similarity(to=x[2:], pool="cls"))
    e = model(x).last_hidden_state[:, 0]
    assert torch.allclose(r.value.double(), F.cosine_similarity(e[:2], e[2:], dim=-1), atol=1e-6)
    assert (r.ledger.error < 1e-9).all() and r.map.shape == (2, 24, 24)
    assert r.target == ["similarity to what was given"] * 2


def test_a_similarity_to_one_text_is_an_outcome(encoder):
    found = relprop.effects(encoder, "alice saw bob", "alice saw paris", Similarity(to="the dog"), kind="total")
    values = [explain(encoder, text, Similarity(to="the dog")).value for text in ("alice saw bob", "alice saw paris")]
    assert torch.allclose(found.total.flatten().float(), values[1] - values[0], atol=1e-6) and found.total.abs() > 0
    with pytest.raises(ValueError, match=r"effects are on the similarity to one text, Similarity\(to=...\)"):
        relprop.effects(encoder, PAIRS[:1], [("alice saw paris", PAIRS[0][1])], Similarity(), kind="total")


def test_nearer_to_one_text_than_to_another(encoder):
    texts = ["alice saw bob", "the dog walks in paris"]
    target = Contrast(Similarity(to="a cat"), Similarity(to="bob saw the dog"))
    r = explain(encoder, texts, target)
    a, b = explain(encoder, texts, target.a), explain(encoder, texts, target.b)
    assert torch.allclose(r.value, a.value - b.value, atol=1e-6) and torch.allclose(r.map, a.map - b.map, atol=1e-5)
    assert (r.ledger.error < 1e-9).all() and r.target[0] == "similarity to 'a cat' - similarity to 'bob saw the dog'"


@pytest.mark.parametrize("inputs, target, said", [
    ("alice saw bob", Similarity(), r"give pairs \(a, b\), or Similarity\(to=...\)"),
    (PAIRS, [Similarity(), Similarity(to="a cat")], "some targets compare the texts of a pair with each other"),
    (PAIRS, Similarity(pool="max"), "a similarity has no 'max'; there are mean, cls, last, pooler"),
    (PAIRS, Similarity(by="euclid"), "a similarity has no 'euclid'; there are cosine, dot"),
    (PAIRS, None, r"no logits in an output .* give Similarity\(\) for pairs of texts"),
    ("alice", Similarity(to=["a cat", "a dog"]), "to= is one input that all are compared with, not 2"),
])
def test_similarities_that_cannot_be(encoder, inputs, target, said):
    with pytest.raises((ValueError, TypeError), match=said):
        explain(encoder, inputs, target)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: real models do not ship with relprop")
def test_a_real_model_finds_the_words_that_both_texts_share():
    from transformers import AutoModel, AutoTokenizer

    folder = SHARED / "models" / "minilm-sentiment"
    subject = load(AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    r = explain(subject, ("The film was a wonderful surprise.", "A wonderful evening!"), Similarity())
    assert (r.ledger.error < 1e-4).all() and -1 <= float(r.value) <= 1
    assert torch.allclose(r.value, explain(subject, "A wonderful evening!",
                                           Similarity(to="The film was a wonderful surprise.")).value, atol=1e-5)


# -- an image and a text -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_an_image_and_a_text_in_one_pass(kind):
    model, inputs = clip(kind)
    r = explain(model, inputs, Similarity())
    z = model(**inputs).logits_per_image
    assert torch.allclose(r.value.double(), z.diagonal(), atol=1e-5) and (r.ledger.error < 1e-9).all()
    text, image = r.inputs["input_ids"], r.inputs["pixel_values"]
    assert (text.abs().flatten(1).sum(1) > 0).all() and (image.abs().flatten(1).sum(1) > 0).all()
    total = sum(part.double().flatten(1).sum(1) for part in (text, image))
    assert torch.allclose(total, r.ledger.input, atol=1e-5)
    assert r.forwards == r.backwards == 1 and r.target == ["similarity"] * 2
    for row in range(2):
        alone = explain(model, {name: value[row:row + 1] for name, value in inputs.items()}, Similarity())
        assert torch.allclose(alone.value, r.value[row:row + 1], atol=1e-5)
        assert torch.allclose(alone.inputs["pixel_values"], image[row:row + 1], atol=1e-5)
        assert torch.allclose(alone.map, r.map[row:row + 1], atol=1e-5)


def test_the_prediction_of_such_a_model_is_its_similarity():
    model, inputs = clip()
    assert torch.equal(explain(model, inputs).map, explain(model, inputs, Similarity()).map)
    with pytest.raises(ValueError, match=r"an image and a text are compared with each other; leave to= out"):
        explain(model, inputs, Similarity(to="a cat"))


def test_half_of_a_cosine_is_the_images():
    """Without biases, which take from both sides, the product shares by halves."""
    from relprop.composite import get

    model, inputs = clip()
    found = relprop.relevance.propagate(model, (), inputs, lambda output: output.logits_per_image.diagonal(),
                                        get("cp-lrp"), taps={
        name: relprop.trace.Tap(f"{name}_projection") for name in ("text", "visual")})
    sides = [found.tapped[name].reshape(2, -1).sum(1) for name in ("text", "visual")]
    assert torch.allclose(sides[0], sides[1]) and torch.allclose(sum(sides), found.value)
