"""What families that see or hear need in a tiny config beside the rules of `config`, by model type."""
from __future__ import annotations

from typing import Any

from .config import PATCH, SIDE, WIDTH, WORDS

_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
              "in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320]}
_WINDOWED = {"image_size": 2 * SIDE, "patch_size": 4, "window_size": 2, "embed_dim": 8, "depths": [1, 2, 1, 1],
             "num_heads": [1, 2, 4, 4]}

CODES = 16
_CODED = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 2], "num_res_blocks": 1, "resolution": SIDE,
          "latent_channels": 8, "embed_dim": 8, "attn_resolutions": [SIDE // 2]}

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
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "timm_wrapper": {"architecture": "test_vit", "model_args": {"img_size": 2 * SIDE}},
    # patches as wide as their pixels
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 3 * PATCH ** 2},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 3 * PATCH ** 2},
    "llama4_vision_model": {"intermediate_size": 4 * WIDTH},
    # which layers are looked at
    "aria": {"projector_patch_to_query_dict": {(SIDE // PATCH) ** 2: 4}},
    "florence_vision": {"patch_size": [7, 3, 3, 3], "window_size": 4, "depths": [1, 1, 1, 1],
                        "embed_dim": [8, 16, 32, 32], "num_heads": [1, 2, 4, 4], "num_groups": [1, 2, 4, 4]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * WIDTH,
                            "num_global_layers": 1},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    # what is none by default
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1,
                           "topk_group": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                 "mrope_section": [1, 1, 2]}},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                            "mrope_section": [1, 1, 1, 1]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": WORDS - 32},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": WORDS - 32},
    "step3p5": {"sliding_window": 8},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [WIDTH, WIDTH]},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [WIDTH, WIDTH]},
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "muse_spark": {"out_hidden_size": 4 * WIDTH},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                              "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"index_kpool": 2},
    "gemma4_vision": {"pooling_kernel_size": 2},
    "gemma4_unified_vision": {"pooling_kernel_size": 2, "mm_embed_dim": WIDTH, "output_proj_dims": WIDTH,
                              "mm_posemb_size": 16},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1] * 4,
                        "vision_config": {"hidden_size": 2 * WIDTH}},
    # pictures that become words of a codebook
    "chameleon": {"image_token_id": WORDS - 1, "vocabulary_map": {"<image>": WORDS - 1} | {
        f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z": 60 + code for code in range(CODES)}},
    "chameleon_vqgan": _CODED | {"num_embeddings": CODES},
    "emu3": {"image_token_id": WORDS - 1, "vocabulary_map": {"<image>": WORDS - 1, "<|extra_200|>": WORDS - 2} | {
        f"<|visual token {code:06d}|>": 60 + code for code in range(CODES)}},
    "emu3_vqgan": _CODED | {"codebook_size": CODES, "hidden_size": 64,
                            "channel_multiplier": [1, 1, 1, 1, 2]},
    "apertus1p5": {"image_token_offset": 60, "audio_token_offset": 60 + CODES},
    "apertus1p5_vision_tokenizer": _CODED | {"codebook_size": CODES},
    "wavtokenizer_encoder": {"codebook_size": CODES},
    "janus_vqgan": _CODED | {"num_embeddings": CODES},
    "fast_vlm": {"vision_config": {"architecture": "test_convnext", "hidden_size": 64, "model_args": {}}},
    "gemma3n": {"image_token_id": WORDS - 15, "audio_token_id": WORDS - 7,
                "audio_soft_tokens_per_image": 8},
    "gemma3n_audio": {"vocab_size": 8, "vocab_offset": WORDS - 8},
    "gemma3n_vision": {"architecture": "test_convnext", "hidden_size": 64, "vocab_size": 8, "vocab_offset": WORDS - 16},
    "perception_lm": {"vision_config": {"architecture": "vit_pe_core_large_patch14_336", "model_args": {
        "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "img_size": [2 * SIDE, 2 * SIDE], "patch_size": PATCH,
        "global_pool": "", "use_post_transformer_norm": False, "ref_feat_shape": [8, 8]}}},
}
