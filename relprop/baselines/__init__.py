"""Maps from plain gradients, and chance: what a propagation method should do better than.

References: K. Simonyan et al., "Deep Inside Convolutional Networks", ICLR workshop 2014 (gradient);
A. Shrikumar et al., "Not Just a Black Box: Learning Important Features Through Propagating Activation Differences",
2016 (input x gradient); M. Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017 (integrated
gradients).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import neutral, rows, units
from ..errors import IndependentOutput
from ..result import Ledger, Relevance
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch

FOLDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda x, dim: x.sum(dim),
    "norm": lambda x, dim: x.abs().sum(dim),
    "max": lambda x, dim: x.abs().amax(dim),
}


class Embedded:
    """While inside `with`, the first module that is called with the token ids gives its output as a leaf of autograd.

    Found by what it is called with, not by its name; the ids stay the model's input (given embeddings instead,
    classifiers read a padding token of right-padded rows). `module` and `leaf` (B, T, D) are set by the first forward.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.module: nn.Module | None = None
        self.leaf: Tensor | None = None

    def __enter__(self) -> Embedded:
        self._handles = [module.register_forward_hook(self._hook, with_kwargs=True) for module in self.model.modules()]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        if self.module is not None or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        called = any(isinstance(value, Tensor) and value.shape == self.ids.shape and bool((value == self.ids).all())
                     for value in [*args, *kwargs.values()])
        if not called or output.shape[:-1] != self.ids.shape:
            return None
        self.module, self.leaf = module, output.detach().requires_grad_()
        return self.leaf.clone()  # not the leaf itself, which must not be written to


def gradient(subject: Subject, batch: Batch, targets: Targets, *, fold: str = "sum") -> Relevance:
    """Change of the target per change of the input, summed over the features of a token or the channels of a pixel.

    R_t = sum_d dy/dx_{t,d}. Simonyan et al. 2014 (section 3) take the largest magnitude over channels instead:
    `fold="max"`. Unit: target per unit of input, so entries of different models do not compare. Not conservative.
    Cost: one forward, one backward.

    Args: fold: "sum" (signed), "norm" (sum of magnitudes) or "max" (largest magnitude).
    Returns: map (B, T) or (B, Y, X); the whole gradient in `inputs`.
    Raises: ValueError for an unknown fold; IndependentOutput if the target does not depend on the input.
    """
    if fold not in FOLDS:
        raise ValueError(f"no fold {fold!r}; there are {', '.join(FOLDS)}")
    found = _derivative(subject, batch, targets)
    plain = _result(subject, batch, found, found.slope, method="gradient", fold=fold)
    return replace(plain, provenance=plain.provenance | {"unit": "target per unit of input"})


def input_x_gradient(subject: Subject, batch: Batch, targets: Targets) -> Relevance:
    """First-order share of each input in the target, summed over features or channels.

    R_t = sum_d x_{t,d} dy/dx_{t,d} (Shrikumar et al. 2016, section 2), x the embeddings or the normalised pixels.
    Unit: that of the target. Sums to the target only for models that are linear through zero. Cost: one forward, one
    backward.

    Returns: map (B, T) or (B, Y, X); with all features in `inputs`.
    Raises: IndependentOutput if the target does not depend on the input.
    """
    found = _derivative(subject, batch, targets)
    return _result(subject, batch, found, found.slope * found.leaf, method="input-x-gradient")


def integrated_gradients(subject: Subject, batch: Batch, targets: Targets, *, n_steps: int = 32,
                         baseline: str | int | None = None, internal_batch_size: int = 32) -> Relevance:
    """Gradient averaged on the straight way from a neutral input, times the way: Captum's `IntegratedGradients`.

    R_t = sum_d (x_{t,d} - x'_{t,d}) int_0^1 dy/dx_{t,d}(x' + a (x - x')) da (Sundararajan et al. 2017, eq. 1), by
    Gauss-Legendre quadrature. Unit: that of the target. Complete up to the steps (their proposition 1): sum R = y(x) -
    y(x'). The ledger books y(x') as "baseline", so that its error is the convergence delta, which is in the provenance
    too. For text the way leads through the embeddings (`LayerIntegratedGradients`), special tokens and padding stay.
    Cost a row: `n_steps` + 3 forwards (5 for text), `n_steps` + 1 backwards.

    Args: n_steps: of the quadrature. baseline: of `neutral.picture`, "zero" (the mean image) by default, or of
        `neutral.token`. internal_batch_size: rows at once, at least those of the batch.
    Returns: map (B, T) or (B, Y, X); with all features in `inputs`.
    Raises: ValueError for an unknown baseline or too few steps; IndependentOutput if the target does not depend on the
        input; ImportError without captum.
    """
    if n_steps < 1 or internal_batch_size < 1:
        raise ValueError(f"n_steps and internal_batch_size are at least 1, got {n_steps} and {internal_batch_size}")
    try:
        from captum.attr import IntegratedGradients, LayerIntegratedGradients
    except ImportError as cause:
        raise ImportError("integrated gradients are Captum's; pip install captum") from cause
    found = _derivative(subject, batch, targets)  # fixes the prediction, finds the embedding
    values = _values(subject, batch, found.targets)
    start, name = _start(subject, batch, baseline)
    run = IntegratedGradients(values) if found.module is None else LayerIntegratedGradients(values, found.module)
    with settled(subject.model), torch.inference_mode(False):
        shares, delta = run.attribute(rows.leaf(batch)[1].clone(), start, n_steps=n_steps,
                                      internal_batch_size=max(internal_batch_size, batch.rows),
                                      return_convergence_delta=True)
    total = shares.detach().flatten(1).sum(1, dtype=found.value.dtype)
    start_value = (found.value - total + delta).cpu()  # y(x'), which Captum ran for the delta
    ledger = Ledger(value=found.value.cpu(), input=total.cpu(), absorbed={"baseline": start_value}, layers=None)
    plain = _result(subject, batch, found, shares.detach(), method="integrated-gradients")
    about = {"baseline": name, "n_steps": n_steps, "convergence_delta": delta.tolist()}
    return replace(plain, conservation="complete up to the steps", ledger=ledger, provenance=plain.provenance | about,
                   forwards=n_steps + (3 if found.module is None else 5), backwards=n_steps + 1)


def random(subject: Subject, batch: Batch, targets: Targets, *, seed: int = 0) -> Relevance:
    """Noise: a standard normal number for each unit, the control that every method must beat.

    Depends on the seed and the row's own input only, so a batch equals the loop over its rows. A patch's number is
    divided evenly over its pixels; special tokens and padding get zero. No unit, not conservative. Cost: one forward,
    for the value.
    """
    with settled(subject.model), torch.no_grad():
        output = subject.forward(batch)
        targets = targets.fixed(output, batch)
        value, names = targets.value(output, batch), targets.names(output, batch)
    groups = units.groups(batch)
    values = torch.zeros(batch.rows, int(groups.max()) + 1)
    for row, content in enumerate(rows.leaf(batch)[1]):
        inside = groups[row] >= 0
        count = int(groups[row].max()) + 1
        content = content.cpu()[inside] if content.shape == inside.shape else content  # ids without padding
        values[row, :count] = torch.randn(count, generator=rows.generator(seed, content))
    return Relevance(map=units.spread(values, groups), value=value.cpu(), target=names, method="random",
                     conservation="not conservative", units=batch.units, ledger=None, forwards=1, backwards=0,
                     inputs={}, latents={},
                     provenance={"model": subject.name, "unit": "noise", "seed": seed})


METHODS: dict[str, Callable[..., Relevance]] = {
    "gradient": gradient,
    "input-x-gradient": input_x_gradient,
    "integrated-gradients": integrated_gradients,
    "random": random,
}


class _Derivative(NamedTuple):
    """Of the target by the leaf: `slope`, shape of `leaf` (B, ...). `module` is the embedding, None for pixels."""

    value: Tensor
    targets: Targets
    names: list[str]
    leaf: Tensor
    slope: Tensor
    module: nn.Module | None


def _derivative(subject: Subject, batch: Batch, targets: Targets) -> _Derivative:
    _, source = rows.leaf(batch)
    with settled(subject.model), torch.inference_mode(False), torch.enable_grad():
        if source.is_floating_point():
            embedded, leaf = None, source.detach().clone().requires_grad_()
            output = subject.forward(rows.put(batch, leaf))
        else:
            with Embedded(subject.model, source) as embedded:
                output = subject.forward(batch)
            leaf = embedded.leaf
            if leaf is None:
                raise ValueError(f"no module of {subject.name} is called with the token ids {tuple(source.shape)}; "
                                 "gradient methods need the embedding to be a module")
        targets = targets.fixed(output, batch)
        value = targets.value(output, batch)
        slope = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
    if slope is None or not slope.flatten(1).any(1).all():
        raise IndependentOutput(f"the target ({', '.join(targets.names(output, batch))}) does not depend on the input, "
                                "so there is nothing to explain")
    module = None if embedded is None else embedded.module
    precise = torch.promote_types(leaf.dtype, torch.float32)  # half precision overflows in sums over features
    return _Derivative(value.detach(), targets, targets.names(output, batch), leaf.detach().to(precise),
                       slope.to(precise), module)


def _values(subject: Subject, batch: Batch, targets: Targets) -> Callable[[Tensor], Tensor]:
    """The target as a function of the input, for Captum: steps x B changed rows in, block by block, a number each."""
    def values(changed: Tensor) -> Tensor:
        which = torch.arange(len(changed), device=changed.device) % batch.rows
        stacked = rows.put(batch.take(which), changed)
        return targets.take(which.tolist()).value(subject.forward(stacked), stacked)

    return values


def _start(subject: Subject, batch: Batch, baseline: str | int | None) -> tuple[Tensor, str]:
    """Where the way of integrated gradients begins, shape of the input, and its name."""
    _, source = rows.leaf(batch)
    if not source.is_floating_point():
        token, name = neutral.token(subject.tokenizer, baseline)
        inside = units.groups(batch).to(source.device) >= 0
        return source.where(~inside, token), name
    if source.ndim == 4:
        picture, name = neutral.picture(source, baseline or "zero")
        return picture.expand_as(source).clone(), name
    if baseline not in (None, "zero"):
        raise ValueError(f"no baseline {baseline!r} for plain tensors; there is zero")
    return torch.zeros_like(source), "zero"


def _result(subject: Subject, batch: Batch, found: _Derivative, whole: Tensor, *, method: str,
            fold: str = "sum") -> Relevance:
    """Relevance of each feature, `whole` (B, ...), folded into a map over channels (dim 1) or features (the last)."""
    folded = whole if whole.ndim == 2 else FOLDS[fold](whole, 1 if whole.ndim == 4 else -1)
    return Relevance(map=folded.float().cpu(), value=found.value.cpu(), target=found.names, method=method,
                     conservation="not conservative", units=batch.units, ledger=None, forwards=1, backwards=1,
                     inputs={str(rows.leaf(batch)[0]): whole.cpu()}, latents={},
                     provenance={"model": subject.name, "fold": fold})
