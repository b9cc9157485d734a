"""Maps of text pass the sanity checks; the benchmark of text methods runs end to end."""
from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import relprop
from relprop import composite, units
from relprop.check import sanity
from relprop.data import sst

DEMO = Path(__file__).parents[1] / "demos" / "benchmark_text.py"
SURVIVES = 0.1  # rank correlation with the map of a model that has learned nothing, at most
MODELS = 3  # that have learned nothing


@pytest.fixture(scope="module")
def sentences(shared):
    """Sentences with a prediction, of a model that is given back as it was."""
    subject = relprop.load("reviews-bert")
    data = sst(shared / "data" / "rationale_eval", 48)
    return subject, subject.prepare([one.input for one in data.examples])


def survival(subject, batch, target, method) -> float:
    """Mean rank correlation of maps with those of the model with all its weights drawn anew."""
    run = lambda: relprop.explain(subject, batch, target, method=method, ledger=False).map
    names, before, inside = [name for name, _ in subject.model.named_parameters()], run(), units.groups(batch) >= 0
    found = []
    for seed in range(MODELS):
        with sanity.randomised(subject.model, names, seed=seed):
            found.append(sanity.correlation(before, run(), inside))
    assert torch.equal(run(), before)
    return float(torch.stack(found).mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", composite.NAMES)
def test_random_weights_destroy_every_map(sentences, method):
    assert abs(survival(*sentences, "POSITIVE", method)) < SURVIVES


def test_a_map_that_does_not_look_at_the_model_survives(sentences):
    assert survival(*sentences, "POSITIVE", "random") > 0.99


def contrast(sentences, method) -> float:
    subject, batch = sentences
    few = batch.take(range(8))
    one, other = (relprop.explain(subject, few, label, method=method, ledger=False).map
                  for label in ("POSITIVE", "NEGATIVE"))
    return float(sanity.class_contrast(one, other, few).mean())


@pytest.mark.parametrize("method", composite.NAMES)
def test_two_classes_have_different_maps(sentences, method):
    """What speaks for one of two classes speaks against the other."""
    assert contrast(sentences, composite.get(method)) < 0.5


def test_magnitudes_do_not_say_which_class(sentences):
    assert contrast(sentences, "gradient") > 0.9


@pytest.mark.slow
def test_the_demo_writes_numbers_and_a_figure(shared, tmp_path, monkeypatch, capsys):
    assert len(DEMO.read_text().splitlines()) <= 60
    demo = runpy.run_path(str(DEMO))
    few = {"COUNT": {"movies": 3, "sst": 4}, "METHODS": ["attnlrp-path", "rollout"]}
    demo["main"].__globals__.update(few)
    monkeypatch.setattr(sys, "argv", ["demo", "--data", str(shared / "data" / "rationale_eval"), "--work",
                                      str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    demo["main"]()
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    stems = [f"benchmark-text-{name}" for name in ("movies", "sst")]
    assert written == sorted(["benchmark-text.png", *(f"{stem}.{kind}" for stem in stems for kind in ("csv", "json"))])
    said = json.loads((tmp_path / "out" / f"{stems[1]}.json").read_text())
    assert said["methods"] == list(few["METHODS"]) and "| `rollout` |" in capsys.readouterr().out
    texts = [one.input for one in sst(shared / "data" / "rationale_eval", 4).examples]
    held = (tmp_path / "out" / f"{stems[1]}.json").read_text()
    assert not any(text[:20] in held for text in texts)
