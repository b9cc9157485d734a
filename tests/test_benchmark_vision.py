"""Maps of pictures pass the sanity checks, and are of the digit asked for; the benchmark of vision methods runs."""
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
from relprop.data import digits
from relprop.data.alignment import prepared

DEMO = Path(__file__).parents[1] / "demos" / "benchmark_vision.py"
SURVIVES = 0.1  # rank correlation with the map of a model that has learned nothing, at most
MODELS = 3  # that have learned nothing
SPECIFIC = 3.0  # times the relevance of the other digit, at least, is on the digit asked for
BLIND = {"deep-taylor": 1.5, "gradient": 3.0}  # composites that hardly hear which class is asked for: at most that much
PICTURES = [name for name in composite.NAMES if composite.get(name).points == (1.0,)]  # a way needs token ids


@pytest.fixture(scope="module")
def subject():
    return relprop.load("digits-vit")


def mapped(subject, count: int, method: str):
    """Canvases with two digits, and the maps of one of them."""
    data = digits(count, seed=11, digits=(2, 2))
    batch = prepared(subject, data)
    targets = [one.target for one in data.examples]
    rules = composite.get(method) if method in composite.NAMES else method  # "gradient" is a baseline's name too
    run = lambda: relprop.explain(subject, batch, targets, method=rules).map
    return data.examples, batch, run


def ratio(examples, relevance) -> float:
    """Positive relevance on the digit asked for over that on the other one, of all canvases together."""
    own = sum(row.clamp(min=0)[one.marked].sum() for one, row in zip(examples, relevance, strict=True))
    other = sum(row.clamp(min=0)[next(iter(one.others.values()))].sum()
                for one, row in zip(examples, relevance, strict=True))
    return float(own / other)


@pytest.mark.parametrize("method", PICTURES)
def test_the_digit_asked_for_has_the_relevance(subject, method):
    examples, _, run = mapped(subject, 12, method)
    found = ratio(examples, run())
    assert (1.0 < found < BLIND[method]) if method in BLIND else found > SPECIFIC


def test_relevance_without_a_model_is_on_both_digits(subject):
    examples, _, run = mapped(subject, 12, "random")
    assert 0.5 < ratio(examples, run()) < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("method", PICTURES)
def test_random_weights_destroy_every_map(subject, method):
    _, batch, run = mapped(subject, 24, method)
    names, inside = [name for name, _ in subject.model.named_parameters()], units.groups(batch) >= 0
    before, found = run(), []
    for seed in range(MODELS):
        with sanity.randomised(subject.model, names, seed=seed):
            found.append(sanity.correlation(before, run(), inside))
    assert torch.equal(run(), before)
    assert abs(float(torch.stack(found).mean())) < SURVIVES


def test_a_map_that_does_not_look_at_the_model_survives(subject):
    _, batch, run = mapped(subject, 2, "random")
    before = run()
    with sanity.randomised(subject.model, [name for name, _ in subject.model.named_parameters()]):
        assert (sanity.correlation(before, run(), units.groups(batch) >= 0) > 0.99).all()


@pytest.mark.slow
def test_the_demo_writes_numbers_and_a_figure(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["demo", "--count", "4", "--methods", "attnlrp-vision", "rollout", "--work",
                                      str(tmp_path / "work"), "--out", str(out)])
    runpy.run_path(str(DEMO), run_name="__main__")
    assert {path.name for path in out.iterdir()} == {f"benchmark-vision.{kind}" for kind in ("csv", "json", "png")}
    said = json.loads((out / "benchmark-vision.json").read_text())
    assert said["methods"] == ["attnlrp-vision", "rollout"] and said["about"]["options"]["ends"] == 4
    assert "| positive-auc | " in capsys.readouterr().out
