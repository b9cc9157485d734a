"""Attention against an oracle of its parts, and the fused kernels against attention in parts."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, attention, name, propagated, randn, variants
from torch import Tensor

from relprop import composite
from relprop.ops import attention as fused
from relprop.ops import matmul, softmax
from relprop.ops.chunk import ENTRIES, shrunk

parametrize = pytest.mark.parametrize
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
EVERYTHING = {"attnlrp": composite.attnlrp().rules, "cp-lrp": composite.cp_lrp().rules,
              "gradient": composite.gradient().rules}


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every tensor here is random, the same each time."""


B, H, T, S, K = 2, 4, 3, 5, 6
BOOLEAN = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
ADDITIVE = torch.linspace(-1.0, 2.0, T * S, dtype=torch.float64).reshape(T, S)
ATTENTIONS: dict[str, dict[str, object]] = {  # options of torch's function
    "plain": {}, "scale": {"scale": 0.7}, "boolean mask": {"attn_mask": BOOLEAN}, "causal": {"is_causal": True},
    "additive mask": {"attn_mask": ADDITIVE}, "infinite mask": {"attn_mask": ADDITIVE.where(BOOLEAN, -math.inf)},
    "mask of each row": {"attn_mask": torch.stack([BOOLEAN, BOOLEAN.flip(1)])[:, None]},
    "grouped queries": {"enable_gqa": True}, "grouped queries, masked": {"enable_gqa": True, "attn_mask": BOOLEAN}}


def operands(options: dict[str, object]) -> list[Tensor]:
    heads = 2 if options.get("enable_gqa") else H
    return [randn(B, H, T, K), randn(B, heads, S, K), randn(B, heads, S, K)]


def added(options: dict[str, object]) -> Tensor:
    """The mask as something to add, (B, H, T, S)."""
    mask = options.get("attn_mask", torch.ones(T, S, dtype=torch.bool))
    mask = torch.ones(T, S, dtype=torch.bool).tril() if options.get("is_causal") else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    return mask.expand(B, H, T, S)


def attention_oracle(inputs: list[Tensor], options: dict[str, object], R: Tensor, of_product: Callable,
                     of_softmax: Callable) -> list[Tensor]:
    q, k, v = inputs
    mask, scale, shared = added(options), options.get("scale", K**-0.5), H // k.shape[1]
    totals = [torch.zeros_like(x) for x in inputs]
    for b in range(B):
        for h in range(H):  # query heads 0 and 1 read the first key head of two
            key = h // shared
            found = attention(q[b, h], k[b, key], v[b, key], mask[b, h], scale, R[b, h], of_product=of_product,
                              of_softmax=of_softmax)
            for total, place, relevance in zip(totals, (h, key, key), found):
                total[b, place] += relevance
    return totals


RULES = [(of_product, of_softmax) for of_product in variants(matmul) for of_softmax in variants(softmax)]


@parametrize("of_product, of_softmax", RULES, ids=name)
@parametrize("case", ATTENTIONS)
def test_attention(case, of_product, of_softmax):
    options = ATTENTIONS[case]
    inputs, R = operands(options), randn(B, H, T, K)
    rules = {"matmul": of_product, "softmax": of_softmax}
    found, _ = propagated(partial(F.scaled_dot_product_attention, **options), inputs, R, rules)
    expected = attention_oracle(inputs, options, R, of_product, of_softmax)
    if of_softmax is softmax.hold:  # then the pattern is a matrix of weights, and no factor that takes a share
        pattern = partial(attention_oracle, inputs, options, R, matmul.gradient, of_softmax)()
        expected = [torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1]), pattern[2]]
    for one, other in zip(found, expected):
        assert_same(one, other, empty=not other.any())
    assert found[2].any()


@parametrize("rules", EVERYTHING)
@parametrize("case", ATTENTIONS)
def test_fused_attention_is_attention_in_parts(case, rules):
    options = ATTENTIONS[case]
    inputs, R, scale = operands(options), randn(B, H, T, K), options.get("scale", K**-0.5)

    def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused.opened(q, k, v, options.get("attn_mask"), options.get("is_causal", False), scale)

    function = partial(F.scaled_dot_product_attention, **options)
    torch.testing.assert_close(in_parts(*inputs), function(*inputs))
    found, absorbed = propagated(function, inputs, R, EVERYTHING[rules])
    expected, taken = propagated(in_parts, inputs, R, EVERYTHING[rules])
    for one, other in zip(found, expected):
        assert_same(one, other, empty=not other.any())
    assert_same(sum(absorbed.values(), R.new_zeros(B)), sum(taken.values(), R.new_zeros(B)), empty=rules == "cp-lrp")


@parametrize("rules", EVERYTHING)
@parametrize("moving", ["q", "k", "v", "qk", "qv", "kv"])
def test_fused_attention_of_which_some_operands_are_constants(moving, rules):
    constants, R = dict(zip("qkv", operands({}))), randn(B, H, T, K)

    def fused_run(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(constants | dict(zip(moving, inputs))).values())

    def in_parts(*inputs: Tensor) -> Tensor:
        return fused.opened(*(constants | dict(zip(moving, inputs))).values(), None, False, K**-0.5)

    inputs = [constants[one] for one in moving]
    found, expected = (propagated(run, inputs, R, EVERYTHING[rules])[0] for run in (fused_run, in_parts))
    for one, other in zip(found, expected):
        assert_same(one, other, empty=not other.any())
    assert found[-1].any() or (rules == "cp-lrp" and "v" not in moving)


@parametrize("chunk", [1, 40, 1 << 22])
def test_the_held_pattern_is_the_same_in_chunks(chunk):
    for case in ("boolean mask", "mask of each row", "causal", "grouped queries, masked"):
        options = ATTENTIONS[case]
        inputs, R = operands(options), randn(B, H, T, K)
        with shrunk(1, chunk / ENTRIES):
            found, _ = propagated(partial(F.scaled_dot_product_attention, **options), inputs, R, EVERYTHING["cp-lrp"])
        assert_same(found[2], attention_oracle(inputs, options, R, matmul.gradient, softmax.hold)[2])


@parametrize("of_product, of_softmax", RULES, ids=name)
def test_a_query_that_may_look_at_nothing_explains_nothing(of_product, of_softmax):
    """As padding on the left leaves behind under a causal mask. The kernel's output is zero there, not NaN."""
    mask = BOOLEAN.clone()
    mask[0] = False
    inputs, R = operands({}), randn(B, H, T, K)
    R[:, :, 0] = 0
    rules = {"matmul": of_product, "softmax": of_softmax}
    found, _ = propagated(partial(F.scaled_dot_product_attention, attn_mask=mask), inputs, R, rules)
    assert all(bool(relevance.isfinite().all()) for relevance in found)
    rest = [inputs[0][:, :, 1:], *inputs[1:]]
    run = partial(F.scaled_dot_product_attention, attn_mask=mask[1:])
    expected, _ = propagated(run, rest, R[:, :, 1:], rules)
    assert not found[0][:, :, 0].any()
    for one, other in zip((found[0][:, :, 1:], *found[1:]), expected):
        assert_same(one, other, empty=not other.any())


def test_a_mask_that_depends_on_the_input_takes_its_share():
    inputs, R, bias = operands({}), randn(B, H, T, K), randn(B, H, T, S)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def in_parts(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * K**-0.5 + bias, -1) @ v

    found, expected = (propagated(f, [*inputs, bias], R, EVERYTHING["attnlrp"])[0] for f in (run, in_parts))
    for one, other in zip(found, expected):
        assert_same(one, other)


# -- multi-head attention as torch has it ------------------------------------------------------------------------------

MULTI_HEAD: dict[str, dict[str, object]] = {
    "plain": {}, "boolean mask": {"attn_mask": ~BOOLEAN}, "additive mask": {"attn_mask": ADDITIVE},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 2 + [True] * 3])},
    "both": {"attn_mask": ADDITIVE, "key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5])},
    "mask of each head": {"attn_mask": torch.stack([~BOOLEAN, BOOLEAN.flip(0)] * 2)},
    "weights wanted": {"need_weights": True}}


@parametrize("separate", [False, True])
@parametrize("rules", EVERYTHING)
@parametrize("case", MULTI_HEAD)
def test_multi_head_attention(case, rules, separate):
    """`F.multi_head_attention_forward` against projections, attention in parts and projection, written out."""
    width, heads, options = 8, 2, {"need_weights": False, **MULTI_HEAD[case]}
    q, k, v = randn(B, T, width), randn(B, S, width), randn(B, S, width)
    W_in, b_in, W_out, b_out, R = randn(24, 8), randn(24), randn(8, 8), randn(8), randn(B, T, width)
    split = {"use_separate_proj_weight": True, **dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"),
                                                          W_in.chunk(3)))}

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mixed, _ = F.multi_head_attention_forward(
            q, k, v, width, heads, None if separate else W_in, b_in, None, None, False, 0.0, W_out, b_out,
            training=False, **options, **(split if separate else {}))
        return mixed.transpose(0, 1)

    def added(mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=q.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask

    mask = torch.zeros(B, 1, T, S, dtype=torch.float64)
    if "attn_mask" in options:
        given = added(options["attn_mask"])
        mask = mask + (given if given.dim() == 2 else given.reshape(B, heads, T, S))
    if "key_padding_mask" in options:
        mask = mask + added(options["key_padding_mask"])[:, None, None]

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        projected = [F.linear(x, W, b).unflatten(-1, (heads, -1)).transpose(1, 2)
                     for x, W, b in zip((q, k, v), W_in.chunk(3), b_in.chunk(3))]
        mixed = fused.opened(*projected, mask, False, (width / heads) ** -0.5)
        return F.linear(mixed.transpose(1, 2).flatten(2), W_out, b_out)

    torch.testing.assert_close(torchs(q, k, v), written_out(q, k, v))
    found, expected = (propagated(f, [q, k, v], R, EVERYTHING[rules])[0] for f in (torchs, written_out))
    for one, other in zip(found, expected):
        assert_same(one, other, empty=not other.any())
    assert found[2].any()


def test_a_wrong_rule_of_attention_fails():
    inputs, R = operands({}), randn(B, H, T, K)
    found, _ = propagated(F.scaled_dot_product_attention, inputs, R, EVERYTHING["gradient"])
    with pytest.raises(AssertionError):
        assert_same(found[2], attention_oracle(inputs, {}, R, matmul.uniform, softmax.taylor)[2])
