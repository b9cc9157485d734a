"""Relevance of attention patterns, weighed by their gradients and rolled out: the method of Chefer et al. 2021.

Reference: H. Chefer, S. Gur, L. Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, and the
code that came with it. The rules are those of `composite.chefer`; relevance starts at 1, not at the explained value.
Departures from the code: sums over the batch are sums over a row, so that a map does not depend on what else was in the
batch, all rows are explained and not the first alone, and the least entry that the read position is given in texts is
the least of the row's own tokens, not of its padding.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import composite
from ..asked import Asked
from ..composite import Composite
from ..latents import places
from ..pattern import Attended, Pattern, attend
from ..relevance import Propagation, propagate
from ..result import Relevance
from ..run import from_one
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, TextUnits
from .readout import mapped, read_from
from .rollout import check_square, raw_attention

RULES: dict[str, Callable[[], Composite]] = {"chefer": composite.chefer, "chefer-lrp": composite.chefer_lrp,
                                             "chefer-detr": composite.chefer_detr}
"""By name: the rules of the method, of the LRP baselines in its code, and of the later code for DETR."""


def transformer_attribution(subject: Subject, batch: Batch, targets: Targets, *, start_layer: int = 0,
                            normalize: bool | None = None, rules: str = "chefer",
                            at: tuple[str, ...] = ()) -> Relevance:
    """Where attention mattered for this target, through all layers (Chefer et al. 2021, eqs. 13 and 14).

    C = A_L' ... A_1' with A_l' = I + mean_h (dy/dA_l * R_{A_l})+, read in the row of the class token or of the position
    that predicts. R_{A} starts at 1 and conserves up to what constants take; the product of gradient and relevance does
    not. Cost: one forward and two backwards.

    Args: start_layer: first layer to count; the code's scripts use 1 for images and 0 for texts. normalize: each A_l'
        to rows that sum to one; None: as in the code, for texts and not for images. rules: a name of `RULES`.
        at: addresses whose relevance under the rules is kept, from 1 at the target; a forward and a backward more.
    Returns: map (B, T) for text, where the position that is read has the least entry of its row in place of its own,
        or (B, Y, X), each patch's share divided evenly over its pixels. Never negative; no unit.
    Raises: ValueError where attention cannot be followed from layer to layer, or for an option that does not exist.
    """
    def weighed(pattern: Pattern) -> Tensor:
        return pattern.slope * pattern.relevance

    options = {"start_layer": start_layer, "normalize": _normalizes(normalize, batch), "rules": rules}
    return _rolled(subject, batch, targets, weighed, "transformer-attribution", options, at)


def lrp_rollout(subject: Subject, batch: Batch, targets: Targets, *, start_layer: int = 0,
                normalize: bool | None = None, rules: str = "chefer", at: tuple[str, ...] = ()) -> Relevance:
    """`transformer_attribution` without the gradient: A_l' = I + mean_h (R_{A_l})+ ("rollout" in the code).

    Class-specific through the relevance alone. Cost, arguments and result as of `transformer_attribution`.
    """
    options = {"start_layer": start_layer, "normalize": _normalizes(normalize, batch), "rules": rules}
    return _rolled(subject, batch, targets, lambda pattern: pattern.relevance, "lrp-rollout", options, at)


def partial_lrp(subject: Subject, batch: Batch, targets: Targets, *, layer: int = -1, gradient: bool = False,
                rules: str = "chefer-lrp") -> Relevance:
    """Relevance of one layer's attention, mean_h (R_A)+ in the row that is read (Voita et al. 2019's partial LRP, as
    Chefer et al. 2021 compare with it).

    Cost: one forward, and two backwards that end at that layer.

    Args: layer: the last by default. gradient: weigh by dy/dA before the positive part is taken. rules: those of the
        code's baseline by default, which do not conserve; "chefer" for those of the method.
    Returns: map as of `transformer_attribution`, zero at the position that is read in texts.
    """
    found, asked = _attended(subject, batch, targets, rules, _one(layer))
    check_square([pattern.weights for pattern in found.patterns], batch.rows)
    pattern = found.patterns[0]
    heads = pattern.slope * pattern.relevance if gradient else pattern.relevance
    read = read_from(found, batch)
    shares = torch.einsum("bt,bts->bs", read, heads.clamp(min=0).mean(1))
    options = {"layer": layer, "gradient": gradient, "rules": rules}
    return _found(subject, batch, asked, found, _without_own(shares, read, batch, least=False), "partial-lrp", options)


def full_lrp(subject: Subject, batch: Batch, targets: Targets, *, rules: str = "chefer",
             at: tuple[str, ...] = ()) -> Relevance:
    """LRP by the rules of `transformer_attribution`: down to the pixels or, in texts, to what the first layer reads
    ("full" in the code).

    R starts at 1. For the books, for word embeddings, and for relevance in the unit of the target, give `explain` the
    composite itself: `method=relprop.composite.chefer()`. Departure from the code: in texts the first token keeps its
    relevance. Cost: one forward and one backward; for texts, a forward of one row more.

    Args: rules: a name of `RULES`. at: addresses whose relevance is kept, see `relprop.latents`.
    Returns: map (B, T) for text, summed over features, or (B, Y, X), summed over channels.
    """
    asked, first = Asked(targets, batch), FIRST if isinstance(batch.units, TextUnits) else ()
    found, inside = _propagated(subject, batch, asked, rules, (*first, *(name for name in at if name not in first)))
    if first:
        shares = inside[FIRST[0]]
    else:
        shares = _of_start(sum(r.sum(1 if r.dim() == 4 else -1) for r in found.relevance.values()), found.value)
    latents = {name: whole for name, whole in inside.items() if name not in first or name in at}
    result = mapped(subject, batch, shares, value=found.value, names=asked.names, method="full-lrp",
                    forwards=1 + bool(first or at), backwards=1, unit="share of the target", rules=rules)
    return replace(result, latents=latents)


FIRST = ("L0.in",)
"""Where the code of the original ends in texts: at the input of its first layer."""


def _propagated(subject: Subject, batch: Batch, asked: Asked, rules: str, at: tuple[str, ...],
                ) -> tuple[Propagation, dict[str, Tensor]]:
    """LRP under the rules, and the relevance of addresses where it starts at 1."""
    wanted = places(subject, batch, at) if at else None
    found = propagate(subject.model, batch.args, batch.kwargs, asked, _rules(rules), ledger=False,
                      taps=wanted.named if wanted else None)
    inside = wanted.read(found, rules) if wanted else {}
    return found, {name: _of_start(whole, found.value) for name, whole in inside.items()}


def _of_start(relevance: Tensor, value: Tensor) -> Tensor:
    """Relevance (B, ...) as it is when it starts at 1 instead of at the value, (B,)."""
    return relevance * from_one(value).to(relevance).reshape(-1, *[1] * (relevance.dim() - 1))


METHODS: dict[str, Callable[..., Relevance]] = {
    "transformer-attribution": transformer_attribution, "lrp-rollout": lrp_rollout, "partial-lrp": partial_lrp,
    "full-lrp": full_lrp, "last-layer-attention": raw_attention}


def _rules(name: str) -> Composite:
    if name not in RULES:
        raise ValueError(f"no rules {name!r}; there are {', '.join(RULES)}")
    return RULES[name]()


def _normalizes(normalize: bool | None, batch: Batch) -> bool:
    return isinstance(batch.units, TextUnits) if normalize is None else normalize


def _one(layer: int) -> slice:
    return slice(layer, layer + 1 or None)


def _attended(subject: Subject, batch: Batch, targets: Targets, rules: str, layers: slice) -> tuple[Attended, Asked]:
    asked = Asked(targets, batch)
    return attend(subject.model, batch.args, batch.kwargs, asked, composite=_rules(rules), layers=layers), asked


def _rolled(subject: Subject, batch: Batch, targets: Targets, weighed: Callable[[Pattern], Tensor], method: str,
            options: dict, at: tuple[str, ...]) -> Relevance:
    """The rows that are read of the product of all layers: a vector, carried down from the last layer."""
    found, asked = _attended(subject, batch, targets, options["rules"], slice(options["start_layer"], None))
    check_square([pattern.weights for pattern in found.patterns], batch.rows)
    read = shares = read_from(found, batch)
    for pattern in reversed(found.patterns):
        layer = weighed(pattern).clamp(min=0).mean(1)  # (B, T, S)
        scale = 1 + layer.sum(-1) if options["normalize"] else torch.ones_like(shares)
        shares = shares / scale
        shares = shares + torch.einsum("bt,bts->bs", shares, layer)
    result = _found(subject, batch, asked, found, _without_own(shares, read, batch, least=True), method, options)
    inside = _propagated(subject, batch, Asked(asked.targets, batch), options["rules"], at)[1] if at else {}
    return replace(result, latents=inside)


def _without_own(shares: Tensor, read: Tensor, batch: Batch, *, least: bool) -> Tensor:
    """Of texts, the position that is read without what it holds of itself, its skip connections: the least entry among
    its row's own tokens in its place, or zero. Unchanged where many positions are read.
    """
    if not isinstance(batch.units, TextUnits):
        return shares
    real = batch.real(shares.shape[1]).to(shares.device)
    low = shares.masked_fill(~real, torch.inf).amin(1, keepdim=True) if least else torch.zeros_like(shares[:, :1])
    return torch.where(read > 0.5, low, shares)


def _found(subject: Subject, batch: Batch, asked: Asked, found: Attended, shares: Tensor, method: str,
           options: dict) -> Relevance:
    return mapped(subject, batch, shares, value=found.value, names=asked.names, method=method, forwards=found.forwards,
                  backwards=2, unit="share of attention", **options)
