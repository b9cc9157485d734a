"""Arguments of timm's classes made small by rule: what an argument calls its sizes says how small they may be."""
from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

WIDTH, HEADS, LAYERS, WINDOW, SIDE, PATCH, CLASSES = 32, 4, 2, 2, 64, 16, 5


def _doubling(first: int) -> Callable[[Any], Any]:
    """What every stage of a pyramid has twice as much of as the one before."""
    return lambda value: type(value)(first * 2 ** min(place, 4) for place in range(len(value)))


def _at_most(most: int) -> Callable[[Any], Any]:
    """Each number as it is, or `most`."""
    def small(value: Any) -> Any:
        return type(value)(map(small, value)) if isinstance(value, (list, tuple)) else min(value, most)

    return small


def _every(number: int) -> Callable[[Any], Any]:
    """One number for each that there is; 0 stays."""
    def small(value: Any) -> Any:
        return type(value)(map(small, value)) if isinstance(value, (list, tuple)) else number if value else value

    return small


Small = Callable[[Any], Any]
RULES: tuple[tuple[str, Small | None, Small | None], ...] = (
    # the first pattern that a name matches whole counts; what is done to a number, and to one for each stage
    (r"depths?|depth_list|serial_depths|transformer_depth|stages|layers|num_blocks|d|num_repeat|parallel_depth",
     _at_most(LAYERS), _at_most(LAYERS)),
    (r"num_vit|attn_groups|transformer_depths|local_up_to_layer", _at_most(1), _at_most(1)),
    (r"extra_norm_period", _at_most(LAYERS), None),
    (r"num_heads|heads|num_heads_inner|num_heads_outer|attn_pool_num_heads", _every(HEADS), _doubling(2)),
    (r"num_kv_heads", _every(2), None),
    (r"embed_dims?|dims|widths|width_list|hidden_sizes", _every(WIDTH), _doubling(8)),
    (r"partial_dim", None, _doubling(4)),
    (r"base_dims", None, _every(8)),
    (r"head_dim|dim_head|key_dim|qk_dim", _every(8), _every(8)),
    (r"state_dim", _at_most(8), _at_most(8)),
    (r"intermediate_size|out_features|num_features|head_widths|head_hidden_size|rel_pos_dim|neck_chans|transformer_dim",
     _every(WIDTH), _every(WIDTH)),
    (r"init_channels|stem_hidden_dim|stem_width|stem_size|stem_chs", _every(8), _every(8)),
    (r"inner_dim", _every(16), None),
    (r"channels", _every(128), _every(128)),  # group norms of 32 groups within bottlenecks of a quarter
    (r"c|out_chs", _at_most(2 * WIDTH), None),
    (r"gs", _at_most(4), None),
    (r"reg_tokens|num_reg_tokens", _every(HEADS), None),
    (r"window_sizes?|wss|window_spec|pretrained_window_sizes", _every(WINDOW), _every(WINDOW)),
    (r"patch_size", lambda value: PATCH if value > PATCH // 2 else value, None),
    (r"block_size", _every(2), None),
    (r"halo_size", _every(1), None),
    (r"ref_feat_shape|rope_ref_feat_shape|global_pos_size|pos_embed_grid_size", _every(4), _every(4)),
    (r"position_embedding_size", _every(16), None),
    (r"swiglu_align_to", _every(8), None),
    (r"num_classes", lambda value: CLASSES, None),
)
UNTOLD = re.compile(r"\w*ratios?|pretrained_\w+|feature_cfg|kwargs_filter|img_size|weight_init|fix_init|conv_init|"
                    r"\w*drop_rate|device|dtype|cache_dir|drop_rate|block_eps|zero_init_last|dynamic_img_\w+|"
                    r"strict_img_size|num_classes|in_chans|fixed_input_size|rope_\w+_coords")
"""Arguments that tell no architectures apart."""
NEEDS: dict[str, dict[str, Any]] = {
    "ByobNet": {"img_size": 128},  # some attend within blocks of places to the end, at a stride of 64
    "CoaT": {"num_heads": 8, "embed_dims": (16, 32, 32, 32)},  # its windows share out eight heads; parallel blocks
    "ConvStem": {"channels": (8, 16, WIDTH), "depth": 3},
    "CrossVit": {"img_size": 120, "img_scale": (1.0, 14 / 15)},  # both in whole patches, of 12 and of 16
    "EfficientFormer": {"img_size": 224},  # its bias is for 7 x 7 places
    "EfficientVitMsra": {"num_heads": (2, 4, 4)},  # a kernel for each head, and there are four
    "EfficientVit": {"head_dim": 16},  # of fewer, some queries are zero throughout, and so is what they divide by
    "EfficientVitLarge": {"head_dim": 16},
    "HieraDet": {"stages": (1, 2, 2, 2), "global_att_blocks": (4,)},
    "IFormer": {"depths": (1, 1, 3, 3)},  # one block that attends in three
    "NextViT": {"depths": (1, 1, 5, 2)},  # one in five
    "ResNetV2": {"stem_chs": 32},  # a group norm of 32 groups
    "VOLO": {"embed_dims": (16, WIDTH, WIDTH, WIDTH)},  # it widens once
    "VisionTransformerSAM": {"global_attn_indexes": (1,)},
}
"""What a class needs beside the rules, by its name."""


def shrunk(built: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class of timm, and those that it has sizes for by default, with small sizes."""
    standard = _standard(built)
    said = {**standard, **arguments}
    pyramid = any(isinstance(said.get(name), (list, tuple)) for name in ("depth", "depths", "stages"))
    found = {}
    for name, value in {**standard, **arguments}.items():
        small = _small(name, value)
        if name == "embed_dim" and small == WIDTH and pyramid:
            small = WIDTH // 2  # of its first stage
        if name in arguments or form(small) != form(value) or name == "num_classes":
            found[name] = small
    per_layer = [name for name in ("num_kv_heads",) if isinstance(found.get(name), (list, tuple))]
    for name in per_layer:  # one number a layer: as many as there are different ones
        found[name] = (HEADS, 2)
    if "img_size" in standard:
        found["img_size"] = side(built, found)
    found.update(NEEDS.get(built.__name__, {}))
    return found


def side(built: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> int:
    """The side of the pictures: near `SIDE`, of whole patches, and of whole groups of patches that are merged."""
    whole = {**_standard(built), **arguments, **NEEDS.get(built.__name__, {})}
    if isinstance(whole.get("img_size"), int) and "img_size" in NEEDS.get(built.__name__, {}):
        return whole["img_size"]
    unit = 1
    for name in ("patch_size", "merge_size", "downsample_ratio", "pooling_kernel_size"):
        unit *= whole.get(name) if isinstance(whole.get(name), int) else 1
    for one in whole.get("patch_sizes", ()):
        unit *= one
    fine = unit if unit > 1 else 32
    return max(round(SIDE / fine), 1) * fine


def form(value: Any) -> str:
    """What a value says of the kinds and places of parts: numbers that are no sizes are left out."""
    if isinstance(value, Mapping):
        told = sorted(f"{name}: {form(one)}" for name, one in value.items() if not UNTOLD.fullmatch(str(name)))
        return "{" + ", ".join(told) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(form, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}{form(_fields(value))}"
    if isinstance(value, partial):
        return f"{form(value.func)}({form(value.args)}, {form(value.keywords)})"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}{sorted({type(part).__name__ for part in value.modules()})}"
    if isinstance(value, float):
        return "number"
    return getattr(value, "__qualname__", None) or repr(value)


def _small(name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{part: _small(part, one) for part, one in _fields(value).items()})
    if isinstance(value, dict):
        return {part: _small(part, one) for part, one in value.items()}
    if isinstance(value, (list, tuple)) and value and not all(isinstance(one, (int, list, tuple)) for one in value):
        return type(value)(_small("", one) for one in value)
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    rule = next((rule for rule in RULES if re.fullmatch(rule[0], name)), None)
    small = None if rule is None else rule[1 if isinstance(value, int) else 2]
    if small is None:
        return [_small("", one) for one in value] if isinstance(value, list) else value
    return small(value)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}


def _standard(built: Callable[..., nn.Module]) -> dict[str, Any]:
    """The defaults of a class's arguments, and of those that it hands on to its parents."""
    found: dict[str, Any] = {}
    for parent in built.__mro__:
        taken = inspect.signature(parent.__init__).parameters
        found = {**{name: one.default for name, one in taken.items() if one.default is not one.empty}, **found}
        if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
            break
    return found
