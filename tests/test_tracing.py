"""Causal tracing: equal to plain runs under noise with one value put back, and to its identities."""
from __future__ import annotations

import pytest
import torch
from test_effects import CLOSE, asked, known, model, subject, two
from torch.testing import assert_close

import relprop
from relprop.intervene import Given, Noise, Resample, intervened
from relprop.mediation import LogOdds, tracing
from relprop.mediation.outcome import outcome
from relprop.mediation.tracing import everywhere, windowed

TEXTS = ["gpt2", "llama-eager", "bert-eager"]


def traced(name, at, *, rows=3, corrupt="1-2", draws=1, **options):
    return tracing(subject(name), two(name, rows=rows)[0], options.pop("ask", asked(name)), corrupt=corrupt, at=at,
                   draws=draws, resamples=99, **options)


def under_noise(name, row, found, ask, restored=None):
    """The outcome of one row alone under the same noise, by plain forwards, with a site at its clean value."""
    one = subject(name)
    batch = one.prepare({key: value[row:row + 1] for key, value in two(name)[0].items()})
    answers = []
    for mine, _ in outcome(ask).pairs(one, batch, batch):
        kept = {}

        class Keep(Given):
            def value(self, now, there, kept=kept):
                kept["clean"] = now.clone()
                return now

        with torch.no_grad(), intervened(model(name), {"embed": Keep(0.0)}, known=known(name)):
            one.forward(mine.batch)
        clean = kept["clean"][0]  # (1, P, C)
        noisy = clean.clone()
        noisy[:, 1:3] = Noise(found.about["noise"], 0).value(clean[None, :, 1:3], None)[0]
        put = {"embed": Given(noisy)}
        if restored is not None:
            put[restored] = Resample(mine.batch)
        with torch.no_grad(), intervened(model(name), put, known=known(name)):
            output = one.forward(mine.batch)
        z = output if mine.at is None else relprop.target.logits(output)[torch.arange(1)[:, None], mine.at]
        if mine.tokens is not None:
            z = z[..., mine.tokens]
        answers.append(mine.answer(z, torch.arange(1)))
    return float(outcome(ask).value(answers)[0])


@pytest.mark.parametrize("name", TEXTS)
def test_it_is_what_plain_runs_give(name):
    ask = asked(name)
    found = traced(name, ["L0@1", "L1.mlp@2", "L1.attn.H1@3"], ask=ask)
    assert found.total.abs().min() > 1e-5 and found.indirect.abs().max() > 1e-5
    for row in range(3):
        assert float(found.base[row]) == pytest.approx(under_noise(name, row, found, ask), rel=1e-6)
        for place, site in enumerate(found.mediators):
            alone = under_noise(name, row, found, ask, site)
            assert float(found.indirect_outcome[place, row]) == pytest.approx(alone, rel=1e-6), site


@pytest.mark.parametrize("name", [*TEXTS, "timm-vit"])
def test_everything_restored_is_the_clean_run(name):
    if name == "timm-vit":
        images = two(name)[0]
        found = tracing(subject(name), images, asked(name), corrupt="p1", at={"all": "L1", "embed": "embed"}, draws=2)
    else:
        found = traced(name, {"all": "L1", "embed": "embed"}, draws=2)
    assert found.total.abs().min() > 1e-5
    assert_close(found.indirect, found.total.expand(2, -1), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "bert-eager"])
def test_what_had_no_noise_gives_nothing_back(name):
    found = traced(name, ["embed@0", "embed@1", "embed@2"])
    assert found.indirect[0].abs().max() < 1e-12 and found.indirect[1:].abs().max() > 1e-5
    whole = traced(name, {"both": ["embed@1", "embed@2"]})
    assert_close(whole.indirect[0], whole.total, **CLOSE)


def test_rows_do_not_depend_on_each_other():
    together = traced("gpt2", ["L0@1", "L1@*"], draws=2)
    for row in range(3):
        one = {key: value[row:row + 1] for key, value in two("gpt2")[0].items()}
        run = lambda strength, one=one: tracing(subject("gpt2"), one, asked("gpt2"), corrupt="1-2", draws=2,
                                                at=together.mediators, strength=strength)
        alone = run(together.about["noise"] / run(1.0).about["noise"])  # the same noise, whatever the others hold
        assert_close(alone.indirect[:, 0], together.indirect[:, row], **CLOSE)


def test_draws_are_averaged_and_told_apart_by_the_seed():
    first, second, both = (traced("gpt2", "L1@1", draws=draws, seed=seed) for draws, seed in ((1, 0), (1, 1), (2, 0)))
    assert not torch.allclose(first.base, second.base)
    assert_close(both.base, (first.base + second.base) / 2, **CLOSE)
    assert_close(both.indirect, (first.indirect + second.indirect) / 2, **CLOSE)
    assert_close(first.counterfactual, both.counterfactual, **CLOSE)


def test_a_window_restores_the_layers_around():
    wide = traced("gpt2", "L*.mlp@1", window=2)
    both = traced("gpt2", {"L0.mlp@1": ["L0.mlp@1", "L1.mlp@1"], "L1.mlp@1": "L1.mlp@1"})
    assert wide.mediators == both.mediators and wide.about["window"] == 2
    assert_close(wide.indirect, both.indirect, **CLOSE)
    assert windowed({}, 3) == {}


def test_every_position_stands_for_itself():
    batch = subject("gpt2").prepare(two("gpt2")[0])
    length = min(row.count(False) for row in batch.units.padding)
    assert everywhere("L1@*", batch) == [f"L1@{place}" for place in range(length)]
    assert everywhere(["L*.mlp", "L0@2"], batch) == ["L*.mlp", "L0@2"] and everywhere({"a": "L0"}, batch) == {"a": "L0"}


def test_it_is_told_and_drawn(tmp_path):
    found = tracing("reviews-bert", "A wonderful film.", corrupt="film", spans={"film": [[2, 3]]}, draws=2)
    same = tracing("reviews-bert", "A wonderful film.", corrupt="wonderful film", draws=2)
    assert same.indirect.equal(found.indirect) and same.about["corrupt"] == "wonderful film"
    assert found.about["corrupted"] == same.about["corrupted"] == [2, 3]
    assert found.about["draws"] == 2 and found.outcome == "P(prediction)"
    assert float(found.counterfactual[0]) > 0.5 and found.about["noise"] > 0
    words = found.save(tmp_path / "map.html").read_text()
    assert "2 wonderful *" in words and "* under noise" in words and "restor" in words


@pytest.mark.parametrize("options, said", [
    (dict(corrupt="77"), "positions"), (dict(corrupt="job"), "no span of this name"),
    (dict(corrupt="9-12"), "positions"),
    (dict(window=0), "window is 0"),
    (dict(draws=0), "draws 0"), (dict(strength=0), "strength"), (dict(scale="log"), "scale"),
    (dict(at="L9@*"), "no layer 9")])
def test_bad_input_is_told(options, said):
    with pytest.raises(ValueError, match=said):
        tracing("reviews-bert", "A wonderful film.", **{"corrupt": "2", "draws": 1, **options})


def test_the_model_is_given_back():
    one = subject("gpt2")
    batch = one.prepare(two("gpt2")[0])
    before = one.forward(batch).logits
    hooks = lambda: sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in one.model.modules())
    count = hooks()
    traced("gpt2", "L0@1", ask=LogOdds([5], [7]))
    with pytest.raises(ValueError):
        traced("gpt2", "L0@99")
    assert hooks() == count and torch.equal(before, one.forward(batch).logits)
