"""What families of transformers need in a tiny config beside the rules of `config`, by model type."""
from __future__ import annotations

from typing import Any

from .config import HEADS, LENGTH, WIDTH

_HEAD = WIDTH // HEADS
_MAMBA = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}

NEEDS: dict[str, dict[str, Any]] = {
    # what is None by default, of which there is none at random
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA,
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    # sizes that have to fit each other
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
             "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "layoutlmv3": {"coordinate_size": WIDTH // 8, "shape_size": WIDTH // 4},
    "lilt": {"hidden_size": 48},
    "mamba2": {"head_dim": 2 * WIDTH // HEADS},
    "neomme": {"head_dim": 16},
    "nystromformer": {"num_landmarks": LENGTH // 3, "segment_means_seq_len": LENGTH},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (WIDTH // 4, 3 * WIDTH // 4), "axial_pos_shape": (8, 8),
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4,
                 "attn_layers": ["local", "lsh"]},
    "zamba": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"],
              "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * _HEAD},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"],
               "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * _HEAD},
}
