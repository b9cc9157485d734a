"""Layers of every kind: state spaces, hybrids, gates, projections by convolution and by einsum, attention over channels
and in windows. What an anatomy says of them is held to the modules themselves.
"""
from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import relprop
from relprop import division, mediation
from relprop.anatomy import anatomy
from relprop.decompose import decompose
from relprop.intervene import Zero, intervened
from relprop.ops import mul, norm, share
from relprop.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
         "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ABLATED = division.get("difference").but("ablation", share=share.aside, rules={"norm": norm.by_difference,
                                                                               "mul": mul.by_difference})


def text(name, **settings):
    config = f"{name.split('For')[0].split('LMHead')[0]}Config"
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**{**SMALL, **settings}))


class Block(nn.Module):
    """Attention over the places of a picture, (B, C, Y, X), its projections and its MLP by convolution."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.mlp = nn.Sequential(nn.Conv2d(width, 24, 1), nn.GELU(), nn.Conv2d(24, width, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, H, K, T)
        pattern = (q.mT @ k / q.shape[-2] ** 0.5).softmax(-1)
        x = x + self.proj((v @ pattern.mT).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


def by_convolution():
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Sequential(Block(), Block()),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def xcit():
    from timm.models.xcit import Xcit

    return Xcit(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=5, cls_attn_layers=1)


def mixer():
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, embed_dim=16, num_blocks=2, num_classes=5)


MAMBA2 = {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "expand": 2, "chunk_size": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
KINDS = {  # how it is built; of a layer: its number, how many heads, and which module reads them
    "state space": (text("Mamba2ForCausalLM", **MAMBA2), {0: (4, "backbone.layers.0.mixer.out_proj")}),
    "no heads": (text("MambaForCausalLM", state_size=4), {1: (0, "backbone.layers.1.mixer.out_proj")}),
    "recurrence": (text("RwkvForCausalLM", attention_hidden_size=16, context_length=16),
                   {0: (0, "rwkv.blocks.0.attention.output")}),
    "hybrid": (text("JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1,
                    mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
               {0: (0, "model.layers.0.mamba.out_proj"), 1: (4, "model.layers.1.self_attn.o_proj")}),
    "gates": (text("Qwen3NextForCausalLM", layer_types=["linear_attention", "full_attention"], num_experts=0, **LINEAR),
              {0: (4, "model.layers.0.linear_attn.out_proj"), 1: (4, "model.layers.1.self_attn.o_proj")}),
    "differential": (text("DiffLlamaForCausalLM"), {1: (2, "model.layers.1.self_attn.o_proj")}),
    "convolution": (by_convolution, {0: (4, "1.0.proj")}),
    "channels": (xcit, {1: (4, "blocks.1.attn.proj")}),
    "einsum": (text("XLNetLMHeadModel", d_model=16, n_layer=2, n_head=4, d_inner=24), {0: (4, None)}),
    "windows": (lambda: transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5)),
        {1: (2, "swin.encoder.layers.0.blocks.1.attention.o_proj"), 3: (4, None)}),
    "Fourier": (text("FNetForMaskedLM", tpu_short_seq_length=8, max_position_embeddings=16), {0: (0, None)}),
    "positions by MLP": (mixer, {0: (0, None)})}
PICTURES = {"convolution", "channels", "windows", "positions by MLP"}
HEADED = [(name, number) for name, (_, layers) in KINDS.items() for number, (heads, path) in layers.items() if path]


@cache
def built(name):
    torch.manual_seed(0)
    model = KINDS[name][0]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def read(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name in PICTURES:
        return (torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64),), {}
    return (), {"input_ids": torch.randint(3, 40, (2, 7), generator=generator)}


def value(output):
    found = output if isinstance(output, torch.Tensor) else output.logits
    return found[:, -2, 5] if found.dim() == 3 else found[:, 1]


@cache
def known(name):
    args, kwargs = read(name)
    return anatomy(built(name), args, kwargs)


def run(name, seed=0):
    args, kwargs = read(name, seed)
    with torch.no_grad():
        return value(built(name)(*args, **kwargs))


@contextmanager
def without(module, head, heads):
    """A module that reads zeros in the place of a head; of 0 heads, that gives zeros."""
    def before(module, args):
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        x = args[0].clone()
        x.unflatten(axis, (heads, -1)).select(axis if axis > 0 else -2, head).zero_()
        return (x,)

    handle = module.register_forward_pre_hook(before) if heads else module.register_forward_hook(
        lambda module, args, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", KINDS)
def test_every_place_reaches_the_output(name):
    args, kwargs = read(name)
    found = known(name)
    verified = found.verify(built(name), args, kwargs)
    assert all(verified.values()), [place for place, reached in verified.items() if not reached]
    for number, (heads, _) in KINDS[name][1].items():
        assert found.layers[number].heads == heads
        assert {f"L{number}", f"L{number}.in", f"L{number}.attn"} <= verified.keys()
        assert (f"L{number}.attn.H0" in verified) == (heads > 0)


@pytest.mark.parametrize("name, number", HEADED)
def test_a_head_is_what_its_projection_reads(name, number):
    heads, path = KINDS[name][1][number]
    place = f"L{number}.attn.H1" if heads else f"L{number}.attn"
    with intervened(built(name), {place: Zero()}, known=known(name)):
        found = run(name)
    with without(built(name).get_submodule(path), 1, heads):
        expected = run(name)
    assert (expected - run(name)).abs().max() > 1e-9
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_head_of_an_einsum_is_a_slice_of_its_weight():
    model = built("einsum")
    with intervened(model, {"L1.attn.H2": Zero()}):
        found = run("einsum")
    weight = model.transformer.layer[1].rel_attn.o
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, 2] = 0
        expected = run("einsum")
        weight.copy_(kept)
    assert (expected - run("einsum")).abs().max() > 1e-9
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_effects_keep_their_books(name):
    number, (heads, _) = next(iter(KINDS[name][1].items()))
    at = [f"L{number}.attn", *([f"L{number}.attn.H1"] if heads else [])]
    base, other = (args or kwargs for args, kwargs in (read(name), read(name, 1)))
    base, other = (side[0] if isinstance(side, tuple) else side for side in (base, other))
    task = "text-generation" if name not in PICTURES else None
    found = mediation.effects(Subject.from_module(built(name), task=task), base, other, relprop.Function(value), at=at,
                              kind=["total", "direct", "indirect"], resamples=9)
    assert_close(found.total, (run(name, 1) - run(name)).to(found.total).expand_as(found.total))
    assert_close(found.direct + found.indirect + found.interaction, found.total.expand_as(found.direct))
    assert (found.indirect.abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_what_the_value_loses(name):
    number, (heads, _) = next(iter(KINDS[name][1].items()))
    place = f"L{number}.attn.H1" if heads else f"L{number}.attn"
    args, kwargs = read(name)
    inputs = args[0] if args else kwargs
    found = decompose(built(name), inputs, place, target=value)
    assert_close(found.total, run(name), rtol=1e-12, atol=1e-12)
    assert_close(found.rel + found.irrel, found.total[None], rtol=1e-12, atol=1e-12)
    assert found.rel.abs().max() > 1e-9
    exact = decompose(built(name), inputs, place, target=value, rules=ABLATED)
    with intervened(built(name), {place: Zero()}, known=known(name)):
        lost = found.total - run(name)
    assert_close(exact.rel[0], lost, rtol=1e-5, atol=1e-6)  # norms and decays are in float32 inside


def test_a_hybrid_lists_the_heads_that_there_are():
    from relprop.address import Address

    places = [str(place) for place, _ in known("hybrid").resolve(Address.parse("L*.attn.H*"))]
    assert places == [f"L1.attn.H{head}" for head in range(4)]
    with pytest.raises(ValueError, match=r"L0.attn.H0: layer 0 \(.*\) has a mixer that is not made of heads; give"):
        list(known("hybrid").resolve(Address.parse("L0.attn.H0")))
    with pytest.raises(ValueError, match="no attention pattern"):
        list(known("state space").resolve(Address.parse("L0.attn.H0.pattern")))


def test_what_reaches_no_output_is_left_out():
    class Idle(nn.Module):
        """A last layer whose stream only picks, and is not part of the output."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(2)])

        def forward(self, x):
            kept = self.layers[0](x)
            return kept[:, self.layers[1](kept).sum().gt(1e9).long()]

    from relprop.address import Address

    torch.manual_seed(0)
    model, x = Idle().eval(), torch.randn(1, 3, 8)
    found = anatomy(model, (x,), {})
    assert not found.layers[0].silent and {"attn", "mlp", "layer"} <= found.layers[1].silent
    assert [str(place) for place, _ in found.resolve(Address.parse("L*.attn.H*"))] == ["L0.attn.H0", "L0.attn.H1"]
    with pytest.raises(ValueError, match="to nothing that the output is made of"):
        list(found.resolve(Address.parse("L1.mlp")))
