"""Composites: which rule where, as a value.

A composite names one rule for every kind of op, and exceptions by module type and by module path. The presets below
are the published methods; `Composite.but` makes a new one from any of them.

References: Achtibat et al. 2024 (AttnLRP: attention-aware layer-wise relevance propagation for transformers), Ali et
al. 2022 (XAI for transformers: better explanations through conservative propagation), Montavon et al. 2017 (Explaining
nonlinear classification decisions with deep Taylor decomposition), Bach et al. 2015 (On pixel-wise explanations), Edin
et al. 2025 (GIM: improved interpretability for large language models).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from .ops import KINDS, activation, add, linear, matmul, mul, norm, softmax

STRICT, UP_TO_BIASES, NOT = "strictly conservative", "conservative up to biases", "not conservative"

Rule = Callable[..., Any]
Rules = Rule | Mapping[str, Rule]
"""One rule for every kind of op that it fits, or a rule by kind."""


@dataclass(frozen=True)
class Composite:
    """Which rule each op of a model follows.

    The most particular wins: a module path (shell pattern, "blocks.0.attn.*"), then a module type, then the kind of op.
    `pixels` is the rule of the linear op that reads the explained input itself, such as a z-box for images.

    Args:
        name: what results and reports call it.
        conservation: one of "strictly conservative", "conservative up to biases", "not conservative".
        rules: a rule for each kind of op; kinds that are missing follow the plain gradient.
        modules: exceptions by module type, for the ops that the module itself calls.
        paths: exceptions by module path.
        pixels: rule of the first linear op over a floating input.
        points: where on the straight way from a text that says nothing to the one explained the rules are applied, in
            (0, 1]; the mean counts. 1 is the text itself. See `relprop.way`; pictures and models without a mask token
            are explained at the input alone.
    Raises: ValueError for an unknown kind of op or conservation class, TypeError for a rule that cannot be called.
    """

    name: str
    conservation: str
    rules: Mapping[str, Rule]
    modules: Mapping[type, Rules] = field(default_factory=dict)
    paths: Mapping[str, Rules] = field(default_factory=dict)
    pixels: Rule | None = None
    points: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.points or not all(0 < point <= 1 for point in self.points):
            raise ValueError(f"points are places on the way to the input, in (0, 1], got {self.points}")
        if self.conservation not in (STRICT, UP_TO_BIASES, NOT):
            raise ValueError(f"conservation must be {STRICT!r}, {UP_TO_BIASES!r} or {NOT!r}, got {self.conservation!r}")
        for rules in (self.rules, *self.modules.values(), *self.paths.values()):
            _check(rules)

    def rule(self, kind: str, path: str, module_type: type | None) -> Rule | None:
        """The rule of an op of `kind` called by the module at `path`; None for the plain gradient.

        The fused attention follows the pair of the rules for "matmul" and "softmax".
        """
        if kind == "attention":
            return self._single("matmul", path, module_type), self._single("softmax", path, module_type)
        return self._single(kind, path, module_type)

    def _single(self, kind: str, path: str, module_type: type | None) -> Rule | None:
        for pattern, rules in self.paths.items():
            if fnmatchcase(path, pattern) and (rule := _of(rules, kind)) is not None:
                return rule
        for wanted, rules in self.modules.items():
            if module_type is not None and issubclass(module_type, wanted) and (rule := _of(rules, kind)) is not None:
                return rule
        return self.rules.get(kind)

    def but(self, name: str | None = None, *, conservation: str | None = None, pixels: Rule | None = None,
            modules: Mapping[type, Rules] | None = None, paths: Mapping[str, Rules] | None = None,
            rules: Mapping[str, Rule] | None = None) -> "Composite":
        """This composite with some rules replaced; what is given here comes before what was there."""
        modules, paths = modules or {}, paths or {}
        return replace(self, name=name or f"{self.name}*", conservation=conservation or self.conservation,
                       pixels=pixels or self.pixels, rules={**self.rules, **(rules or {})},
                       modules={**modules, **{t: r for t, r in self.modules.items() if t not in modules}},
                       paths={**paths, **{p: r for p, r in self.paths.items() if p not in paths}})

    def boxed(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "Composite":
        """This composite with the box of a z-box at the pixels: black and white, 0 and 1, after (p - mean) / std.

        Args: mean, std: of each channel; where they are not known, each row's own least and greatest entry is the box.
        """
        if self.pixels is not linear.z_box or mean is None or std is None:
            return self
        mean, std = (torch.tensor(channel).reshape(1, -1, 1, 1) for channel in (mean, std))
        return replace(self, pixels=partial(linear.z_box, low=(0 - mean) / std, high=(1 - mean) / std))

    def describe(self) -> dict[str, str]:
        """Its rules in words, for the provenance of a result."""
        words = {kind: _name(rule) for kind, rule in self.rules.items()}
        words |= {f"{t.__name__}": _name(rules) for t, rules in self.modules.items()}
        words |= {pattern: _name(rules) for pattern, rules in self.paths.items()}
        points = {} if self.points == (1.0,) else {"points": ", ".join(f"{point:g}" for point in self.points)}
        return words | ({"pixels": _name(self.pixels)} if self.pixels else {}) | points


def _of(rules: Rules, kind: str) -> Rule | None:
    return rules.get(kind) if isinstance(rules, Mapping) else rules


def _check(rules: Rules) -> None:
    for kind, rule in (rules.items() if isinstance(rules, Mapping) else [(None, rules)]):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind of op {kind!r}; the kinds are {', '.join(KINDS)}")
        if not callable(rule):
            raise TypeError(f"a rule is a function of tensors, got {rule!r} for {kind or 'a module'}")


def _name(rules: Rules) -> str:
    if isinstance(rules, Mapping):
        return ", ".join(f"{kind}: {_name(rule)}" for kind, rule in rules.items())
    if isinstance(rules, partial):
        options = ", ".join(f"{k}={_name(v) if callable(v) else v}" for k, v in rules.keywords.items()
                            if not isinstance(v, torch.Tensor))
        return f"{_name(rules.func)}({options})"
    return f"{rules.__module__.rsplit('.', 1)[-1]}.{rules.__name__}"


def attnlrp() -> Composite:
    """AttnLRP (Achtibat et al. 2024): LRP-0 in linear maps, half to each factor of a product, the softmax's Taylor
    expansion, activations passed, the norms' scale held. Not conservative: the softmax keeps its constant part.
    """
    return Composite("attnlrp", NOT, {
        "linear": linear.zero, "conv": linear.zero, "norm": norm.held, "softmax": softmax.taylor,
        "activation": activation.identity, "matmul": matmul.uniform, "add": add.zero, "mul": mul.uniform})


def attnlrp_gamma(conv: float = 0.25, dense: float = 0.05) -> Composite:
    """AttnLRP with LRP-gamma in the linear maps, for vision transformers, whose plain maps are noisy (Achtibat et al.
    2024, section 4.1). Not conservative. Args: conv, dense: gamma of convolutions and of linear layers.
    """
    return attnlrp().but("attnlrp-gamma", rules={
        "conv": partial(linear.gamma, gamma=conv), "linear": partial(linear.gamma, gamma=dense)})


READS = ("*qkv", "*query", "*key", "*value", "*q_proj", "*k_proj", "*v_proj")
"""Paths of linear maps that attention reads the residual stream by, as timm and transformers call them."""
WRITES = ("*attn.proj", "*attention.output.dense", "*out_proj", "*o_proj", "head", "*.head", "head.fc", "*classifier")
"""Paths of linear maps that write what attention gives, or the classes."""


def attnlrp_vision(pixels: float = 10.0, dense: float = 0.02, read: float = 0.1) -> Composite:
    """AttnLRP for pictures, the default for them: relevance of what stands out from a picture's ground.

    What the README's benchmark of digits has chosen, by canvases that are not among those of its table. LRP-gamma in
    linear maps, as `attnlrp_gamma`, but: strong where pixels are read, where it makes maps clean; faint in the layers,
    where it hides what speaks against a class; a little stronger where attention reads; and none where attention writes
    and classes are read, where it mixes the classes. Pixels count by how far they are from their picture's median
    colour (`linear.grounded`), so that the ground has no relevance. Maps of other names follow `dense`. Not
    conservative.

    Args: pixels, dense, read: gamma of the map that reads the pixels, of linear maps, and of those that attention reads
        by.
    """
    reading, writing = {"linear": partial(linear.gamma, gamma=read)}, {"linear": linear.zero}
    return attnlrp_gamma(dense=dense).but(
        "attnlrp-vision", pixels=partial(linear.grounded, rule=partial(linear.gamma, gamma=pixels)),
        paths={**dict.fromkeys(WRITES, writing), **dict.fromkeys(READS, reading)})


def attnlrp_path(points: Sequence[float] = (0.5, 1.0)) -> Composite:
    """AttnLRP, mean of places on the way from a text of mask tokens to the one explained (see `relprop.way`), for text.

    At the text itself a model may be so sure that no word by itself seems to count. Of what says nothing either, such
    as the mean of all embeddings and positions, nothing comes into the map; the ledger has it under "reference". Not
    conservative. Costs a forward and a backward for each of the `points`.
    """
    return replace(attnlrp(), name="attnlrp-path", points=tuple(points))


def cp_lrp() -> Composite:
    """CP-LRP (Ali et al. 2022): attention patterns, gates and the norms' scale held constant, LRP-0 elsewhere.

    Conservative up to biases: all that is lost is lost to them and to other additive constants.
    """
    return attnlrp().but("cp-lrp", conservation=UP_TO_BIASES, rules={"softmax": softmax.hold, "mul": mul.hold_gate})


def deep_taylor() -> Composite:
    """Deep Taylor decomposition (Montavon et al. 2017): z-plus in every linear map, z-box at the pixels, activations
    passed, the ratio rule at sums (Chefer et al. 2021), attention patterns and the norms' scale held.

    Chefer et al. pass relevance through norms and attention scores entry by entry as well; an entry near zero then
    receives an arbitrary amount per unit, and maps of whole models grow by orders of magnitude, so both are held here.
    Conservative up to biases: z-plus leaves those of linear maps out; norms, position embeddings and class tokens
    absorb.
    """
    return Composite("deep-taylor", UP_TO_BIASES, {
        "linear": linear.z_plus, "conv": linear.z_plus, "norm": norm.held, "softmax": softmax.hold,
        "activation": activation.identity, "matmul": matmul.uniform, "add": add.ratio, "mul": mul.uniform},
        pixels=linear.z_box)


def chefer() -> Composite:
    """The rules of Chefer et al. 2021 to the letter, for the maps that are made of them (`transformer-attribution` and
    kin): deep Taylor in linear maps, entry by entry through norms, softmax and activations, half to each factor of a
    product, the ratio rule at every sum. Conservative up to what constants take; grows large where entries are near
    zero.
    """
    linear_maps = partial(linear.z_plus, eps=1e-9)
    return Composite("chefer", UP_TO_BIASES, {
        "linear": linear_maps, "conv": linear_maps, "norm": norm.identity, "softmax": softmax.identity,
        "activation": activation.identity, "matmul": matmul.uniform, "add": add.ratio_of_all, "mul": mul.uniform},
        pixels=partial(linear.z_box, eps=1e-9))


def chefer_lrp() -> Composite:
    """The rules of the LRP baselines in the code of Chefer et al. 2021 ("LRP", "partial LRP"): as `chefer`, but each
    sign of a linear map by itself, and sums without the ratio. Not conservative: relevance grows from layer to layer.
    """
    linear_maps = partial(linear.z_plus_apart, eps=1e-9)
    return chefer().but("chefer-lrp", conservation=NOT, rules={
        "linear": linear_maps, "conv": linear_maps, "add": add.zero})


def chefer_detr() -> Composite:
    """The rules of the code of Chefer et al. 2021b for DETR: as `chefer`, but position embeddings and other constants
    take nothing, and each linear map passes on the whole of a row's relevance. Conservative up to constants that are
    not added, such as class tokens; grows as large.
    """
    return chefer().but("chefer-detr", rules={
        "linear": partial(linear.z_plus_whole, eps=1e-9), "add": add.ratio_of_moving})


def epsilon(eps: float = 1e-6) -> Composite:
    """LRP-epsilon in linear maps and sums (Bach et al. 2015), the held pattern in attention, the held scale in norms.

    Conservative up to biases and the stabilizer.
    """
    return cp_lrp().but("epsilon", rules={
        "linear": partial(linear.epsilon, eps=eps), "conv": partial(linear.epsilon, eps=eps),
        "add": partial(add.epsilon, eps=eps)})


def gamma(conv: float = 0.25, dense: float = 0.05) -> Composite:
    """LRP-gamma in linear maps with attention patterns held: CP-LRP with gamma. Conservative up to biases."""
    return cp_lrp().but("gamma", rules={
        "conv": partial(linear.gamma, gamma=conv), "linear": partial(linear.gamma, gamma=dense)})


def gim(temperature: float = 2.0) -> Composite:
    """GIM (Edin et al. 2025, gradient interaction modifications): the gradient, but for the norms' scale held, the
    softmax softened on the way back, and half to each factor of a product: of the query, key and value of an attention
    1/4, 1/4 and 1/2, of a gate and what it gates 1/2. Not conservative. Made for circuits, where a part whose work is
    done by others as well has no gradient of its own.
    """
    return gradient().but("gim", rules={
        "norm": norm.held, "softmax": partial(softmax.tempered, temperature=temperature), "matmul": matmul.uniform,
        "mul": mul.uniform})


def gradient() -> Composite:
    """Plain gradient x input, with the ledger that shows how far it is from conserving. Not conservative."""
    return Composite("gradient", NOT, {
        "linear": linear.zero, "conv": linear.zero, "norm": norm.gradient, "softmax": softmax.taylor,
        "activation": activation.gradient, "matmul": matmul.gradient, "add": add.zero, "mul": mul.gradient})


PRESETS: dict[str, Callable[[], Composite]] = {
    "attnlrp": attnlrp, "attnlrp-gamma": attnlrp_gamma, "attnlrp-vision": attnlrp_vision,
    "attnlrp-path": attnlrp_path, "cp-lrp": cp_lrp, "deep-taylor": deep_taylor, "epsilon": epsilon, "gamma": gamma,
    "gradient": gradient}
NAMES = tuple(PRESETS)

DEFAULTS: dict[str, str] = {"image": "attnlrp-vision", "text": "attnlrp-path", "both": "attnlrp"}
"""The method of `explain` where none is named, by what a model takes; chosen by the benchmarks in the README, but for
texts with pictures, which are explained by one backward pass.
"""


def default(modality: str) -> str:
    """The method of `explain` where none is named.

    Args: modality: of `Subject.modality`; what `DEFAULTS` does not have is explained as text is.

    >>> default("tensors") == DEFAULTS["text"]
    True
    """
    return DEFAULTS.get(modality, DEFAULTS["text"])


def get(composite: str | Composite) -> Composite:
    """The composite of that name, or the one given. Raises: ValueError for an unknown name, listing the known."""
    if isinstance(composite, Composite):
        return composite
    if composite not in PRESETS:
        raise ValueError(f"unknown composite {composite!r}; the composites are {', '.join(NAMES)}")
    return PRESETS[composite]()
