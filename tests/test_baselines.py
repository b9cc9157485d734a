"""Gradients by finite differences, completeness of integrated gradients, and what each baseline costs."""
from __future__ import annotations

import pytest
import torch
from tiny import CLS, MASK, PAD, SEP, TOKENIZER, bert, gpt2, images, targets, text, vit
from torch import nn

from relprop import attention, baselines
from relprop.errors import IndependentOutput
from relprop.subject import Subject
from relprop.target import Contrast, Probability
from relprop.tokens import Batch, TensorUnits

METHODS = {**baselines.METHODS, **attention.METHODS}
COSTLY = {"integrated-gradients": {"n_steps": 3}}  # options that keep the tests short


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
        assert (together.map[row, len(ids):] == 0).all() and single.map.any()


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
@pytest.mark.parametrize("kind", ["text", "picture"])
def test_the_cost_is_stated(seed, name, kind):
    network = bert() if kind == "text" else vit()
    batch = text([CLS, 5, 6, SEP], [CLS, 7, SEP]) if kind == "text" else images(torch.randn(2, 3, 24, 24).double(), 6)
    subject = reads_text(network) if kind == "text" else Subject(network)
    forwards: list[int] = []
    network.register_forward_hook(lambda module, args, kwargs, output: forwards.append(
        len(next(iter([*args, *kwargs.values()])))), with_kwargs=True)
    found = METHODS[name](subject, batch, targets(0, batch), **COSTLY.get(name, {}))
    assert sum(forwards) == found.forwards * batch.rows > 0


@pytest.mark.parametrize("name", ["gradient", "input-x-gradient", "integrated-gradients"])
def test_it_works_where_the_caller_has_no_gradient(seed, name):
    network, batch = bert(), text([CLS, 5, 6, SEP])
    expected = METHODS[name](reads_text(network), batch, targets(0, batch), **COSTLY.get(name, {})).map
    with torch.no_grad():
        found = METHODS[name](reads_text(network), batch, targets(0, batch), **COSTLY.get(name, {})).map
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["gradient", "input-x-gradient", "integrated-gradients"])
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


def test_integrated_gradients_do_not_depend_on_how_they_are_batched(seed):
    network, batch = bert(), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    run = [baselines.integrated_gradients(reads_text(network), batch, targets([0, 2], batch), n_steps=5,
                                          internal_batch_size=size).map for size in (1, 4, 100)]
    torch.testing.assert_close(run[0], run[1])
    torch.testing.assert_close(run[0], run[2])


@pytest.mark.parametrize("options, message", [
    ({"n_steps": 0}, "at least 1"), ({"internal_batch_size": 0}, "at least 1"), ({"baseline": "unk"}, "no unk token"),
    ({"baseline": "mean"}, "no baseline 'mean' for text")])
def test_bad_options_of_integrated_gradients_are_errors(seed, options, message):
    batch = text([CLS, 5, SEP])
    with pytest.raises(ValueError, match=message):
        baselines.integrated_gradients(reads_text(bert()), batch, targets(0, batch), **options)


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
