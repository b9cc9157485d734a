"""Patches are those that the model cuts: rectangular, padded, overlapping, behind prefix tokens and registers."""
from __future__ import annotations

import numpy as np
import pictured
import pytest
import torch
from torch import nn

import relprop
from relprop import grid, latents
from relprop.family import prefix_tokens

WIDE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3)
SMALL = dict(num_classes=3, embed_dim=16, depth=2, num_heads=2)


def transformers_model(name, **config):
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**config)).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.15)
    return model


def vit(**options):
    import timm

    return timm.create_model("vit_tiny_patch16_224", **SMALL | options).eval()


def swin(**options):
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, embed_dim=8, depths=(1, 1),
                             num_heads=(2, 2), window_size=4, **options).eval()


def hiera():
    return transformers_model("HieraForImageClassification", image_size=[32, 32], embed_dim=8, depths=[1, 1],
                              num_heads=[1, 2], mlp_ratio=2.0, num_labels=3, patch_size=[7, 7], patch_stride=[4, 4],
                              patch_padding=[3, 3], masked_unit_size=[4, 4], query_stride=[2, 2], num_query_pool=1)


CASES = {  # a model, the size of its pictures, pixels of a patch, patches, and tokens in front of them
    "timm": (lambda: vit(img_size=24, patch_size=6), (24, 24), (6, 6), (4, 4), 1),
    "timm-any-size": (lambda: vit(img_size=24, patch_size=6, dynamic_img_size=True), (24, 42), (6, 6), (4, 7), 1),
    "timm-padded": (lambda: vit(img_size=24, patch_size=6, dynamic_img_size=True, dynamic_img_pad=True), (22, 40),
                    (6, 6), (4, 7), 1),
    "timm-tall-patches": (lambda: vit(img_size=(24, 40), patch_size=(6, 10)), (24, 40), (6, 10), (4, 4), 1),
    "timm-registers": (lambda: vit(img_size=(24, 36), patch_size=6, reg_tokens=3), (24, 36), (6, 6), (4, 6), 4),
    "timm-swin": (lambda: swin(img_size=(32, 48), patch_size=4), (32, 48), (4, 4), (8, 12), 0),
    "vit": (lambda: transformers_model("ViTForImageClassification", **WIDE, image_size=24, patch_size=6), (24, 24),
            (6, 6), (4, 4), 1),
    "dinov2-registers": (lambda: transformers_model("Dinov2WithRegistersForImageClassification", **WIDE, image_size=24,
                                                    patch_size=6, num_register_tokens=3), (24, 36), (6, 6), (4, 6), 4),
    "swin": (lambda: transformers_model("SwinForImageClassification", image_size=32, patch_size=4, embed_dim=8,
                                        depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3), (32, 48),
             (4, 4), (8, 12), 0),
    "hiera-overlapping": (hiera, (32, 32), (4, 4), (8, 8), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_patches_are_those_of_the_model(case):
    build, size, patch, count, prefix = CASES[case]
    torch.manual_seed(0)
    model = build()
    assert prefix_tokens(model) == prefix
    subject = relprop.load(model)
    r = relprop.explain(subject, torch.randn(2, 3, *size), target=1)
    assert (r.units.patch, r.units.grid, r.units.size) == (patch, count, size)
    if all(side * many <= whole for side, many, whole in zip(patch, count, size, strict=True)):
        assert r.patches().shape == (2, *count)
        torch.testing.assert_close(r.patches().sum((1, 2)), r.map.sum((1, 2)), rtol=1e-3, atol=1e-5)
    if case.startswith(("timm", "dino", "vit")) and "swin" not in case:
        tokens = r.at("L0").shape[1]
        assert tokens == prefix + count[0] * count[1]
        assert latents.prefix(subject.prepare(torch.randn(1, 3, *size)), tokens) == prefix


def test_a_switch_takes_rectangular_pictures():
    model = CASES["vit"][0]()
    r = relprop.explain(model, {"pixel_values": torch.randn(1, 3, 24, 36), "interpolate_pos_encoding": True}, target=1)
    assert r.patches().shape == (1, 4, 6)


def test_watching_leaves_the_model_as_it_is():
    model = vit(img_size=24, patch_size=6).train()
    hooks = lambda: [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    before = hooks()
    assert grid.cut(model, (torch.randn(1, 3, 24, 24),), {}, (24, 24)) == ((6, 6), (4, 4))
    assert model.training and hooks() == before


def test_what_cuts_no_patches():
    class Parts(nn.Module):
        """Reads every quarter of a picture by itself."""

        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2)

        def forward(self, x):
            quarters = x.unfold(2, 12, 12).unfold(3, 12, 12).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
            return self.head(self.conv(quarters).flatten(2).mT).mean((0, 1))[None]

    given = (torch.randn(1, 3, 24, 24),)
    assert grid.cut(Parts(), given, {}, (24, 24)) is None
    assert grid.cut(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), given, {}, (24, 24)) is None  # no tokens
    assert grid.cut(vit(img_size=48, patch_size=6), given, {}, (24, 24)) is None  # it does not take them


def test_pictures_that_become_patches_are_mapped_as_they_are():
    import transformers

    sight = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_patches=256,
                 patch_size=16)
    model = transformers_model("Siglip2ForImageClassification", vision_config=sight, num_labels=3).double()
    subject = relprop.load((model, transformers.Siglip2ImageProcessor(max_num_patches=64)))
    images = [pictured.picture(60, 90), np.array(pictured.picture(60, 90, 1))]
    r = relprop.explain(subject, images, target=1, method="attnlrp")
    assert r.map.shape == (2, 60, 90) and r.patches().shape == (2, 6, 9) and float(r.ledger.error.max()) < 1e-9
    torch.testing.assert_close(r.map.sum((1, 2)).double(), r.ledger.input, rtol=1e-4, atol=1e-7)
    assert r.check(steps=2, randoms=2).baseline == "median colour"
    alone = relprop.explain(subject, images[1], target=1, method="attnlrp")
    torch.testing.assert_close(alone.map[0], r.map[1], rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="pictures of one size"):
        subject.prepare([pictured.picture(60, 90), pictured.picture(90, 60)])
