"""Attention: torch's `MultiheadAttention` and timm's `Attention`."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Dropout, Identity, Module

from ..composite import Composite
from ..ops.attention import additive
from .affine import Linear
from .ruled import Leaf, Ruled, stands_for


@stands_for(torch.nn.MultiheadAttention)
class MultiheadAttention(Leaf, torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` under the composite's rules for "linear", "matmul" and "softmax".

    The weights that it returns carry no relevance of their own.

    Raises: ValueError for `add_bias_kv` and `add_zero_attn`, which have no rule.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
                 add_bias_kv: bool = False, add_zero_attn: bool = False, kdim: int | None = None,
                 vdim: int | None = None, batch_first: bool = False, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, *, composite: str | Composite = "attnlrp") -> None:
        if add_bias_kv or add_zero_attn:
            raise ValueError(f"no rule for {'add_bias_kv' if add_bias_kv else 'add_zero_attn'}: keys that come from "
                             "nowhere; build the attention without it")
        super().__init__(embed_dim, num_heads, dropout, bias, kdim=kdim, vdim=vdim, batch_first=batch_first,
                         device=device, dtype=dtype, composite=composite)


class Attention(Ruled):
    """timm's `Attention` (1.0.31: constructor, state dict and forward), for vision transformers.

    Softmax of q k^T over the keys, times v, under the composite's rules for "matmul" and "softmax"; the fused kernel
    unless `fused_attn` is set to False. A gate is a product, under the rule for "mul".

    Args: dim: width D. attn_head_dim: K, by default D / H. dim_out: width of the result, by default D. qk_norm,
        scale_norm: a `norm_layer` over each query and key, and over the mixed values. gated: a sigmoid gate before the
        output projection.
    Raises: ValueError if D is not a multiple of the heads, or a norm is asked for without `norm_layer`.
    """

    def __init__(self, dim: int, num_heads: int = 8, attn_head_dim: int | None = None, dim_out: int | None = None,
                 qkv_bias: bool = False, qk_norm: bool = False, scale_norm: bool = False, proj_bias: bool = True,
                 gated: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0,
                 norm_layer: Callable[..., Module] | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, *, composite: str | Composite = "attnlrp") -> None:
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}; give attn_head_dim")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer, such as relprop.nn.LayerNorm")
        super().__init__(composite=composite)
        place = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, attn_head_dim or dim // num_heads
        self.attn_dim, self.scale, self.fused_attn = num_heads * self.head_dim, self.head_dim ** -0.5, True
        self.qkv = Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **place)
        self.q_norm = norm_layer(self.head_dim, **place) if qk_norm else Identity()
        self.k_norm = norm_layer(self.head_dim, **place) if qk_norm else Identity()
        self.attn_drop = Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **place) if scale_norm else Identity()
        self.gate = Linear(dim, self.attn_dim, bias=qkv_bias, **place) if gated else None
        self.proj = Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **place)
        self.proj_drop = Dropout(proj_drop)
        self._follow(composite)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention of x, (B, T, D), to itself. `attn_mask`: True or 0 where a key is seen, (..., T, T)."""
        gate = None if self.gate is None else self._ruled(torch.sigmoid, self.gate(x))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)  # (B, H, T, K)
        x = self._mixed(q, k, v, attn_mask, is_causal).transpose(1, 2).flatten(2)  # (B, T, H K)
        x = self.norm(x)
        if gate is not None:
            x = self._ruled(torch.mul, x, gate)
        return self.proj_drop(self.proj(x))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if self.fused_attn:
            dropped = self.attn_drop.p if self.training else 0.0
            return self._ruled(F.scaled_dot_product_attention, q, k, v, attn_mask, dropped, is_causal)
        scores = self._ruled(torch.matmul, q * self.scale, k.mT)
        mask = additive(attn_mask, is_causal, q, k)
        scores = scores if mask is None else scores + mask
        return self._ruled(torch.matmul, self.attn_drop(self._ruled(torch.softmax, scores, -1)), v)
