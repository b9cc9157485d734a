"""What families that see or hear need in a tiny config beside the rules of `config`, by model type."""
from __future__ import annotations

from typing import Any

from .config import HEADS, SIDE, WIDTH, WORDS

_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
              "in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320]}
_WINDOWED = {"image_size": 2 * SIDE, "patch_size": 4, "window_size": 2, "embed_dim": 8, "depths": [1, 2, 1, 1],
             "num_heads": [1, 2, 4, 4]}

SIGHT: dict[str, dict[str, Any]] = {
    # convolutions whose widths have to fit each other
    "align_vision_model": _EFFICIENT,
    "bit": {"num_groups": 4},
    "efficientnet": _EFFICIENT,
    "hgnet_v2": {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 32], "stage_mid_channels": [8, 8, 8, 8],
                 "stage_out_channels": [16, 16, 32, 32], "hidden_sizes": [16, 16, 32, 32],
                 "stage_numb_of_layers": [1, 1, 1, 1]},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilevitv2": {"width_multiplier": 0.25},
    "textnet": {"stem_out_channels": 8},
    # windows, and pictures that they cover several times
    "donut-swin": _WINDOWED,
    "swin": _WINDOWED,
    "swinv2": _WINDOWED,
    # sides that have to fit each other
    "cvt": {"depth": [1, 2, 3]},
    "align": {"projection_dim": 80},
    "levit": {"image_size": 2 * SIDE, "patch_size": 16, "key_dim": [8, 8, 8], "hidden_sizes": [16, 32, 32]},
    "perceiver": {"num_cross_attention_heads": 1},
    # parts that only some classes of a family have
    "blip_2_qformer": {"use_qformer_text_input": True},
    "shieldgemma2": {"yes_token_index": WORDS - 30, "no_token_index": WORDS - 31},
    "timm_wrapper": {"architecture": "test_vit", "model_args": {"img_size": 2 * SIDE}},
}
