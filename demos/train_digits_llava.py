"""Trains a small LLaVA that answers "what digit is on the left ?" about canvases of digits, and saves it to a folder.

    python demos/train_digits_llava.py [FOLDER]

Its eye is the bundled `digits-vit`, which is left as it is; the projector and a language model of two layers learn.
Takes a few minutes on a CPU. `demos/vision_language.py` explains what it answers.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import relprop
from relprop.zoo.digits import Canvases, canvases

DIGITS = "zero one two three four five six seven eight nine".split()
SIDES = ("left", "right")
WORDS = ["<pad>", "<unk>", "<image>", "what", "digit", "is", "on", "the", *SIDES, "?", *DIGITS]
PROMPT = "<image> what digit is on the {} ?"
BATCH, RATE = 64, 3e-3


def processor() -> transformers.LlavaProcessor:
    """A word a token; pictures as the eye takes them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>",
                                                     additional_special_tokens=["<image>"])
    pixels = relprop.load("digits-vit").pixels
    mean, std = (list(value) * 3 for value in (pixels.mean, pixels.std))
    images = transformers.ViTImageProcessor(size={"height": 54, "width": 54}, image_mean=mean, image_std=std)
    return transformers.LlavaProcessor(images, tokenizer, patch_size=6, vision_feature_select_strategy="default",
                                       num_additional_image_tokens=1)


def model() -> transformers.LlavaForConditionalGeneration:
    """The eye with the bundled weights, everything else random."""
    eye = transformers.ViTConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
                                 image_size=54, patch_size=6, num_channels=3, layer_norm_eps=1e-6)
    mouth = transformers.LlamaConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                                     vocab_size=len(WORDS), max_position_embeddings=128, pad_token_id=0,
                                     bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    made = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=eye, text_config=mouth, image_token_id=2, image_token_index=2, vision_feature_layer=-2))
    found = made.model.vision_tower.load_state_dict(converted(relprop.load("digits-vit").model.state_dict()), False)
    assert not found.missing_keys or all("pooler" in name for name in found.missing_keys), found
    return made


def converted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a vision transformer as transformers has them; grey becomes three equal channels."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings", "norm": "layernorm",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm1": "layernorm_before",
             "norm2": "layernorm_after", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    found = {}
    for name, value in weights.items():
        stem, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        place, part = ("", stem) if not stem.startswith("blocks.") else (
            f"layers.{stem.split('.')[1]}.", stem.split(".", 2)[2])
        if part == "attn.qkv":
            found |= {f"{place}attention.{of}_proj{dot}{kind}": third for of, third in zip("qkv", value.chunk(3))}
        elif part in names:  # the classes are no part of an eye
            value = value.expand(-1, 3, -1, -1) / 3 if value.dim() == 4 else value
            found[f"{place}{names[part]}{dot}{kind}"] = value
    return found


def answers(drawn: Canvases) -> Tensor:
    """The digit on the left and the one on the right of canvases with two, (B, 2)."""
    across = torch.arange(drawn.masks.shape[-1], dtype=torch.float32)
    ink = drawn.masks.sum(2).float()  # (B, 10, X)
    place = (ink * across).sum(2) / ink.sum(2)
    return place.nan_to_num(posinf=1e9, nan=1e9).argsort(1)[:, :2]


def features(made: transformers.LlavaForConditionalGeneration, read: transformers.LlavaProcessor, drawn: Canvases
             ) -> Tensor:
    """What the eye sees of canvases, (B, 81, 128): it does not learn, so once is enough."""
    grey = (drawn.images.expand(-1, 3, -1, -1) * 255).round().byte()
    with torch.no_grad():
        seen = [made.model.vision_tower(read.image_processor(list(part), return_tensors="pt")["pixel_values"],
                                        output_hidden_states=True).hidden_states[-2][:, 1:] for part in grey.split(100)]
    return torch.cat(seen)


def logits(made: transformers.LlavaForConditionalGeneration, seen: Tensor, ids: Tensor) -> Tensor:
    """The model behind its eye: logits of the answer, (B, V)."""
    words = made.get_input_embeddings()(ids[:, 1:])  # behind the sign for the picture
    given = torch.cat([made.model.multi_modal_projector(seen), words], 1)
    return made.lm_head(made.model.language_model(inputs_embeds=given).last_hidden_state[:, -1])


def train(count: int = 1500, steps: int = 600, seed: int = 0) -> tuple[transformers.LlavaForConditionalGeneration,
                                                                      transformers.LlavaProcessor, float]:
    """The trained model, its processor, and how many of 300 questions about new canvases it answers rightly."""
    torch.manual_seed(seed)
    read, made = processor(), model()
    first = WORDS.index(DIGITS[0])
    asked = torch.tensor([read.tokenizer(PROMPT.format(side))["input_ids"] for side in SIDES])
    drawn, new = canvases(count, seed=seed, split="train", digits=(2, 2)), canvases(150, seed=seed, digits=(2, 2))
    seen, right = features(made, read, drawn), answers(drawn) + first
    learned = [p for name, p in made.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for step in range(steps):
        rows, sides = torch.randint(count, (BATCH,)), torch.randint(2, (BATCH,))
        loss = F.cross_entropy(logits(made, seen[rows], asked[sides]), right[rows, sides])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    made.eval()
    with torch.no_grad():
        told = torch.stack([logits(made, features(made, read, new), asked[side].expand(150, -1)).argmax(1)
                            for side in range(2)], 1)
    return made, read, float((told == answers(new) + first).float().mean())


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output/digits-llava")
    trained, reader, share = train()
    print(f"{share:.1%} of the questions about new canvases are answered rightly")
    trained.save_pretrained(folder)
    reader.save_pretrained(folder)
