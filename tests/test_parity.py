"""Relevance equals what the code of the published methods computes, through models as their libraries ship them.

The cases hold weights, inputs and the peers' outputs (LXT for AttnLRP and CP-LRP, zennit for the rules of linear maps).
LXT departs from its paper in one number: it divides by x + 1e-10, whatever the sign of x, in activations and around
zennit's rules, which moves its relevance by up to 1e-8. The presets do not follow; the tests run them as they are, and
once more with that number put in, to show that nothing else differs.
"""
from __future__ import annotations

import json
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED
from torch import Tensor, nn

from relprop import composite as composites
from relprop.composite import UP_TO_BIASES, Composite
from relprop.numerics import stabilize
from relprop.ops import activation, linear, norm, pool
from relprop.relevance import Propagation, propagate
from relprop.trace import Tap

REFERENCE = SHARED / "reference"
CASES = sorted(path.stem for path in REFERENCE.glob("*.json") if path.stem.startswith(("lxt_", "zennit_")))

# of float64 outputs, relative to the largest entry
SAME = 1e-9  # the peer's arithmetic, step by step
OFFSET = 1e-8  # LXT's 1e-10 under x, where an activation is read near zero
FLOAT32_INSIDE = 2e-6  # transformers norms, rotates, or takes the softmax in float32 in a float64 model too
GRADIENT = 5e-6  # the same for the plain gradient, whose terms cancel
CONV, EXPLICIT = 1e-10, 1e-4
FLOAT32 = 1e-4  # of outputs that the reference stores in float32 only
SINGLE = ("gemma3", "gptneox", "llama", "mistral", "qwen2", "qwen3")

Runs = list[tuple[str, ...]]


def shifted(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """LXT's activation rule: f(x) / (x + 1e-10), without the sign."""
    return g * y / (x + 1e-10)


def around(x: Tensor, y: Tensor, g: Tensor, affine: linear.Affine, *, gamma: float) -> linear.Shares:
    """LXT around zennit's gamma rule: back from relevance to relevance per unit by x moved 1e-10 away from zero."""
    shares = linear.gamma(x, y, g, affine, gamma=gamma, eps=ZENNIT_EPS)
    return shares._replace(x=shares.x * x / stabilize(x, 1e-10))


@cache
def case(name: str) -> SimpleNamespace:
    """A case as it is stored: its description, and the model's tensors, the inputs and the outputs, by name."""
    from safetensors.torch import load_file

    tensors = load_file(REFERENCE / f"{name}.safetensors")

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    about = json.loads((REFERENCE / f"{name}.json").read_text())
    return SimpleNamespace(name=name, about=about, config=about["config"], model=under("model."), input=under("input."),
                           out={**under("out."), **under("out64.")})


def runs(prefix: str, explicit: bool = False) -> Runs:
    """Every case, method and target with an output of its own: one propagation each."""
    names = [name for name in CASES if name.startswith(prefix) and ("explicit" in name) == explicit]
    stored = {name: json.loads((REFERENCE / f"{name}.json").read_text())["outputs"] for name in names}
    return sorted({(name, *key.rsplit(".", 2 if name.startswith("lxt") else 1)[:-1])
                   for name in names for key in stored[name] if "." in key})


def parametrize(names: str, rows: list[tuple[str, ...]]) -> pytest.MarkDecorator:
    skip = pytest.mark.skip(reason=f"no {REFERENCE}: reference outputs do not ship with relprop")
    missing = pytest.param(*[None] * len(names.split(",")), marks=skip)
    return pytest.mark.parametrize(names, rows or [missing], ids=str)


def wanted_of(stored: SimpleNamespace, *run: str) -> dict[str, Tensor]:
    """The peer's outputs of one method and target."""
    prefix = ".".join((*run, ""))
    return {key.removeprefix(prefix): value for key, value in stored.out.items() if key.startswith(prefix)}


def assert_parity(found: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    """The largest difference, relative to the largest entry of the peer's output."""
    tolerance = tolerance if wanted.dtype == torch.float64 else max(tolerance, FLOAT32)
    found, wanted = found.double().reshape(wanted.shape), wanted.double()
    assert wanted.abs().max() > 0, f"{name} is empty, so that anything would agree with it"
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, f"{name}: {error:.2e} of the largest entry, more than {tolerance:.0e}"


# -- LXT on transformers ---------------------------------------------------------------------------------------------

LLAMA = {"layer": "model.layers.{}", "heads": ".self_attn.o_proj", "neurons": ".mlp.down_proj",
         "qkv_q": ".self_attn.q_proj", "qkv_k": ".self_attn.k_proj", "qkv_v": ".self_attn.v_proj"}
PLACES = {
    "BertForSequenceClassification": {
        "layer": "bert.encoder.layer.{}", "heads": ".attention.output.dense", "neurons": ".output.dense",
        "qkv_q": ".attention.self.query", "qkv_k": ".attention.self.key", "qkv_v": ".attention.self.value"},
    "DistilBertForSequenceClassification": {
        "layer": "distilbert.transformer.layer.{}", "heads": ".attention.out_lin", "neurons": ".ffn.lin2",
        "qkv_q": ".attention.q_lin", "qkv_k": ".attention.k_lin", "qkv_v": ".attention.v_lin"},
    "GPT2LMHeadModel": {
        "layer": "transformer.h.{}", "heads": ".attn.c_proj", "neurons": ".mlp.c_proj", "qkv_c_attn": ".attn.c_attn"},
    "GPTNeoXForCausalLM": {
        "layer": "gpt_neox.layers.{}", "heads": ".attention.dense", "neurons": ".mlp.dense_4h_to_h"},
    "LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA, "Qwen2ForCausalLM": LLAMA, "Qwen3ForCausalLM": LLAMA,
    "Gemma3ForCausalLM": LLAMA}
"""Where each family keeps the tensors that the peer reports, by module path."""

COMPOSITES = {"attnlrp": "attnlrp", "cplrp": "cp-lrp", "gxi": "gradient"}


def as_peer(name: str) -> Composite:
    """A composite with LXT's offset in its activations, except for DistilBERT's ReLU, which LXT leaves alone."""
    composite = composites.get(name)
    if name == "gradient":
        return composite
    return composite.but(f"{name} as in LXT", rules={"activation": shifted},
                         paths={"": {"activation": activation.identity}})



@cache
def language_model(name: str) -> nn.Module:
    import transformers

    stored = case(name)
    config = getattr(transformers, stored.config["config_cls"])(**stored.config["config"])
    model = getattr(transformers, stored.config["cls"])(config).double().eval()
    missing, unexpected = model.load_state_dict({k: v.double() for k, v in stored.model.items()}, strict=False)
    assert not unexpected and all("lm_head" in key for key in missing), (missing, unexpected)
    model.tie_weights()
    return model


def weighted(terms: list[dict[str, object]]) -> object:
    """The target of a case: a weighted sum of logits, at a position for language models."""
    def value(output: object) -> Tensor:
        total = 0
        for term in terms:
            logits = output.logits if term["position"] is None else output.logits[:, term["position"]]
            chosen = logits.sum(-1) if term["index"] == "all" else logits[:, term["index"]]
            total = total + term["weight"] * chosen
        return total
    return value


def taps(places: dict[str, str], layers: int, middle: int) -> dict[str, Tap]:
    """The peer's tensors: what each layer returns, what the projections of a middle layer return or read."""
    def at(part: str, layer: int) -> str:
        return places["layer"].format(layer) + places[part]

    wanted = {f"hidden {i + 1}": Tap(places["layer"].format(i)) for i in range(layers)}
    wanted |= {f"heads {i}": Tap(at("heads", i), "linear", "input") for i in range(layers)}
    wanted |= {part: Tap(at(part, middle)) for part in places if part.startswith("qkv")}
    return wanted | {"mlp_neurons": Tap(at("neurons", middle), "linear", "input")}


def outputs(found: Propagation, about: dict[str, object], output: str) -> Tensor:
    """One of the peer's outputs, from what was found. A tensor that nothing reaches back to (held queries) has none."""
    leaf = found.relevance["input_ids"]  # (1, T, D)
    tapped = found.tapped
    layers, heads = (about["config"]["config"].get(a, about["config"]["config"].get(b)) for a, b in (
        ("num_hidden_layers", "n_layers"), ("num_attention_heads", "n_heads")))
    layers = layers or about["config"]["config"]["n_layer"]
    if output == "token":
        return leaf.sum(-1)
    if output == "embedding_features":
        return leaf
    if output == "hidden":
        return torch.cat([leaf.sum(-1), *(tapped[f"hidden {i + 1}"].sum(-1) for i in range(layers))])
    if output == "hidden_features_mid":
        return tapped[f"hidden {about['mlp_layer'] + 1}"]
    if output == "heads":
        return torch.cat([tapped[f"heads {i}"].unflatten(-1, (heads, -1)).sum(-1) for i in range(layers)])
    if output == "qkv_c_attn":
        return tapped[output].unflatten(-1, (3, -1)).sum(-1)
    if output.startswith("qkv"):
        return tapped[output].sum(-1) if output in tapped else torch.zeros(leaf.shape[:2])
    return tapped[output]


TEXT = [run for run in runs("lxt_") if "vit" not in run[0]]


@parametrize("name,method,target", TEXT)
def test_language_model_as_it_comes(name, method, target):
    """The preset, in the attention backend that transformers chooses."""
    tolerance = OFFSET if name.split("_")[1] not in SINGLE else GRADIENT if method == "gxi" else FLOAT32_INSIDE
    compare_language_model(name, method, target, composites.get(COMPOSITES[method]), tolerance)


@parametrize("name,method,target", [run for run in TEXT if run[2] == "logit_top"])  # its outputs are the most
def test_language_model_as_the_peer_ran_it(name, method, target):
    """LXT's 1e-10 put in, eager attention as in the reference."""
    compare_language_model(name, method, target, as_peer(COMPOSITES[method]), SAME, backend="eager")


@parametrize("name,method,target", runs("lxt_explicit_", explicit=True))
def test_explicit_variant(name, method, target):
    """LXT's first implementation adds unsigned epsilons of 1e-6 to 1e-8 to its denominators, which neither its
    successor nor we do: those two differ by up to 4.5e-5, as the `.json` of the case records."""
    composite = composites.get(COMPOSITES[method.removeprefix("explicit_")])
    compare_language_model(name, method, target, composite, EXPLICIT)


def compare_language_model(name: str, method: str, target: str, composite: Composite, tolerance: float, *,
                           backend: str = "sdpa") -> None:
    stored = case(name)
    about, places = stored.about, PLACES[stored.config["cls"]]
    model = language_model(name)
    model.set_attn_implementation(backend)
    wanted = wanted_of(stored, method, target)
    assert "token" in wanted
    found = propagate(model, (), stored.input, weighted(about["targets"][target]), composite,
                      taps=taps(places, model.config.num_hidden_layers, about["mlp_layer"] or 0))
    if "logits" in stored.out:
        assert_parity(found.output.logits.detach(), stored.out["logits"], max(tolerance, 1e-6), "logits")
    for output, peer in wanted.items():
        if method.endswith("cplrp") and output in ("qkv_q", "qkv_k"):
            assert not peer.any() and output not in found.tapped  # the pattern is held: queries get nothing
        else:
            assert_parity(outputs(found, about, output), peer, tolerance, output)


# -- LXT on vision transformers --------------------------------------------------------------------------------------

GAMMAS = {"gamma_conv0p25_lin0p05": (0.25, 0.05), "gamma_conv0p1_lin0": (0.1, 0.0), "gamma_conv100_lin1": (100.0, 1.0)}
ZENNIT_EPS = 1e-6  # the stabilizer of every rule of zennit, which LXT takes its gamma rule from


VISION = [run for run in runs("lxt_") if "vit" in run[0]]


def vision_composite(method: str, library: str, peer: bool) -> Composite:
    """The peer's method: AttnLRP or CP-LRP, with or without zennit's gamma. `peer`: with LXT's 1e-10 put in."""
    base = COMPOSITES["cplrp" if method.startswith("gamma") else method.partition("_gamma")[0]]
    composite = as_peer(base) if peer else composites.get(base)
    if "gamma" not in method:
        return composite
    conv, dense = GAMMAS[method[method.index("gamma"):]]
    gamma = around if peer else partial(linear.gamma, eps=ZENNIT_EPS)
    composite = composite.but(method, rules={"conv": partial(gamma, gamma=conv), "linear": partial(gamma, gamma=dense)})
    if library != "torchvision":
        return composite
    # torch's multi-head attention uses its projections as tensors, so that zennit's hooks on modules never fire there
    return composite.but(method, modules={nn.MultiheadAttention: {"linear": linear.zero}})


@cache
def vision_model(name: str) -> nn.Module:
    stored = case(name)
    if stored.config["library"] == "timm":
        from timm.models.vision_transformer import VisionTransformer
    else:
        from torchvision.models.vision_transformer import VisionTransformer
    model = VisionTransformer(**stored.config["kwargs"]).double().eval()
    model.load_state_dict(stored.model)
    return model


VISION_PLACES = {
    "timm": ("norm_pre", "blocks.{}", "blocks.{}.mlp.fc2"),
    "torchvision": ("encoder.dropout", "encoder.layers.encoder_layer_{}", "encoder.layers.encoder_layer_{}.mlp.3")}


@parametrize("name,method,target", VISION)
def test_vision_transformer_as_it_comes(name, method, target):
    compare_vision_transformer(name, method, target, peer=False)


@parametrize("name,method,target", [run for run in VISION if run[2] == "logit_top"])
def test_vision_transformer_as_the_peer_ran_it(name, method, target):
    """LXT's 1e-10 put in."""
    compare_vision_transformer(name, method, target, peer=True)


def compare_vision_transformer(name: str, method: str, target: str, *, peer: bool) -> None:
    """For timm the peer ran a ViT of transformers with the same weights, eager, whose softmax is in float32."""
    stored = case(name)
    start, block, down = VISION_PLACES[stored.config["library"]]
    depth = stored.config["kwargs"].get("depth", stored.config["kwargs"].get("num_layers"))
    hidden = {"hidden 0": Tap(start), **{f"hidden {i + 1}": Tap(block.format(i)) for i in range(depth)}}
    neurons = {"mlp_neurons": Tap(down.format(stored.about["mlp_layer"]), "linear", "input")}
    terms = stored.about["targets"][target]
    found = propagate(vision_model(name), (stored.input["pixel_values"].double(),), {},
                      lambda logits: sum(weight * logits[:, index] for index, weight in terms),
                      vision_composite(method, stored.config["library"], peer), taps={**hidden, **neurons})
    tolerance = FLOAT32_INSIDE if stored.config["library"] == "timm" else SAME if peer else OFFSET
    pixels = found.relevance["0"]
    ours = {"pixels": pixels.sum(1), "pixels_rgb": pixels, "mlp_neurons": found.tapped["mlp_neurons"],
            "hidden": torch.stack([found.tapped[key].sum(-1) for key in hidden])}
    wanted = wanted_of(stored, method, target)
    assert "pixels" in wanted
    for output, theirs in wanted.items():
        assert_parity(ours[output], theirs, tolerance, output)


# -- zennit ----------------------------------------------------------------------------------------------------------

LAYERS = {
    "conv": lambda i, o, kernel, stride, padding: nn.Conv2d(i, o, kernel, stride, padding), "bn": nn.BatchNorm2d,
    "lin": nn.Linear, "avg": nn.AvgPool2d, "max": nn.MaxPool2d, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU,
    "tanh": nn.Tanh, "flat": nn.Flatten}


@cache
def network(name: str) -> nn.Sequential:
    stored = case(name)
    model = nn.Sequential(*(LAYERS[kind](*sizes) for kind, *sizes in stored.config["layers"])).double().eval()
    model.load_state_dict(stored.model)
    return model


def zennit_composite(method: str, config: dict[str, object]) -> Composite:
    """zennit's composite: activations and batch norm passed, average pools stabilized, first layer by path."""
    stable = {"eps": ZENNIT_EPS}
    epsilon, plus = partial(linear.epsilon, **stable), partial(linear.z_plus, bias=True, **stable)
    alpha_beta, gamma = partial(linear.alpha_beta, **stable), partial(linear.gamma, gamma=config["gamma"], **stable)
    box = partial(linear.z_box, low=config["low"], high=config["high"], **stable)
    square, flat = partial(linear.w_square, **stable), partial(linear.flat, **stable)
    both = {  # rule of convolutions, of linear layers, of the first layer
        "EpsilonGammaBox": (gamma, epsilon, box), "EpsilonPlus": (plus, epsilon, None),
        "EpsilonAlpha2Beta1": (alpha_beta, epsilon, None), "EpsilonPlusFlat": (plus, epsilon, flat),
        "EpsilonAlpha2Beta1Flat": (alpha_beta, epsilon, flat), "epsilon_everywhere_1e-6": (epsilon, epsilon, None),
        "epsilon_everywhere_0p25": (*[partial(linear.epsilon, eps=0.25)] * 2, None),
        "zplus_everywhere_zero_bias": (*[partial(linear.z_plus, **stable)] * 2, None),
        "alpha2beta1_everywhere_zero_bias": (*[partial(alpha_beta, bias=False)] * 2, None),
        "gamma_everywhere": (gamma, gamma, None), "first_wsquare_rest_epsilon": (epsilon, epsilon, square)}
    conv, dense, first = both[method]
    rules = {"conv": conv, "linear": dense, "norm": norm.identity, "activation": activation.identity}
    return Composite(method, UP_TO_BIASES, rules, modules={nn.AvgPool2d: {"pool": partial(pool.epsilon, **stable)}},
                     paths={"0": {"conv": first}} if first else {})


@parametrize("name,method", runs("zennit_"))
def test_zennit(name, method):
    """zennit starts with relevance 1 at the explained class, which is what a logit divided by its own value carries."""
    stored = case(name)
    rows = torch.arange(len(stored.input["target"]))

    def value(logits: Tensor) -> Tensor:
        logit = logits[rows, stored.input["target"]]
        return logit / logit.detach()

    wanted = wanted_of(stored, method)
    inner = {key: Tap(key.removeprefix("layer").removesuffix("_output")) for key in wanted if key != "input"}
    found = propagate(network(name), (stored.input["x"].double(),), {}, value, zennit_composite(method, stored.config),
                      taps=inner)
    assert len(wanted) > 4
    for output, peer in wanted.items():
        assert_parity(found.relevance["0"] if output == "input" else found.tapped[output], peer, CONV, output)


def test_parity_fails_where_a_rule_is_wrong():
    wanted = torch.randn(5, dtype=torch.float64)
    assert_parity(wanted, wanted, SAME, "itself")
    with pytest.raises(AssertionError, match="largest entry"):
        assert_parity(wanted * 1.01, wanted, SAME, "scaled")
    with pytest.raises(AssertionError, match="empty"):
        assert_parity(torch.zeros(5), torch.zeros(5), SAME, "empty")
