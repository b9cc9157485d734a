"""Tiny configs by rule, and texts as models read them: what the census of language models stands on."""
from __future__ import annotations

import pytest
import torch

from relprop.census import auto, config
from relprop.census.need import NEEDS
from relprop.census.text import LENGTH, text

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def shrunk(family: str):
    import transformers

    return config.shrunk(transformers.CONFIG_MAPPING[family], NEEDS)


@pytest.mark.parametrize("family, layers", [
    ("qwen3_next", {"linear_attention", "full_attention"}), ("gemma3_text", {"sliding_attention", "full_attention"}),
    ("kimi_linear", {"linear_attention", "full_attention"}), ("lfm2", {"conv", "full_attention"}),
    ("llama4_text", {"chunked_attention", "full_attention"})])
def test_there_is_a_layer_of_each_kind(family, layers):
    made = shrunk(family)
    assert set(made.layer_types) == layers and len(made.layer_types) == made.num_hidden_layers <= 3


def test_lists_of_layers_agree():
    """Dense and sparse, linear and full attention: few layers that have all."""
    made = shrunk("bailing_hybrid")
    assert set(made.layer_types) == {"linear_attention", "full_attention"}
    assert set(made.mlp_layer_types) == {"dense", "sparse"}
    assert len(made.mlp_layer_types) == len(made.layer_types) == made.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3", "qwen3_moe", "mamba2", "t5", "bert", "bloom"])
def test_sizes_are_small_and_fit(family):
    import transformers

    made = shrunk(family)
    assert made.vocab_size == config.WORDS
    heads, of_keys = (getattr(made, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    default = transformers.CONFIG_MAPPING[family]()
    if of_keys is not None:
        shared = default.num_key_value_heads < default.num_attention_heads
        assert of_keys == (2 if shared else heads)


def test_parts_follow_the_rules_and_their_own_needs():
    made = shrunk("gemma3n")
    assert made.text_config.num_kv_shared_layers == 2 and made.text_config.num_hidden_layers == 4
    assert shrunk("encoder-decoder").decoder.add_cross_attention


def test_what_follows_from_other_sizes():
    latent = shrunk("deepseek_v3")
    assert latent.qk_head_dim == latent.qk_nope_head_dim + latent.qk_rope_head_dim
    scan = shrunk("bamba")
    assert scan.mamba_n_heads * scan.mamba_d_head == scan.mamba_expand * scan.hidden_size


def model(key: str):
    found = next(one for one in auto.architectures() if one.key == f"transformers/{key}")
    return found, found.model()


def test_texts_differ_in_length():
    about, made = model("text-classification/gpt2/GPT2ForSequenceClassification")
    read = about.inputs(made)
    assert read["attention_mask"].sum(1).tolist() == [LENGTH, LENGTH - 1]
    assert (read["input_ids"][1, -1] == made.config.pad_token_id).all()
    assert not (read["input_ids"][0] == made.config.pad_token_id).any()


def test_texts_end_where_models_look_for_an_end():
    about, made = model("text-classification/bart/BartForSequenceClassification")
    read = about.inputs(made)
    ends = read["input_ids"] == made.config.eos_token_id
    assert ends.sum(1).tolist() == [1, 1] and "decoder_input_ids" not in read


def test_questions_stand_apart_from_passages():
    about, made = model("question-answering/longformer/LongformerForQuestionAnswering")
    apart = about.inputs(made)["input_ids"] == made.config.sep_token_id
    assert apart.sum(1).tolist() == [3, 3]


def test_a_class_of_a_part_is_given_the_part():
    """As transformers' auto classes do; and what generates text is a decoder."""
    _, made = model("text-generation/qwen3_5/Qwen3_5ForCausalLM")
    assert made.config.model_type == "qwen3_5_text"
    _, made = model("text-generation/bert/BertLMHeadModel")
    assert made.config.is_decoder


def test_inputs_are_the_same_each_time():
    _, made = model("fill-mask/bert/BertForMaskedLM")
    first, second = (text("fill-mask", made, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
