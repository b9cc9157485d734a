"""Composites as attributions of Captum: the same numbers as `explain`, in Captum's own metrics, tunnel and figures."""
from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
import torch
from captum.attr import Attribution, InputXGradient, NoiseTunnel
from captum.attr import visualization as figures
from captum.metrics import infidelity, sensitivity_max
from tiny import CLS, MASK, PAD, SEP, TOKENIZER, bert, gpt2, text, vit
from torch import nn

import relprop
from relprop import captum, composite, relevance
from relprop.captum import CPLRP, AttnLRP, AttnLRPPath, CompositeAttribution, GradientInput
from relprop.subject import Subject

CLASSES = CompositeAttribution.__subclasses__()


@pytest.fixture
def pixels(seed) -> torch.Tensor:
    return torch.randn(2, 3, 24, 24, dtype=torch.float64)


def test_every_composite_has_its_class():
    assert {of.composite for of in CLASSES} == set(composite.NAMES) and len(CLASSES) >= 6
    assert all(issubclass(of, Attribution) and of.__doc__ for of in CLASSES)


def test_relprop_alone_does_not_import_captum():
    code = "import relprop.explain, relprop.quantus, sys; print('captum' in sys.modules, 'quantus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.split() == ["False", "False"]
    assert relprop.captum is captum


# What it computes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", CLASSES, ids=lambda of: of.composite)
def test_it_is_what_explain_says(pixels, of):
    network = vit()
    found = of(network).attribute(pixels, target=[2, 0])
    rules = composite.get(of.composite)
    expected = relprop.explain(network, pixels, [2, 0], method=rules).inputs
    assert found.shape == pixels.shape and found.any()
    torch.testing.assert_close(found.float(), next(iter(expected.values())), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("of", CLASSES, ids=lambda of: of.composite)
def test_the_delta_is_the_value_less_the_sum(pixels, of):
    network = vit()
    attribution = of(network)
    assert attribution.has_convergence_delta() and attribution.multiplies_by_inputs
    found, delta = attribution.attribute(pixels, target=torch.tensor([2, 0]), return_convergence_delta=True)
    with torch.no_grad():
        value = network(pixels)[[0, 1], [2, 0]]
    torch.testing.assert_close(delta, value - found.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)
    ledger = relprop.explain(network, pixels, [2, 0], method=composite.get(of.composite)).ledger
    torch.testing.assert_close(delta, ledger.total_absorbed + ledger.residual, rtol=1e-4, atol=1e-6)
    spread, rest = of(network, spread_bias=True).attribute(pixels, target=1, return_convergence_delta=True)
    assert spread.any() and (rest.abs() < 1e-6).all()


def test_gradient_input_is_captums_own(pixels):
    network = vit()
    ours, theirs = (of(network).attribute(pixels, target=1) for of in (GradientInput, InputXGradient))
    torch.testing.assert_close(ours, theirs.detach())


def test_a_composite_of_ones_own(pixels):
    network = vit()
    mine = composite.get("cp-lrp").but("mine", paths={"blocks.0.*": composite.get("gradient").rules})
    found = CompositeAttribution(network, mine).attribute(pixels, target=1)
    expected = relprop.explain(network, pixels, 1, method=mine).inputs
    torch.testing.assert_close(found.float(), next(iter(expected.values())), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, CPLRP(network).attribute(pixels, target=1))
    with_function = CompositeAttribution(network, mine, forward_func=lambda x: network(x))
    torch.testing.assert_close(with_function.attribute(pixels, target=1), found)  # paths are as before


@pytest.mark.parametrize("target", [1, torch.tensor(1), [1, 1], torch.tensor([1, 1]), (1,), [(1,), (1,)]], ids=repr)
def test_targets_are_captums(pixels, target):
    network = vit()
    expected = AttnLRP(network).attribute(pixels, target=1)
    torch.testing.assert_close(AttnLRP(network).attribute(pixels, target=target), expected)


def test_an_output_of_one_number_a_row_needs_no_target(pixels):
    network = vit()
    alone = AttnLRP(network, forward_func=lambda x: network(x)[:, 2]).attribute(pixels)
    torch.testing.assert_close(alone, AttnLRP(network).attribute(pixels, target=2))


# Token ids, embeddings and further arguments -------------------------------------------------------------------------


def test_ids_and_their_embeddings_agree(seed):
    network, batch = bert(), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    ids, mask = batch.kwargs["input_ids"], batch.kwargs["attention_mask"]
    by_ids, delta = AttnLRP(network).attribute(ids, [1, 2], mask, return_convergence_delta=True)
    call = lambda embedded, mask: network(inputs_embeds=embedded, attention_mask=mask).logits
    by_words = AttnLRP(network, forward_func=call).attribute(network.bert.embeddings.word_embeddings(ids), [1, 2], mask)
    assert by_ids.shape == ids.shape and by_words.shape == (*ids.shape, 16) and by_ids.any()
    torch.testing.assert_close(by_ids, by_words.sum(-1))
    expected = relprop.explain(network, batch.kwargs, [1, 2]).map
    torch.testing.assert_close(by_ids.float(), expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        value = network(ids, mask).logits[[0, 1], [1, 2]]
    torch.testing.assert_close(delta, value - by_ids.sum(1))


def test_the_way_of_a_text_begins_at_mask_tokens(seed):
    network, batch = bert(initializer_range=0.1), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    ids, mask = batch.kwargs["input_ids"], batch.kwargs["attention_mask"]
    path = AttnLRPPath(network, mask_token=MASK, kept=[CLS, SEP, PAD])
    found, delta = path.attribute(ids, [1, 2], mask, return_convergence_delta=True)
    subject = Subject(network, TOKENIZER, "text")
    expected = relprop.explain(subject, batch, [relprop.Class(1), relprop.Class(2)], method="attnlrp-path")
    torch.testing.assert_close(found.float(), expected.map, rtol=1e-5, atol=1e-7)
    assert (found[torch.tensor(batch.units.special)] == 0).all() and found.any()
    torch.testing.assert_close(delta, expected.ledger.value - found.sum(1), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, AttnLRP(network).attribute(ids, [1, 2], mask), rtol=0.1)
    from_all = AttnLRPPath(network, mask_token=MASK).attribute(ids, [1, 2], mask)
    assert (from_all[:, 0] != 0).all()  # special tokens too, where they are not kept


def test_floating_inputs_have_no_way(pixels):
    network = vit()
    expected = AttnLRP(network).attribute(pixels, target=1)
    torch.testing.assert_close(AttnLRPPath(network, mask_token=MASK).attribute(pixels, target=1), expected)


def test_a_token_of_a_language_model(seed):
    network, ids = gpt2(), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    found = CPLRP(network).attribute(ids, target=(3, 7))  # position, token
    expected = relprop.explain(network, ids, relprop.Token(7, position=3), method="cp-lrp").map
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-7)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(5, 3).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
        assert name == "given"
        return (self.a(x) + self.b(y)) * scale


def test_several_inputs_and_arguments_that_are_constant(seed):
    """A factor that is not explained takes none of the relevance, under any rule for products."""
    network, x, y = Scaled(), torch.randn(2, 4).double(), torch.randn(2, 5).double()
    scale = torch.rand(2, 1, dtype=torch.float64) + 1
    found, delta = AttnLRP(network).attribute((x, y), 1, (scale, "given"), return_convergence_delta=True)
    torch.testing.assert_close(found[0], x * network.a.weight[1].detach() * scale)
    torch.testing.assert_close(found[1], y * network.b.weight[1].detach() * scale)
    torch.testing.assert_close(delta, ((network.a.bias + network.b.bias)[1] * scale[:, 0]).detach())


class PositionsFirst(nn.Module):
    """As many positions as would hold the rows, folded, so that the books are kept row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.head((self.mix(x.transpose(0, 1) * 1).relu() * scale).mean(0))


def test_targets_and_arguments_follow_their_rows(seed, monkeypatch):
    network, x, scale = PositionsFirst(), torch.randn(2, 4, 8).double(), torch.rand(2, 1).double() + 1
    alone, of_row = [], relevance._Run.of_row
    monkeypatch.setattr(relevance._Run, "of_row", lambda run, row: alone.append(row) or of_row(run, row))
    for target in ([2, 0], torch.tensor([2, 0])):
        found = AttnLRP(network).attribute(x, target, scale)
        assert alone == [0, 1]
        alone.clear()
        for row, one in enumerate((2, 0)):
            single = AttnLRP(network).attribute(x[row:row + 1], one, scale[row:row + 1])
            torch.testing.assert_close(found[row], single[0])
        alone.clear()


def test_the_model_is_given_back(pixels):
    network = vit().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for forward_func in (None, lambda x: network(x), lambda x: 1 / 0):
        try:
            AttnLRP(network, forward_func=forward_func).attribute(pixels, target=1)
        except ZeroDivisionError:
            pass
        assert all(module.training for module in network.modules())
        assert all(p.requires_grad and p.grad is None for p in network.parameters())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_model_itself_is_in_eval_mode(seed):
    class Dropped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    network, x = Dropped(30, 3).train(), torch.randn(2, 30)
    for forward_func in (None, lambda x: network(x)):
        found = AttnLRP(network, forward_func=forward_func).attribute(x, target=1)
        torch.testing.assert_close(found, x * network.weight[1].detach())
    assert network.training


# Captum's metrics, tunnel and figures --------------------------------------------------------------------------------


def test_infidelity_tells_a_map_from_noise(pixels):
    network = vit()

    def perturbed(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.05 * torch.randn_like(inputs)
        return noise, inputs - noise

    def of(attributions: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return infidelity(network, perturbed, pixels, attributions, target=1, n_perturb_samples=40, normalize=True)

    found = GradientInput(network).attribute(pixels, target=1)
    # infidelity wants attributions per unit of the input
    per_unit = found / pixels
    assert (of(per_unit) < 0.2 * of(torch.randn_like(found) * per_unit.std())).all()
    assert of(AttnLRP(network).attribute(pixels, target=1)).isfinite().all()


class Bag(nn.Module):
    """What it says of a text is the sum of what it says of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 8).double(), nn.Linear(8, 3).double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids).sum(1))


def test_infidelity_of_a_way_from_mask_tokens_is_nothing_where_words_add_up(seed):
    network, ids = Bag(), torch.tensor([[CLS, 5, 6, 7, SEP], [CLS, 8, 9, 10, SEP]])

    def masked(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gone = (torch.rand(inputs.shape) < 0.5) & ~torch.isin(inputs, torch.tensor([CLS, SEP]))
        return gone.double(), torch.where(gone, MASK, inputs)

    def of(attributions: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return infidelity(network, masked, ids, attributions, target=1, n_perturb_samples=40)

    path = AttnLRPPath(network, mask_token=MASK, kept=[CLS, SEP]).attribute(ids, target=1)
    assert (of(path) < 1e-12).all() and (of(AttnLRP(network).attribute(ids, target=1)) > 1e-3).all()


def test_sensitivity_is_of_the_explanation(pixels):
    network = vit()
    for of in (AttnLRP, AttnLRPPath, CPLRP):
        attribute = of(network).attribute
        small, large = (sensitivity_max(attribute, pixels, perturb_radius=radius, n_perturb_samples=3, target=[2, 0])
                        for radius in (1e-6, 0.2))
        assert small.shape == (2,) and (small < 1e-3).all() and (small > 0).all() and (large > 10 * small).all()


def test_the_noise_tunnel_takes_it(pixels):
    network = vit()
    tunnel = NoiseTunnel(AttnLRP(network))
    plain = AttnLRP(network).attribute(pixels, target=1)
    still, delta = tunnel.attribute(pixels, nt_samples=3, stdevs=0.0, target=1, return_convergence_delta=True)
    torch.testing.assert_close(still, plain)
    assert delta.shape == (6,)
    assert not torch.allclose(tunnel.attribute(pixels, nt_samples=3, stdevs=0.3, target=1), plain)


def test_captums_figures_draw_it(pixels):
    import matplotlib.pyplot as plt

    found = AttnLRP(vit()).attribute(pixels, target=1)[0].permute(1, 2, 0).numpy()
    shown = numpy.asarray(pixels[0].sigmoid().permute(1, 2, 0))
    figure, _ = figures.visualize_image_attr(found, shown, method="blended_heat_map", sign="all", use_pyplot=False)
    assert figure.axes and figure.axes[0].images
    plt.close("all")


def test_captums_text_figure_draws_it(seed):
    ids = torch.tensor([[CLS, 5, 6, 7, SEP]])
    found = AttnLRP(bert()).attribute(ids, 1, torch.ones_like(ids))[0]
    shown = figures.format_word_importances(["CLS", "good", "bad", "so", "SEP"], (found / found.abs().max()).tolist())
    assert shown.count("<mark") == 5 and len(set(shown.split("background-color: "))) > 3  # of unlike colours


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_input_is_an_error(pixels):
    network = vit()
    with pytest.raises(ValueError, match="no composite; give one of attnlrp"):
        CompositeAttribution(network)
    with pytest.raises(ValueError, match="unknown composite 'lrp'; the composites are attnlrp"):
        CompositeAttribution(network, "lrp")
    with pytest.raises(ValueError, match="attnlrp-path needs a text of mask tokens where its way begins"):
        AttnLRPPath(bert()).attribute(torch.tensor([[CLS, 5, SEP]]), 1)
    with pytest.raises(ValueError, match="attnlrp explains at the input alone and takes no mask_token"):
        AttnLRP(network, mask_token=MASK)
    with pytest.raises(ValueError, match="mask_token is the id of a token, got -1"):
        AttnLRPPath(network, mask_token=-1)
    with pytest.raises(TypeError, match="relevance passes through a module, and function is none"):
        AttnLRP(lambda x: network(x))
    with pytest.raises(ValueError, match=r"target None selects \(2, 3\) of the output, expected one number"):
        AttnLRP(network).attribute(pixels)
    with pytest.raises(ValueError, match="unruled must be"):
        AttnLRP(network, unruled="no").attribute(pixels, target=1)
