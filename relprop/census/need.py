"""What families of transformers need in a tiny config beside the rules of `config`, by model type."""
from __future__ import annotations

from typing import Any

from .config import HEADS, LENGTH, PAD, WIDTH

_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_DRAFT = {"text_config": {  # every layer reads keys and values of the model that it drafts for
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": WIDTH // HEADS}}
_ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
          "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS}

NEEDS: dict[str, dict[str, Any]] = {
    # what is none by default, though no model of the family is without
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                                                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": _HYBRID,
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 4},
    "t5": {"decoder_start_token_id": PAD},
    "xmod": {"default_language": "en_XX"},
    # sizes that have to fit each other, and kinds of layers that configs tell in ways of their own
    "big_bird": {"block_size": 1, "num_random_blocks": 1},  # else there are too few blocks to leave any out
    "bigbird_pegasus": {"block_size": 1, "num_random_blocks": 1},
    "blt": {"use_cache": False},
    "bros": {"hidden_size": 2 * WIDTH},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
             "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "layoutlmv3": {"coordinate_size": WIDTH // 8, "shape_size": WIDTH // 4},
    "lilt": {"hidden_size": 48},
    "mamba2": {"head_dim": 2 * WIDTH // HEADS},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "neomme": {"head_dim": 16},
    "nystromformer": {"num_landmarks": LENGTH // 3, "segment_means_seq_len": LENGTH},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (WIDTH // 4, 3 * WIDTH // 4), "axial_pos_shape": (8, 8),
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4,
                 "num_hidden_layers": 2, "attn_layers": ["local", "lsh"], "hash_seed": 0},
    "vibevoice_acoustic_tokenizer_encoder": {"vae_std": 0.0},  # else it adds noise, another each time
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # widths are rounded to multiples of 64
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"mamba_headdim": 2 * WIDTH // HEADS},
}
