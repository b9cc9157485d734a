"""Maps from the plain gradient at the input: as it is, its magnitude, times the input, or averaged over noisy copies.
All are Captum's.

References: K. Simonyan et al., "Deep Inside Convolutional Networks", ICLR workshop 2014 (saliency); A. Shrikumar et
al., "Not Just a Black Box: Learning Important Features Through Propagating Activation Differences", 2016 (input x
gradient); D. Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017; J. Adebayo et al., "Local Explanation
Methods for Deep Neural Networks Lack Sensitivity to Parameter Values", 2018 (VarGrad).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import latents, rows, sight
from ..asked import Asked
from ..relevance import propagate
from ..result import Relevance
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, TextUnits
from .chance import seeded
from .leaf import FOLDS, Derivative, Runs, at_least_one, captum, content, derivative, result

UNIT = "target per unit of input"
KINDS = ("smoothgrad", "smoothgrad_sq", "vargrad")  # Captum's names


def gradient(subject: Subject, batch: Batch, targets: Targets, *, fold: str | None = None,
             at: Sequence[str] = ()) -> Relevance:
    """Change of the target per change of the input, over the features of a token or the channels of a pixel: Captum's
    `Saliency` with signs.

    R_t = sum_d dy/dx_{t,d}, or sum_d |dy/dx_{t,d}| for token ids: behind the embeddings of many models comes a norm,
    which takes their mean away, so that the signed sum is zero whatever the text. Unit: target per unit of input, so
    entries of different models do not compare. Not conservative. Cost: one forward, one backward.

    Args: fold: "sum" (signed), "norm" (sum of magnitudes) or "max" (largest magnitude); None: "norm" for token ids,
        "sum" for the rest. at: addresses; see `latents.by_gradient`.
    Returns: map (B, T) or (B, Y, X); the whole gradient in `inputs`.
    Raises: ValueError for an unknown fold; IndependentOutput if the target does not depend on the input; ImportError
        without captum.
    """
    fold = _fold(fold, batch)
    found = derivative(subject, batch, targets)
    slope = _captums(captum().Saliency, found, abs=False)
    plain = result(subject, batch, found, slope, method="gradient", fold=fold)
    return _inside(plain, subject, batch, found, at, {"unit": UNIT})


def saliency(subject: Subject, batch: Batch, targets: Targets, *, fold: str | None = None) -> Relevance:
    """Magnitude of the change of the target per change of the input: Captum's `Saliency`.

    R_t = max_d |dy/dx_{t,d}| over the channels of a pixel (Simonyan et al. 2014, section 3), sum_d |dy/dx_{t,d}| over
    the features of a token, which are many. Says where the target is sensitive, not which way: no entry is negative.
    Unit: target per unit of input. Not conservative. Cost: one forward, one backward.

    Args: fold: "max" (largest magnitude) or "norm" (sum of magnitudes); None: "norm" for token ids, "max" for the rest.
    Returns: map (B, T) or (B, Y, X); the magnitude of every feature in `inputs`.
    Raises: as of `gradient`.
    """
    fold = _fold(fold, batch, pixels="max", known=("max", "norm"))
    found = derivative(subject, batch, targets)
    size = _captums(captum().Saliency, found)
    plain = result(subject, batch, found, size, method="saliency", fold=fold)
    return replace(plain, provenance=plain.provenance | {"unit": UNIT})


def input_x_gradient(subject: Subject, batch: Batch, targets: Targets, *, at: Sequence[str] = ()) -> Relevance:
    """First-order share of each input in the target, summed over features or channels: Captum's `InputXGradient`.

    R_t = sum_d x_{t,d} dy/dx_{t,d} (Shrikumar et al. 2016, section 2), x the embeddings or the normalised pixels.
    Unit: that of the target. Sums to the target only for models that are linear through zero; of a model with a norm
    right behind its embeddings (ModernBERT), which does not see their length, it is zero. Cost: one forward, one
    backward.

    Args: at: addresses; see `latents.by_gradient`.
    Returns: map (B, T) or (B, Y, X); with all features in `inputs`.
    Raises: IndependentOutput if the target does not depend on the input; ImportError without captum.
    """
    if batch.pictures is not None:
        return _of_both(subject, batch, targets, at)
    found = derivative(subject, batch, targets)
    shares = _captums(captum().InputXGradient, found)
    plain = result(subject, batch, found, shares, method="input-x-gradient")
    return _inside(plain, subject, batch, found, at, {})


def _of_both(subject: Subject, batch: Batch, targets: Targets, at: Sequence[str]) -> Relevance:
    """Input x gradient of a text and the pictures beside it, all inputs at once."""
    asked = Asked(targets, batch)
    found = propagate(subject.model, batch.args, batch.kwargs, asked, "gradient", ledger=False)
    pictures, _ = sight.maps(found.relevance, batch)
    own = found.relevance[str(rows.leaf(batch)[0])] if isinstance(batch.units, TextUnits) else None
    whole = torch.stack([one.map for one in pictures]) if own is None else own.sum(-1).float().cpu()
    more = 2 if at else 0
    return Relevance(map=whole, value=found.value.float().cpu(), target=asked.names, method="input-x-gradient",
                     conservation="not conservative", units=batch.units, forwards=1 + more, backwards=1 + more // 2,
                     inputs={name: r.float().cpu() for name, r in found.relevance.items()}, pictures=pictures,
                     latents=latents.by_gradient(subject, batch, asked.targets, at),
                     provenance={"model": subject.name})


def _captums(method: Callable, found: Derivative, **options: Any) -> Tensor:
    """What a gradient method of Captum makes of the derivative that there is: the pass that found the embedding and
    fixed the prediction has made it already, and Captum's own would be a second one.
    """
    run = method(lambda leaf: found.value)
    run.gradient_func = lambda forward_fn, inputs, target_ind=None, additional_forward_args=None: (found.slope,)
    with torch.no_grad():
        return run.attribute(found.leaf.clone().requires_grad_(), **options).detach()


def _inside(plain: Relevance, subject: Subject, batch: Batch, found: Derivative, at: Sequence[str],
            about: dict[str, str]) -> Relevance:
    """The result with activation x gradient at addresses."""
    more = 2 if at else 0  # the anatomy, and the run that is tapped
    return replace(plain, latents=latents.by_gradient(subject, batch, found.targets, at),
                   provenance=plain.provenance | about, forwards=plain.forwards + more,
                   backwards=plain.backwards + more // 2)


def smoothgrad(subject: Subject, batch: Batch, targets: Targets, *, samples: int = 16, noise: float = 0.15,
               kind: str = "smoothgrad", fold: str | None = None, seed: int = 0, batch_size: int = 32,
               show_progress: bool = False) -> Relevance:
    """Gradient averaged over noisy copies of the input: Captum's `NoiseTunnel` around its `Saliency`.

    R_t = fold_d 1/n sum_i dy/dx_{t,d}(x + e_i), e_i normal (Smilkov et al. 2017, section 3). The noise's standard
    deviation is `noise` times a row's own spread: the largest pixel less the smallest, as there; for embeddings their
    standard deviation, since a few entries are tens of it away and the range would drown the rest. Padding gets none.
    Unit: target per unit of input (its square for the other kinds). Not conservative. Cost a row: `samples` + 1
    forwards and backwards. Chance depends on the seed and the row's own input.

    Args: samples: n. noise: in spreads, at least 0. kind: "smoothgrad" (mean), "smoothgrad_sq" (mean of squares) or
        "vargrad" (variance; Adebayo et al. 2018). fold: as of `gradient`. batch_size: noisy copies at once.
        show_progress: a bar of the copies.
    Returns: map (B, T) or (B, Y, X); with all features in `inputs`.
    Raises: ValueError for an unknown option; IndependentOutput if the target does not depend on the input; ImportError
        without captum.
    """
    fold = _fold(fold, batch)
    at_least_one(samples=samples, batch_size=batch_size)
    if kind not in KINDS or not noise >= 0:
        raise ValueError(f"kind is one of {', '.join(KINDS)} and noise at least 0, got {kind!r} and {noise}")
    found = derivative(subject, batch, targets)
    runs = Runs(subject, batch, found, batch_size=batch_size)
    options = {"nt_samples": samples, "nt_type": kind}
    smooth = torch.zeros_like(found.leaf)
    with runs.progress("smoothgrad", samples * batch.rows, show_progress):
        for row in range(batch.rows):
            with seeded(seed, content(batch, row)):
                _smoothed(runs, row, noise, options, into=smooth)
    plain = result(subject, batch, found, smooth, method="smoothgrad", fold=fold)
    unit = UNIT + ("" if kind == "smoothgrad" else ", squared")
    about = {"unit": unit, "samples": samples, "noise": noise, "kind": kind, "seed": seed,
             "noise_of": "range of the row" if found.module is None else "standard deviation of the embeddings"}
    return replace(plain, provenance=plain.provenance | about, forwards=runs.forwards, backwards=runs.backwards)


def _smoothed(runs: Runs, row: int, noise: float, options: dict, *, into: Tensor) -> None:
    values, inside = runs.of_row(row)
    own = runs.found.leaf[row] if inside is None else runs.found.leaf[row][inside]
    plain = captum().Saliency(values)
    plain.gradient_func = runs.gradients
    tunnel = captum().NoiseTunnel(plain)
    smooth = tunnel.attribute(own[None], stdevs=noise * _spread(runs.found, own), abs=False, **options)[0]
    into[row, slice(None) if inside is None else inside] = smooth.to(into.dtype)


def _spread(found: Derivative, own: Tensor) -> float:
    return float(own.std(correction=0)) if found.module is not None else float(own.max() - own.min())


def _fold(fold: str | None, batch: Batch, *, pixels: str = "sum", known: Iterable[str] = FOLDS) -> str:
    if fold is None:
        return pixels if rows.leaf(batch)[1].is_floating_point() else "norm"
    if fold not in known:
        raise ValueError(f"no fold {fold!r}; there are {', '.join(known)}")
    return fold
