"""GradCAM of attention against the outputs of the original codes, and by hand."""
from __future__ import annotations

import pytest
import torch
from conftest import SHARED
from test_chefer import case, network
from tiny import CLS, SEP, bert, gpt2, images, targets, text, vit
from torch import Tensor, nn

from relprop import attention
from relprop.subject import Subject
from relprop.tokens import Batch

REFERENCE = SHARED / "reference"
NEEDED = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no {REFERENCE}: it does not ship")


def outputs(name: str) -> list[tuple[str, str]]:
    return [(path.stem, key) for path in sorted(REFERENCE.glob(name)) for key in case(path.stem)[0]["outputs"]
            if "attn_gradcam" in key]


def named(pairs: list) -> list:
    return pairs or [pytest.param(*[None] * 2, marks=pytest.mark.skip(reason=f"no {REFERENCE}: it does not ship"))]


def found(model: nn.Module, batch: Batch, target: int | None, **options) -> Tensor:
    return attention.attention_gradcam(Subject(model), batch, targets(target, batch, labels=None), **options).map


# The original codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, key", named(outputs("chefer_vit_*.json")))
def test_pictures_equal_the_original(name, key):
    about, stored = case(name)
    model = network(about, stored)
    model.norm.eps = 1e-6  # of the original's baselines, unlike its other methods
    size = about["config"]["kwargs"]["patch_size"]
    batch = images(stored["input.pixel_values"].double(), size)
    map = found(model, batch, about["targets"][key.split(".")[0]])[0]
    patches = map.double().reshape(len(map) // size, size, -1, size).sum((1, 3))
    expected = stored[f"out64.{key}"]
    assert expected.max() == 1 and expected.min() == 0
    torch.testing.assert_close(patches, expected, rtol=1e-6, atol=1e-6)
    of_map = found(model, batch, about["targets"][key.split(".")[0]], over="map")[0]
    assert not torch.allclose(of_map, map, atol=1e-3), "what the mean is over makes a difference"


@pytest.mark.parametrize("name, key", named([*outputs("chefer_bert_*.json"), *outputs("cheferMM_bert_*.json")]))
def test_texts_equal_the_original(name, key):
    about, stored = case(name)
    kind, *_, target, _ = key.split(".")
    ids, mask = stored[f"input.{kind}.input_ids"], stored[f"input.{kind}.attention_mask"]
    own = ids[0, :int(mask.sum())].tolist()
    batch = text(own) if mask.all() else text(own, [5] * ids.shape[1])  # padded by another row
    expected = stored.get(f"out64.{key}")
    assert expected is not None and torch.equal(batch.kwargs["attention_mask"][:1], mask)
    map = found(network(about, stored), batch, about["targets"][kind][target], padding=True)[0, :len(own)].double()
    # of the other code all rows are stored; the class token is read
    torch.testing.assert_close(map, expected[0, :len(own)], rtol=1e-6, atol=1e-6)
    assert map[0] == 0 and (expected[0].max() > 0 or (map == 0).all())


@NEEDED
def test_the_original_has_nan_where_ours_is_zero():
    about, stored = case("cheferMM_bert_a")
    assert about["peer_non_finite_outputs"]["pad.other.attn_gradcam"]["count"]
    ids, mask = stored["input.pad.input_ids"], stored["input.pad.attention_mask"]
    own = ids[0, :int(mask.sum())].tolist()
    map = found(network(about, stored), text(own, [5] * ids.shape[1]), about["targets"]["pad"]["other"], padding=True)
    assert (map[0] == 0).all()


@NEEDED
@pytest.mark.parametrize("case_name, weights, slope, output, row", [
    ("cheferMM_detr_a", "attention.dec_cross", "attn_grad.dec_cross", "attn_gradcam", None),
    ("cheferMM_lxmert_a", "attention.x_lang_self", "attn_grad.x_lang_self", "attn_gradcam.R_t_t", 0),
    ("cheferMM_lxmert_a", "attention.x_lang_cross", "attn_grad.x_lang_cross", "attn_gradcam.R_t_i", 0)])
def test_cross_attention_equals_the_original(case_name, weights, slope, output, row):
    stored = {key[4:]: value for key, value in case(case_name)[1].items() if key.startswith("out.")}  # in float32
    prefixes = [key.removesuffix(slope) for key in stored if key.endswith(slope)]
    assert prefixes
    for prefix in prefixes:
        ours = attention.gradcam(stored[weights][-1:], stored[f"{prefix}{slope}"][-1:])[0]
        ours = ours[int(prefix[1])] if row is None else ours
        if output.endswith("R_t_t"):
            ours[0, 0] = 0  # as the original has it
        largest = stored[f"{prefix}{output}"].abs().max()
        assert largest > 0 and (ours - stored[f"{prefix}{output}"]).abs().max() < 1e-6 * largest


# By hand -------------------------------------------------------------------------------------------------------------


def test_each_head_weighs_its_mean_gradient(seed):
    weights = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    slope = torch.zeros_like(weights)
    slope[0, 0, 0, 1], slope[0, 1, 2, 2] = 9.0, -4.5
    expected = ((weights[0, 0] - 0.5 * weights[0, 1]) / 2).clamp(min=0)
    assert (expected == 0).any() and (expected > 0).any()
    torch.testing.assert_close(attention.gradcam(weights, slope)[0], expected)
    first = torch.zeros(1, 3, 3, dtype=torch.float64)
    first[:, 0] = 1 / 3  # the first row alone, where the second head has no gradient
    torch.testing.assert_close(attention.gradcam(weights, slope, counted=first)[0], 3 * weights[0, 0] / 2)


class OneWay(nn.Module):
    """An attention all of whose gradients have one sign: y = sign * sum of what position 0 takes of positive values."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.embedding, self.pass_on, self.sign = nn.Embedding(10, 4), nn.Identity(), sign

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        mixed = (x @ x.mT + (attention_mask[:, None] - 1) * 1e9).softmax(-1)[:, None] @ (1 + x ** 2)[:, None]
        return self.sign * self.pass_on(mixed[:, 0])[:, 0].sum(-1, keepdim=True)


@pytest.mark.parametrize("options", [{}, {"over": "row"}, {"normalize": False}, {"padding": True}])
def test_where_all_is_clipped_the_map_is_zero_and_not_nan(seed, options):
    batch = text([CLS, 5, 6, SEP], [CLS, 7, SEP])
    state = OneWay(1).state_dict()
    for sign, some in ((1.0, True), (-1.0, False)):
        model = OneWay(sign)
        model.load_state_dict(state)
        map = found(model.double(), batch, 0, **options)
        assert map.isfinite().all() and (map >= 0).all() and bool((map > 0).any()) == some


@pytest.mark.parametrize("options", [{}, {"over": "row"}, {"over": "map"}, {"normalize": False}, {"layer": 0}])
def test_a_batch_equals_the_loop_over_its_rows(seed, options):
    rows, full = ([CLS, 5, 6, 7, 8, SEP], [CLS, 9, 10, SEP]), 0
    for model in (bert(), bert(), gpt2()):
        together = found(model, text(*rows), None, **options)
        for row, ids in enumerate(rows):
            alone = found(model, text(ids), None, **options)[0]
            torch.testing.assert_close(together[row, :len(ids)], alone)
            full += bool(alone.max() > 1e-3)
        assert (together[1, 4:] == 0).all()
    assert full > 1, "not all may be clipped"


def test_of_padding_only_the_codes_way_depends(seed):
    model, alone, padded = bert(), text([CLS, 9, 10, SEP]), text([CLS, 9, 10, SEP], [CLS, 5, 6, 7, 8, SEP])
    one, other = (found(model, batch, 0, padding=True)[0, :4] for batch in (alone, padded))
    assert one.max() > 0 and not torch.allclose(one, other)
    torch.testing.assert_close(one, found(model, padded, 0)[0, :4])


def test_the_range_is_from_zero_to_one_or_in_the_unit_of_the_target(seed):
    batch = images(torch.randn(2, 3, 24, 24).double(), 6)
    for model in (vit(), vit(), vit()):
        map, plain = (found(model, batch, 1, normalize=normalize) * 36 for normalize in (True, False))
        largest = plain.flatten(1).amax(1)
        assert map.min() == 0 and torch.equal(map.flatten(1).amax(1).round(decimals=5), (largest > 0).float())
        for row in range(2):
            width = largest[row] - plain[row].min()
            if width > 0:
                torch.testing.assert_close(map[row], (plain[row] - plain[row].min()) / width)
    assert largest.max() > 0


def test_unknown_options_are_errors():
    batch = text([CLS, 5, SEP])
    with pytest.raises(ValueError, match="no mean over 'column'; there are row, map"):
        found(bert(), batch, 0, over="column")
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"no layer {layer}; the model has 3 attentions"):
            found(bert(), batch, 0, layer=layer)
