"""Which method explains where none is named: that of what the model takes, everywhere the same."""
from __future__ import annotations

import pytest
import tiny
import torch
from test_cli import good
from torch import nn

import relprop
from relprop import composite
from relprop.benchmark import benchmark
from relprop.data import digits
from relprop.method import compared
from relprop.zoo.digits import canvases


def picture():
    return (canvases(1, seed=5, digits=(2, 2)).images[0, 0] * 255).round().byte().numpy()


CASES = {"image": ("digits-vit", picture), "text": ("reviews-bert", lambda: "A wonderful film.")}


def test_every_default_is_a_composite():
    assert {*CASES, "both"} == set(composite.DEFAULTS) and set(composite.DEFAULTS.values()) <= set(composite.NAMES)


@pytest.mark.parametrize("modality", CASES)
def test_explain_takes_the_default_of_what_the_model_takes(modality):
    name, made = CASES[modality]
    subject, wanted = relprop.load(name), composite.DEFAULTS[modality]
    found, named = (relprop.explain(subject, made(), method=method) for method in (None, wanted))
    assert found.method == wanted == composite.default(modality)
    assert found.map.any() and torch.equal(found.map, named.map)
    other = next(name for name in composite.NAMES if name not in composite.DEFAULTS.values())
    assert not torch.allclose(found.map, relprop.explain(subject, made(), method=other).map)


def test_a_plain_module_is_explained_as_text_is():
    torch.manual_seed(0)
    found = relprop.explain(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(2, 4), 1)
    assert found.method == composite.DEFAULTS["text"]


def test_a_vision_model_without_a_name_is_explained_as_pictures_are():
    torch.manual_seed(0)
    found = relprop.explain(tiny.vit(), torch.randn(1, 3, 24, 24, dtype=torch.float64), 1)
    assert found.method == composite.DEFAULTS["image"]


def test_compare_and_benchmark_start_with_the_default():
    subject = relprop.load("digits-vit")
    wanted = [composite.DEFAULTS["image"], "rollout", "integrated-gradients"]
    assert compared("image") == wanted
    assert [one.method for one in relprop.compare(subject, picture(), check=False).results] == wanted
    found = benchmark(subject, digits(2, seed=3, digits=(2, 2)), metrics=["pointing-game"], show_progress=False)
    assert list(found.methods) == wanted


@pytest.mark.parametrize("modality", CASES)
def test_the_command_line_names_the_defaults(modality):
    line = next(line for line in good("models", "--methods").splitlines() if f"{modality}s" in line)
    assert line.split()[0] == composite.DEFAULTS[modality]


def test_the_command_line_explains_by_the_default():
    assert f"by {composite.DEFAULTS['text']}" in good("explain", "A wonderful film.")
