"""Gradients by finite differences, completeness where it is promised, exact answers on additive models, and costs."""
from __future__ import annotations

import math
from inspect import signature

import numpy
import pytest
import torch
from families import FAMILIES
from tiny import CLS, MASK, PAD, SEP, TOKENIZER, bert, gpt2, images, targets, text, vit
from torch import nn

import relprop
from relprop import attention, baselines
from relprop.errors import IndependentOutput
from relprop.subject import Subject
from relprop.target import Contrast, Probability
from relprop.tokens import Batch, TensorUnits

METHODS = {name: run for name, run in {**baselines.METHODS, **attention.METHODS}.items() if name != "deeplift"}
COSTLY = {"integrated-gradients": {"n_steps": 3}, "layer-integrated-gradients": {"n_steps": 3},
          "smoothgrad": {"samples": 3}, "gradient-shap": {"samples": 3, "noise": 0.1}, "kernel-shap": {"samples": 40},
          "lime": {"samples": 40}}  # options that keep the tests short
GRADIENTS = ("gradient", "saliency", "input-x-gradient", "integrated-gradients", "layer-integrated-gradients",
             "smoothgrad", "gradient-shap")
BASELINED = ("integrated-gradients", "layer-integrated-gradients", "gradient-shap", "occlusion", "feature-ablation",
             "kernel-shap", "lime")
CLIPPED = ("attention-gradcam",)  # may be zero everywhere
DRAWN = ("random", "smoothgrad", "gradient-shap", "kernel-shap", "lime")


def bert_of(number: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(number)
        return bert()


def reads_text(network: nn.Module) -> Subject:
    return Subject(network, TOKENIZER, "text")


# The table of methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spec", [None, [Probability(2), Contrast(0, 1)]], ids=["prediction", "one a row"])
def test_a_batch_of_texts_equals_the_loop(seed, name, spec):
    network, rows = bert(), ([CLS, 5, 6, 7, 8, SEP], [CLS, 9, 10, SEP])
    batch = text(*rows)
    options = COSTLY.get(name, {})
    together = METHODS[name](reads_text(network), batch, targets(spec, batch), **options)
    for row, ids in enumerate(rows):
        alone = text(ids)
        one = spec[row] if isinstance(spec, list) else spec
        single = METHODS[name](reads_text(network), alone, targets(one, alone), **options)
        torch.testing.assert_close(together.map[row, :len(ids)], single.map[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.value[row], single.value[0])
        assert together.target[row] == single.target[0]
        assert (together.map[row, len(ids):] == 0).all() and (single.map.abs().max() > 1e-3 or name in CLIPPED)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_pictures_equals_the_loop(seed, name):
    network, pixels = vit(), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    options = COSTLY.get(name, {})
    batch = images(pixels, 6)
    together = METHODS[name](Subject(network), batch, targets([2, 0], batch), **options)
    for row, spec in enumerate([2, 0]):
        alone = images(pixels[row:row + 1], 6)
        single = METHODS[name](Subject(network), alone, targets(spec, alone), **options)
        torch.testing.assert_close(together.map[row], single.map[0], rtol=1e-5, atol=1e-6)
    assert together.map.shape == (2, 24, 24) and together.map.dtype == torch.float32
    assert not torch.allclose(together.map[0], together.map[1])


@pytest.mark.parametrize("name", METHODS)
def test_a_language_model_is_explained_at_its_last_token(seed, name):
    batch = text([5, 6, 7, 8], [9, 10])
    found = METHODS[name](reads_text(gpt2()), batch, targets(None, batch, labels=None), **COSTLY.get(name, {}))
    assert found.map.shape == (2, 4) and (found.map[1, 2:] == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_equal_and_the_model_is_given_back(seed, name):
    network = bert().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    batch = text([CLS, 5, 6, SEP])
    run = METHODS[name]
    first, second = (run(reads_text(network), batch, targets(0, batch), **COSTLY.get(name, {})) for _ in range(2))
    assert torch.equal(first.map, second.map)
    with pytest.raises(ZeroDivisionError):
        run(reads_text(network), batch, targets(lambda output: 1 / 0, batch), **COSTLY.get(name, {}))
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_given_back_after_an_error_on_the_way(seed, name):
    network = bert().train()
    batch, seen = text([CLS, 5, 6, SEP]), []

    def fails_later(output):
        seen.append(len(output.logits))
        return output.logits[:, 0] if len(seen) < 3 else 1 / 0

    try:  # rollout reads the target twice
        METHODS[name](reads_text(network), batch, targets(fails_later, batch), **COSTLY.get(name, {}))
    except ZeroDivisionError:
        pass
    assert seen and all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("name", METHODS)
def test_chance_is_of_the_seed_alone_and_global_chance_stays(seed, name):
    run, batch = METHODS[name], text([CLS, 5, 6, 7, SEP], [CLS, 8, 9, SEP])
    options = COSTLY.get(name, {})
    before, drawn = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    seeded = lambda seed: run(reads_text(bert_of(0)), batch, targets(0, batch), **options,
                              **({"seed": seed} if name in DRAWN else {})).map
    maps = [seeded(1), seeded(1), seeded(2)]
    assert torch.equal(before, torch.get_rng_state()) and (drawn == numpy.random.get_state()[1]).all()
    torch.manual_seed(3)  # global chance is not what is drawn from
    numpy.random.seed(3)
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], seeded(1))
    assert torch.equal(maps[0], maps[2]) == (name not in DRAWN)


@pytest.mark.parametrize("name", [name for name in METHODS if "batch_size" in signature(METHODS[name]).parameters])
@pytest.mark.parametrize("kind", ["text", "picture"])
def test_the_map_does_not_depend_on_the_batch_size(seed, name, kind):
    network = bert() if kind == "text" else vit()
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    batch = text([CLS, 5, 6, 7, SEP], [CLS, 7, SEP]) if kind == "text" else images(pixels, 6)
    subject, most = (reads_text(network) if kind == "text" else Subject(network)), []
    network.register_forward_hook(lambda module, args, kwargs, output: most.append(
        len(next(iter([*args, *kwargs.values()])))), with_kwargs=True)
    for size in (1, 7, 100):
        most.clear()
        found = METHODS[name](subject, batch, targets([0, 2], batch), batch_size=size, **COSTLY.get(name, {})).map
        assert max(most) <= max(size, batch.rows)
        expected = found if size == 1 else expected  # noqa: F821
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["text", "picture"])
def test_the_cost_is_stated(seed, name, kind):
    network = bert() if kind == "text" else vit()
    batch = text([CLS, 5, 6, SEP], [CLS, 7, SEP]) if kind == "text" else images(torch.randn(2, 3, 24, 24).double(), 6)
    subject = reads_text(network) if kind == "text" else Subject(network)
    forwards: list[int] = []
    network.register_forward_hook(lambda module, args, kwargs, output: forwards.append(
        len(next(iter([*args, *kwargs.values()])))), with_kwargs=True)
    found = METHODS[name](subject, batch, targets(0, batch), **COSTLY.get(name, {}))
    assert found.forwards == math.ceil(sum(forwards) / batch.rows) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in baselines.METHODS if name not in ("deeplift", "random")])
def test_every_family_row_by_row(family, name):
    """Whatever the family calls its parts; rows differ in length."""
    if (family, name) == ("torch-encoder-sequence-first", "layer-integrated-gradients"):
        pytest.skip("its layers read positions first")
    if name == "input-x-gradient" and family in ("modernbert", "deberta-v3"):
        pytest.skip("a norm right behind the embeddings does not see their length: the map is zero")
    made = FAMILIES[family]
    args, kwargs = made.inputs()
    costly = {**COSTLY, "kernel-shap": {}} if args else COSTLY  # fewer samples than patches are no stable fit
    options = {**costly.get(name, {}), **({"baseline": 3} if kwargs and name in BASELINED else {})}
    run = lambda inputs: relprop.explain(Subject.from_module(made.model()), inputs, target=made.value, method=name,
                                         options=options).map
    together = run(args[0] if args else kwargs)
    for row in range(len(together)):
        alone = run(args[0][row:row + 1] if args else {key: value[row:row + 1] for key, value in kwargs.items()})
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-3 * together[row].abs().max().item())
    assert together.any()


@pytest.mark.parametrize("name", GRADIENTS)
def test_it_works_where_the_caller_has_no_gradient(seed, name):
    network, batch = bert(), text([CLS, 5, 6, SEP])
    expected = METHODS[name](reads_text(network), batch, targets(0, batch), **COSTLY.get(name, {})).map
    with torch.no_grad():
        found = METHODS[name](reads_text(network), batch, targets(0, batch), **COSTLY.get(name, {})).map
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", GRADIENTS)
def test_an_output_that_does_not_depend_on_the_input_is_an_error(seed, name):
    batch = text([CLS, 5, SEP])
    with pytest.raises(IndependentOutput, match="does not depend"):
        METHODS[name](reads_text(bert()), batch, targets(lambda output: 0 * output.logits[:, 0], batch))


# Gradients -----------------------------------------------------------------------------------------------------------


def test_gradient_agrees_with_finite_differences(seed):
    network, pixels, eps = vit(), torch.randn(1, 3, 24, 24, dtype=torch.float64), 1e-5
    batch = images(pixels, 6)
    found = baselines.gradient(Subject(network), batch, targets(1, batch))
    for y, x in ((0, 0), (7, 13), (23, 5)):
        moved = pixels.clone()
        moved[:, :, y, x] += eps  # all channels, whose derivatives are summed
        with torch.no_grad():
            slope = (network(moved) - network(pixels))[0, 1] / eps
        torch.testing.assert_close(found.map[0, y, x].double(), slope, rtol=1e-3, atol=1e-5)
    whole = found.inputs["0"]
    assert whole.shape == pixels.shape
    for fold, expected in (("norm", whole.abs().sum(1)), ("max", whole.abs().amax(1))):
        folded = baselines.gradient(Subject(network), batch, targets(1, batch), fold=fold).map
        torch.testing.assert_close(folded, expected.float())
    with pytest.raises(ValueError, match="no fold"):
        baselines.gradient(Subject(network), batch, targets(1, batch), fold="mean")


@pytest.mark.parametrize("name", ["gradient", "saliency", "input-x-gradient"])
def test_pictures_have_the_maps_of_captum_itself(seed, name):
    from captum.attr import InputXGradient, Saliency

    network, batch = vit(), images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6)
    found = baselines.METHODS[name](Subject(network), batch, targets([2, 0], batch))
    options = {} if name == "input-x-gradient" else {"abs": name == "saliency"}
    expected = (InputXGradient if name == "input-x-gradient" else Saliency)(network).attribute(
        batch.args[0].clone().requires_grad_(), target=torch.tensor([2, 0]), **options).detach()
    torch.testing.assert_close(found.inputs["0"], expected)
    folded = expected.amax(1) if name == "saliency" else expected.sum(1)
    torch.testing.assert_close(found.map, folded.float())
    assert folded.any() and (found.forwards, found.backwards) == (1, 1)


@pytest.mark.parametrize("name", ["gradient", "saliency", "input-x-gradient"])
def test_texts_have_the_maps_of_captum_at_the_embedding(seed, name):
    from captum.attr import LayerGradientXActivation

    network, batch = bert(), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    found = baselines.METHODS[name](reads_text(network), batch, targets([2, 0], batch))
    call = lambda ids, mask: network(input_ids=ids, attention_mask=mask).logits
    layer = LayerGradientXActivation(call, network.bert.embeddings.word_embeddings,
                                     multiply_by_inputs=name == "input-x-gradient")
    expected = layer.attribute(batch.kwargs["input_ids"], torch.tensor([2, 0]), batch.kwargs["attention_mask"]).detach()
    whole = expected.abs() if name == "saliency" else expected
    torch.testing.assert_close(found.inputs["input_ids"], whole)
    torch.testing.assert_close(found.map, (expected if name == "input-x-gradient" else whole.abs()).sum(-1).float())
    assert found.map.any()


@pytest.mark.parametrize("name", ["gradient", "saliency", "input-x-gradient"])
def test_captum_is_what_is_called(seed, name, monkeypatch):
    from captum import attr

    batch = images(torch.randn(1, 3, 24, 24, dtype=torch.float64), 6)
    called = attr.InputXGradient if name == "input-x-gradient" else attr.Saliency
    monkeypatch.setattr(called, "attribute", lambda self, inputs, **options: torch.full_like(inputs, 0.5))
    found = baselines.METHODS[name](Subject(vit()), batch, targets(0, batch))
    assert (found.inputs["0"] == 0.5).all()


def test_the_gradient_of_text_is_folded_by_magnitude(seed):
    """The signed sum over an embedding vanishes where a norm takes its mean away."""
    network, batch = bert(), text([CLS, 5, 6, SEP])
    maps = {fold: baselines.gradient(reads_text(network), batch, targets(1, batch), fold=fold).map
            for fold in (None, "norm", "sum")}
    assert torch.equal(maps[None], maps["norm"]) and (maps["sum"].abs() < 1e-9 * maps["norm"]).all()


def test_input_x_gradient_is_the_share_of_a_linear_model(seed):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)).double()
    x = torch.randn(2, 12, dtype=torch.float64)
    batch = Batch((x,), {}, 2, TensorUnits((2, 12)))
    found = baselines.input_x_gradient(Subject(network), batch, targets(2, batch))
    torch.testing.assert_close(found.inputs["0"], x * network[1].weight[2].detach())
    torch.testing.assert_close(found.map.sum(1).double(), found.value, rtol=1e-6, atol=1e-6)


def test_the_embedding_is_found_and_the_ids_stay(seed):
    network, batch = bert(), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    seen = []
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    found = baselines.input_x_gradient(reads_text(network), batch, targets(0, batch))
    assert seen == [{"input_ids", "attention_mask"}]
    embeddings = network.bert.embeddings.word_embeddings(batch.kwargs["input_ids"]).detach()
    leaf = embeddings.clone().requires_grad_()
    output = network(inputs_embeds=leaf, attention_mask=batch.kwargs["attention_mask"])  # BERT reads the first anyway
    expected, = torch.autograd.grad(output.logits[:, 0].sum(), leaf)
    torch.testing.assert_close(found.inputs["input_ids"], embeddings * expected)


def test_ids_that_no_module_takes_are_an_error():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 3))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table[ids].sum(1)

    ids = torch.tensor([[1, 2, 3]])
    batch = Batch((ids,), {}, 1, TensorUnits((1, 3)))
    with pytest.raises(ValueError, match="no module of .* is called with the token ids"):
        baselines.gradient(Subject(Functional()), batch, targets(0, batch))


# Integrated gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [None, "median", "blur"])
def test_integrated_gradients_of_pictures_are_complete(seed, baseline):
    network, batch = vit(), images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6)
    found, few = (baselines.integrated_gradients(Subject(network), batch, targets([0, 2], batch), baseline=baseline,
                                                 n_steps=steps) for steps in (48, 2))
    delta = torch.tensor(found.provenance["convergence_delta"], dtype=torch.float64).abs()
    assert (delta < 1e-6 * found.map.abs().sum((1, 2))).all()
    assert (delta < torch.tensor(few.provenance["convergence_delta"], dtype=torch.float64).abs()).all()
    # Not by the delta, by running the baseline: the books hold.
    from relprop import neutral

    start = neutral.picture(batch.args[0], baseline or "zero")[0].expand_as(batch.args[0])
    with torch.no_grad():
        expected = network(start)[torch.arange(2), torch.tensor([0, 2])]
    torch.testing.assert_close(found.ledger.absorbed["baseline"], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.ledger.residual.abs(), delta, rtol=1e-6, atol=1e-12)


def test_integrated_gradients_of_text_are_complete_and_spare_special_tokens(seed):
    network, batch = bert(initializer_range=0.1), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    subject = reads_text(network)
    found = baselines.integrated_gradients(subject, batch, targets(1, batch))
    special = torch.tensor(batch.units.special)
    assert (found.map[special] == 0).all() and (found.map[~special] != 0).all()
    masked = batch.kwargs["input_ids"].masked_fill(~special, MASK)
    with torch.no_grad():
        start = network(masked, attention_mask=batch.kwargs["attention_mask"]).logits[:, 1]
    torch.testing.assert_close(found.map.double().sum(1), found.value - start, rtol=1e-5, atol=1e-6)
    assert found.provenance["baseline"] == "mask token"
    other = baselines.integrated_gradients(subject, batch, targets(1, batch), n_steps=2, baseline="pad")
    assert other.provenance["baseline"] == "pad token"


def test_zero_embeddings_are_a_baseline(seed):
    network, batch = bert(initializer_range=0.1), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    found = baselines.integrated_gradients(reads_text(network), batch, targets(1, batch), baseline="zero")
    special = torch.tensor(batch.units.special)
    inputs = network.bert.embeddings.word_embeddings(batch.kwargs["input_ids"]) * special[..., None]
    with torch.no_grad():
        start = network(inputs_embeds=inputs, attention_mask=batch.kwargs["attention_mask"]).logits[:, 1]
    torch.testing.assert_close(found.ledger.absorbed["baseline"], start)
    assert found.provenance["baseline"] == "zero embedding" and (found.ledger.residual.abs() < 1e-5).all()


def test_integrated_gradients_do_not_depend_on_how_they_are_batched(seed):
    network, batch = bert(), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    run = [baselines.integrated_gradients(reads_text(network), batch, targets([0, 2], batch), n_steps=5,
                                          batch_size=size).map for size in (1, 4, 100)]
    torch.testing.assert_close(run[0], run[1])
    torch.testing.assert_close(run[0], run[2])


@pytest.mark.parametrize("options, message", [
    ({"n_steps": 0}, "at least 1"), ({"batch_size": 0}, "at least 1"), ({"baseline": "unk"}, "no unk token"),
    ({"baseline": "mean"}, "no baseline 'mean' for text")])
def test_bad_options_of_integrated_gradients_are_errors(seed, options, message):
    batch = text([CLS, 5, SEP])
    with pytest.raises(ValueError, match=message):
        baselines.integrated_gradients(reads_text(bert()), batch, targets(0, batch), **options)


# SmoothGrad ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, expected", [("smoothgrad", lambda g: g), ("smoothgrad_sq", lambda g: g * g),
                                            ("vargrad", lambda g: 0 * g)])
def test_smoothgrad_without_noise_is_the_gradient(seed, kind, expected):
    network, batch = bert(), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    plain = baselines.gradient(reads_text(network), batch, targets(1, batch)).inputs["input_ids"]
    found = baselines.smoothgrad(reads_text(network), batch, targets(1, batch), noise=0, samples=3, kind=kind)
    padded = torch.tensor(batch.units.padding)
    assert plain.any()
    torch.testing.assert_close(found.inputs["input_ids"], expected(plain).masked_fill(padded[..., None], 0))


def test_smoothgrad_is_the_mean_over_its_noise(seed):
    """Of y = sum w x^2 the gradient is 2 w x, so that of the noisy copies has mean 2 w x and standard deviation
    2 w s."""
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**2 @ self.weight.T

    network, x = Square(), torch.randn(2, 6, dtype=torch.float64)
    batch = Batch((x,), {}, 2, TensorUnits((2, 6)))
    run = [baselines.smoothgrad(Subject(network), batch, targets(1, batch), samples=4000, noise=0.2, kind=kind,
                                batch_size=4000).inputs["0"] for kind in ("smoothgrad", "vargrad")]
    scale = 0.2 * (x.amax(1) - x.amin(1))[:, None]
    expected = 2 * network.weight[1].detach()
    assert ((run[0] - expected * x).abs() < 5 * (expected * scale).abs() / 4000**0.5).all()
    torch.testing.assert_close(run[1], (expected * scale)**2, rtol=0.2, atol=0)


# Integrated gradients of a layer -------------------------------------------------------------------------------------


def test_a_layer_of_a_vision_model_agrees_with_captum(seed):
    from captum.attr import LayerIntegratedGradients

    network, batch = vit(), images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6)
    found = baselines.layer_integrated_gradients(Subject(network), batch, targets([2, 0], batch), layer="blocks.0",
                                                 n_steps=8)
    run = LayerIntegratedGradients(network, network.blocks[0])
    shares = run.attribute(batch.args[0], torch.zeros_like(batch.args[0]), target=torch.tensor([2, 0]), n_steps=8)
    expected = shares.sum(-1)[:, 1:].view(2, 4, 4)  # without the class token
    patches = found.map.view(2, 4, 6, 4, 6)
    torch.testing.assert_close(patches.sum((2, 4)).double(), expected, rtol=1e-4, atol=1e-6)
    assert (patches == patches[:, :, :1, :, :1]).all()
    torch.testing.assert_close(found.ledger.absorbed["prefix tokens"], shares.sum(-1)[:, 0])


def test_patches_that_are_not_known_are_the_finest_that_fit(seed):
    network, batch = vit(), images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6)
    maps = [baselines.layer_integrated_gradients(Subject(network), one, targets(1, batch), n_steps=3).map
            for one in (batch, Batch(batch.args, {}, 2, TensorUnits((2, 3, 24, 24))))]
    assert torch.equal(*maps) and maps[0].any()


@pytest.mark.parametrize("layer", [None, "L1", "bert.encoder.layer.1", "bert.embeddings"])
def test_every_layer_is_complete(seed, layer):
    network, batch = bert(initializer_range=0.1), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    found = baselines.layer_integrated_gradients(reads_text(network), batch, targets(1, batch), layer=layer)
    masked = batch.kwargs["input_ids"].masked_fill(~torch.tensor(batch.units.special), MASK)
    with torch.no_grad():
        start = network(masked, attention_mask=batch.kwargs["attention_mask"]).logits[:, 1]
    torch.testing.assert_close(found.ledger.absorbed["baseline"], start)
    torch.testing.assert_close(found.map.double().sum(1), found.value - start, rtol=1e-5, atol=1e-6)
    special = torch.tensor(batch.units.special)
    assert (found.map[special] == 0).all() == (layer in (None, "bert.embeddings"))  # deeper, they hold something
    assert found.provenance["layer"] == {None: "bert.encoder.layer.0 (input)", "L1": "bert.encoder.layer.1"}.get(
        layer, layer)


def test_the_first_layer_reads_what_the_embedding_gives(seed):
    """Of a model without a norm before its first layer, words with positions move as words alone."""
    network, batch = gpt2(), text([5, 6, 7, 8], [9, 10])
    at_layer, at_words = (run(reads_text(network), batch, targets(None, batch, labels=None), n_steps=4).map for run in (
        baselines.layer_integrated_gradients, baselines.integrated_gradients))
    torch.testing.assert_close(at_layer, at_words)


def test_a_convolution_is_a_layer(seed):
    network = vit()
    batch = images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6)
    found, whole = (run(Subject(network), batch, targets(1, batch), n_steps=6, **options) for run, options in (
        (baselines.layer_integrated_gradients, {"layer": "patch_embed.proj"}), (baselines.integrated_gradients, {})))
    patches = [result.map.view(2, 4, 6, 4, 6).sum((2, 4)) for result in (found, whole)]
    torch.testing.assert_close(*patches, rtol=1e-4, atol=1e-5)  # patches are linear in their own pixels


def test_a_layer_may_keep_its_features_last(seed):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Linear(3 * 6 * 6, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cells = x.unflatten(3, (4, 6)).unflatten(2, (4, 6)).permute(0, 2, 4, 1, 3, 5).flatten(3)
            return self.head(self.cut(cells).tanh().mean((1, 2)))  # (B, Gy, Gx, D)

    network, batch = Last().double(), images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6)
    found, whole = (run(Subject(network), batch, targets(1, batch), **options) for run, options in (
        (baselines.layer_integrated_gradients, {"layer": "cut"}), (baselines.integrated_gradients, {})))
    patches = [result.map.view(2, 4, 6, 4, 6).sum((2, 4)) for result in (found, whole)]
    torch.testing.assert_close(*patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer, message", [
    ("blocks.9", "no layer 'blocks.9'"), ("L9", "no layer 9"), ("L0.attn", "not one whole layer"),
    ("L*", "not one whole layer"), ("head", "gives no features"), ("blocks.0.attn.attn_drop", "gives")])
def test_a_layer_that_cannot_be_is_an_error(seed, layer, message):
    batch = images(torch.randn(1, 3, 24, 24, dtype=torch.float64), 6)
    with pytest.raises(ValueError, match=message):
        baselines.layer_integrated_gradients(Subject(vit()), batch, targets(0, batch), layer=layer)


# GradientSHAP and DeepLIFT -------------------------------------------------------------------------------------------


def test_gradient_shap_is_exact_on_a_linear_model_and_complete_on_others(seed):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3)).double()
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    batch = images(x, 6)
    found = baselines.gradient_shap(Subject(network), batch, targets([2, 0], batch), baseline="mean", samples=2)
    weight = network[1].weight.detach()[[2, 0]].view_as(x)
    torch.testing.assert_close(found.inputs["0"], weight * (x - x.mean((2, 3), keepdim=True)))
    assert (found.ledger.residual.abs() < 1e-9).all()
    both = baselines.gradient_shap(Subject(network), batch, targets([2, 0], batch), baseline=["mean", "zero"])
    with torch.no_grad():
        ends = [network(start.expand_as(x))[[0, 1], [2, 0]] for start in (x.mean((2, 3), keepdim=True), 0 * x)]
    torch.testing.assert_close(both.ledger.absorbed["baseline"], sum(ends) / 2)
    many, few = (baselines.gradient_shap(Subject(vit()), batch, targets(0, batch), samples=n, batch_size=256,
                                         baseline=["zero", "blur"]) for n in (1500, 3))
    assert (many.ledger.residual.abs() < 0.1 * many.inputs["0"].abs().flatten(1).sum(1)).all()
    assert many.ledger.residual.abs().sum() < few.ledger.residual.abs().sum()
    assert many.provenance["baseline"] == "zero (mean colour of training), blurred picture"


def test_gradient_shap_draws_from_all_baselines_that_there_are(seed):
    batch = text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    found = baselines.gradient_shap(reads_text(bert()), batch, targets(0, batch), samples=4)
    assert found.provenance["baseline"] == "mask token, pad token, eos token"
    assert (found.map[torch.tensor(batch.units.special)] == 0).all() and found.map.any()


def relu_net() -> nn.Module:
    """With two modules in a row that DeepLIFT has a rule for, where Captum's own hooks lose one."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 11 * 11, 8),
                         nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)).double()


def test_deeplift_is_complete_where_it_applies_and_equals_its_rows(seed):
    network, batch = relu_net(), images(torch.randn(2, 3, 24, 24, dtype=torch.float64), None)
    found = baselines.deeplift(Subject(network), batch, targets([2, 0], batch), baseline="blur")
    assert (found.ledger.residual.abs() < 1e-9).all() and found.conservation == "complete"
    plain = baselines.input_x_gradient(Subject(network), batch, targets([2, 0], batch))
    assert not torch.allclose(found.map, plain.map)
    for row, spec in enumerate([2, 0]):
        single = baselines.deeplift(Subject(network), batch.take([row]), targets([spec], batch.take([row])),
                                    baseline="blur")
        torch.testing.assert_close(found.map[row], single.map[0])
    assert (found.forwards, found.backwards) == (4, 3)
    assert all(module.training and not vars(module).keys() & {"input", "output"} for module in network.modules())


def test_deeplift_of_text(seed):
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.hidden, self.act = nn.Embedding(40, 8), nn.Linear(8, 8), nn.ReLU()
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head((self.act(self.hidden(self.words(input_ids))) * attention_mask[..., None]).sum(1))

    batch = text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    found = baselines.deeplift(reads_text(Bag().double()), batch, targets([1, 2], batch))
    assert (found.ledger.residual.abs() < 1e-9).all() and found.map.any()
    assert (found.map[torch.tensor(batch.units.special)] == 0).all()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(self.act(self.first(x)))))


@pytest.mark.parametrize("network, shape, message", [
    (lambda: vit(), (1, 3, 24, 24), "does not apply to model: in row 0 the map sums to .* GELU, LayerNorm"),
    (lambda: Twice().double(), (2, 6), "a module is called more than once")])
def test_deeplift_says_why_it_does_not_apply(seed, network, shape, message):
    network, x = network(), torch.randn(shape, dtype=torch.float64)
    batch = images(x, 6) if x.ndim == 4 else Batch((x,), {}, len(x), TensorUnits(shape))
    with pytest.raises(ValueError, match=message):
        baselines.deeplift(Subject(network), batch, targets(0, batch))
    assert all(not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
               and not vars(module).keys() & {"input", "output"} for module in network.modules())


@pytest.mark.parametrize("name, options, message", [
    ("smoothgrad", {"samples": 0}, "samples must be at least 1"), ("smoothgrad", {"noise": -1}, "noise at least 0"),
    ("smoothgrad", {"noise": math.nan}, "noise at least 0"), ("smoothgrad", {"kind": "mean"}, "kind is one of"),
    ("smoothgrad", {"fold": "mean"}, "no fold"), ("saliency", {"fold": "sum"}, "no fold 'sum'; there are max, norm"),
    ("gradient-shap", {"samples": 2.5}, "samples must be at least 1"),
    ("gradient-shap", {"baseline": []}, "empty list of baselines"), ("gradient-shap", {"noise": -1}, "at least 0"),
    ("gradient-shap", {"baseline": ["mask", "mean"]}, "no baseline 'mean' for text"),
    ("layer-integrated-gradients", {"n_steps": 0}, "n_steps must be at least 1"),
    ("layer-integrated-gradients", {"baseline": "zero"}, "no baseline 'zero' for text"),
    ("deeplift", {"baseline": "unk"}, "no unk token")])
def test_bad_options_are_errors(seed, name, options, message):
    batch = text([CLS, 5, 6, SEP])
    with pytest.raises(ValueError, match=message):
        baselines.METHODS[name](reads_text(bert()), batch, targets(0, batch), **options)


@pytest.mark.parametrize("method, options, message", [
    ("smoothgrad", {"sample": 3}, "smoothgrad has no option sample; it has samples, noise, kind, fold, seed"),
    ("input-x-gradient", {"fold": "sum"}, "input-x-gradient has no option fold; it has none"),
    ("attnlrp", {"n_steps": 3}, "attnlrp is a composite and has no option n_steps")])
def test_unknown_options_list_the_known(seed, method, options, message):
    with pytest.raises(ValueError, match=message):
        relprop.explain(vit().float(), torch.randn(1, 3, 24, 24), target=0, method=method, options=options)


# Chance --------------------------------------------------------------------------------------------------------------


def test_random_depends_on_the_seed_and_is_even_within_a_patch(seed):
    batch = images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6)
    first, other = (baselines.random(Subject(vit()), batch, targets(0, batch), seed=number).map for number in (0, 1))
    patches = first.view(2, 4, 6, 4, 6)
    assert (patches == patches[:, :, :1, :, :1]).all() and not torch.allclose(first, other)
    assert not torch.allclose(first[0], first[1])  # rows do not share their noise
    sums = patches.sum((2, 4))
    assert abs(sums.mean()) < 0.5 and abs(sums.std() - 1) < 0.5


def test_random_gives_nothing_to_special_tokens(seed):
    batch = text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    found = baselines.random(reads_text(bert()), batch, targets(0, batch))
    assert ((found.map != 0) == ~torch.tensor(batch.units.special)).all()
    assert PAD in batch.kwargs["input_ids"]
