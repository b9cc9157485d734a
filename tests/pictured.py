"""Tiny random models of texts with pictures, each with a processor of its kind, from configs: nothing downloaded."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

WORDS = "what is the digit in picture on left right ? . a photo of cat dog seven three user assistant : answer one two"
SIDE, PATCH = 28, 7
SIZE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=640, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIGHT = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH)
SEEN = dict(SIGHT, image_size=SIDE)
READ = dict(vocab_size=640, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)

Made = tuple[nn.Module, Any, str]
"""A model, its processor, and the sign for a picture in a prompt."""


def tokenizer(*specials: str, **options: Any) -> Any:
    """A byte-level tokenizer that knows `WORDS`, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "<bos>", "<eos>", "<unk>", *specials],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator([WORDS] * 20 + [" " + word for word in WORDS.split()] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>", additional_special_tokens=list(specials), **options)


def picture(Y: int, X: int, seed: int = 0) -> Image.Image:
    """Soft blots of colour."""
    few = np.random.default_rng(seed).integers(0, 255, (max(2, Y // 8), max(2, X // 8), 3), dtype=np.uint8)
    return Image.fromarray(few).resize((X, Y), Image.Resampling.BICUBIC)


def random(model: nn.Module) -> nn.Module:
    """The model with random weights, all of them: biases, class tokens and norms too. Float64."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        level = 1.0 if "norm" in name.lower() and weight.dim() == 1 and name.endswith("weight") else 0.0
        weight.data = level + 0.15 * torch.randn(weight.shape, generator=generator)
    return model.double().eval()


def _clip_images(tf: Any) -> Any:
    return tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIZE)


def llava(tf: Any) -> Made:
    words = tokenizer("<image>")
    sign = words.convert_tokens_to_ids("<image>")
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**SEEN), text_config=tf.LlamaConfig(**TEXT),
                            image_token_id=sign, image_token_index=sign, vision_feature_layer=-1)
    made = tf.LlavaProcessor(_clip_images(tf), words, patch_size=PATCH, vision_feature_select_strategy="default",
                             num_additional_image_tokens=1)
    return tf.LlavaForConditionalGeneration(config), made, "<image>"


def llava_next(tf: Any) -> Made:
    words = tokenizer("<image>")
    sign = words.convert_tokens_to_ids("<image>")
    config = tf.LlavaNextConfig(vision_config=tf.CLIPVisionConfig(**SEEN), text_config=tf.LlamaConfig(**TEXT),
                                image_token_id=sign, image_token_index=sign, vision_feature_layer=-1,
                                image_grid_pinpoints=PINPOINTS)
    images = tf.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS)
    made = tf.LlavaNextProcessor(images, words, patch_size=PATCH, vision_feature_select_strategy="default",
                                 num_additional_image_tokens=1)
    return tf.LlavaNextForConditionalGeneration(config), made, "<image>"


def onevision(tf: Any) -> Made:
    words = tokenizer("<image>", "<video>")
    sign = words.convert_tokens_to_ids
    sight = tf.SiglipVisionConfig(**SEEN, vision_use_head=False)
    config = tf.LlavaOnevisionConfig(vision_config=sight, text_config=tf.Qwen2Config(**TEXT), vision_feature_layer=-1,
                                     image_token_id=sign("<image>"), image_token_index=sign("<image>"),
                                     video_token_id=sign("<video>"), video_token_index=sign("<video>"),
                                     image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="full")
    images = tf.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=PINPOINTS)
    made = tf.LlavaOnevisionProcessor(images, words, tf.LlavaOnevisionVideoProcessor(size=SIZE), num_image_tokens=16,
                                      vision_feature_select_strategy="full")
    return tf.LlavaOnevisionForConditionalGeneration(config), made, "<image>"


def _qwen(tf: Any, name: str, videos: str, sight: dict, **text: Any) -> Made:
    signs = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*signs)
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   words.convert_tokens_to_ids(list(signs)), strict=True))
    turned = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
    config = getattr(tf, f"{name}Config")(
        text_config=dict(TEXT, rope_parameters=turned, **text),
        vision_config=dict(sight, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2), **ids)
    cut = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    images = tf.Qwen2VLImageProcessor(**cut, size={"shortest_edge": 14 * 14 * 4, "longest_edge": 14 * 14 * 40})
    made = getattr(tf, f"{name}Processor")(images, words, getattr(tf, videos)(patch_size=PATCH, merge_size=2))
    return getattr(tf, f"{name}ForConditionalGeneration")(config), made, "<|vision_start|><|image_pad|><|vision_end|>"


def qwen2_vl(tf: Any) -> Made:
    return _qwen(tf, "Qwen2VL", "Qwen2VLVideoProcessor",
                 dict(depth=2, embed_dim=24, hidden_size=32, num_heads=2, mlp_ratio=2))


def qwen2_5_vl(tf: Any) -> Made:
    return _qwen(tf, "Qwen2_5_VL", "Qwen2VLVideoProcessor",
                 dict(depth=2, hidden_size=24, out_hidden_size=32, intermediate_size=32, num_heads=2, window_size=28,
                      fullatt_block_indexes=[1]))


def qwen3_vl(tf: Any) -> Made:
    return _qwen(tf, "Qwen3VL", "Qwen3VLVideoProcessor",
                 dict(depth=2, hidden_size=24, out_hidden_size=32, intermediate_size=32, num_heads=2,
                      num_position_embeddings=16, deepstack_visual_indexes=[0]), head_dim=8)


def gemma3(tf: Any) -> Made:
    signs = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    words = tokenizer(*signs)
    begin, end, sign = words.convert_tokens_to_ids(list(signs))
    words.boi_token, words.eoi_token, words.image_token = signs
    words.boi_token_id, words.eoi_token_id, words.image_token_id = begin, end, sign
    config = tf.Gemma3Config(text_config=tf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=32), vision_config=SEEN,
                             mm_tokens_per_image=4, boi_token_index=begin, eoi_token_index=end, image_token_id=sign)
    made = tf.Gemma3Processor(tf.Gemma3ImageProcessor(size=SIZE), words, image_seq_length=4)
    return tf.Gemma3ForConditionalGeneration(config), made, "<start_of_image>"


def paligemma(tf: Any) -> Made:
    words = tokenizer("<image>")
    sign = words.convert_tokens_to_ids("<image>")
    config = tf.PaliGemmaConfig(text_config=tf.GemmaConfig(**TEXT, head_dim=8), projection_dim=32, image_token_id=sign,
                                vision_config=dict(SEEN, vision_use_head=False))
    images = tf.SiglipImageProcessor(size=SIZE)
    images.image_seq_length = 16
    return tf.PaliGemmaForConditionalGeneration(config), tf.PaliGemmaProcessor(images, words), "<image>"


def idefics3(tf: Any) -> Made:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles)
    config = tf.Idefics3Config(text_config=tf.LlamaConfig(**TEXT), vision_config=SEEN, scale_factor=2,
                               image_token_id=words.convert_tokens_to_ids("<image>"))
    images = tf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": SIDE})
    made = tf.Idefics3Processor(images, words, image_seq_len=4)
    return tf.Idefics3ForConditionalGeneration(config), made, "<image>"


def internvl(tf: Any) -> Made:
    signs = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
    words = tokenizer(*signs)
    context, begin, end, _ = words.convert_tokens_to_ids(list(signs))
    words.context_image_token, words.start_image_token, words.end_image_token, words.video_token = signs
    words.context_image_token_id, words.start_image_token_id, words.end_image_token_id = context, begin, end
    sight = tf.InternVLVisionConfig(**{**SIGHT, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]})
    config = tf.InternVLConfig(text_config=tf.Qwen2Config(**TEXT), vision_config=sight, image_token_id=context,
                               image_seq_length=4)
    images = tf.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, max_patches=4)
    made = tf.InternVLProcessor(images, words, tf.InternVLVideoProcessor(size=SIZE), image_seq_length=4)
    return tf.InternVLForConditionalGeneration(config), made, "<IMG_CONTEXT>"


def mistral3(tf: Any) -> Made:
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    sign = words.convert_tokens_to_ids("[IMG]")
    config = tf.Mistral3Config(vision_config=tf.PixtralVisionConfig(**SIGHT, image_size=56),
                               text_config=tf.MistralConfig(**TEXT), image_token_index=sign, image_token_id=sign,
                               vision_feature_layer=-1, spatial_merge_size=2)
    images = tf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    made = tf.PixtralProcessor(images, words, patch_size=PATCH, spatial_merge_size=2)
    return tf.Mistral3ForConditionalGeneration(config), made, "[IMG]"


def blip(tf: Any) -> Made:
    config = tf.BlipConfig(text_config=dict(READ, encoder_hidden_size=24, sep_token_id=2), vision_config=SEEN)
    made = tf.BlipProcessor(tf.BlipImageProcessor(size=SIZE), tokenizer())
    return tf.BlipForConditionalGeneration(config), made, ""


def clip(tf: Any) -> Made:
    config = tf.CLIPConfig(text_config=READ, vision_config=SEEN, projection_dim=16)
    return tf.CLIPModel(config), tf.CLIPProcessor(_clip_images(tf), tokenizer()), ""


def siglip(tf: Any) -> Made:
    config = tf.SiglipConfig(text_config=READ, vision_config=SEEN)
    words = tokenizer(model_max_length=16)
    words.model_input_names = ["input_ids"]  # the model is given no mask, and reads padding
    return tf.SiglipModel(config), tf.SiglipProcessor(tf.SiglipImageProcessor(size=SIZE), words), ""


def siglip2(tf: Any) -> Made:
    config = tf.Siglip2Config(text_config=READ, vision_config=dict(SIGHT, patch_size=16, num_patches=256))
    return tf.Siglip2Model(config), tf.Siglip2Processor(tf.Siglip2ImageProcessor(), tokenizer(model_max_length=64)), ""


BUILDS: dict[str, Callable[[Any], Made]] = {
    one.__name__: one for one in (llava, llava_next, onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3, paligemma,
                                  idefics3, internvl, mistral3, blip, clip, siglip, siglip2)}
WRITERS = [name for name in BUILDS if name not in ("clip", "siglip", "siglip2")]
PATCHES = {  # of pictures of 40 x 60 and 50 x 37 pixels: patches as the model has them, of tiles those of all tiles
    "llava": ((4, 4), (4, 4)), "llava_next": ((5, 8), (8, 6)), "onevision": ((5, 8), (8, 6)), "gemma3": ((2, 2),) * 2,
    "qwen2_vl": ((3, 4), (4, 3)), "qwen2_5_vl": ((3, 4), (4, 3)), "qwen3_vl": ((3, 4), (4, 3)),
    "paligemma": ((4, 4),) * 2, "idefics3": ((4, 4),) * 2, "internvl": ((4, 4), (4, 2)), "mistral3": ((3, 4), (4, 3)),
    "blip": ((4, 4),) * 2, "clip": ((4, 4),) * 2, "siglip": ((4, 4),) * 2, "siglip2": ((13, 19), (18, 14))}


def some(*names: str) -> list[Any]:
    """These kinds, and all others for the slow tests."""
    import pytest

    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in BUILDS]


@cache
def made(name: str) -> Made:
    """A model of this kind in float64, made once, its processor and its sign."""
    import transformers

    torch.manual_seed(0)
    model, processor, sign = BUILDS[name](transformers)
    return random(model), processor, sign


def rows(sign: str) -> list[dict[str, Any]]:
    """Two rows, of texts of unlike length and pictures of unlike shape."""
    return [{"text": sign + "what is the digit in the picture?", "image": picture(40, 60)},
            {"text": sign + "a photo of two", "image": picture(50, 37, 1)}]


def alike(output: Any) -> Tensor:
    """How alike the text and the picture of each row are."""
    return output.logits_per_image.diagonal()
