"""Hand-made batches and tiny random models, shared by the tests of baselines, attention and checks."""
from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from relprop.target import Targets, resolve
from relprop.tokens import Batch, ImageUnits, TextUnits

PAD, MASK, CLS, SEP = 0, 1, 2, 3
TOKENIZER = SimpleNamespace(mask_token_id=MASK, pad_token_id=PAD, unk_token_id=None, eos_token_id=SEP)


def text(*ids: list[int], left: bool = False) -> Batch:
    """Rows of token ids, padded; CLS, SEP and padding are special."""
    width = max(map(len, ids))
    fill = [[PAD] * (width - len(row)) for row in ids]
    padded = torch.tensor([a + b if left else b + a for a, b in zip(fill, ids, strict=True)])
    padding = padded == PAD
    special = torch.isin(padded, torch.tensor([PAD, CLS, SEP]))
    places = torch.where(special, -1, (~special).cumsum(1) - 1)
    word_ids = [[None if at < 0 else at for at in row] for row in places.tolist()]
    units = TextUnits(tokens=[[str(i) for i in row] for row in padded.tolist()],
                      words=[[str(i) for i in row if i not in (PAD, CLS, SEP)] for row in ids], word_ids=word_ids,
                      offsets=[[(0, 0)] * width for _ in ids], texts=[" ".join(map(str, row)) for row in ids],
                      special=special.tolist(), padding=padding.tolist())
    last = width - 1 - (~padding).int().flip(1).argmax(1)
    return Batch((), {"input_ids": padded, "attention_mask": (~padding).long()}, len(ids), units, last)


def images(pixels: torch.Tensor, patch: int | None) -> Batch:
    """Pixels (B, C, Y, X) of a model with square patches."""
    size = tuple(pixels.shape[-2:])
    grid = (size[0] // patch, size[1] // patch) if patch else None
    seen = torch.zeros(len(pixels), *size, 3, dtype=torch.uint8)
    return Batch((pixels,), {}, len(pixels), ImageUnits(size, (patch, patch) if patch else None, grid, seen))


def targets(spec: object, batch: Batch, *, labels: int | None = 3) -> Targets:
    """Targets of a model with this many classes, or of one that predicts tokens."""
    names = None if labels is None else tuple(f"label {i}" for i in range(labels))
    return resolve(spec, rows=batch.rows, labels=names)


def bert(**changes) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    options = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                   max_position_embeddings=32, num_labels=3, initializer_range=0.5, pad_token_id=PAD)
    return BertForSequenceClassification(BertConfig(**options | changes)).double().eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5,
                        bos_token_id=CLS, eos_token_id=SEP, pad_token_id=PAD)
    return GPT2LMHeadModel(config).double().eval()


def vit(**changes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    options = dict(img_size=24, patch_size=6, in_chans=3, num_classes=3, embed_dim=16, depth=2, num_heads=2)
    return VisionTransformer(**options | changes).double().eval()
