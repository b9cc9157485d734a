"""Methods as explain functions of Quantus: in its metrics where it is installed, and the shapes that it asks for."""
from __future__ import annotations

import numpy
import pytest
import torch
from tiny import bert, vit
from torch import nn

import relprop
from relprop import quantus


@pytest.fixture
def pixels(seed) -> numpy.ndarray:
    return torch.randn(2, 3, 24, 24).numpy()


@pytest.mark.parametrize("method, options", [("attnlrp", None), ("rollout", None), ("smoothgrad", {"samples": 2}),
                                             ("feature-ablation", None)])
def test_pixels_have_one_channel(pixels, method, options):
    network, y = vit().float(), numpy.array([2, 0])
    found = quantus.explain(network, pixels, y, method=method, options=options)
    assert found.shape == (2, 1, 24, 24) and found.dtype == numpy.float32
    expected = relprop.explain(network, torch.tensor(pixels), [2, 0], method=method, options=options or {}).map
    numpy.testing.assert_allclose(found[:, 0], expected.numpy(), rtol=1e-5, atol=1e-7)


def test_channels_are_kept_where_there_are_any(pixels):
    network = vit().float()
    found = quantus.explain(network, pixels, 1, method="attnlrp", channels=True)
    assert found.shape == pixels.shape
    summed = quantus.explain(network, pixels, 1, method="attnlrp")
    numpy.testing.assert_allclose(found.sum(1, keepdims=True), summed, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="rollout has a map .* and nothing finer"):
        quantus.explain(network, pixels, 1, method="rollout", channels=True)


def test_features_positions_and_ids(seed):
    linear, x = nn.Linear(5, 3), numpy.random.randn(2, 5)
    found = quantus.explain(linear, x, 1, method="input-x-gradient")  # float64 for a float32 model
    numpy.testing.assert_allclose(found, x * linear.weight[1].detach().numpy(), rtol=1e-5)
    deep = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert quantus.explain(deep, numpy.random.randn(2, 4, 3).astype("float32"), [1, 2]).shape == (2, 4, 3)
    ids = numpy.array([[2, 5, 6, 3], [2, 7, 8, 3]])
    assert quantus.explain(bert(), ids, numpy.array([1, 0])).shape == (2, 4)
    numpy.testing.assert_array_equal(quantus.explain(bert_of(1), ids), quantus.explain(bert_of(1), ids, device="cpu"))


def bert_of(number: int) -> nn.Module:
    torch.manual_seed(number)
    return bert()


def test_bad_input_is_an_error(pixels):
    network = vit().float()
    with pytest.raises(ValueError, match="unknown method 'lrp'; the methods are"):
        quantus.explain(network, pixels, 1, method="lrp")
    with pytest.raises(TypeError, match="sample"):
        quantus.explain(network, pixels, 1, samples=3)
    with pytest.raises(ValueError, match="3 targets for 2 rows"):
        quantus.explain(network, pixels, numpy.array([1, 2, 0]))


def installed() -> object:
    return pytest.importorskip("quantus", reason="Quantus is not installed; pip install relprop[test]")


def test_robustness(pixels):
    found = installed().MaxSensitivity(nr_samples=2, lower_bound=0.01, disable_warnings=True)(
        model=vit().float().eval(), x_batch=pixels, y_batch=numpy.array([2, 0]), explain_func=quantus.explain,
        explain_func_kwargs={"method": "cp-lrp"}, device="cpu")
    assert len(found) == 2 and all(0 < value < 10 for value in found)


def test_faithfulness(pixels):
    """Of a linear model, input x gradient is what the target loses: their correlation is perfect, unlike noise's."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3)).eval()
    metric = installed().FaithfulnessCorrelation(
        nr_runs=60, subset_size=60, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True)
    run = lambda method: metric(model=network, x_batch=pixels, y_batch=numpy.array([2, 0]), softmax=False,
                                explain_func=quantus.explain,
                                explain_func_kwargs={"method": method, "channels": method != "random"})
    good, noise = numpy.array(run("input-x-gradient")), numpy.array(run("random"))
    assert (good > 0.999).all() and (numpy.abs(noise) < 0.6).all()


def test_localisation(pixels):
    masks = numpy.zeros((2, 1, 24, 24), dtype=bool)
    masks[..., :12] = True
    found = installed().RelevanceMassAccuracy(abs=True, disable_warnings=True)(
        model=vit().float().eval(), x_batch=pixels, y_batch=numpy.array([2, 0]), s_batch=masks,
        explain_func=quantus.explain, explain_func_kwargs={"method": "attnlrp"})
    assert len(found) == 2 and all(0 < value < 1 for value in found)
