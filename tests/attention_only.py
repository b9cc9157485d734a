"""A transformer of attention alone, as someone would write it, and the weights of one that were kept elsewhere."""
from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, width: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, heads * head) for _ in range(3))
        self.project = nn.Linear(heads * head, width)

    def forward(self, x: Tensor) -> Tensor:
        reads = (self.query, self.key, self.value)
        q, k, v = (read(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for read in reads)  # (B, H, T, K)
        return self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer: attention, added to the stream."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.attention = Attention(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class AttentionOnly(nn.Module):
    """Embeddings, layers of attention, logits; no MLP and no norm."""

    def __init__(self, vocabulary: int, positions: int, layers: int, *sizes: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, sizes[0]), nn.Embedding(positions, sizes[0])
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(layers))
        self.unembed = nn.Linear(sizes[0], vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)  # (B, T, V)


def loaded(folder: Path) -> AttentionOnly:
    """The model of a folder with weights in the shapes of TransformerLens: W_Q (H, D, K), x W; W_O (H, K, D)."""
    from safetensors.torch import load_file

    about, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    sizes = [about[name] for name in ("d_vocab", "n_ctx", "n_layers", "d_model", "n_heads", "d_head")]
    state = {"embed.weight": weights["embed.W_E"], "position.weight": weights["pos_embed.W_pos"],
             "unembed.weight": weights["unembed.W_U"].T, "unembed.bias": weights["unembed.b_U"]}
    for layer in range(about["n_layers"]):
        mine, theirs = f"blocks.{layer}.attention.", f"blocks.{layer}.attn."
        for name, letter in (("query", "Q"), ("key", "K"), ("value", "V")):
            state[f"{mine}{name}.weight"] = weights[f"{theirs}W_{letter}"].transpose(1, 2).flatten(0, 1)
            state[f"{mine}{name}.bias"] = weights[f"{theirs}b_{letter}"].flatten()
        state[f"{mine}project.weight"] = weights[f"{theirs}W_O"].flatten(0, 1).T
        state[f"{mine}project.bias"] = weights[f"{theirs}b_O"]
    made = AttentionOnly(*sizes).eval()
    made.load_state_dict(state)
    return made
