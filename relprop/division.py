"""Divisions: which forward rule where, as a value; what a composite is for the way back.

A division names one rule for every kind of op, and where signs that clash are settled. The presets below are the
published methods, and two that are not.

References: Hsu et al. 2024 (Efficient automated circuit discovery in transformers using contextual decomposition,
"CD-T", ICLR 2025) and its code, github.com/adelaidehsu/CD_Circuit; Murdoch et al. 2018 (Beyond word importance).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from .ops import KINDS, activation, matmul, norm, share, softmax

Rule = Callable[..., Any]

HALVES = {"attention": ("context", "linear", "add", "norm"), "mlp": ("linear", "add", "norm")}
"""The two halves of a layer, and after which ops in them clashing signs may be settled. The attention's begins with the
mix of values; the MLP's with the first linear map after the output projection, and ends with the layer."""


SHARE = "share"
"""What the rule for constants is called beside kinds of ops."""


@dataclass(frozen=True)
class Division:
    """Which forward rule each op of a model follows.

    Args:
        name: what results call it.
        rules: a rule for each of the kinds "norm", "activation", "softmax", "matmul", "mul"; others have one way only.
        share: the rule for constants, of `ops.share`.
        normalized: after which ops of which half of a layer `share.unclashed` follows, as in `HALVES`.
        whole: False: the total goes on without what the rules lose, as in the published code (its eps of 1e-8).
        paths: exceptions by module path (shell pattern): rules by kind, "share" that for constants.
    Raises: ValueError for an unknown kind of op or place, TypeError for a rule that cannot be called.
    """

    name: str
    rules: Mapping[str, Rule]
    share: Rule = share.proportional
    normalized: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: bool = True
    paths: Mapping[str, Mapping[str, Rule]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rules in (self.rules, *self.paths.values()):
            for kind, rule in rules.items():
                if kind not in (*KINDS, SHARE):
                    raise ValueError(f"unknown kind of op {kind!r}; the kinds are {', '.join(KINDS)}")
                if not callable(rule):
                    raise TypeError(f"the rule of {kind} must be a function of tensors, got {type(rule).__name__}")
        for half, after in self.normalized.items():
            if half not in HALVES or not set(after) <= set(HALVES[half]):
                places = "; ".join(f"{half}: {', '.join(ops)}" for half, ops in HALVES.items())
                raise ValueError(f"signs cannot be settled in {half!r} after {after}; there is {places}")

    def rule(self, kind: str, path: str) -> Any:
        """The rule of an op of `kind` called by the module at `path`; of the fused attention the pair of its product's
        and its softmax's.
        """
        if kind == "attention":
            return self.rule("matmul", path), self.rule("softmax", path)
        return self._of_path(kind, path) or self.rules.get(kind)

    def constants(self, path: str) -> Rule:
        """The rule for constants in the module at `path`."""
        return self._of_path(SHARE, path) or self.share

    def _of_path(self, kind: str, path: str) -> Rule | None:
        for pattern, rules in self.paths.items():
            if fnmatchcase(path, pattern) and kind in rules:
                return rules[kind]
        return None

    def but(self, name: str | None = None, **changes: Any) -> Division:
        """This division with some fields replaced; of `rules` only those that are given."""
        rules = {**self.rules, **changes.pop("rules", {})}
        return replace(self, name=name or f"{self.name}*", rules=rules, **changes)

    def published(self) -> Division:
        """This division with the published code's share weights |r| / (|r| + |i| + 1e-8), whose parts do not sum to the
        model's own total: off by 1e-8 to 5e-6. One source at a time.
        """
        return replace(self, name=f"{self.name} (published eps)", share=partial(share.proportional, eps=1e-8),
                       whole=False)

    def describe(self) -> dict[str, str]:
        """Its rules in words, for the provenance of a result."""
        words = {kind: rule.__name__ for kind, rule in self.rules.items()}
        words["constants"] = getattr(self.share, "func", self.share).__name__
        return words | {f"normalized in {half}": ", ".join(after) for half, after in self.normalized.items()}


def cdt() -> Division:
    """CD-T (Hsu et al. 2024, section 3, and their code for heads): the pattern decomposed, A_rel = softmax(q_rel
    k_rel), activations by difference, clashing signs settled in the MLP's half. Gates, which GPT-2 does not have, by
    the mean of both orders.
    """
    return Division("cdt", {
        "norm": norm.of_total, "activation": activation.difference, "softmax": softmax.pattern_decomposed,
        "matmul": matmul.inner, "mul": matmul.halved}, normalized={"mlp": ("linear", "add", "norm")})


def cdt_held() -> Division:
    """CD-T for local importance (Hsu et al. 2024, section 4, and their code for BERT, `cdt_basic`): the pattern that of
    the total, clashing signs settled after every op of a layer.
    """
    return cdt().but("cdt-held", rules={"softmax": softmax.pattern_held}, normalized=HALVES)


def difference() -> Division:
    """Every op by difference, rel = f(x) - f(x - rel), with norms at the scale of the total: what the output loses. The
    pattern too is split, and all cross terms are relevant.
    """
    return Division("difference", {
        "norm": norm.of_total, "activation": activation.difference, "softmax": softmax.pattern_difference,
        "matmul": matmul.crossed, "mul": matmul.crossed})


def shapley() -> Division:
    """Every op by the mean of both orders (Murdoch et al. 2018, section 3.2.2), with norms at the scale of the total
    and the pattern held. No signs are settled.
    """
    return Division("shapley", {
        "norm": norm.of_total, "activation": activation.shapley, "softmax": softmax.pattern_held,
        "matmul": matmul.halved, "mul": matmul.halved})


PRESETS: dict[str, Callable[[], Division]] = {"cdt": cdt, "cdt-held": cdt_held, "difference": difference,
                                              "shapley": shapley}
NAMES = tuple(PRESETS)


def get(division: str | Division) -> Division:
    """The division of that name, or the one given. Raises: ValueError for an unknown name, listing the known."""
    if isinstance(division, Division):
        return division
    if division not in PRESETS:
        raise ValueError(f"unknown rules {division!r}; there are {', '.join(NAMES)}, or a Division of your own")
    return PRESETS[division]()
