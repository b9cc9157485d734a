"""Drop-in modules: the plain modules forwards, the interception's map backwards, and all given back."""
from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop import composite, nn
from relprop.errors import IndependentOutput, UnruledOp
from relprop.explain import explain
from relprop.ops import add, linear, softmax
from relprop.relevance import propagate

COMPOSITES = composite.NAMES
HELD = tuple(name for name in COMPOSITES if composite.get(name).rules["softmax"] is softmax.hold)
D, H = 8, 2


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every model here is random, the same each time."""


def settle(model: torch.nn.Module) -> torch.nn.Module:
    """In float64 and eval mode, every parameter and running statistic away from 0 and 1: none can be left out."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 0.6).mul_(torch.randn_like(tensor).sign() if tensor.dim() > 1 else 1)
    return model.double().eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 24, 24, dtype=torch.float64)


def tokens(rows: int = 2, length: int = 5, width: int = D) -> Tensor:
    return torch.randn(rows, length, width, dtype=torch.float64)


def value(output: Tensor) -> Tensor:
    """The explained value of each row: its entries, weighted."""
    entries = output.flatten(1)
    return entries @ torch.linspace(1.0, 2.0, entries.shape[1], dtype=entries.dtype)


def by_backward(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a model of drop-ins, and x * x.grad after a plain backward pass."""
    x = x.clone().requires_grad_()
    output = model(x)
    value(output).sum().backward()
    return output.detach(), x.detach() * x.grad


def by_interception(model: torch.nn.Module, x: Tensor, rules: str | composite.Composite) -> Tensor:
    return propagate(model, (x,), {}, value, rules, ledger=False).relevance["0"]


def assert_same_map(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def encoder(**changes) -> torch.nn.Module:
    options = dict(dim_feedforward=12, batch_first=True, dropout=0.0) | changes
    layer = torch.nn.TransformerEncoderLayer(D, H, **options)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


class Called(torch.nn.Module):
    """A module as a function of one tensor."""

    def __init__(self, inner: torch.nn.Module, call) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def padded(**changes) -> torch.nn.Module:
    return Called(encoder(**changes), lambda inner, x: inner(x, src_key_padding_mask=PADDING)[:, 0])


def tokens_first(inner: torch.nn.Module) -> torch.nn.Module:
    return Called(inner, lambda inner, x: inner(x.transpose(0, 1)).transpose(0, 1))


def decoder(**changes) -> torch.nn.Module:
    """One whose memory depends on the input as well."""
    layer = torch.nn.TransformerDecoderLayer(D, H, 12, batch_first=True, **changes)
    seen = torch.nn.Transformer.generate_square_subsequent_mask(5).double()
    return Called(torch.nn.TransformerDecoder(layer, 2), lambda inner, x: inner(x, x.flip(1), tgt_mask=seen))


def on_embeddings(model: torch.nn.Module) -> torch.nn.Module:
    return Called(model, lambda inner, x: inner(inputs_embeds=x).logits)


def distilled() -> torch.nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(img_size=24, patch_size=6, num_classes=3, embed_dim=16, depth=2, num_heads=2)


def torchvision_vit() -> torch.nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=24, patch_size=6, num_layers=2, num_heads=H, hidden_dim=D, mlp_dim=12,
                             num_classes=3)


MODELS = {
    "timm": (tiny.vit, pixels),
    "timm-norms": (lambda: tiny.vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.5), pixels),
    "timm-average": (lambda: tiny.vit(class_token=False, global_pool="avg", reg_tokens=2), pixels),
    "timm-pooled": (lambda: tiny.vit(class_token=False, global_pool="map", pre_norm=True), pixels),
    "timm-distilled": (distilled, pixels),
    "torchvision": (torchvision_vit, pixels),
    "encoder": (encoder, tokens),
    "encoder-norm-first": (lambda: encoder(norm_first=True, activation="gelu"), tokens),
    "encoder-function": (lambda: encoder(activation=lambda x: F.silu(x) * 2), tokens),
    "encoder-module": (lambda: encoder(activation=torch.nn.Mish(), batch_first=False, bias=False), tokens),
    "encoder-padded": (padded, tokens),
    "encoder-padded-norm-first": (lambda: padded(norm_first=True), tokens),
    "encoder-tokens-first": (lambda: tokens_first(encoder(batch_first=False)), tokens),
    "decoder": (decoder, tokens),
    "decoder-norm-first": (lambda: decoder(norm_first=True), tokens),
    "bert": (lambda: on_embeddings(tiny.bert()), lambda: tokens(width=16)),
    "gpt2": (lambda: on_embeddings(tiny.gpt2()), lambda: tokens(width=16)),
}


# -- the same map as the interception ------------------------------------------------------------------------------

@pytest.mark.parametrize("rules", COMPOSITES)
@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_model_gives_the_map_of_the_interception(name, rules):
    make, inputs = MODELS[name]
    model, x = settle(make()), inputs()
    expected, plain = by_interception(model, x, rules), model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of these models is out of sight
        replacement = nn.replace(model, rules)
    with replacement:
        output, found = by_backward(model, x)
    torch.testing.assert_close(output, plain, rtol=1e-12, atol=1e-12)
    assert_same_map(found, expected)


@pytest.mark.parametrize("rules", COMPOSITES)
def test_a_replaced_model_gives_the_map_of_explain(rules):
    """Whose box of pixels is that of the model's own normalisation."""
    import timm

    model = settle(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    result = explain(model, x, 3, method=rules if rules != "gradient" else composite.get(rules))
    with nn.replace(model, rules):
        leaf = x.clone().requires_grad_()
        model(leaf)[:, 3].sum().backward()
    assert_same_map((leaf * leaf.grad).detach(), result.inputs["0"].double(), 1e-6)  # which is float32


def test_maps_of_other_rules_are_not_the_same():
    model, x = settle(tiny.vit()), pixels()
    for rules, other in zip(COMPOSITES, (*COMPOSITES[1:], COMPOSITES[0]), strict=True):
        if {rules, other} == {"cp-lrp", "epsilon"}:
            continue
        with nn.replace(model, rules):
            found = by_backward(model, x)[1]
        with pytest.raises(AssertionError):
            assert_same_map(found, by_interception(model, x, other), 1e-6)


def test_a_rule_by_path_and_by_type_reaches_the_replaced_modules():
    model, x = settle(tiny.vit()), pixels()
    gamma = partial(linear.gamma, gamma=0.4)
    rules = composite.get("attnlrp").but(paths={"blocks.0.mlp.*": {"linear": gamma}},
                                         modules={torch.nn.Conv2d: {"conv": linear.z_plus}})
    with nn.replace(model, rules):
        found = by_backward(model, x)[1]
    assert_same_map(found, by_interception(model, x, rules))
    assert not torch.allclose(found, by_interception(model, x, "attnlrp"))


@pytest.mark.parametrize("rules", COMPOSITES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_with_padding(rules, batch_first):
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(D, H, batch_first=batch_first)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            y, _ = self.attention(x, x, x, key_padding_mask=PADDING, need_weights=False)
            return y if batch_first else y.transpose(0, 1)

    model, x = settle(Pooled()), tokens()
    expected = by_interception(model, x, rules)
    with nn.replace(model, rules):
        found = by_backward(model, x)[1]
    assert_same_map(found, expected)
    if rules in HELD:
        assert not found[1, 3:].any(), "padding is not attended"


@pytest.mark.parametrize("rules", COMPOSITES)
def test_multi_head_attention_of_different_widths(rules):
    attention = settle(torch.nn.MultiheadAttention(D, H, kdim=3, vdim=5, batch_first=True))
    inputs = [tokens(2, 4), tokens(2, 6, 3), tokens(2, 6, 5)]
    found = propagate(attention, tuple(inputs), {}, lambda output: value(output[0]), rules, ledger=False).relevance
    leaves = [x.clone().requires_grad_() for x in inputs]
    with nn.replace(attention, rules):  # the model itself is what is replaced
        value(attention(*leaves)[0]).sum().backward()
    for place, x in enumerate(leaves):
        if str(place) in found:  # held patterns pass nothing to queries and keys
            assert_same_map((x * x.grad).detach(), found[str(place)])
        else:
            assert x.grad is None or not x.grad.any()


def test_the_drop_ins_step_aside_inside_an_interception():
    model, x = settle(Written()), pixels()
    result = propagate(model, (x,), {}, value, "cp-lrp")  # with its books, which would not balance otherwise
    assert (result.ledger.error < 1e-9).all()
    assert_same_map(by_interception(model, x, "cp-lrp"), result.relevance["0"])
    assert not torch.allclose(by_backward(model, x)[1], result.relevance["0"])  # theirs is attnlrp


def test_it_is_relevance_and_not_the_gradient():
    model, x = settle(tiny.vit()), pixels()
    with nn.replace(model, "attnlrp"):
        relevance = by_backward(model, x)[1]
    gradient = by_backward(model, x)[1]
    assert not torch.allclose(relevance, gradient, rtol=0.1)


# -- a model written from the parts --------------------------------------------------------------------------------

class Written(torch.nn.Module):
    """A vision transformer as one would write it with drop-ins."""

    def __init__(self, **options):
        super().__init__()
        self.patches = nn.Conv2d(3, D, 6, stride=6, **options)
        self.position = torch.nn.Parameter(torch.zeros(1, 16, D))
        self.add, self.multiply = nn.Add(**options), nn.Mul(**options)
        self.blocks = torch.nn.ModuleList([nn.Block(D, H, init_values=0.3, **options) for _ in range(2)])
        self.norm, self.gate, self.act = nn.LayerNorm(D, **options), nn.Linear(D, D, **options), nn.Sigmoid(**options)
        self.head = nn.Linear(D, 3, **options)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.add(x, self.position)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(self.multiply(self.act(self.gate(x)), x).mean(1))


class Plain(Written):
    """The same model in plain torch and timm."""

    def __init__(self):
        from timm.models.vision_transformer import Block

        torch.nn.Module.__init__(self)
        self.patches = torch.nn.Conv2d(3, D, 6, stride=6)
        self.position = torch.nn.Parameter(torch.zeros(1, 16, D))
        self.blocks = torch.nn.ModuleList([Block(D, H, init_values=0.3) for _ in range(2)])
        self.norm, self.gate, self.act = torch.nn.LayerNorm(D), torch.nn.Linear(D, D), torch.nn.Sigmoid()
        self.head = torch.nn.Linear(D, 3)

    add = staticmethod(torch.add)
    multiply = staticmethod(torch.mul)


@pytest.mark.parametrize("rules", [name for name in COMPOSITES if not composite.get(name).paths])  # it has no paths
def test_a_written_model_gives_the_map_of_its_plain_twin(rules):
    plain, x = settle(Plain()), pixels()
    model = Written(composite=rules).double()
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    output, found = by_backward(model, x)
    assert torch.equal(output, plain(x))
    assert_same_map(found, by_interception(plain, x, rules))
    assert all(parameter.grad is None for parameter in model.parameters()), "relevance is no gradient of a parameter"


def test_it_trains_as_the_plain_model_does():
    plain, x = settle(Plain()).train(), pixels()
    model = Written().double()
    assert not model.blocks[0].training, "built to explain"
    model.load_state_dict(plain.state_dict())
    model.train()
    for trained in (plain, model):
        F.cross_entropy(trained(x), torch.tensor([0, 2])).backward()
    for (name, expected), (_, found) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert expected.grad.any() and torch.equal(found.grad, expected.grad), name


def test_cp_lrp_without_biases_conserves():
    bare = {"norm_layer": partial(nn.LayerNorm, bias=False), "proj_bias": False, "composite": "cp-lrp"}
    blocks = [nn.Block(D, H, qk_norm=True, **bare) for _ in range(2)]
    model, x = settle(torch.nn.Sequential(*blocks)), tokens()
    output, relevance = by_backward(model, x)
    torch.testing.assert_close(relevance.flatten(1).sum(1), value(output), rtol=1e-9, atol=1e-9)


def test_deep_taylor_without_biases_conserves_in_blocks_of_skip_connections():
    options = {"activation": "gelu", "bias": False, "batch_first": True}  # a ReLU may leave z-plus nothing positive
    layer = nn.TransformerEncoderLayer(D, H, 12, composite="deep-taylor", **options)
    output, relevance = by_backward(settle(layer), tokens())
    torch.testing.assert_close(relevance.flatten(1).sum(1), value(output), rtol=1e-9, atol=1e-9)


def test_the_composite_of_a_part_is_its_own():
    block, x = settle(nn.Block(D, H)), tokens()
    block.mlp.fc1.composite = "deep-taylor"
    assert block.composite.name == block.attn.qkv.composite.name == "attnlrp"
    rules = composite.get("attnlrp").but(paths={"mlp.fc1": {"linear": linear.z_plus}})
    assert_same_map(by_backward(block, x)[1], by_interception(block, x, rules))
    block.composite = "cp-lrp"
    assert {part.composite.name for part in block.modules() if isinstance(part, nn.Ruled)} == {"cp-lrp"}
    assert_same_map(by_backward(block, x)[1], by_interception(block, x, "cp-lrp"))
    assert "composite='cp-lrp'" in repr(block.attn.qkv)


def test_layers_given_as_plain_classes_become_drop_ins():
    block = nn.Block(D, H, norm_layer=torch.nn.LayerNorm, act_layer=torch.nn.SiLU, composite="cp-lrp")
    assert isinstance(block.norm1, nn.LayerNorm) and isinstance(block.mlp.act, nn.SiLU)
    assert block.mlp.fc1.composite.name == "cp-lrp"


def test_a_copy_follows_the_same_composite():
    model, x = settle(Written(composite="cp-lrp")), pixels()
    first = by_backward(model, x)[1]
    torch.testing.assert_close(by_backward(copy.deepcopy(model), x)[1], first, rtol=0, atol=0)


def test_it_survives_pickle():
    model, x = settle(Written(composite="cp-lrp")), pixels()  # its blocks hold modules of timm
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(by_backward(again, x)[1], by_backward(model, x)[1])


def test_words_are_explained_at_the_embedding():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(11, D), nn.Embedding(6, D, explained=False)
            self.add, self.layer = nn.Add(), nn.TransformerEncoderLayer(D, H, 12, batch_first=True)

        def forward(self, input_ids):
            return self.layer(self.add(self.words(input_ids), self.places(torch.arange(input_ids.shape[1]))))

    model, ids = settle(Reader()), torch.tensor([[1, 2, 3], [4, 4, 5]])
    value(model(ids)).sum().backward()
    expected = settled_reader(model, ids)
    assert_same_map((model.words.embedded * model.words.embedded.grad).detach(), expected)
    assert model.words.weight.grad is None and model.places.embedded is None
    model.train()
    value(model(ids)).sum().backward()
    assert model.words.weight.grad.any()


def settled_reader(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The interception's map of what comes out of the word embedding."""
    class Rest(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, rows):
            places = self.model.places.weight[:rows.shape[1]]
            return self.model.layer(rows + places)

    return by_interception(Rest(), model.words.weight[ids].detach(), "attnlrp")


# -- constructor, state dict and forward of the originals ------------------------------------------------------------

SINGLE = {
    "Linear": ((4, 3), (2, 4)), "Conv1d": ((4, 3, 2), (2, 4, 6)), "Conv2d": ((4, 2, 3), (2, 4, 5, 5)),
    "Conv3d": ((2, 2, 2), (2, 2, 3, 3, 3)), "ConvTranspose1d": ((4, 3, 2), (2, 4, 6)),
    "ConvTranspose2d": ((4, 2, 3), (2, 4, 5, 5)), "ConvTranspose3d": ((2, 2, 2), (2, 2, 3, 3, 3)),
    "LayerNorm": ((4,), (2, 3, 4)), "RMSNorm": ((4,), (2, 3, 4)), "GroupNorm": ((2, 4), (2, 4, 3)),
    "BatchNorm1d": ((4,), (2, 4, 3)), "BatchNorm2d": ((4,), (2, 4, 3, 3)), "BatchNorm3d": ((2,), (2, 2, 3, 3, 3)),
    "Softmax": ((-1,), (2, 3, 4)), "LogSoftmax": ((-1,), (2, 3, 4)), "Softmin": ((-1,), (2, 3, 4)),
    "Threshold": ((0.1, 0.0), (2, 4))} | {name: ((), (2, 4)) for name in (
        "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Hardswish", "Tanh", "Hardtanh",
        "Tanhshrink", "Softsign", "Sigmoid", "Hardsigmoid", "LogSigmoid", "Softplus", "Softshrink", "Hardshrink")}
PARTS = {"Add", "Mul", "MatMul"}
WHOLE = {"Attention", "Block", "Embedding", "EncoderBlock", "MultiheadAttention", "TransformerDecoderLayer",
         "TransformerEncoderLayer"}


def test_every_drop_in_is_tested():
    exported = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    assert exported == set(SINGLE) | PARTS | WHOLE | {"Ruled", "Replacement"}


SOFTMAX = ("Softmax", "LogSoftmax", "Softmin")


@pytest.mark.parametrize("name, rules", [
    (name, rules) for name in SINGLE for rules in COMPOSITES if not (name in SOFTMAX and rules in HELD)])
def test_single_modules(name, rules):
    arguments, shape = SINGLE[name]
    plain = settle(getattr(torch.nn, name)(*arguments))
    dropin = getattr(nn, name)(*arguments, composite=rules).double()
    dropin.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropin.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    output, found = by_backward(dropin, x)
    assert torch.equal(output, plain(x))
    assert_same_map(found, by_interception(plain, x, rules))


@pytest.mark.parametrize("rules", HELD)
@pytest.mark.parametrize("name", SOFTMAX)
def test_a_softmax_alone_depends_on_nothing_where_it_is_held(name, rules):
    plain, dropin = getattr(torch.nn, name)(-1), getattr(nn, name)(-1, composite=rules)
    x = tokens()
    output = dropin(x.clone().requires_grad_())
    assert torch.equal(output, plain(x)) and not output.requires_grad
    with pytest.raises(IndependentOutput, match="does not depend on the input"):
        by_interception(plain, x, rules)
    values = tokens().requires_grad_()  # what a pattern weighs does depend
    value(dropin(x.clone().requires_grad_()) @ values.mT).sum().backward()
    assert values.grad.all()


def test_an_activation_in_place_leaves_its_input_alone():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    hidden = x * 1
    y = nn.ReLU(inplace=True)(hidden)
    assert torch.equal(hidden, x) and torch.equal(y, x.relu())


@pytest.mark.parametrize("options", [
    {}, {"qkv_bias": True, "gated": True}, {"qk_norm": True, "scale_norm": True, "norm_layer": torch.nn.LayerNorm},
    {"attn_head_dim": 3, "dim_out": 6, "proj_bias": False}], ids=str)
@pytest.mark.parametrize("rules", COMPOSITES)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_of_timm(options, rules, fused):
    from timm.layers import Attention

    plain, dropin = settle(Attention(D, H, **options)), nn.Attention(D, H, composite=rules, **options).double()
    dropin.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropin.state_dict())
    plain.fused_attn = dropin.fused_attn = fused
    x = tokens()
    output, found = by_backward(dropin, x)
    assert torch.equal(output, plain(x))
    assert_same_map(found, by_interception(plain, x, rules))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    for masks in ({"attn_mask": seen}, {"is_causal": True}, {"attn_mask": torch.zeros(5, 5).double()}):
        torch.testing.assert_close(dropin(x.clone().requires_grad_(), **masks), plain(x, **masks))


@pytest.mark.parametrize("options", [
    {}, {"init_values": 0.1, "qkv_bias": True, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    {"drop_path": 0.3, "proj_drop": 0.2, "attn_drop": 0.1, "attn_layer": "attn", "act_layer": torch.nn.ReLU}], ids=str)
def test_block_of_timm(options):
    from timm.models.vision_transformer import Block

    plain, dropin = settle(Block(D, H, **options)), nn.Block(D, H, composite="deep-taylor", **options).double()
    assert [name for name, _ in dropin.named_modules()] == [name for name, _ in plain.named_modules()]
    dropin.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropin.state_dict())
    x = tokens()
    output, found = by_backward(dropin, x)
    assert torch.equal(output, plain(x))
    assert_same_map(found, by_interception(plain, x, "deep-taylor"))


def original_of(name: str) -> type[torch.nn.Module]:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block
    from torchvision.models.vision_transformer import EncoderBlock

    return {"Attention": Attention, "Block": Block, "EncoderBlock": EncoderBlock}.get(name) or getattr(torch.nn, name)


@pytest.mark.parametrize("name", sorted(WHOLE | set(SINGLE)))
def test_constructors_and_forwards_take_what_the_originals_take(name):
    """The same names, kinds and defaults, in the same order; layers by default are drop-ins."""
    given = [one for one in inspect.signature(original_of(name)).parameters.values()
             if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    taken = list(inspect.signature(getattr(nn, name)).parameters.values())
    own = [one.name for one in taken[len(given):]]
    assert own == (["explained", "composite"] if name == "Embedding" else ["composite"])
    for ours, theirs in zip(taken, given, strict=False):
        assert (ours.name, ours.kind) == (theirs.name, theirs.kind)
        assert ours.default == theirs.default or theirs.name.endswith("_layer"), theirs.name
    forwards = [inspect.signature(kind.forward).parameters for kind in (getattr(nn, name), original_of(name))]
    assert [*forwards[0]] == [*forwards[1]]


def test_encoder_block_of_torchvision():
    from torchvision.models.vision_transformer import EncoderBlock

    options = (H, D, 12, 0.1, 0.1)
    plain, dropin = settle(EncoderBlock(*options)), nn.EncoderBlock(*options, composite="deep-taylor").double()
    dropin.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropin.state_dict())
    x = tokens()
    output, found = by_backward(dropin, x)
    torch.testing.assert_close(output, plain(x), rtol=1e-12, atol=1e-12)
    assert_same_map(found, by_interception(plain, x, "deep-taylor"))


@pytest.mark.parametrize("options", [
    {}, {"norm_first": True, "activation": "gelu"}, {"batch_first": True, "bias": False, "layer_norm_eps": 1e-3},
], ids=str)
def test_encoder_layer_of_torch(options):
    plain = settle(torch.nn.TransformerEncoderLayer(D, H, 12, **options))
    dropin = nn.TransformerEncoderLayer(D, H, 12, composite="deep-taylor", **options).double()
    dropin.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropin.state_dict())
    x = tokens()
    output, found = by_backward(dropin, x)
    torch.testing.assert_close(output, plain(x), rtol=1e-12, atol=1e-12)
    assert_same_map(found, by_interception(plain, x, "deep-taylor"))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5 if dropin.self_attn.batch_first else 2).double()
    torch.testing.assert_close(dropin(x.clone().requires_grad_(), src_mask=mask), plain(x, src_mask=mask))


@pytest.mark.parametrize("options", [
    {}, {"norm_first": True, "activation": "gelu"}, {"batch_first": True, "bias": False, "layer_norm_eps": 1e-3},
], ids=str)
def test_decoder_layer_of_torch(options):
    plain = settle(torch.nn.TransformerDecoderLayer(D, H, 12, **options))
    dropin = nn.TransformerDecoderLayer(D, H, 12, composite="deep-taylor", **options).double()
    dropin.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropin.state_dict())
    x, memory = tokens(), tokens()
    leaves = [t.clone().requires_grad_() for t in (x, memory)]
    output = dropin(*leaves)
    value(output).sum().backward()
    torch.testing.assert_close(output, plain(x, memory), rtol=1e-12, atol=1e-12)
    expected = propagate(plain, (x, memory), {}, value, "deep-taylor", ledger=False).relevance
    for place, leaf in enumerate(leaves):
        assert_same_map((leaf * leaf.grad).detach(), expected[str(place)])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 5}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_of_torch(options, batch_first):
    plain = settle(torch.nn.MultiheadAttention(D, H, batch_first=batch_first, **options))
    dropin = nn.MultiheadAttention(D, H, batch_first=batch_first, **options).double()
    dropin.load_state_dict(plain.state_dict())
    plain.load_state_dict(dropin.state_dict())
    rows, length, keys = (2, 4, 6) if batch_first else (4, 2, 6)
    query = tokens(rows, length)
    key, value = (tokens(*((2, keys) if batch_first else (keys, 2)), options.get(name, D)) for name in ("kdim", "vdim"))
    batch, queries = (2, 4) if batch_first else (2, 4)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[1, 4:] = True
    for extra in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(queries, keys).double()},
                  {"attn_mask": torch.rand(batch * H, queries, keys) < 0.2, "key_padding_mask": padding},
                  {"need_weights": False}, {"average_attn_weights": False}):
        expected = plain(query, key, value, **extra)
        found = dropin(query.clone().requires_grad_(), key, value, **extra)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    unbatched = [t[0] if batch_first else t[:, 0] for t in (query, key, value)]
    torch.testing.assert_close(dropin(unbatched[0].clone().requires_grad_(), *unbatched[1:]), plain(*unbatched))


def test_operators():
    a, b = tokens().requires_grad_(), tokens().requires_grad_()
    for part, function in ((nn.Add(), torch.add), (nn.Mul(), torch.mul)):
        assert torch.equal(part(a, b), function(a, b)) and not part.state_dict()
    assert torch.equal(nn.MatMul()(a, b.mT), a @ b.mT)
    value(nn.Mul()(a, b)).sum().backward()
    torch.testing.assert_close((a * a.grad).sum(), value(a * b).sum() / 2)
    torch.testing.assert_close(a * a.grad, b * b.grad)


def test_the_gate_is_held_where_the_composite_says_so():
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    value(nn.Mul(composite="cp-lrp")(nn.SiLU(composite="cp-lrp")(x), y)).sum().backward()
    assert (x.grad is None or not x.grad.any()) and y.grad.any()


# -- given back ----------------------------------------------------------------------------------------------------

def state(model: torch.nn.Module) -> list[object]:
    """All that `replace` might leave behind."""
    modules = [(path, id(module), type(module), module.training, sorted(module.__dict__), len(module._forward_hooks))
               for path, module in model.named_modules()]
    parameters = [(name, id(p), p.data_ptr(), p._version, p.requires_grad, p.grad)
                  for name, p in model.named_parameters()]
    return [*modules, *parameters]


@pytest.mark.parametrize("name", MODELS)
def test_all_is_given_back(name):
    make, inputs = MODELS[name]
    model, x = settle(make()), inputs()
    list(model.children())[-1].training = True
    next(model.parameters()).requires_grad_(False)
    before, plain = state(model), by_backward(model, x)
    model.zero_grad()
    replacement = nn.replace(model)
    assert replacement.replaced and not replacement.unseen
    assert f"{len(replacement.replaced)} modules" in repr(replacement)
    assert all(isinstance(model.get_submodule(path), nn.Ruled) for path in replacement.replaced)
    assert [id(module) for module in model.modules()] == [entry[1] for entry in before[:len(list(model.modules()))]]
    by_backward(model, x)
    assert all(parameter.grad is None for parameter in model.parameters())
    replacement.undo()
    replacement.undo()
    assert state(model) == before
    for found, expected in zip(by_backward(model, x), plain, strict=True):
        assert torch.equal(found, expected)


def test_all_is_given_back_after_an_exception():
    model = tiny.vit().train()
    before = state(model)
    with pytest.raises(RuntimeError), nn.replace(model, "cp-lrp"):
        model(torch.zeros(1, 4, 24, 24).double())
    assert state(model) == before


def test_the_output_is_that_of_the_plain_model_without_gradients():
    model, x = encoder().double().eval(), tokens()
    model.enable_nested_tensor = model.use_nested_tensor = True  # torch's fast path, with ragged rows
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
    with nn.replace(model):
        with torch.no_grad():
            assert torch.equal(model(x, src_key_padding_mask=PADDING), expected)
        for kept in (model(x, src_key_padding_mask=PADDING),
                     model(x.clone().requires_grad_(), src_key_padding_mask=PADDING)):
            torch.testing.assert_close(kept[~PADDING], expected[~PADDING])  # the fast path leaves zeros in the rest


def test_a_written_encoder_takes_the_fast_path_where_nothing_requires_a_gradient():
    model = torch.nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 12, batch_first=True), 2).double().eval()
    x = tokens()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
    assert torch.equal(model.requires_grad_(False)(x, src_key_padding_mask=PADDING), expected)
    kept = model(x.clone().requires_grad_(), src_key_padding_mask=PADDING)
    torch.testing.assert_close(kept[~PADDING], expected[~PADDING])


def test_a_replaced_model_can_be_trained_and_explained_in_between():
    model, x = settle(tiny.vit()), pixels()
    expected = by_backward(model, x)[1]
    with nn.replace(model):
        relevance = by_backward(model, x)[1]
        model.train()
        torch.testing.assert_close(by_backward(model, x)[1], expected)
        model.eval()
        assert torch.equal(by_backward(model, x)[1], relevance)


def test_the_mode_it_was_in_comes_back():
    model = tiny.vit()
    with nn.replace(model):
        model.train()
    assert not any(module.training for module in model.modules())


def test_a_replaced_model_moves_and_saves_as_ever():
    model, x = settle(tiny.vit()), pixels()
    keys = list(model.state_dict())
    with nn.replace(model, "cp-lrp"):
        expected = by_backward(model, x)[1]
        assert list(model.state_dict()) == keys
        saved = io.BytesIO()
        torch.save(model.state_dict(), saved)
        saved.seek(0)
        model.load_state_dict(torch.load(saved, weights_only=True))
        assert torch.equal(by_backward(model, x)[1], expected)
        found = by_backward(model.float(), x.float())[1]
    assert found.dtype == torch.float32 and list(model.state_dict()) == keys
    assert_same_map(found.double(), expected, 1e-4)


def test_a_copy_of_a_replaced_model_stays_one():
    model, x = settle(tiny.vit()), pixels()
    plain = by_backward(model, x)[1]
    with nn.replace(model, "cp-lrp"):
        expected = by_backward(model, x)[1]
        copied = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
    assert torch.equal(by_backward(model, x)[1], plain)
    with nn.replace(copied, "attnlrp"):  # it is lent to nobody, so that it can be
        assert not torch.allclose(by_backward(copied, x)[1], expected)
    for other in (copied, again):
        assert torch.equal(by_backward(other, x)[1], expected)


def test_threads_do_not_meet():
    model, x = settle(tiny.vit(depth=1)), pixels()
    with nn.replace(model), ThreadPoolExecutor(4) as pool:
        expected = by_backward(model, x)[1]
        assert all(torch.equal(found, expected) for _, found in pool.map(lambda _: by_backward(model, x), range(8)))


def test_what_is_recomputed_follows_the_rules_too():
    model, x = settle(tiny.vit()), pixels()
    expected = by_interception(model, x, "attnlrp")
    model.set_grad_checkpointing(True)
    with nn.replace(model, "attnlrp"):
        assert_same_map(by_backward(model, x)[1], expected)


def test_a_replaced_model_can_be_explained():
    model, x = settle(tiny.vit()), pixels()
    expected = explain(model, x, 1, method="cp-lrp")
    with nn.replace(model, "attnlrp"):
        assert torch.equal(explain(model, x, 1, method="cp-lrp").map, expected.map)
        found = by_backward(model, x)[1]
    assert_same_map(found, by_interception(model, x, "attnlrp"))


def test_a_model_of_drop_ins_gets_its_own_composite_back():
    model, x = settle(Written(composite="attnlrp")), pixels()
    own = by_backward(model, x)[1]
    with nn.replace(model, "cp-lrp") as replacement:
        assert model.head.composite.name == "cp-lrp" and "patches" in replacement.replaced
        assert_same_map(by_backward(model, x)[1], by_interception(model, x, "cp-lrp"))
    assert model.head.composite.name == "attnlrp"
    assert torch.equal(by_backward(model, x)[1], own)


def test_hooks_and_shared_modules_stay():
    shared = torch.nn.Linear(D, D)
    model, seen = settle(torch.nn.Sequential(shared, torch.nn.GELU(), shared)), []
    handle = shared.register_forward_hook(lambda *_: seen.append(1))
    expected = by_interception(model, tokens(), "attnlrp")
    assert expected.any() and len(seen) == 2
    with nn.replace(model) as replacement:
        assert replacement.replaced == ("0", "1")
        model(tokens().requires_grad_())
    assert len(seen) == 4
    handle.remove()


def test_a_parametrized_module_keeps_its_parametrization():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(D, 3)).double()
    model, x = torch.nn.Sequential(layer).eval(), tokens()
    expected = by_interception(model, x, "attnlrp-gamma")
    with nn.replace(model, "attnlrp-gamma"):
        assert isinstance(model[0], nn.Linear)
        assert_same_map(by_backward(model, x)[1], expected)
    assert type(model[0]) is type(layer)


# -- other people's modules ------------------------------------------------------------------------------------------

class Quick(torch.nn.Module):
    """An activation of several calls."""

    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class Scaled(torch.nn.Module):
    """A norm written out."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("rules", COMPOSITES)
def test_modules_without_parts_need_no_drop_in(rules):
    layers = torch.nn.Linear(D, D), Quick(), Scaled(), torch.nn.Dropout(), torch.nn.Linear(D, 3)
    model = settle(torch.nn.Sequential(*layers))
    x = tokens()
    with nn.replace(model, rules) as replacement:
        assert replacement.replaced == ("0", "1", "2", "4")
        assert isinstance(model[1], Quick) and isinstance(model[2], Scaled)
        output, found = by_backward(model, x)
    torch.testing.assert_close(output, model(x))
    assert_same_map(found, by_interception(model, x, rules))


class Residual(torch.nn.Module):
    """A block of one's own: what it computes between its parts is in no module."""

    def __init__(self):
        super().__init__()
        self.qkv, self.gate = torch.nn.Linear(D, 3 * D), torch.nn.Linear(D, D)
        self.act = Quick()

    def forward(self, x):
        q, k, v = self.qkv(F.layer_norm(x, (D,))).chunk(3, -1)
        x = x + F.softmax(q @ k.mT / D ** 0.5, -1) @ v
        return x + self.act(self.gate(x)) * x


@pytest.mark.parametrize("rules", COMPOSITES)
def test_what_a_forward_computes_between_its_parts_follows_the_composite(rules):
    model, x = settle(torch.nn.Sequential(Residual(), Residual())), tokens()
    rules = composite.get(rules).but(paths={"1": {"add": add.ratio}})  # at the path of the module that computes
    expected, plain = by_interception(model, x, rules), model(x)
    with nn.replace(model, rules) as replacement:
        output, found = by_backward(model, x)
    assert not replacement.unseen and {"0", "0.qkv", "1", "1.act"} <= set(replacement.replaced)
    torch.testing.assert_close(output, plain, rtol=1e-12, atol=1e-12)
    assert_same_map(found, expected)


def test_rows_that_cannot_be_told_apart_are_said():
    model, x = settle(tokens_first(encoder(batch_first=False))), tokens(2, 4)  # (4, 2, 8) inside: rows may be folded
    with nn.replace(model, "deep-taylor"), pytest.warns(UserWarning, match=r"\(4, 2, 8\) holds the 2 rows .* is open"):
        by_backward(model, x)
    with nn.replace(model, "deep-taylor"):
        alone = torch.cat([by_backward(model, row)[1] for row in x.split(1)])
    assert_same_map(alone, by_interception(model, x, "deep-taylor"))


def test_a_part_in_train_mode_is_plain():
    model, x = settle(torch.nn.Sequential(Residual(), torch.nn.Linear(D, D))), tokens()
    plain = composite.get("gradient").rules
    expected = by_interception(model, x, composite.get("cp-lrp").but(paths={"0": plain, "0.*": plain}))
    with nn.replace(model, "cp-lrp"):
        whole = by_backward(model, x)[1]
        model[0].train()
        assert_same_map(by_backward(model, x)[1], expected)
    assert not torch.allclose(whole, expected)


def test_a_forward_set_on_the_instance_is_not_passed_over_in_silence():
    model = torch.nn.Sequential(*(torch.nn.Linear(D, D) for _ in range(8)))
    for module in model[1:]:
        module.forward = lambda x: x
    with pytest.warns(UserWarning, match=r"plain gradient: 1, 2, 3, 4, 5 and 2 more.*relprop\.explain") as caught:
        replacement = nn.replace(model)
    assert caught[0].filename == __file__
    with replacement:
        assert replacement.replaced == ("0",) and replacement.unseen == tuple("1234567")


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match=r"replace model\._orig_mod"):
        nn.replace(torch.compile(torch.nn.Linear(2, 2), backend="eager"))


def test_an_op_without_a_rule_is_an_error_where_it_is():
    class Sorted(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    model = torch.nn.Sequential(Sorted())
    with nn.replace(model), pytest.raises(UnruledOp, match="'0'"):
        model(torch.eye(3).requires_grad_())


# -- bad input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, error, said", [
    (lambda: nn.replace("vit"), TypeError, "expected a torch.nn.Module, got str"),
    (lambda: nn.replace(torch.nn.Sequential(torch.nn.Dropout())), ValueError, "nothing to replace in Sequential"),
    (lambda: nn.replace(torch.nn.Linear(2, 2), "lrp"), ValueError, "unknown composite 'lrp'"),
    (lambda: nn.Linear(2, 2, composite="lrp"), ValueError, "unknown composite 'lrp'"),
    (lambda: nn.Linear(2), TypeError, "out_features"),
    (lambda: nn.Attention(7, 2), ValueError, "dim 7 is not a multiple of num_heads 2"),
    (lambda: nn.Attention(8, 2, qk_norm=True), ValueError, "need a norm_layer"),
    (lambda: nn.Block(8, 2, attn_layer="diff"), ValueError, "attn_layer 'diff' has no drop-in"),
    (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), ValueError, "no rule for add_bias_kv"),
    (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), ValueError, "no rule for add_zero_attn"),
], ids=lambda part: part if isinstance(part, str) else None)
def test_bad_input(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_model_is_replaced_once_at_a_time():
    model = tiny.vit()
    before = state(model)
    with nn.replace(model):
        with pytest.raises(ValueError, match="replaced already"):
            nn.replace(model.blocks, "cp-lrp")
        assert model.head.composite.name == "attnlrp"
    assert state(model) == before


def test_attention_with_added_keys_is_an_error_when_it_runs():
    model = torch.nn.MultiheadAttention(D, H, add_bias_kv=True)
    x = torch.randn(3, 2, D, requires_grad=True)
    with nn.replace(model), pytest.raises(NotImplementedError, match="bias_kv"):
        model(x, x, x)
