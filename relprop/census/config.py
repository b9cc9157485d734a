"""Configurations shrunk by rule: what a config calls its sizes says how small they may be."""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WIDTH, HEADS, LAYERS, WORDS, TOKENS, SIDE, PATCH = 32, 4, 2, 96, 64, 32, 8
PAD, LENGTH = 0, 12
"""The token that fills up a text, and how long texts are."""

KEY_HEADS = r"(\w+_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|multi_query_group_num)"
COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
"""What configs call the number of layers that they have lists of."""

RULES: tuple[tuple[str, Any], ...] = (
    # the first pattern that a name matches whole counts
    (r"(\w+_)?vocab(_size)?|vocab_size_\w+|(src|tgt)_vocab_size", WORDS),
    (r"pad_token_id", PAD),
    (r"(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|"
     r"num_(encoder|decoder|text|vision)_layers|(text|vision|conf|pred)_?num_hidden_layers|depth|(l|x|r)_layers|layers|"
     r"perceiver_depth|resampler_depth)", LAYERS),
    (KEY_HEADS, 2),
    (r"(\w+_)?(num_attention_heads|n_heads?|num_heads|attention_heads|linear_num_heads|resampler_n_heads)", HEADS),
    (r"linear_num_(key|value)_heads|mamba_n_heads|n_mamba_heads|mamba_num_heads|(\w+_)?time_mix_heads", HEADS),
    (r"(\w+_)?head_dim|d_kv|head_size|attention_head_size|dim_head", WIDTH // HEADS),
    (r"rotary_dim|rotary_ndims", WIDTH // HEADS // 2),
    (r"(\w+_)?(d_state|state_size)", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|(\w+_)?lora_rank|time_step_rank", 8),
    (r"(\w+_)?(hidden_size(_global)?|d_model|hidden_dim|n_embd|embed_dim|embedding_size|dim|d_latents|lru_width|"
     r"projection_dim|word_embed_proj_dim|proj_dim|output_dim|emb_dim|embed_size|d_embed|pooler_output_size|attention_hidden_size|"
     r"bottleneck_size|d_rel|codevector_dim|classifier_proj_size|out_hidden_size|embedding_dim|"
     r"adapter_(input_size|in_dim|out_dim))", WIDTH),
    (r"(\w+_)?(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|mlp_dim|feed_forward_size|dim_ff|dff|"
     r"expert_ffn_hidden_size|mlp_hidden_size|pffn_hidden_size|moe_hidden_size)", 48),
    (r"(\w+_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", 4),
    (r"(\w+_)?(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group|n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"(\w+_)?(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|context_length|seq_len|"
     r"max_source_positions|max_target_positions)", TOKENS),
    (r"(\w+_)?(image_size|img_size)", SIDE),
    (r"(\w+_)?patch_size", PATCH),
    (r"(\w+_)?sliding_window(_size)?|attention_window_size|attention_window|local_attention|"
     r"local_attention_window_len", 8),
    (r"local_radius|global_block_size", 3),
    (r"num_filters", 2),
    (r"(\w+_)?(layer_period|attention_interval|attn_every_n_layers|attention_every_n_layers)", 2),
    (r"(\w+_)?layer_offset", 1),
    (r"max_window_layers|first_k_dense_replace|num_kv_shared_layers|n_layers_per_attn_res_block", 1),
    (r"num_(query_tokens|latents|landmarks)|resampler_num_latents|resampler_n_latents", 8),
    (r"(\w+_)?index_topk", 4),
    (r"groups_width|num_conv_pos_embedding_groups", 2),
    (r"num_conv_pos_embeddings", 4),
    # pictures: as many patches as their side holds
    (r"num_position_embeddings|num_patches|num_image_tokens|max_num_patches", (SIDE // PATCH) ** 2),
    (r"latent_query_num|mm_tokens_per_image|vision_soft_tokens_per_image", 4),
)
WIDTHS = re.compile(r"(hidden_sizes|embed_dims?|channels|dims?|neck_hidden_sizes|out_channels|in_channels|tdnn_dim|"
                    r"conv_dim)")
DEPTHS = re.compile(r"(depths?|num_blocks|layers|stage_num_blocks|block_repeats)")
PLACES = r"(image|video|audio|speech)_token_(id|index)"
"""Tokens that hold the places of pictures and sounds among words, which a config may leave open."""
GROUPS = re.compile(r"(num_heads|num_attention_heads|num_groups)")


def shrunk(config_class: type, needs: Mapping[str, Mapping[str, Any]] = {}) -> Any:
    """A tiny config of a class of transformers: sizes that it calls by a known name are small, parts of it likewise.

    Args: needs: what families need besides, by model type.
    """
    return config_class(**settings(config_class, needs))


def settings(config_class: type, needs: Mapping[str, Mapping[str, Any]] = {}, default: Any = None,
             tokens: dict[str, int] | None = None) -> dict[str, Any]:
    """What is to be said to a config's class to make it tiny. `default`: the config that it would make by itself, or
    as a part of another. `tokens`: ids of special tokens by what they mean, which are the same in all parts.
    """
    tokens = {} if tokens is None else tokens
    given = dict(needs.get(config_class.model_type, {}))
    default = _default(config_class, given) if default is None else default
    named = {name: standard for name, standard in vars(default).items() if name[0] != "_"}
    found: dict[str, Any] = {}
    for name, standard in named.items():
        kind, part = _part(standard, getattr(config_class, "sub_configs", {}).get(name))
        if kind is not None:
            found[name] = {"model_type": kind.model_type, **settings(kind, needs, part, tokens)}
            if isinstance(given.get(name), Mapping):
                found[name].update(given.pop(name))
        elif name not in given and (small := _small(name, standard, tokens)) is not None:
            found[name] = small
    if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()):
        given.setdefault("rope_parameters", _turned(vars(default), found))
    rest = {name: standard for name, standard in named.items() if name not in given}
    found.update(_related(rest, vars(default)))
    staged = any(DEPTHS.fullmatch(name) and isinstance(one, (list, tuple)) for name, one in named.items())
    layers = {} if staged or set(given) & set(COUNTS) else _layers(rest)
    return {**found, **layers, **given}


def _part(standard: Any, listed: type | None) -> tuple[type | None, Any]:
    """The class of a config that is a part of another, and what it is there by itself; a part that is left out is of
    the class that is listed.
    """
    if hasattr(standard, "model_type"):
        return type(standard), standard
    return (listed if standard is None and getattr(listed, "model_type", None) else None), None


def _default(config_class: type, given: Mapping[str, Any]) -> Any:
    """The config as it is when nothing is said; of some nothing may be left out."""
    try:
        return config_class()
    except Exception:  # whatever the library calls what it misses
        if not given:
            raise
        return config_class(**given)


def _small(name: str, standard: Any, tokens: dict[str, int]) -> Any:
    if re.fullmatch(PLACES, name):
        return _token(name, tokens)
    if isinstance(standard, bool) or standard is None:
        return None
    if isinstance(standard, int):
        rule = next((small for pattern, small in RULES if re.fullmatch(pattern, name)), None)
        if rule is None and name.endswith(("_id", "_index")):
            return _token(name, tokens) if standard >= WORDS else None
        return None if rule is None else min(rule, standard) if standard > 0 else None
    if name == "image_grid_pinpoints":
        return [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    if isinstance(standard, (list, tuple)) and standard and all(isinstance(one, int) for one in standard):
        kind = type(standard)
        if name == "attention_window":
            return kind(8 for _ in standard)
        if name.endswith("_token_id"):
            return kind([_token(name, tokens)]) if max(standard) >= WORDS else None
        if name.endswith("_token_ids"):
            return kind(_token(f"{name} {place}", tokens) for place in range(len(standard)))
        if name.endswith("_indexes"):  # of layers
            return kind((0,))
        if DEPTHS.fullmatch(name):
            return kind(1 for _ in standard)
        if GROUPS.fullmatch(name):
            return kind(min(2 ** i, 4) for i in range(len(standard)))
        if WIDTHS.fullmatch(name):
            return kind(8 * 2 ** min(i, 2) for i in range(len(standard)))
        if name in ("image_size", "img_size"):
            return kind(SIDE for _ in standard)
        if name == "patch_size":
            return kind(PATCH for _ in standard)
    return None


def _related(named: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that follow from others: as many key heads as heads stay as many, rotated and other dimensions of a query
    are all of them, heads of a state-space fill its width; and what is none by default but computed with.
    """
    found: dict[str, Any] = {}
    heads = next((default[name] for name in ("num_attention_heads", "n_heads", "num_heads") if default.get(name)), None)
    whole = "qk_head_dim" in default and "qk_rope_head_dim" in default
    expand = default.get("mamba_expand") or default.get("expand")
    for name, standard in named.items():
        if re.fullmatch(KEY_HEADS, name) and heads is not None and standard in (heads, None):
            found[name] = HEADS
        elif name == "head_dim" and standard is None:
            found[name] = WIDTH // HEADS
        elif name == "vocab_size" and standard is None:
            found[name] = WORDS
        elif standard is None and name in default and (
                name == "pad_token_id" and "vocab_size" in default
                or name == "decoder_start_token_id" and default.get("is_encoder_decoder")):
            found[name] = PAD
        elif name == "qk_head_dim" and whole or (name == "head_dim" and standard == default.get("qk_head_dim")):
            found[name] = 2 * (WIDTH // HEADS)
        elif expand and re.fullmatch(r"mamba_(d_head|headdim|head_dim)", name):
            found[name] = int(expand * WIDTH) // HEADS
    return found


def _turned(default: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """How positions in time, height and width share what of a head they rotate."""
    rope = dict(default.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0})
    width = found.get("qk_rope_head_dim") or found.get("head_dim") or WIDTH // HEADS
    half = int(width * rope.get("partial_rotary_factor", 1)) // 2
    return rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def _layers(named: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers and the lists that say of what kind each one is, so that there is one of each kind."""
    count = next((name for name in COUNTS if isinstance(named.get(name), int)), None)
    if count is None:
        return {}
    lists = {name: standard for name, standard in named.items() if isinstance(standard, (list, tuple))
             and len(standard) == named[count] > 1 and all(isinstance(one, (str, int)) for one in standard)}
    numbers = {name for name, one in lists.items() if list(one) == [*range(named[count])] and named[count] > LAYERS}
    chosen, seen = [], set()
    for layer in range(named[count]):
        kinds = {(name, one[layer]) for name, one in lists.items()
                 if name not in numbers and _small(name, one[layer], {}) is None}
        if not kinds <= seen:
            chosen.append(layer)
            seen |= kinds
    chosen = chosen if len(chosen) >= LAYERS else sorted({*chosen, *range(LAYERS)})[:LAYERS]
    cut = {name: type(one)(_small(name, one[layer], {}) or one[layer] for layer in chosen)
           for name, one in lists.items()}
    cut |= {name: type(lists[name])(range(len(chosen))) for name in numbers}
    return {count: len(chosen), **cut} if lists else {}


def _token(name: str, tokens: dict[str, int]) -> int:
    """An id for a special token, one for each meaning, from the end of the vocabulary."""
    return tokens.setdefault(re.sub(r"(_token)?_(id|index)$", "", name), WORDS - 1 - len(tokens))
