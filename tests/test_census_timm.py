"""timm in the census: which of its names are asked about, what tiny instances keep, and that they are explained."""
from __future__ import annotations

from fnmatch import fnmatch

import pytest
import timm as library
import torch
from torch import nn

from relprop import explain
from relprop.census import size, timm
from relprop.census.architecture import value
from relprop.census.examination import BALANCED, UNCHANGED, examine
from relprop.relevance import propagate
from relprop.result.census import EXPLAINED

PATTERNS = """vit* deit* beit* eva* cait* swin* swinv2* xcit* maxvit* coatnet* crossvit* davit* pit* mvitv2* hiera*
    flexivit* naflexvit* vit_*reg*_dinov2 vit_*dinov3* vit_*siglip* levit* twins* tnt* nest* volo* visformer* mobilevit*
    edgenext* efficientformer* efficientvit* gcvit* pvt_v2* coat_* convit* nextvit* fastvit* tiny_vit* swiftformer*
    vitamin* focalnet* iformer* gemma4_vit* qwen3_vit* deepseek_vit* samvit* sam2_hiera* caformer* poolformer*
    sequencer* mambaout* mixer* *resnet26d* botnet* lambda_* halonet* mobilenetv4_hybrid* vit_*dino* *siglip*"""
LEFT_OUT = "resnet50 convnext_tiny efficientnet_b0 mobilenetv4_conv_small repvgg_a0 vgg11 gernet_l"
END_TO_END = ("vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "swinv2_base_window8_256", "cait_m36_384",
              "xcit_large_24_p8_224", "levit_128", "naflexvit_base_patch16_map of patches")
LARGEST = 20_000_000  # nextvit's widths are its own
USUAL = 3_500_000


def of(name: str):
    """The architecture that a name of timm's belongs to."""
    return next(one for one in timm.architectures() if name in one.names or one.name == name)


# -- the listing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_every_family_is_asked(pattern):
    assert any(fnmatch(name, pattern) for one in timm.architectures() for name in one.names), pattern


def test_each_name_belongs_to_one_architecture_and_networks_of_convolutions_to_none():
    names = [name for group in timm.groups() for name in group]
    assert len(set(names)) == len(names) and set(names) <= set(library.list_models())
    left = set(LEFT_OUT.split())
    assert left <= set(library.list_models()) and not left & set(names)
    keys = [one.key for one in timm.architectures()]
    assert len(set(keys)) == len(keys) and len(timm.groups()) < len(names) / 2
    assert set(names) >= {name for name in library.list_models() if "vit_" in name and "repvit" not in name}


def test_what_is_left_out_is_in_timm():
    """So that a module that changed its name, or became something else, is not left out unseen."""
    modules = {library.model_entrypoint(name).__module__.rpartition(".")[2] for name in library.list_models()}
    assert {*timm.CONVOLUTIONAL.split(), *timm.MIXED} <= modules


def test_sizes_tell_no_architectures_apart_and_parts_do():
    vit = of("vit_base_patch16_224")
    assert {"vit_large_patch16_224", "vit_base_patch16_384", "vit_base_patch32_224"} <= set(vit.names)
    assert vit.stands == len(vit.names) > 10
    others = ("vit_base_patch16_gap_224", "vit_base_patch16_clip_224", "vit_base_patch16_rope_224",
              "vit_base_patch16_reg4_gap_256", "vit_relpos_base_patch16_224", "deit_base_patch16_224")
    assert len({of(name).key for name in (vit.name, *others)}) == 1 + len(others)
    assert of("xcit_small_12_p8_224").key != of("xcit_small_12_p16_224").key  # the stem has as many steps as the patch


def test_timm_is_left_alone():
    from timm.models import vision_transformer

    before = dict(vars(vision_transformer))
    timm.recipe("vit_base_patch16_224")
    assert vars(vision_transformer) == before
    assert library.create_model("vit_tiny_patch16_224", depth=1).embed_dim == 192


# -- the instances -----------------------------------------------------------------------------------------------------

def kinds(model: nn.Module) -> set[str]:
    return {type(part).__name__ for part in model.modules()}


@pytest.mark.parametrize(("name", "kept"), [
    ("vit_small_patch14_reg4_dinov2", lambda m: m.reg_token.shape[1] == 4 and "LayerScale" in kinds(m)),
    ("vit_base_patch16_siglip_224", lambda m: "AttentionPoolLatent" in kinds(m) and m.cls_token is None),
    ("swin_base_patch4_window7_224", lambda m: any(max(part.shift_size) > 0 for part in m.modules()
                                                   if hasattr(part, "shift_size"))),
    ("swinv2_base_window8_256", lambda m: any("cpb_mlp" in key for key, _ in m.named_parameters())),
    ("cait_m36_384", lambda m: {"TalkingHeadAttn", "ClassAttn"} <= kinds(m)),
    ("xcit_large_24_p8_224", lambda m: {"XCA", "ClassAttn", "LPI"} <= kinds(m)),
    ("convit_base", lambda m: {"GPSA", "MHSA"} <= kinds(m)),
    ("davit_base", lambda m: {"SpatialBlock", "ChannelBlock"} <= kinds(m)),
    ("eva02_base_patch14_224", lambda m: m.rope is not None and "SwiGLU" in kinds(m)),
    ("beit_base_patch16_224", lambda m: any("relative_position_bias_table" in key for key, _ in m.named_parameters())),
    ("samvit_base_patch16", lambda m: sorted(block.window_size for block in m.blocks) == [0, size.WINDOW]),
    ("deit_base_distilled_patch16_224", lambda m: m.dist_token is not None and m.head_dist is not None),
    ("nextvit_base", lambda m: {"ConvAttention", "Mhca", "EMhsa"} & kinds(m)),
    ("coat_mini", lambda m: "ParallelBlock" in kinds(m)),
    ("maxvit_base_tf_224", lambda m: {"SqueezeExcite", "PartitionAttentionCl"} & kinds(m)),
    ("vit_base_r50_s16_224", lambda m: "ResNetV2" in kinds(m)),
])
def test_a_tiny_instance_keeps_what_makes_its_architecture(name, kept):
    model = of(name).build()
    assert kept(model), kinds(model)
    assert sum(p.numel() for p in model.parameters()) < (LARGEST if name.startswith("nextvit") else USUAL)


def test_batch_norms_have_met_inputs():
    model = of("levit_128").model()
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert norms and not any(part.training for part in model.modules())
    assert all(norm.momentum == 0.1 and (norm.running_var != 1).all() and norm.running_mean.any() for norm in norms)


def test_patches_of_pictures_of_two_shapes():
    one = of("naflexvit_base_patch16_gap of patches")
    model = one.model()
    given = one.inputs(model)
    assert given["patch_valid"].sum(1).tolist() == [36, 27] and given["patch_coord"][1].amax(0).tolist() == [2, 8]
    with torch.no_grad():
        assert model(**given).shape == (2, size.CLASSES)


@pytest.mark.parametrize("name", END_TO_END)
def test_a_handful_is_explained(name):
    """As the census does, but for what it asks besides."""
    model = of(name).model()
    given, seen = of(name).inputs(model), []
    for method in EXPLAINED:
        found = explain(model, dict(given), lambda y: value(seen.append(y) or y), method=method)
        assert (found.ledger.error <= BALANCED).all() and found.ledger.input.abs().min() > 0
    with torch.no_grad():
        torch.testing.assert_close(value(seen[0]), value(model(**given)), rtol=1e-4, atol=UNCHANGED)


@pytest.mark.slow
def test_every_architecture_is_explained():
    found = [examine(one) for one in timm.architectures()]
    works = [entry for entry in found if entry.works]
    assert len(works) >= 0.97 * len(found) and sum(entry.stands for entry in works) > 750
    assert max(entry.parameters for entry in works) < LARGEST
    left = {entry.key: entry.failures for entry in works if not entry.explained}
    assert len(left) <= 0.05 * len(works), left


@pytest.mark.slow
def test_books_of_every_family_balance_in_double_precision():
    families = {(one.family, " of patches" in one.name): one for one in reversed(timm.architectures())}
    assert len(families) > 80
    for one in families.values():
        model = one.model().double()
        given = {name: x.double() if x.is_floating_point() else x for name, x in one.inputs(model).items()}
        for method in EXPLAINED:
            found = explain(model, dict(given), value, method=method)
            assert (found.ledger.error < 1e-9).all(), (one.key, method, found.ledger.error)
            assert found.map.abs().sum() > 0


# -- heads: the books of a class of a picture --------------------------------------------------------------------------

HEADS = {
    **{pool: ("vit_tiny_patch16_224", {"global_pool": pool}) for pool in ("token", "avg", "max", "avgmax", "map")},
    "map, no class token": ("vit_base_patch16_siglip_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "registers, avg": ("vit_tiny_patch16_224", {"reg_tokens": 4, "global_pool": "avg"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}), "class attention": ("cait_xxs24_224", {}),
    "eva, map": ("vit_pe_core_tiny_patch16_384", {}), "relative positions": ("vit_relpos_small_patch16_224", {}),
    "rotated": ("vit_base_patch16_rope_224", {}), "parallel": ("vit_base_patch16_18x2_224", {}),
}


@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("head", HEADS)
def test_books_of_a_class_balance_whatever_pools_it(head, method):
    name, options = HEADS[head]
    torch.manual_seed(0)
    model = library.create_model(name, img_size=48, embed_dim=32, depth=2, num_heads=4, num_classes=5, **options)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    x = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    classes, seen = torch.tensor([0, 4, 2]), []
    found = propagate(model, (x,), {}, lambda y: seen.append(y) or y.gather(1, classes[:, None])[:, 0], method)
    torch.testing.assert_close(seen[0], model(x), rtol=1e-10, atol=1e-10)
    assert (found.ledger.error < 1e-9).all()
    assert (found.relevance["0"].abs().sum((1, 2, 3)) > 1e-3 * found.ledger.value.abs()).all()
