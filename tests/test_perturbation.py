"""Methods that take units out: exact answers on additive models, slow oracles on others, units, and bad input."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny import CLS, MASK, PAD, SEP, TOKENIZER, bert, gpt2, images, targets, text, vit
from torch import Tensor, nn

import relprop
from relprop import baselines, units
from relprop.subject import Subject
from relprop.tokens import Batch, TensorUnits, TextUnits

METHODS = {name: baselines.METHODS[name] for name in ("occlusion", "feature-ablation", "kernel-shap", "lime")}
EXACT = {"kernel-shap": {"samples": 200}, "lime": {"samples": 200, "alpha": 0.0}}  # with enough samples, unregularised


class Bag(nn.Module):
    """Sum of a number for each token, for three classes: additive in the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 3, dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.words(input_ids) * attention_mask[..., None]).sum(1) + 100  # a large constant, to lose digits


class Pairs(Bag):
    """With the product of each two neighbours, so that units interact."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) * attention_mask[..., None]
        return x.sum(1) + (x[:, 1:] * x[:, :-1]).sum(1)


def pieces(batch: Batch, words: list[list[int | None]]) -> Batch:
    """The batch with these words for its tokens."""
    plain = batch.units
    spelled = [[f"w{i}" for i in range(1 + max(i for i in row if i is not None))] for row in words]
    return Batch(batch.args, batch.kwargs, batch.rows, TextUnits(
        plain.tokens, spelled, words, plain.offsets, plain.texts, plain.special, plain.padding), batch.last, batch.read)


# Additive models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_an_additive_model_of_text_is_answered_exactly(seed, name):
    network, batch = Bag(), text([CLS, 5, 6, 7, 8, 9, SEP], [CLS, 9, 4, SEP])
    found = METHODS[name](Subject(network, TOKENIZER, "text"), batch, targets([1, 2], batch), **EXACT.get(name, {}))
    weight = network.words.weight.detach()
    ids = batch.kwargs["input_ids"]
    for row, of in enumerate((1, 2)):
        expected = (weight[ids[row], of] - weight[MASK, of]).where(~torch.tensor(batch.units.special[row]), 0)
        assert expected.any()
        torch.testing.assert_close(found.map[row].double(), expected, rtol=1e-4, atol=1e-4)
    assert found.provenance["baseline"] == "mask token"


@pytest.mark.parametrize("name", METHODS)
def test_an_additive_model_of_pictures_is_answered_exactly(seed, name):
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3)).double(), torch.randn(2, 3, 24, 24).double()
    batch = images(x, 6)
    found = METHODS[name](Subject(network), batch, targets([2, 0], batch), baseline="mean", **EXACT.get(name, {}))
    weight = network[1].weight.detach()[[2, 0]].view_as(x)
    parts = (weight * (x - x.mean((2, 3), keepdim=True))).sum(1)  # (B, Y, X)
    expected = units.pooled(parts, units.groups(batch))  # of each patch
    torch.testing.assert_close(units.pooled(found.map.double(), units.groups(batch)), expected, rtol=1e-3, atol=1e-4)
    patches = found.map.view(2, 4, 6, 4, 6)
    torch.testing.assert_close(patches, patches[:, :, :1, :, :1].expand_as(patches))


@pytest.mark.parametrize("name", METHODS)
def test_features_of_a_plain_tensor_are_units(seed, name):
    network, x = nn.Linear(5, 3).double(), torch.randn(2, 5).double()
    batch = Batch((x,), {}, 2, TensorUnits((2, 5)))
    found = METHODS[name](Subject(network), batch, targets([2, 0], batch), **EXACT.get(name, {}))
    torch.testing.assert_close(found.map.double(), x * network.weight.detach()[[2, 0]], rtol=1e-4, atol=1e-4)


# Oracles -------------------------------------------------------------------------------------------------------------


def subset_values(network: nn.Module, ids: list[int], of: int) -> dict[frozenset, float]:
    """Target of every subset of the units of a text with its CLS and SEP."""
    inner = range(len(ids) - 2)
    found = {}
    for size in range(len(ids) - 1):
        for there in itertools.combinations(inner, size):
            row = torch.tensor([[CLS, *(ids[i + 1] if i in there else MASK for i in inner), SEP]])
            with torch.no_grad():
                found[frozenset(there)] = network(row, torch.ones_like(row))[0, of].item()
    return found


def test_kernel_shap_is_the_shapley_value(seed):
    """By its definition, over all orders."""
    network, ids = Pairs(), [CLS, 5, 6, 7, 8, SEP]
    values, batch = subset_values(network, ids, 1), text(ids)
    shapley = [0.0] * 4
    for order in itertools.permutations(range(4)):
        for place, unit in enumerate(order):
            before = frozenset(order[:place])
            shapley[unit] += (values[before | {unit}] - values[before]) / math.factorial(4)
    found = METHODS["kernel-shap"](Subject(network, TOKENIZER, "text"), batch, targets(1, batch), samples=6000)
    alone = METHODS["feature-ablation"](Subject(network, TOKENIZER, "text"), batch, targets(1, batch))
    assert (found.map[0, 1:5] - alone.map[0, 1:5]).abs().max() > 0.2  # units interact
    torch.testing.assert_close(found.map[0, 1:5].double(), torch.tensor(shapley).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(found.map.sum(1), found.value - values[frozenset()], rtol=1e-4, atol=1e-4)
    assert found.forwards == 1 + 15  # equal subsets ran once
    assert (found.ledger.residual.abs() < 1e-4).all()


def test_feature_ablation_takes_out_one_unit_after_the_other(seed):
    network, ids = Pairs(), [CLS, 5, 6, 7, 8, SEP]
    values, batch = subset_values(network, ids, 2), text(ids)
    found = METHODS["feature-ablation"](Subject(network, TOKENIZER, "text"), batch, targets(2, batch))
    everything = frozenset(range(4))
    expected = [values[everything] - values[everything - {unit}] for unit in range(4)]
    torch.testing.assert_close(found.map[0, 1:5], torch.tensor(expected))
    assert found.forwards == 5


def test_lime_is_the_weighted_ridge_of_all_subsets(seed):
    network, ids, k, alpha = Pairs(), [CLS, 5, 6, 7, 8, SEP], 0.4, 1000.0
    values, batch, n = subset_values(network, ids, 0), text(ids), 8000
    there = torch.tensor([[float(i in subset) for i in range(4)] for subset in values], dtype=torch.float64)
    y = torch.tensor(list(values.values()), dtype=torch.float64)
    distance = 1 - there.sum(1).sqrt() / 2  # cosine, of ones and of none
    weight = (-distance**2 / (2 * k**2)).exp() * n / 16
    centred, offset = there - weight @ there / weight.sum(), y - weight @ y / weight.sum()
    gram = centred.T @ (weight[:, None] * centred) + alpha * torch.eye(4)
    expected = torch.linalg.solve(gram, centred.T @ (weight * offset))
    found = METHODS["lime"](Subject(network, TOKENIZER, "text"), batch, targets(0, batch), samples=n, kernel_width=k,
                            alpha=alpha, batch_size=500)
    torch.testing.assert_close(found.map[0, 1:5].double(), expected, rtol=0, atol=0.03)
    assert found.forwards == 16


@pytest.mark.parametrize("window, stride", [(8, 4), ((6, 9), (5, 3)), (24, 24), (5, 5)])
def test_occlusion_averages_over_the_windows_that_hold_a_pixel(seed, window, stride):
    network, x = vit(), torch.randn(1, 3, 24, 24, dtype=torch.float64)
    batch = images(x, 6)
    found = baselines.occlusion(Subject(network), batch, targets(1, batch), window=window, stride=stride,
                                baseline="zero")
    (high, wide), (down, right) = ((s, s) if isinstance(s, int) else s for s in (window, stride))
    total, count = torch.zeros(2, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        value = network(x)[0, 1]
        for y in range(0, math.ceil((24 - high) / down) + 1):
            for z in range(0, math.ceil((24 - wide) / right) + 1):
                where = (slice(y * down, y * down + high), slice(z * right, z * right + wide))
                changed = x.clone()
                changed[:, :, *where] = 0
                size = changed[0, 0][where].numel()  # a window at the edge is cut
                total[where] += (value - network(changed)[0, 1]) / size
                count[where] += 1
    assert (count > 0).all() and total.any()
    torch.testing.assert_close(found.map[0].double(), total / count, rtol=1e-4, atol=1e-6)
    assert found.forwards == 1 + (math.ceil((24 - high) / down) + 1) * (math.ceil((24 - wide) / right) + 1)


def test_occlusion_of_text_slides_over_words(seed):
    network, ids = Pairs(), [CLS, 5, 6, 7, 8, SEP]
    values, batch = subset_values(network, ids, 1), text(ids, [CLS, 9, SEP])
    found = baselines.occlusion(Subject(network, TOKENIZER, "text"), batch, targets(1, batch), window=2, stride=1)
    everything = frozenset(range(4))
    drop = [(values[everything] - values[everything - {u, u + 1}]) / 2 for u in range(3)]
    expected = [drop[0], (drop[0] + drop[1]) / 2, (drop[1] + drop[2]) / 2, drop[2]]
    torch.testing.assert_close(found.map[0, 1:5], torch.tensor(expected))
    assert found.map[1, 1] != 0  # a row with fewer words than the window


# Units and baselines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_word_is_taken_out_whole(seed, name):
    words = [[None, 0, 0, 1, None], [None, 0, None, None, None]]
    network, batch = Bag(), pieces(text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP]), words)
    subject, spec = Subject(network, TOKENIZER, "text"), targets(1, batch)
    found, tokens = (METHODS[name](subject, batch, spec, by=by, **EXACT.get(name, {})) for by in (None, "token"))
    change = (network.words.weight[batch.kwargs["input_ids"]] - network.words.weight[MASK])[..., 1].detach()
    torch.testing.assert_close(found.map[0, 1:4].double(), torch.stack([change[0, 1:3].mean()] * 2 + [change[0, 3]]),
                               rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.map[0, 1:4].double(), change[0, 1:4], rtol=1e-4, atol=1e-4)
    words = [relevance for _, relevance in found.words(0)]
    assert words == pytest.approx([change[0, 1:3].sum().item(), change[0, 3].item()], abs=1e-3)
    assert found.provenance["by"] == "word" and tokens.provenance["by"] == "token"


@pytest.mark.parametrize("name", ["feature-ablation", "kernel-shap", "lime"])
def test_patches_of_any_size_are_units(seed, name):
    network, x = vit(), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    batch = images(x, 6)
    found = METHODS[name](Subject(network), batch, targets(1, batch), patch=(12, 8), **EXACT.get(name, {}))
    parts = found.map.view(2, 2, 12, 3, 8)
    assert (parts == parts[:, :, :1, :, :1]).all() and len(parts[:, :, 0, :, 0].unique()) == 12


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("baseline, said", [("pad", "pad token"), (7, "token 7"),
                                            ("delete", "deleted (attention mask)")])
def test_the_baseline_is_named_and_matters(seed, name, baseline, said):
    network, batch = bert(), text([CLS, 5, 6, 8, SEP])
    run = lambda baseline: METHODS[name](Subject(network, TOKENIZER, "text"), batch, targets(1, batch),
                                         baseline=baseline, **EXACT.get(name, {}))
    found = run(baseline)
    assert found.provenance["baseline"] == said and not torch.allclose(found.map, run(None).map)


def test_a_language_model_without_a_mask_token_has_a_baseline(seed):
    batch = text([5, 6, 7, 8], [9, 10])
    subject = Subject(gpt2(), type("Tokenizer", (), {"eos_token_id": SEP})(), "text")
    found = METHODS["kernel-shap"](subject, batch, targets(None, batch, labels=None), samples=20)
    assert found.provenance["baseline"] == "eos token" and found.map.any() and PAD in batch.kwargs["input_ids"]


def test_one_unit_takes_all(seed):
    network, batch = bert(), text([CLS, 5, SEP])
    maps = [METHODS[name](Subject(network, TOKENIZER, "text"), batch, targets(1, batch), **EXACT.get(name, {})).map
            for name in METHODS]
    assert maps[0][0, 1] != 0
    for found in maps[1:]:
        torch.testing.assert_close(found, maps[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, options, message", [
    ("feature-ablation", {"batch_size": 0}, "batch_size must be at least 1"),
    ("feature-ablation", {"by": "sentence"}, "units are taken by token or word"),
    ("feature-ablation", {"patch": 6}, "only pictures are cut into patches"),
    ("feature-ablation", {"baseline": "median"}, "no baseline 'median' for text"),
    ("occlusion", {"window": 0}, "window must be at least 1"), ("occlusion", {"window": (2, 2)}, "window must be"),
    ("occlusion", {"window": 2, "stride": 3}, "would leave gaps"), ("occlusion", {"stride": 1.5}, "stride must be"),
    ("kernel-shap", {"samples": 0}, "samples must be at least 1"), ("lime", {"samples": True}, "samples must be"),
    ("lime", {"kernel_width": 0}, "kernel_width is above 0"), ("lime", {"alpha": -1}, "alpha at least 0")])
def test_bad_options_of_text_are_errors(seed, name, options, message):
    batch = text([CLS, 5, 6, SEP])
    with pytest.raises(ValueError, match=message):
        METHODS[name](Subject(bert(), TOKENIZER, "text"), batch, targets(0, batch), **options)


@pytest.mark.parametrize("name, options, message", [
    ("feature-ablation", {"patch": 25}, "does not fit a picture"), ("lime", {"patch": (2, 2, 2)}, "a pair of sides"),
    ("lime", {"patch": 0}, "patch must be at least 1"), ("lime", {"by": "word"}, "only text has words"),
    ("occlusion", {"window": (30, 2)}, "does not fit a picture"), ("occlusion", {"window": "big"}, "window"),
    ("kernel-shap", {"baseline": "mask"}, "no baseline 'mask' for images")])
def test_bad_options_of_pictures_are_errors(seed, name, options, message):
    batch = images(torch.randn(1, 3, 24, 24, dtype=torch.float64), 6)
    with pytest.raises(ValueError, match=message):
        METHODS[name](Subject(vit()), batch, targets(0, batch), **options)


def test_a_text_of_special_tokens_has_nothing_to_take_out(seed):
    batch = text([CLS, 5, SEP], [CLS, SEP])
    with pytest.raises(ValueError, match="row 1 holds nothing"):
        METHODS["lime"](Subject(bert(), TOKENIZER, "text"), batch, targets(0, batch))


def test_a_target_that_turns_nan_is_an_error(seed):
    class Log(Bag):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (input_ids[:, 1:2] - MASK).double().log().expand(-1, 3)

    batch = text([CLS, 5, SEP])
    with pytest.raises(ValueError, match="the target turns -inf under the baseline 'mask token'"):
        METHODS["feature-ablation"](Subject(Log(), TOKENIZER, "text"), batch, targets(0, batch))


def test_progress_is_shown_when_asked_for(seed, capsys):
    for shown in (False, True):
        relprop.explain(vit().float(), torch.randn(1, 3, 24, 24), target=0, method="occlusion", show_progress=shown)
        assert ("occlusion" in capsys.readouterr().err) == shown
