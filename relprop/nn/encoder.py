"""Layers of transformers: timm's `Block`, torch's encoder and decoder layers, torchvision's `EncoderBlock`.

Their sums at skip connections go through the table; all else are modules, which are drop-ins themselves. timm and
torchvision need not be installed, so that their layers are written out here.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import Dropout, Identity, Module

from ..composite import Composite
from .activation import GELU
from .attention import Attention, MultiheadAttention
from .norm import LayerNorm
from .ruled import Ruled, Whole, stands_for

_NORM = partial(LayerNorm, eps=1e-6)
"""The norm of vision transformers, timm's and torchvision's."""


class Block(Ruled):
    """timm's `Block` (1.0.31: constructor, state dict and forward), the layer of its vision transformers.

    x + attention(norm(x)), then x + mlp(norm(x)), with layer scale where `init_values` says so. Layers given as torch's
    or timm's classes, or as ones of one's own, become drop-ins.

    Args: as timm's. attn_layer: a class like `Attention`, "" or "attn". depth: taken and not used, as by timm's own.
    Raises: ValueError for another `attn_layer` by name; ImportError without timm, whose `Mlp`, `LayerScale` and
        `DropPath` are used.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = False, qk_norm: bool = False,
                 scale_attn_norm: bool = False, scale_mlp_norm: bool = False, proj_bias: bool = True,
                 proj_drop: float = 0.0, attn_drop: float = 0.0, init_values: float | None = None,
                 drop_path: float = 0.0, act_layer: Callable[..., Module] = GELU,
                 norm_layer: Callable[..., Module] = _NORM,
                 mlp_layer: Callable[..., Module] | None = None, attn_layer: Callable[..., Module] | str = Attention,
                 depth: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
                 composite: str | Composite = "attnlrp") -> None:
        from timm.layers import DropPath, LayerScale, Mlp

        if isinstance(attn_layer, str) and attn_layer not in ("", "attn"):
            raise ValueError(f"attn_layer {attn_layer!r} has no drop-in; give 'attn', or a class")
        super().__init__(composite=composite)
        place = {"device": device, "dtype": dtype}
        attn_layer = Attention if isinstance(attn_layer, str) else attn_layer
        self.norm1 = norm_layer(dim, **place)
        self.attn = attn_layer(dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, scale_norm=scale_attn_norm,
                               proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=proj_drop, norm_layer=norm_layer,
                               **place)
        self.ls1 = LayerScale(dim, init_values=init_values, **place) if init_values else Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else Identity()
        self.norm2 = norm_layer(dim, **place)
        self.mlp = (mlp_layer or Mlp)(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None, bias=proj_bias, drop=proj_drop, **place)
        self.ls2 = LayerScale(dim, init_values=init_values, **place) if init_values else Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else Identity()
        self._follow(composite)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self._ruled(torch.add, x, self.drop_path1(self.ls1(attended)))
        return self._ruled(torch.add, x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


@stands_for(torch.nn.TransformerEncoderLayer)
class TransformerEncoderLayer(Whole, torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`, of either order of norm and sum, without its fast path while it carries
    relevance.
    """

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        plain, options = super().forward, (src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:  # they come only where nothing requires a gradient, and are for the fast path alone
            return plain(src, *options)
        return self._ruled(plain, src, *options)


@stands_for(torch.nn.TransformerDecoderLayer)
class TransformerDecoderLayer(Whole, torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`, of either order of norm and sum."""


class EncoderBlock(Ruled):
    """torchvision's `EncoderBlock` (constructor, state dict and forward), the layer of its vision transformer.

    Raises: ImportError without torchvision, whose `MLPBlock` is used.
    """

    def __init__(self, num_heads: int, hidden_dim: int, mlp_dim: int, dropout: float, attention_dropout: float,
                 norm_layer: Callable[..., Module] = _NORM, *,
                 composite: str | Composite = "attnlrp") -> None:
        from torchvision.models.vision_transformer import MLPBlock

        super().__init__(composite=composite)
        self.num_heads = num_heads
        self.ln_1 = norm_layer(hidden_dim)
        self.self_attention = MultiheadAttention(hidden_dim, num_heads, dropout=attention_dropout, batch_first=True)
        self.dropout = Dropout(dropout)
        self.ln_2 = norm_layer(hidden_dim)
        self.mlp = MLPBlock(hidden_dim, mlp_dim, dropout)
        self._follow(composite)

    def forward(self, input: Tensor) -> Tensor:
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self._ruled(torch.add, self.dropout(x), input)
        return self._ruled(torch.add, x, self.mlp(self.ln_2(x)))
