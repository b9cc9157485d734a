"""The class of a picture, whatever makes one state of many: a class token, the mean, an attention pool."""
from __future__ import annotations

import pytest
import tiny
import torch

from relprop import Class, Contrast, Probability, explain

LABELS = {0: "cat", 1: "dog", 2: "tree"}


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every model here is random, the same each time."""


def sharpened(model):
    for parameter in model.parameters():  # biases and tokens start at constants, at which errors hide
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


def timm_vit(pool, **options):
    return sharpened(tiny.vit(global_pool=pool, **options))


def of_transformers(name, **options):
    import transformers

    kind = getattr(transformers, name)
    return sharpened(kind(kind.config_class(image_size=24, patch_size=6, hidden_size=16, num_hidden_layers=2,
                                            num_attention_heads=2, intermediate_size=24, id2label=LABELS, **options)))


def siglip():
    from transformers import SiglipConfig, SiglipForImageClassification

    return sharpened(SiglipForImageClassification(SiglipConfig(id2label=LABELS, vision_config=dict(
        image_size=24, patch_size=6, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24))))


HEADS = {
    "token": lambda: timm_vit("token"), "avg": lambda: timm_vit("avg", class_token=False),
    "avg beside a class token": lambda: timm_vit("avg"), "avgmax": lambda: timm_vit("avgmax", class_token=False),
    "max": lambda: timm_vit("max", class_token=False), "map": lambda: timm_vit("map", class_token=False),
    "fc norm": lambda: timm_vit("avg", fc_norm=True, class_token=False),
    "registers": lambda: timm_vit("token", reg_tokens=2), "ViT": lambda: of_transformers("ViTForImageClassification"),
    "BEiT, mean": lambda: of_transformers("BeitForImageClassification", use_mean_pooling=True),
    "DINOv2, both": lambda: of_transformers("Dinov2ForImageClassification"), "SigLIP, mean": siglip}


@pytest.mark.parametrize("head", HEADS)
def test_the_class_of_a_pooled_head(head):
    model, x = HEADS[head](), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    r = explain(model, x, [2, Contrast(0, 1)])
    z = model(x)
    z = z if isinstance(z, torch.Tensor) else z.logits
    assert torch.allclose(r.value.double(), torch.stack([z[0, 2], z[1, 0] - z[1, 1]]), atol=1e-5)
    assert (r.ledger.error < 1e-9).all() and torch.allclose(r.map.flatten(1).sum(1).double(), r.ledger.input, atol=1e-4)
    assert (r.map.abs().flatten(1).sum(1) > 0).all()
    for row, target in enumerate([2, Contrast(0, 1)]):
        assert torch.allclose(explain(model, x[row:row + 1], target).map, r.map[row:row + 1], atol=1e-5)
    p = explain(model, x, Probability(Class(1)))
    assert torch.allclose(p.value.double(), z.softmax(1)[:, 1], atol=1e-6) and (p.ledger.error < 1e-9).all()


def test_labels_of_a_picture():
    model, x = HEADS["BEiT, mean"](), torch.randn(1, 3, 24, 24, dtype=torch.float64)
    assert explain(model, x, "dog").target == ["dog"]
    assert torch.equal(explain(model, x, "dog").map, explain(model, x, 1).map)
