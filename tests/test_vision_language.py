"""The relevance of one word over a picture and a prompt, on the picture's own pixels, in one backward pass."""
from __future__ import annotations

import json

import numpy as np
import pictured
import pytest
import torch

import relprop
from relprop import prompt
from relprop.check.removal import removal
from relprop.target import Answer, Contrast, Similarity

TEMPLATE = ("{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}SIGN{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
            "{% if add_generation_prompt %}assistant :{% endif %}")


def target(name):
    return 7 if name in pictured.WRITERS else pictured.alike


@pytest.fixture(scope="module")
def llava():
    model, processor, sign = pictured.made("llava")
    return relprop.load((model, processor)), sign


@pytest.fixture
def chatting(llava):
    subject, sign = llava
    subject.processor.chat_template = TEMPLATE.replace("SIGN", sign)
    yield subject
    subject.processor.chat_template = None


@pytest.mark.parametrize("name", pictured.some("llava", "qwen2_vl", "clip"))
def test_books_balance_in_one_pass_and_rows_are_as_alone(name):
    model, processor, sign = pictured.made(name)
    subject, rows, calls = relprop.load((model, processor)), pictured.rows(sign), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    r = relprop.explain(subject, rows, target=target(name))
    handle.remove()
    assert r.forwards == r.backwards == 1
    packed = bool(r._live.batch.pictures.packing)  # patches of pictures of unlike size: each row goes by itself
    assert len(calls) == (2 if packed else 1)
    assert float(r.ledger.error.max()) < 1e-9
    assert [one.row for one in r.pictures] == [0, 1]
    assert [tuple(one.image.shape) for one in r.pictures] == [(40, 60, 3), (50, 37, 3)]
    assert tuple(one.grid for one in r.pictures) == pictured.PATCHES[name]
    for part in (r.map, *(one.map for one in r.pictures)):
        assert bool((part > 0).any() and (part < 0).any())
    for kind, total in r.totals.items():
        torch.testing.assert_close(total, r.ledger.parts[kind], rtol=1e-5, atol=1e-7)
    for one in r.pictures:
        torch.testing.assert_close(one.patches().sum(), one.map[one.cells >= 0].sum(), rtol=1e-4, atol=1e-6)
    calls.clear()
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    alone = relprop.explain(subject, rows[1], target=target(name))
    handle.remove()
    assert len(calls) == 1
    torch.testing.assert_close(alone.value, r.value[1:])
    torch.testing.assert_close(alone.pictures[0].map, r.pictures[1].map, rtol=1e-4, atol=1e-7)
    assert [word for word, _ in alone.words(0)] == [word for word, _ in r.words(1)]
    assert [value for _, value in alone.words(0)] == pytest.approx([value for _, value in r.words(1)], abs=1e-6)
    parts = relprop.explain(subject, rows, target=target(name), batch_size=1)
    assert [one.row for one in parts.pictures] == [0, 1] and parts.ledger.parts["image"].shape == (2,)
    torch.testing.assert_close(parts.pictures[1].map, r.pictures[1].map, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_float32(name):
    model, processor, sign = pictured.BUILDS[name](__import__("transformers"))
    r = relprop.explain((pictured.random(model).float(), processor), pictured.rows(sign), target=7)
    assert float(r.ledger.error.max()) < 1e-3


def test_a_picture_of_the_models_size_has_the_relevance_of_its_pixels(llava):
    subject, sign = llava
    r = relprop.explain(subject, {"text": sign + "what is it", "image": pictured.picture(28, 28)}, target=7)
    expected = r.inputs["pixel_values"].sum(1)
    # a place is known to a fraction of a pixel, so that a little of each is its neighbours'
    assert float((r.image - expected).abs().sum()) < 0.12 * float(expected.abs().sum())
    torch.testing.assert_close(r.image.sum((1, 2)), expected.sum((1, 2)))
    whole = expected.unflatten(2, (4, 7)).unflatten(1, (4, 7)).sum((2, 4))
    assert float((r.patches() - whole).abs().sum()) < 0.03 * float(whole.abs().sum())


def test_patches_in_another_order_are_put_back():
    model, processor, sign = pictured.made("qwen2_vl")
    r = relprop.explain((model, processor), {"text": sign + "what is it", "image": pictured.picture(28, 56)}, target=7)
    flat = r.inputs["pixel_values"]  # (N, C T P P); patches of a merged 2 x 2 lie next to each other
    tall, wide, P = 2, 4, pictured.PATCH
    boxes = flat.view(tall, wide, 2, 2, 3 * 2, P, P)
    expected = boxes.permute(0, 2, 5, 1, 3, 6, 4).sum(-1).reshape(1, tall * 2 * P, wide * 2 * P)
    assert float((r.image - expected).abs().sum()) < 0.12 * float(expected.abs().sum())
    whole = boxes.sum((2, 3, 4, 5, 6))[None]
    assert r.patches().shape == whole.shape
    assert float((r.patches() - whole).abs().sum()) < 0.03 * float(whole.abs().sum())


def test_padding_of_pictures_has_an_account_of_its_own():
    model, processor, sign = pictured.made("llava_next")
    r = relprop.explain((model, processor), pictured.rows(sign), target=7)
    assert float(r.ledger.absorbed["padding of pictures"].abs().min()) > 0


def test_tokens_in_the_place_of_a_picture_are_no_words(llava):
    subject, sign = llava
    r = relprop.explain(subject, {"text": sign + "a photo of two", "image": pictured.picture(40, 60)}, target=7)
    assert [word for word, _ in r.words(0)] == ["a", "photo", "of", "two"]
    assert r.specials(0) == [(sign, 0.0)] * 16  # the model reads the picture there, not the tokens


def test_ways_to_give_text_and_picture(chatting):
    picture, text = pictured.picture(40, 60), "what is the digit"
    ways = [{"text": text, "image": picture}, (picture, text), (text, np.array(picture)), [(picture, text)],
            {"text": [text], "images": [picture]}, {"question": text, "image": picture},
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}],
            {"messages": [{"role": "user", "content": [{"type": "image", "image": picture},
                                                       {"type": "text", "text": text}]}]}]
    found = [relprop.explain(chatting, way, target=" seven") for way in ways]
    assert [word for word, _ in found[0].words(0)] == text.split()  # what the template adds is no word
    assert found[0].target == ["' seven'"]
    for other in found[1:]:
        assert other.equals(found[0])


def test_tensors_of_the_processor_give_the_same_maps(llava):
    for name in ("llava", "qwen2_vl", "llava_next"):
        model, processor, sign = pictured.made(name)
        # of a size that the model takes, so that the picture can be put together from its pixels
        rows = [{"text": sign + "what is it", "image": pictured.picture(28, 56)},
                {"text": sign + "a photo of two", "image": pictured.picture(28, 56, 1)}]
        subject = relprop.load((model, processor))
        expected = relprop.explain(subject, rows, target=7)
        tensors = prompt.process(prompt.read(rows, processor, name), processor)
        r = relprop.explain(subject, tensors, target=7)
        torch.testing.assert_close(r.map, expected.map)
        torch.testing.assert_close(r.totals["image"], expected.totals["image"])
        if name == "llava":  # a square is cut out, and what was around it is not known
            assert [tuple(one.map.shape) for one in r.pictures] == [(28, 28)] * 2
        else:
            for one, other in zip(r.pictures, expected.pictures, strict=True):
                torch.testing.assert_close(one.map, other.map, rtol=1e-4, atol=1e-6)
                assert float((one.image.float() - other.image.float()).abs().mean()) < 4
        assert [word for word, _ in r.words(1)] == ["a", "photo", "of", "two"]


def test_rows_with_several_pictures_or_none():
    for name in ("qwen2_vl", "internvl"):
        model, processor, sign = pictured.made(name)
        pictures = [pictured.picture(40, 60), pictured.picture(50, 37, 1)]
        rows = [{"text": sign + "one" + sign + "two", "images": pictures}, {"text": "three", "images": []}]
        r = relprop.explain((model, processor), rows, target=7)
        assert [one.row for one in r.pictures] == [0, 0] and float(r.ledger.error.max()) < 1e-9
        assert float(r.totals["image"][1]) == 0 and r.ranked.shape[1] == r.map.shape[1] + sum(
            one.grid[0] * one.grid[1] for one in r.pictures)
        with pytest.raises(ValueError, match="2 pictures of"):
            _ = r.image
        assert r.row(1).pictures == () and len(r.row(0).pictures) == 2
        assert r.check(steps=2, randoms=2).forwards > 0


def test_answers_and_their_contrast():
    model, processor, sign = pictured.made("qwen2_vl")
    subject, row = relprop.load((model, processor)), pictured.rows(sign)[:1]
    one, other = (relprop.explain(subject, row, target=Answer(text)) for text in (" seven cat", " dog"))
    both = relprop.explain(subject, pictured.rows(sign), target=Contrast(Answer(" seven cat"), Answer(" dog")))
    assert float(both.ledger.error.max()) < 1e-9 and [one.row for one in both.pictures] == [0, 1]
    torch.testing.assert_close(both.pictures[0].map, one.pictures[0].map - other.pictures[0].map, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(both.ledger.parts["image"], both.totals["image"], rtol=1e-5, atol=1e-7)
    assert both.check(steps=2, randoms=2).forwards > 0


def test_similarity_over_both():
    model, processor, sign = pictured.made("clip")
    r = relprop.explain((model, processor), pictured.rows(sign), target=Similarity())
    with torch.no_grad():
        tensors = prompt.process(prompt.read(pictured.rows(sign), processor, "clip"), processor)
        logits = model(**{name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})
    torch.testing.assert_close(r.value.double(), pictured.alike(logits), rtol=1e-6, atol=1e-6)
    assert set(r.totals) == {"text", "image"} and float(r.totals["image"].abs().min()) > 0


@pytest.mark.parametrize("name", pictured.some("llava", "qwen2_vl", "llava_next"))
def test_units_are_taken_out_of_both(name):
    model, processor, sign = pictured.made(name)
    subject = relprop.load((model, processor))
    batch = subject.prepare(pictured.rows(sign))
    out = removal(subject, batch)
    (key, found), = batch.pictures.origins.items()
    none = out.without(torch.tensor([1, 0]), torch.zeros(2, int(out.counts.max()), dtype=torch.bool))
    items = batch.pictures.items([1, 0]).get(key, torch.tensor([1, 0]))
    assert torch.equal(none.kwargs[key], batch.kwargs[key][items])
    words = int(out.groups[0, :batch.kwargs["input_ids"].shape[1]].max()) + 1
    gone = torch.zeros(1, int(out.counts.max()), dtype=torch.bool)
    gone[0, words + 1] = True  # the second patch of the first row
    one = out.without(torch.tensor([0]), gone)
    own = batch.pictures.items([0]).get(key, torch.tensor([0]))
    changed = one.kwargs[key] != batch.kwargs[key][own]
    inside = batch.pictures.cells(key)[own] == 1
    assert bool(changed.any()) and not bool(changed[~inside].any())
    assert float(changed[inside].float().mean()) > 0.9
    assert torch.equal(one.kwargs["input_ids"], batch.kwargs["input_ids"][:1])
    gone[0] = False
    gone[0, 0] = True
    one = out.without(torch.tensor([0]), gone)
    assert torch.equal(one.kwargs[key], batch.kwargs[key][own])
    assert int((one.kwargs["input_ids"] != batch.kwargs["input_ids"][:1]).sum()) == 1


def test_the_check_ranks_words_and_patches_together(llava):
    subject, sign = llava
    r = relprop.explain(subject, pictured.rows(sign), target=7)
    assert r.ranked.shape == (2, r.map.shape[1] + 16)
    torch.testing.assert_close(r.ranked[:, -16:], r.patches().flatten(1))
    curve = r.check(steps=4, randoms=4, by="word")
    assert curve.baseline == "unk token, median colour" and len(curve.area) == 2
    assert r.check(steps=2, randoms=2, baseline="zero").baseline == "unk token, zero (mean colour of training)"


def test_results_are_kept_and_drawn(llava, tmp_path):
    subject, sign = llava
    r = relprop.explain(subject, pictured.rows(sign), target=7)
    r.check(steps=2, randoms=2)
    for suffix in ("json", "safetensors"):
        r.save(tmp_path / f"map.{suffix}")
        kept = relprop.open(tmp_path / f"map.{suffix}")
        assert kept.equals(r.__class__.from_dict(json.loads(json.dumps(r.to_dict()))))
        assert [tuple(one.map.shape) for one in kept.pictures] == [(40, 60), (50, 37)]
        assert torch.equal(kept.pictures[1].map, r.pictures[1].map) and kept.ledger.parts.keys() == {"text", "image"}
        assert torch.equal(kept.pictures[1].image, r.pictures[1].image)
    for suffix in ("png", "html"):
        assert r.save(tmp_path / f"map.{suffix}").stat().st_size > 10_000
    page = (tmp_path / "map.html").read_text()
    assert page.count('class="row beside"') == 2 and "16 × &lt;image&gt;" in page and "patches, words" in page
    kept.save(tmp_path / "again.html")  # without the model
    assert "text" in str(r.ledger) and "image" in str(r.ledger)


def test_other_methods_over_both(llava):
    subject, sign = llava
    rows = pictured.rows(sign)
    found = relprop.compare(subject, rows, target=7, steps=2, randoms=2)
    assert [r.method for r in found.results] == ["attnlrp", "cp-lrp", "input-x-gradient"]
    assert all(r._live.curve is not None and len(r.pictures) == 2 for r in found.results)
    plain = relprop.explain(subject, rows, target=7, method="input-x-gradient")
    by_rules = relprop.explain(subject, rows, target=7, method=relprop.composite.get("gradient"))
    torch.testing.assert_close(plain.map, by_rules.map)
    torch.testing.assert_close(plain.pictures[0].map, by_rules.pictures[0].map)
    ablated = relprop.explain(subject, rows[0], target=7, method="feature-ablation", options={"by": "token"})
    assert ablated.pictures[0].grid == (4, 4)
    batch = subject.prepare(rows[0])
    out = removal(subject, batch)
    values = []
    for unit in (0, 12):  # a word and a patch
        gone = torch.zeros(1, int(out.counts.max()), dtype=torch.bool)
        gone[0, unit] = True
        with torch.no_grad():
            logits = [subject.forward(one).logits[0, -1, 7] for one in (batch, out.without(torch.tensor([0]), gone))]
        values.append(float(logits[0] - logits[1]))
    flat = ablated.ranked[0][out.groups[0] >= 0]
    assert [float(flat[0]), float(flat[12])] == pytest.approx(values, abs=1e-5)
    noise = relprop.explain(subject, rows, target=7, method="random")
    assert len(noise.pictures) == 2 and noise.check(steps=2, randoms=2).forwards > 0
    with pytest.raises(ValueError, match="explains one input"):
        relprop.explain(subject, rows, target=7, method="rollout")


def test_what_is_no_prompt(llava):
    subject, sign = llava
    picture = pictured.picture(28, 28)
    with pytest.raises(TypeError, match="takes text and pictures, and a row was Image"):
        subject.prepare([picture])
    with pytest.raises(ValueError, match="at least one word"):
        subject.prepare({"text": " ", "image": picture})
    with pytest.raises(TypeError, match="not a tensor"):
        subject.prepare({"text": "what", "image": torch.zeros(3, 28, 28)})
    with pytest.raises(ValueError, match="give as many pictures as texts"):
        subject.prepare({"text": ["what", "is"], "image": [picture]})
    with pytest.raises(ValueError, match="cannot read the batch"):
        subject.prepare({"text": sign + sign + "what", "image": picture})
    with pytest.raises(ValueError, match="no chat template"):
        subject.prepare([{"role": "user", "content": [{"type": "image", "image": picture}]}])


def test_a_folder_has_both(tmp_path):
    model, processor, sign = pictured.made("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    subject = relprop.load(tmp_path, dtype="float64")
    assert subject.modality == "both" and subject.task == "image-text-to-text"
    rows = pictured.rows(sign)[:1]
    expected = relprop.explain((model, processor), rows, target=7)
    torch.testing.assert_close(relprop.explain(subject, rows, target=7).image, expected.image)


def test_relevance_inside_of_both_towers():
    model, processor, sign = pictured.made("qwen2_vl")
    r = relprop.explain((model, processor), pictured.rows(sign), target=7, at="L*.attn.H0")
    assert [tuple(t.shape) for t in r.latents.values()] == [(2, 48), (2, 48), (2, 22), (2, 22)]
    assert all(bool(t.any()) for t in r.latents.values())
