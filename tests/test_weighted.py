"""Attention weighed by values, against the vectors written out from the weights of the models."""
from __future__ import annotations

import pytest
import torch
from tiny import CLS, SEP, bert, gpt2, images, targets, text, vit
from torch import Tensor, nn

from relprop import attention
from relprop.subject import Subject
from relprop.tokens import Batch
from relprop.trace import attention_patterns, mixings


def llama(**changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.5, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**options | changes)).double().eval()


class Encoder(nn.Module):
    """torch's own layers, batch or positions first, with a class token's logits."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.batch_first, self.head = batch_first, nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return self.head(y[:, 0] if self.batch_first else y[0])


class Written(nn.Module):
    """Attention whose values go through the given calls on their way to the skip connection."""

    def __init__(self, after: str) -> None:
        super().__init__()
        self.after = after
        self.qkv, self.out, self.gate = nn.Linear(8, 24), nn.Linear(8, 6), nn.Linear(8, 8)
        self.scale, self.norm = nn.Parameter(torch.randn(6)), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).softmax(-1)
        if self.after == "turned":
            mixed = (v.mT @ weights.mT).flatten(1, 2).mT
        else:
            mixed = (weights @ v).transpose(1, 2).flatten(2)
        if self.after == "gated":
            mixed = mixed * self.gate(x).sigmoid()
        if self.after == "normed":
            mixed = self.norm(mixed)
        if self.after == "bare":
            return x + mixed
        return x[..., :6] + self.scale * (mixed @ self.out.weight.mT + self.out.bias)


def projected(model: nn.Module, name: str, transposed: bool = False) -> list[Tensor]:
    """The weight of each layer's output projection, (D_in, D)."""
    found = [module.weight.detach() for path, module in model.named_modules() if path.endswith(name)]
    return found if transposed else [weight.mT for weight in found]


def values(model: nn.Module, name: str, run: callable, cut: slice = slice(None)) -> list[Tensor]:
    """What the modules of this name return."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda m, a, y: seen.append(y.detach()[..., cut]))
             for path, module in model.named_modules() if path.endswith(name)]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def oracle(weights: Tensor, v: Tensor, W: Tensor) -> Tensor:
    """|| sum_h A_{hts} v_{hs} W^h ||, one vector at a time."""
    rows, heads, length, _ = weights.shape
    found = torch.zeros(rows, length, length, dtype=weights.dtype)
    v = v.unflatten(-1, (-1, W.shape[0] // heads))  # (B, S, H or fewer, K)
    by_head = W.unflatten(0, (heads, -1))  # (H, K, D)
    for b in range(rows):
        for t in range(length):
            for s in range(length):
                given = [weights[b, h, t, s] * v[b, s, h * v.shape[2] // heads] @ by_head[h] for h in range(heads)]
                found[b, t, s] = sum(given).norm()
    return found


TEXT = text([5, 6, 7, 8, 9], [9, 10, 11])
FAMILIES = {
    "bert": (bert, TEXT, "self.value", slice(None), "attention.output.dense", False),
    "gpt2": (gpt2, TEXT, "attn.c_attn", slice(32, None), "attn.c_proj", True),
    "llama": (llama, TEXT, "v_proj", slice(None), "o_proj", False),
    "vit": (vit, images(torch.randn(2, 3, 24, 24).double(), 6), "attn.qkv", slice(32, None), "attn.proj", False)}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_those_of_the_vectors_written_out(seed, name, backend):
    make, batch, value, cut, projection, transposed = FAMILIES[name]
    model = make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(backend)
    elif backend == "eager":
        for block in model.blocks:
            block.attn.fused_attn = False
    found = mixings(model, batch.args, batch.kwargs)[1]
    _, patterns = attention_patterns(model, batch.args, batch.kwargs)
    v = values(model, value, lambda: model(*batch.args, **batch.kwargs), cut)
    W = projected(model, projection, transposed)
    assert len(found) == len(patterns) == len(v) == len(W) > 1
    for mixing, pattern, v_s, W_O in zip(found, patterns, v, W, strict=True):
        expected = oracle(pattern, v_s, W_O)
        torch.testing.assert_close(attention.lengths(mixing), expected, rtol=1e-9, atol=1e-12)
        assert not mixing.gated and mixing.projected and (expected > 0).any()


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_order_of_batch_and_positions_is_found(seed, batch_first):
    model = Encoder(batch_first).double().eval()
    for rows in (2, 3, 4):
        x = torch.randn(rows, 3, 8, dtype=torch.float64)
        _, found = mixings(model, (x,), {})
        layer = model.encoder.layers[0].self_attn
        v = x @ layer.in_proj_weight[16:].mT + layer.in_proj_bias[16:]
        expected = oracle(found[0].weights, v.detach(), layer.out_proj.weight.detach().mT)
        torch.testing.assert_close(attention.lengths(found[0]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("after", ["scaled", "turned", "gated"])
def test_vectors_sum_to_the_output(seed, after):
    model, x = Written(after).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    output, (mixing,) = mixings(model, (x,), {})
    assert mixing.gated == (after == "gated")
    given = attention.weighted._vectors(mixing)
    constant = x[..., :6] + model.scale * model.out.bias
    torch.testing.assert_close(given.sum(2) + constant, output)
    torch.testing.assert_close(attention.lengths(mixing), given.norm(dim=-1))  # without a gate, in another way


def test_without_a_projection_the_values_are_taken_alone(seed):
    model, x = Written("bare").double(), torch.randn(2, 5, 8, dtype=torch.float64)
    _, (mixing,) = mixings(model, (x,), {})
    expected = (mixing.weights[..., None] * mixing.values[:, :, None]).norm(dim=-1)  # (B, H, T, S)
    assert not mixing.projected
    torch.testing.assert_close(attention.lengths(mixing), expected.norm(dim=1))  # heads stand beside each other


def test_what_is_not_linear_in_the_values_is_an_error(seed):
    model, x = Written("normed").double(), torch.randn(2, 5, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="meet layer_norm on the way"):
        attention.lengths(mixings(model, (x,), {})[1][0])


def test_heads_may_cancel(seed):
    """Where two heads give opposite vectors nothing is given, however much they look there."""
    model = Written("scaled").double()
    with torch.no_grad():
        model.qkv.weight[4:8] = model.qkv.weight[:4]  # same queries, keys and values for both heads
        model.qkv.weight[12:16] = model.qkv.weight[8:12]
        model.qkv.weight[20:24] = model.qkv.weight[16:20]
        model.qkv.bias.zero_()
        model.out.weight[:, 4:] = -model.out.weight[:, :4]
    _, (mixing,) = mixings(model, (torch.randn(1, 5, 8, dtype=torch.float64),), {})
    assert mixing.weights.min() > 0 and attention.lengths(mixing).max() < 1e-7


def test_chunks_change_nothing(seed, monkeypatch):
    _, (mixing, *_) = mixings(bert(), TEXT.args, TEXT.kwargs)
    expected = attention.lengths(mixing)
    monkeypatch.setattr(attention.weighted, "CHUNK", 1)
    torch.testing.assert_close(attention.lengths(mixing), expected)


# Maps ----------------------------------------------------------------------------------------------------------------


def found(model: nn.Module, batch: Batch, **options) -> Tensor:
    return attention.value_weighted_attention(Subject(model), batch, targets(0, batch), **options).map


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_map_is_the_row_that_is_read(seed, layer):
    model, batch = bert(), text([CLS, 5, 6, 7, SEP], [CLS, 8, SEP])
    row = attention.lengths(mixings(model, batch.args, batch.kwargs)[1][layer])[:, 0]
    row = row * batch.kwargs["attention_mask"]
    map = found(model, batch, layer=layer)
    torch.testing.assert_close(map, (row / row.sum(1, keepdim=True)).float())
    raw = attention.raw_attention(Subject(model), batch, targets(0, batch), layer=layer).map
    assert not torch.allclose(map, raw, atol=1e-3)


def test_rolled_it_is_the_rollout_of_shares(seed):
    model, batch = bert(), text([CLS, 5, 6, 7, SEP])
    shares = [attention.lengths(mixing) for mixing in mixings(model, batch.args, batch.kwargs)[1]]
    shares = [one / one.sum(-1, keepdim=True) for one in shares]
    product = torch.eye(5, dtype=torch.float64)
    for one in shares:
        product = (one + torch.eye(5)) / 2 @ product
    torch.testing.assert_close(found(model, batch, rolled=True), product[:, 0].float())
    last = (shares[2] + torch.eye(5)) / 2
    torch.testing.assert_close(found(model, batch, rolled=True, start_layer=2), last[:, 0].float())


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="layer 3 is not one of the 3 layers"):
        found(bert(), text([CLS, 5, SEP]), layer=3)


def test_rows_of_padding_may_be_nan(seed):
    mixing = mixings(gpt2(), TEXT.args, TEXT.kwargs)[1][0]
    expected = attention.weighted._shares(mixing, ~TEXT.kwargs["attention_mask"].bool())
    mixing.weights[1, :, 3:] = torch.nan  # what a fused kernel leaves in rows that are masked throughout
    shares = attention.weighted._shares(mixing, ~TEXT.kwargs["attention_mask"].bool())
    assert torch.equal(shares, expected) and (shares[1, :3].sum(-1) - 1).abs().max() < 1e-9
