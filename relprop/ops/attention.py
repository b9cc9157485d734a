"""Fused attention, and the whole of `F.multi_head_attention_forward`.

The fused kernel stays fused where the rules of its parts allow it: AttnLRP needs only the gradients of its operands
scaled, CP-LRP only the transpose of the pattern. Any other rule opens it into product, softmax and product.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..numerics import through, widened
from . import matmul as product
from . import softmax
from .call import Call, biases, dependent, scaled, wide
from .chunk import entries
from .journal import POSITIONS, SOFTMAX
from .split import Split, led


def additive(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as something to add to the scores, (..., T, S); None where nothing is masked."""
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -math.inf)


def pattern(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention pattern softmax(q k^T scale + mask), (B, H, T, S); rows that are masked throughout are zero."""
    scores = (query * scale) @ key.mT
    if mask is None:
        return scores.softmax(-1)
    weights = (scores + mask).softmax(-1)
    return weights.nan_to_num(0.0) if bool(mask.isneginf().all(-1).any()) else weights


def grouped(key: Tensor, query: Tensor) -> Tensor:
    """`key` with its heads repeated to the number of query heads (grouped-query attention)."""
    repeats = query.shape[-3] // key.shape[-3] if key.dim() > 2 else 1
    return key if repeats == 1 else key.repeat_interleave(repeats, dim=-3)


class HeldPattern(Function):
    """Attention whose pattern is a constant: only the values receive relevance, A^T g, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, run: Any, mask: Tensor | None, is_causal: bool,
                scale: float) -> Tensor:
        ctx.save_for_backward(query, key, mask)
        ctx.is_causal, ctx.scale, ctx.heads = is_causal, scale, value.shape[-3] if value.dim() > 2 else None
        return wide(ctx, run(query, key, value))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        query, key, mask = ctx.saved_tensors
        key = grouped(key, query)
        g_v = through(lambda g: _transposed(query, key, mask, ctx.is_causal, ctx.scale, g), g, query.dtype)
        if ctx.heads is not None and ctx.heads != g_v.shape[-3]:
            g_v = g_v.unflatten(-3, (ctx.heads, -1)).sum(-3)
        return None, None, g_v, None, None, None, None


def blocks(query: Tensor, key: Tensor) -> list[slice]:
    """Queries that are taken together, so that no more than a chunk of the pattern is held at once."""
    several = max(1, entries(of_pairs=True) // max(1, query[..., 0, 0].numel() * key.shape[-2]))
    return [slice(start, start + several) for start in range(0, query.shape[-2], several)]


def within(where: slice, mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask of a block of queries, as something to add to their scores."""
    if not is_causal:
        return additive(mask if mask is None or mask.shape[-2] == 1 else mask[..., where, :], False, query, key)
    later = torch.arange(key.shape[-2], device=query.device) > torch.arange(
        query.shape[-2], device=query.device)[where, None]
    return torch.zeros(later.shape, dtype=query.dtype, device=query.device).masked_fill_(later, -math.inf)


def _transposed(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, g: Tensor) -> Tensor:
    """A^T g, a block of queries at a time; the pattern A is made of scores in float32."""
    total: Tensor | None = None
    for where in blocks(query, key):
        part = within(where, mask, is_causal, query, key)
        weights = pattern(widened(query[..., where, :]), widened(key), part, scale)
        term = widened(weights.to(g.dtype).mT @ g[..., where, :])
        total = term if total is None else total.add_(term)
    return total if total is not None else torch.zeros_like(key)


def scaled_dot_product_attention(call: Call, query: Tensor, key: Tensor, value: Tensor,
                                 attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
                                 scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """`F.scaled_dot_product_attention` under `call.rule`, the pair (rule of the products, rule of the softmax)."""
    of_product, of_softmax = call.rule
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call.func(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if of_softmax is softmax.hold and not call.open:
        if not dependent(value):
            return run(query, key, value).detach()
        return HeldPattern.apply(query.detach(), key.detach(), value, run, attn_mask, is_causal, factor)
    fused = not call.open and of_softmax is softmax.taylor and of_product in (product.uniform, product.gradient)
    biased = call.positions and attn_mask is not None and attn_mask.dtype != torch.bool and (
        call.origin(attn_mask) == POSITIONS or biases(attn_mask))
    if dependent(attn_mask) or biased or not fused:
        return call.retrace(lambda: opened(query, key, value, attn_mask, is_causal, factor))
    if of_product is product.uniform:
        return _uniform(call, query, key, value, run)
    moving = [x for x in (query, key, value) if dependent(x)]
    return call.booked(SOFTMAX, moving, lambda *xs: run(*_refill((query, key, value), xs)))


def _uniform(call: Call, query: Tensor, key: Tensor, value: Tensor, run: Any) -> Tensor:
    """AttnLRP inside the fused kernel: half to the values, half through the softmax, there half to q and half to k."""
    through_pattern = 0.5 if dependent(value) else 1.0
    of_value = 0.5 if dependent(query) or dependent(key) else 1.0
    of_scores = through_pattern * (0.5 if dependent(query) and dependent(key) else 1.0)
    factors = (of_scores, of_scores, of_value)
    if call.journal is None:
        return run(*(scaled(x, f) for x, f in zip((query, key, value), factors, strict=True)))
    moving = [x for x in (query, key, value) if dependent(x)]
    kept = [f for x, f in zip((query, key, value), factors, strict=True) if dependent(x)]

    def scaled_run(*aliases: Tensor) -> Tensor:
        return run(*_refill((query, key, value), [scaled(x, f) for x, f in zip(aliases, kept, strict=True)]))

    return call.booked(SOFTMAX, moving, scaled_run)


def _refill(tensors: tuple[Tensor, ...], moving: Any) -> list[Tensor]:
    """`tensors` with the dependent ones replaced, in order, by `moving`."""
    source = iter(moving)
    return [next(source) if dependent(t) else t for t in tensors]


def opened(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool,
           scale: float) -> Tensor:
    """The same attention as separate torch calls, for rules that need to stand between them."""
    key, value = grouped(key, query), grouped(value, query)
    mask = additive(attn_mask, is_causal, query, key)
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is None:
        return torch.matmul(F.softmax(scores, dim=-1), value)
    seen = (mask > -math.inf).any(-1, keepdim=True)  # a query that may look at nothing: zero, as from the kernel
    weights = F.softmax(scores + mask.where(seen, 0.0), dim=-1)
    return torch.matmul(weights if bool(seen.all()) else weights * seen, value)


def multi_head_attention_forward(call: Call, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int,
                                 num_heads: int, in_proj_weight: Tensor | None, in_proj_bias: Tensor | None,
                                 bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
                                 out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
                                 key_padding_mask: Tensor | None = None, need_weights: bool = True,
                                 attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
                                 q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
                                 v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
                                 static_v: Tensor | None = None, average_attn_weights: bool = True,
                                 is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` in calls that the table sees, batch first, with its forward's result.

    Returns (T, B, D) and, where asked for, the attention weights, which carry no relevance of their own.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise NotImplementedError(f"multi-head attention with bias_kv, add_zero_attn or static keys in {call.path!r} "
                                  "has no rule; build the module without them")
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
    biases = in_proj_bias.chunk(3) if in_proj_bias is not None else (None, None, None)
    mask = _merged_mask(attn_mask, key_padding_mask, is_causal and attn_mask is None, num_heads, query, key)
    unbatched = query.dim() == 2

    def run() -> tuple[Tensor, Tensor | None]:
        same = query is key and key is value
        q, k, v = ((t.unsqueeze(1) if unbatched else t).transpose(0, 1) for t in (query, key, value))  # (B, T, D)
        if same and not use_separate_proj_weight:
            projected = F.linear(q, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
        else:
            projected = [F.linear(x, W, b) for x, W, b in zip((q, k, v), weights, biases, strict=True)]
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in projected)  # (B, H, T, K)
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        out = F.linear(mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1)
        attended = _weights(q, k, mask, average_attn_weights) if need_weights else None
        return (out.squeeze(1), attended if attended is None else attended.squeeze(0)) if unbatched else (out, attended)

    return call.retrace(run)


def _merged_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, heads: int,
                 query: Tensor, key: Tensor) -> Tensor | None:
    """Both masks of torch's multi-head attention (True = masked) as one additive mask, (B or 1, H or 1, T, S)."""
    def added(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(query.dtype)
        return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(mask, -math.inf)

    total = None
    if attn_mask is not None:
        total = added(attn_mask)
        total = total[None, None] if total.dim() == 2 else total.unflatten(0, (-1, heads))
    elif is_causal:
        total = additive(None, True, query.movedim(0, -2), key.movedim(0, -2))[None, None]
    if key_padding_mask is not None:
        padding = added(key_padding_mask).reshape(-1, 1, 1, key.shape[0])
        total = padding if total is None else total + padding
    return total


@torch.no_grad()
def _weights(query: Tensor, key: Tensor, mask: Tensor | None, average: bool) -> Tensor:
    weights = pattern(query.detach(), key.detach(), mask, 1 / math.sqrt(query.shape[-1]))
    return weights.mean(1) if average else weights


# -- forward ---------------------------------------------------------------------------------------------------------

def split_attention(call: Split, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                    enable_gqa: bool = False) -> Tensor | None:
    """`F.scaled_dot_product_attention`, forward, by the pair (rule of the products, rule of the softmax)."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if call.rule[1] is softmax.pattern_held:
        rel = call.rel(value)
        if rel is None:
            return None
        mask = additive(attn_mask, is_causal, query, key)
        rel = grouped(rel, query)
        return pattern(query, grouped(key, query), mask, factor) @ led(rel, query.dim())
    return call.rel(call.retrace(lambda: opened(query, key, value, attn_mask, is_causal, factor)))
