"""Rollout against a dense oracle and the original code, and the rows that maps are read from."""
from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny import CLS, SEP, bert, gpt2, images, targets, text, vit
from torch import nn

from relprop import attention
from relprop.errors import IndependentOutput
from relprop.subject import Subject
from relprop.target import Token
from relprop.tokens import Batch

FOLLOWED = {name: method for name, method in attention.METHODS.items() if name != "full-lrp"}  # by their patterns
SHARES = ("rollout", "raw-attention", "last-layer-attention", "value-weighted-attention", "attention-flow")
ONE_LAYER = ("partial-lrp", "attention-gradcam")  # look at the last layer alone
CLIPPED = ("attention-gradcam",)  # may be zero everywhere


def patterns(layers: int, batch: int, heads: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, length, dtype=torch.float64).softmax(-1) for _ in range(layers)]


def oracle(given: list[torch.Tensor], fusion: str, discard: float) -> torch.Tensor:
    """Rollout of a single row as the sum over every path through the layers, entry by entry."""
    length = given[0].shape[-1]
    mixed = []
    for pattern in given:
        entries = {(t, s): {"mean": sum, "max": max, "min": min}[fusion]([h[t][s] for h in pattern[0].tolist()])
                   for t, s in itertools.product(range(length), repeat=2)}
        if fusion == "mean":
            entries = {place: entry / pattern.shape[1] for place, entry in entries.items()}
        for place in sorted(entries, key=entries.get)[:int(discard * length * length)]:
            entries[place] = 0.0
        whole = {t: 1 + sum(entries[t, s] for s in range(length)) for t in range(length)}
        mixed.append({(t, s): (entries[t, s] + (t == s)) / whole[t] for t, s in entries})
    result = torch.zeros(length, length, dtype=torch.float64)
    for path in itertools.product(range(length), repeat=len(given) + 1):  # from the input upwards
        share = 1.0
        for layer, (s, t) in zip(mixed, itertools.pairwise(path), strict=True):
            share *= layer[t, s]
        result[path[-1], path[0]] += share
    return result


@pytest.mark.parametrize("discard", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("fusion", attention.FUSIONS)
def test_rollout_is_the_sum_over_all_paths(seed, fusion, discard):
    given = patterns(3, 2, 3, 4)
    found = attention.rollout(given, head_fusion=fusion, discard=discard)
    expected = torch.stack([oracle([p[row:row + 1] for p in given], fusion, discard) for row in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_start_layer_leaves_out_the_layers_below(seed):
    given = patterns(3, 1, 2, 4)
    assert torch.equal(attention.rollout(given, start_layer=1), attention.rollout(given[1:]))


def test_padding_takes_nothing_and_its_rows_may_be_nan(seed):
    given = patterns(3, 1, 2, 6)
    short = [p[..., :4, :4] / p[..., :4, :4].sum(-1, keepdim=True) for p in given]
    padded = [torch.full_like(p, torch.nan) for p in given]  # what a fused kernel leaves in fully masked rows
    for whole, real in zip(padded, short, strict=True):
        whole[..., :4, 4:] = 0
        whole[..., :4, :4] = real
    padding = torch.tensor([[False] * 4 + [True] * 2])
    found = attention.rollout(padded, padding=padding, discard=0.4)
    torch.testing.assert_close(found[:, :4, :4], attention.rollout(short, discard=0.4))
    assert (found[:, :4, 4:] == 0).all()


@pytest.mark.parametrize("options, message", [
    ({"head_fusion": "median"}, "no head fusion"), ({"discard": 1.0}, "share"), ({"start_layer": 3}, "3 layers")])
def test_unknown_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        attention.rollout(patterns(3, 1, 1, 2), **options)


def test_what_cannot_be_followed_is_an_error(seed):
    with pytest.raises(ValueError, match="no attention was found"):
        attention.rollout([])
    with pytest.raises(ValueError, match="no windows"):
        attention.rollout([*patterns(1, 4, 1, 4), *patterns(1, 1, 1, 4)])
    batch = images(torch.randn(1, 3, 24, 24), None)
    network = nn.Sequential(nn.Conv2d(3, 3, 24), nn.Flatten())
    for method in FOLLOWED.values():
        with pytest.raises(ValueError, match="no attention was found"):
            method(Subject(network), batch, targets(0, batch))


@pytest.mark.parametrize("name", [name for name in FOLLOWED if name not in ONE_LAYER])  # the last is one window
def test_a_hierarchical_model_is_an_error(seed, name):
    from timm.models.swin_transformer import SwinTransformer

    network = SwinTransformer(img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4,
                              num_classes=3).eval()
    batch = images(torch.randn(1, 3, 32, 32), None)
    way_out = "" if name == "generic-attention" else ".*take generic-attention"
    with pytest.raises(ValueError, match=f"no merging of tokens{way_out}"):
        FOLLOWED[name](Subject(network), batch, targets(0, batch))


# Which rows are read -------------------------------------------------------------------------------------------------


def weights(network: nn.Module, batch: Batch, length: int, spec: object = 0, **vocabulary) -> torch.Tensor:
    return attention.readout(network, batch, targets(spec, batch, **vocabulary), length)[1]


def test_the_class_token_is_read(seed):
    batch = text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    assert (weights(bert(), batch, 5) == torch.eye(5)[0]).all()
    assert (weights(vit(), images(torch.randn(2, 3, 24, 24).double(), 6), 17) == torch.eye(17)[0]).all()


def test_an_average_reads_every_patch_alike(seed):
    found = weights(vit(global_pool="avg", reg_tokens=2), images(torch.randn(2, 3, 24, 24).double(), 6), 19)
    assert (found[:, :3] == 0).all()  # class and register tokens are left out of timm's average
    torch.testing.assert_close(found[:, 3:], torch.full((2, 16), 1 / 16, dtype=torch.float64))


@pytest.mark.parametrize("left", [False, True])
def test_the_predicting_position_is_read(seed, left):
    batch = text([5, 6, 7, 8], [9, 10], left=left)
    network = gpt2()
    spec = [Token(4), Token(4, position=0)]
    found = weights(network, batch, 4, spec, labels=None)
    assert found.argmax(1).tolist() == [3, 2 if left else 0] and (found.amax(1) == 1).all()


def test_a_target_that_reads_no_position_is_an_error(seed):
    batch = text([CLS, 5, SEP])
    with pytest.raises(IndependentOutput, match="row 0"):
        attention.readout(bert(), batch, targets(lambda output: 0 * output.logits[:, 0], batch), 3)


# Maps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", attention.METHODS)
def test_a_batch_equals_the_loop_over_its_rows(seed, name):
    method = attention.METHODS[name]
    long, short = [CLS, 5, 6, 7, 8, SEP], [CLS, 9, 10, SEP]
    for network, labels, left in ((bert(), 3, False), (gpt2(), None, False)):
        batch, alone = text(long, short, left=left), text(short)
        together = method(Subject(network), batch, targets(None, batch, labels=labels))
        single = method(Subject(network), alone, targets(None, alone, labels=labels))
        torch.testing.assert_close(together.map[1:, :4], single.map)
        assert (together.map[1, 4:] == 0).all() and (single.map.abs().sum() > 0 or name in CLIPPED)
        assert together.target[1:] == single.target


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 3}, {"global_pool": "avg", "class_token": False}])
@pytest.mark.parametrize("known", [True, False])
def test_a_picture_keeps_each_patch_share(seed, name, changes, known):
    network = vit(**changes)
    batch = images(torch.randn(2, 3, 24, 24).double(), 6 if known else None)
    found = FOLLOWED[name](Subject(network), batch, targets(1, batch))
    assert found.map.shape == (2, 24, 24) and found.map.dtype == torch.float32
    patches = found.map.view(2, 4, 6, 4, 6)
    assert (patches == patches[:, :, :1, :, :1]).all()  # even within each patch
    total = found.map.sum((1, 2))
    assert (total > 0).all() or name in CLIPPED
    if name not in SHARES:
        return
    assert (total <= 1 + 1e-6).all()
    if not network.num_prefix_tokens:
        torch.testing.assert_close(total, torch.ones(2))  # nothing was dropped, so the shares sum to one


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_given_back(seed, training):
    network = bert().train(training)
    network.dropout.eval()
    batch = text([CLS, 5, 6, SEP])
    before = {name: p.clone() for name, p in network.state_dict().items()}
    for spec in (0, lambda output: 1 / 0):  # also after an exception in the middle
        try:
            attention.attention_rollout(Subject(network), batch, targets(spec, batch))
        except ZeroDivisionError:
            pass
        assert network.training == training and not network.dropout.training
        assert all(p.requires_grad and p.grad is None for p in network.parameters())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
        assert all(torch.equal(before[name], p) for name, p in network.state_dict().items())


def test_it_works_where_the_caller_has_no_gradient(seed):
    batch = text([CLS, 5, 6, SEP])
    network = bert()
    expected = attention.attention_rollout(Subject(network), batch, targets(0, batch)).map
    with torch.no_grad():
        assert torch.equal(attention.attention_rollout(Subject(network), batch, targets(0, batch)).map, expected)


# The original code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["chefer_vit_a", "chefer_vit_b"])
def test_rollout_agrees_with_the_original(shared, case):
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    about = json.loads((shared / "reference" / f"{case}.json").read_text())
    stored = load_file(shared / "reference" / f"{case}.safetensors")
    network = VisionTransformer(**about["config"]["kwargs"]).eval()
    network.load_state_dict({name.removeprefix("model."): t for name, t in stored.items() if name.startswith("model.")})
    network.double()
    pixels = stored["input.pixel_values"].double()
    patch = network.patch_embed.patch_size[0]
    batch = images(pixels, patch)
    for start, name in ((0, "attention_rollout"), (1, "attention_rollout_start1")):
        found = attention.attention_rollout(Subject(network), batch, targets(0, batch, labels=7), start_layer=start)
        grid = network.patch_embed.grid_size
        shares = found.map.view(1, grid[0], patch, grid[1], patch).sum((2, 4)).flatten(1)
        torch.testing.assert_close(shares, stored[f"out64.{name}"].float(), rtol=1e-5, atol=1e-8)
