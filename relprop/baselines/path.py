"""Maps that add up to how far the target is from that of a neutral input: gradients along the way between the two, and
DeepLIFT's multipliers. All are Captum's.

References: M. Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017 (integrated gradients); S.
Lundberg and S.-I. Lee, "A Unified Approach to Interpreting Model Predictions", NIPS 2017, and G. Erion et al.,
"Improving Performance of Deep Learning Models with Axiomatic Attribution Priors and Expected Gradients", Nature Machine
Intelligence 2021 (GradientSHAP); A. Shrikumar et al., "Learning Important Features Through Propagating Activation
Differences", ICML 2017 (DeepLIFT).
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import latents, neutral, rows, units
from ..address import Address
from ..anatomy import anatomy
from ..result import Relevance
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, ImageUnits
from .chance import seeded
from .leaf import Embedded, Held, Runs, at_least_one, captum, completed, content, derivative, result, summed

Baseline = str | int | None
COMPLETE = 1e-3  # of the map's magnitude: a DeepLIFT that leaves more unexplained has not met a rule for every op
STEPS = "complete up to the steps"
# What DeepLIFT passes by its linear rule, which is the gradient; in evaluation mode
LINEAR = (nn.Linear, nn.Bilinear, nn.Identity, nn.Flatten, nn.Unflatten, nn.Embedding, nn.modules.conv._ConvNd,
          nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
          nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d, nn.Upsample)


def integrated_gradients(subject: Subject, batch: Batch, targets: Targets, *, n_steps: int = 32,
                         baseline: Baseline = None, batch_size: int = 32, at: Sequence[str] = (),
                         show_progress: bool = False) -> Relevance:
    """Gradient averaged on the straight way from a neutral input, times the way: Captum's `IntegratedGradients`.

    R_t = sum_d (x_{t,d} - x'_{t,d}) int_0^1 dy/dx_{t,d}(x' + a (x - x')) da (Sundararajan et al. 2017, eq. 1), by
    Gauss-Legendre quadrature. Unit: that of the target. Complete up to the steps (their proposition 1): sum R = y(x) -
    y(x'). The ledger books y(x') as "baseline", so that its residual is the convergence delta, which is in the
    provenance too. For text the way leads through the embeddings; special tokens and padding stay. Cost a row:
    `n_steps` + 2 forwards, `n_steps` + 1 backwards.

    Args: n_steps: of the quadrature. baseline: of `neutral.picture`, "zero" (the mean image) by default; for text of
        `neutral.token`, or "zero" for embeddings that are zero. batch_size: rows at once, at least those of the batch.
        at: addresses of layers, "L3" or "L3.in": integrated gradients there, as of `layer_integrated_gradients`.
        show_progress: a bar of the rows.
    Returns: map (B, T) or (B, Y, X); with all features in `inputs`.
    Raises: ValueError for an unknown baseline, too few steps, or an address inside a layer; IndependentOutput if the
        target does not depend on the input; ImportError without captum.
    """
    at_least_one(n_steps=n_steps, batch_size=batch_size)
    found = derivative(subject, batch, targets)  # fixes the prediction, finds the embedding
    runs = Runs(subject, batch, found, batch_size=batch_size)
    with runs.progress("integrated gradients", (n_steps + 1) * batch.rows, show_progress):
        start, value, name = _start(runs, baseline)
        shares = captum().IntegratedGradients(runs.whole).attribute(
            found.leaf.clone(), start, n_steps=n_steps, internal_batch_size=max(batch_size, batch.rows)).detach()
    runs.count(0, backwards=n_steps * batch.rows)
    plain = result(subject, batch, found, shares, method="integrated-gradients")
    plain = replace(plain, latents=_inside_layers(runs, at, baseline, n_steps, batch_size))
    return completed(plain, runs, summed(shares), value, {"baseline": name, "n_steps": n_steps}, conservation=STEPS)


def layer_integrated_gradients(subject: Subject, batch: Batch, targets: Targets, *, layer: str | None = None,
                               n_steps: int = 32, baseline: Baseline = None, batch_size: int = 32,
                               at: Sequence[str] = (), show_progress: bool = False) -> Relevance:
    """Integrated gradients of what a layer gives at each position: Captum's `IntegratedGradients` there. (Its own
    `LayerIntegratedGradients` agrees where a layer takes and gives tensors alone, which transformers' layers do not.)

    R_t = sum_d (h_{t,d} - h'_{t,d}) int_0^1 dy/dh_{t,d}(h' + a (h - h')) da, h the layer's output on the input and h'
    that on the neutral input (Sundararajan et al. 2017, eq. 1, at h). A position of a deep layer has seen the others,
    so the map says where the layer holds what counts, not which input it came from. Unit, completeness and ledger: as
    of `integrated_gradients`; what class and register tokens hold is booked as "prefix tokens". Cost a row: `n_steps` +
    3 forwards (one more without `layer`, or with an address), `n_steps` + 1 backwards.

    Args: layer: a module's path, or an address ("L3": the output of layer 3, "L3.in": its input); None: what the first
        layer reads, which is words or patches with their positions. n_steps, batch_size, at, show_progress: as of
        `integrated_gradients`. baseline: of `neutral.picture` or `neutral.token`, by default as there.
    Returns: map (B, T), or (B, Y, X) with each patch's relevance divided evenly over its pixels.
    Raises: ValueError for an unknown option, a layer that is not there, or one whose output does not keep the positions
        of tokens or patches; IndependentOutput if the target does not depend on the input.
    """
    at_least_one(n_steps=n_steps, batch_size=batch_size)
    found = derivative(subject, batch, targets)
    runs = Runs(subject, batch, found, batch_size=batch_size)
    start, name = _input(subject, batch, baseline)
    with runs.progress("layer integrated gradients", (n_steps + 2) * batch.rows, show_progress):
        module, path, reads = _layer(runs, layer)
        shares, value = _through(runs, (module, path, reads), start, n_steps, batch_size)
    relevance, prefix = _placed(shares, batch, path)
    plain = Relevance(map=relevance.float(), value=found.value.cpu(), target=found.names, units=batch.units,
                      method="layer-integrated-gradients", conservation=STEPS, provenance={"model": subject.name},
                      latents=_inside_layers(runs, at, baseline, n_steps, batch_size))
    about = {"layer": path + (" (input)" if reads else ""), "baseline": name, "n_steps": n_steps}
    rest = None if prefix is None else {"prefix tokens": prefix}
    return completed(plain, runs, summed(relevance), value, about, conservation=STEPS, rest=rest)


def _through(runs: Runs, layer: tuple[nn.Module, str, bool], start: Tensor, n_steps: int, batch_size: int,
             ) -> tuple[Tensor, Tensor]:
    """Integrated gradients of what a layer gives or reads, its shape, and the target on the neutral input, (B,)."""
    module, path, reads = layer
    h, _ = _held(runs, module, path, reads, rows.leaf(runs.batch)[1])
    h_start, value = _held(runs, module, path, reads, start)
    run = captum().IntegratedGradients(partial(runs.inner, module, reads=reads))
    shares = run.attribute(h, h_start, n_steps=n_steps, internal_batch_size=max(batch_size, runs.batch.rows))
    runs.count(0, backwards=n_steps * runs.batch.rows)
    return shares.detach().cpu(), value


def _inside_layers(runs: Runs, at: Sequence[str], baseline: Baseline, n_steps: int, batch_size: int,
                   ) -> dict[str, Tensor]:
    """Integrated gradients at addresses of layers, summed over features, by their text, (B, T)."""
    wanted = [Address.parse(text) for text in at]
    inside = next((str(address) for address in wanted if address.part not in ("layer", "in")), None)
    if inside is not None:
        raise ValueError(f"{inside} is inside a layer, where there is no straight way that the model could go; "
                         "integrated gradients answer for L3 and L3.in; a composite or input-x-gradient for the rest")
    if not wanted:
        return {}
    if baseline == "zero" and runs.found.module is not None:
        raise ValueError("at a layer the way begins where the model is given neutral tokens; choose another baseline")
    start, _ = _input(runs.subject, runs.batch, baseline)
    places = latents.places(runs.subject, runs.batch, wanted)
    modules, found = dict(runs.subject.model.named_modules()), {}
    for place, tap in places.taps.items():
        if tap.nth:
            raise ValueError(f"{place}: layers that share one module cannot be gone through one by one")
        with runs.progress(f"integrated gradients of {place}", (n_steps + 2) * runs.batch.rows, False):
            layer = modules[tap.path], tap.path, tap.side == "input"
            shares, _ = _through(runs, layer, start, n_steps, batch_size)
        found[str(place)] = places.of(place, tap, shares).float()
    return found


def gradient_shap(subject: Subject, batch: Batch, targets: Targets, *, samples: int = 32, noise: float = 0.0,
                  baseline: Baseline | Sequence[str | int] = None, seed: int = 0, batch_size: int = 32,
                  show_progress: bool = False) -> Relevance:
    """Gradient at random points between the input and neutral inputs drawn at random, times the way: Captum's
    `GradientShap`.

    R_t = E_{x', a} sum_d (x_{t,d} - x'_{t,d}) dy/dx_{t,d}(x' + a (x - x')), a uniform on [0, 1] (Lundberg and Lee 2017;
    Erion et al. 2021, eq. 3). Unit: that of the target. Complete in expectation: sum R = y(x) - E y(x'); the ledger
    books the mean of y(x') as "baseline", and its residual is what the draws left. For text as `integrated_gradients`.
    Cost a row: `samples` + 1 forwards and backwards, and a forward for each baseline. Chance depends on the seed and
    the row's own input.

    Args: samples: points. noise: standard deviation of what is added to them, in the unit of the input. baseline: one,
        as of `integrated_gradients`, or a list to draw from; None: all of `neutral.PICTURES`, or every token of
        `neutral.TOKENS` that there is. batch_size, show_progress: as of `smoothgrad`.
    Returns: map (B, T) or (B, Y, X); with all features in `inputs`.
    Raises: ValueError for an unknown option; IndependentOutput if the target does not depend on the input; ImportError
        without captum.
    """
    at_least_one(samples=samples, batch_size=batch_size)
    if not noise >= 0:
        raise ValueError(f"noise is a standard deviation, at least 0, got {noise}")
    found = derivative(subject, batch, targets)
    runs = Runs(subject, batch, found, batch_size=batch_size)
    choices = _choices(subject, batch, baseline)
    shares = torch.zeros_like(found.leaf)
    with runs.progress("gradient shap", (samples + len(choices)) * batch.rows, show_progress):
        starts, values, names = zip(*(_start(runs, choice) for choice in choices), strict=True)
        for row in range(batch.rows):
            with seeded(seed, content(batch, row)):
                _shap(runs, row, [start[row] for start in starts], samples, float(noise), into=shares)
    plain = result(subject, batch, found, shares, method="gradient-shap")
    about = {"baseline": ", ".join(names), "samples": samples, "noise": noise, "seed": seed}
    return completed(plain, runs, summed(shares), torch.stack(values).mean(0), about,
                     conservation="complete in expectation")


def deeplift(subject: Subject, batch: Batch, targets: Targets, *, baseline: Baseline = None) -> Relevance:
    """Difference from a neutral input, passed back by the rescale rule: Captum's `DeepLift`.

    R_t = sum_d m_{t,d} (x_{t,d} - x'_{t,d}), the multiplier m of an activation being its output's difference over its
    input's (Shrikumar et al. 2017, section 3.5.1). Unit: that of the target. Complete: sum R = y(x) - y(x').

    Captum has the rule for activations and poolings that are modules (ReLU, Sigmoid, MaxPool2d ...), each called once.
    What else is not linear (GELU, a norm, attention) passes its plain gradient, the sum is off, and the map would be no
    DeepLIFT: that is an error here. So it applies to networks of such modules, not to transformers as they are.
    Cost: 4 forwards, 3 backwards.

    Args: baseline: as of `integrated_gradients`.
    Returns: map (B, T) or (B, Y, X); with all features in `inputs`.
    Raises: ValueError where it does not apply, which says why, or for an unknown baseline.
    """
    found = derivative(subject, batch, targets)
    runs = Runs(subject, batch, found)
    with runs.progress("deeplift", 0, False), _tidied(subject.model), warnings.catch_warnings():
        start, value, name = _start(runs, baseline)
        warnings.filterwarnings("ignore", module="captum")  # of hooks that it takes away again
        try:
            shares = captum().DeepLift(_Valued(subject.model, runs.whole)).attribute(found.leaf.clone(), start).detach()
        except RuntimeError as cause:
            if "more than once" not in str(cause):
                raise
            raise ValueError(f"deeplift does not apply to {subject.name}: a module is called more than once") from cause
    runs.count(0, backwards=2 * batch.rows)
    plain = result(subject, batch, found, shares, method="deeplift")
    done = completed(plain, runs, summed(shares), value, {"baseline": name}, conservation="complete")
    _check_complete(subject, done, shares)
    return done


def _check_complete(subject: Subject, done: Relevance, shares: Tensor) -> None:
    off = done.ledger.residual.abs() > COMPLETE * shares.abs().flatten(1).sum(1).to(done.ledger.residual)
    if not off.any():
        return
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    row, ruled = int(off.nonzero()[0]), tuple(SUPPORTED_NON_LINEAR)
    leaves = [module for module in subject.model.modules() if not any(True for _ in module.children())]
    other = sorted({type(module).__name__ for module in leaves if not isinstance(module, (*ruled, *LINEAR))})
    books = done.ledger
    raise ValueError(
        f"deeplift does not apply to {subject.name}: in row {row} the map sums to {books.input[row].item():.4g}, and "
        f"the target changes by {(books.value - books.absorbed['baseline'])[row].item():.4g}. Captum has its rule for "
        f"modules of type {', '.join(kind.__name__ for kind in ruled)}, and not for what else is not linear: "
        f"{', '.join([*other, 'functions of torch (attention, products)', 'targets that are no logit'])}")


class _Valued(nn.Module):
    """The model with the explained values as its output, as Captum's `DeepLift` takes it."""

    def __init__(self, model: nn.Module, values: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.values = model, values
        self.training = False

    def forward(self, changed: Tensor) -> Tensor:
        return self.values(changed)


@contextmanager
def _tidied(model: nn.Module) -> Iterator[None]:
    """Each module reads a copy of what the one before it gave: of two with a rule in a row, which share a tensor,
    Captum 0.9 loses the first's. And what it leaves on modules, after an error or without a gradient, is taken away.
    """
    before = {module: set(vars(module)) for module in model.modules()}
    copied = [module.register_forward_pre_hook(lambda module, args: tree_map(_copy, args)) for module in before]
    try:
        yield
    finally:
        for handle in copied:
            handle.remove()
        for module, names in before.items():
            for name in set(vars(module)) - names:
                delattr(module, name)


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _shap(runs: Runs, row: int, starts: list[Tensor], samples: int, noise: float, *, into: Tensor) -> None:
    values, inside = runs.of_row(row)
    where = slice(None) if inside is None else inside
    shap = captum().GradientShap(values)
    shap.gradient_func = runs.gradients
    starts = torch.stack([start[where] for start in starts])  # (K, ...)
    own = shap.attribute(runs.found.leaf[row][where][None], starts, n_samples=samples, stdevs=noise)[0]
    into[row, where] = own.to(into.dtype)


def _start(runs: Runs, baseline: Baseline) -> tuple[Tensor, Tensor, str]:
    """Where the way begins, shape of the leaf; the target there, (B,); and its name. Cost: one forward."""
    batch, leaf, module = runs.batch, runs.found.leaf, runs.found.module
    if module is not None and baseline == "zero":
        start, name = leaf.masked_fill(_inside(batch, leaf.device)[..., None], 0), "zero embedding"
        return start, runs.whole(start).detach(), name
    start, name = _input(runs.subject, batch, baseline)
    if module is None:
        return start, runs.whole(start).detach(), name
    with torch.no_grad(), Embedded(module, start) as embedded:
        value = runs.ids(start)
    return embedded.leaf.detach().to(leaf.dtype), value.detach(), name


def _input(subject: Subject, batch: Batch, baseline: Baseline) -> tuple[Tensor, str]:
    """The neutral input, as the model takes it, and its name."""
    _, source = rows.leaf(batch)
    if not source.is_floating_point():
        token, name = neutral.token(subject.tokenizer, baseline)
        return source.where(~_inside(batch, source.device), token), name
    if source.ndim == 4:
        picture, name = neutral.picture(source, baseline or "zero")
        return picture.expand_as(source).clone(), name
    if baseline not in (None, "zero"):
        raise ValueError(f"no baseline {baseline!r} for plain tensors; there is zero")
    return torch.zeros_like(source), "zero"


def _inside(batch: Batch, device: torch.device) -> Tensor:
    """Which tokens are units, (B, T): no special token, no padding."""
    return units.groups(batch).to(device) >= 0


def _choices(subject: Subject, batch: Batch, baseline: Baseline | Sequence[str | int]) -> list[Baseline]:
    if baseline is None and rows.leaf(batch)[1].ndim == 4:
        return list(neutral.PICTURES)
    if baseline is None and not rows.leaf(batch)[1].is_floating_point():
        known = (name for name in neutral.TOKENS if getattr(subject.tokenizer, f"{name}_token_id", None) is not None)
        return list(known) or [None]
    several = isinstance(baseline, Sequence) and not isinstance(baseline, str)
    if several and not baseline:
        raise ValueError("an empty list of baselines; give at least one, or None for all")
    return list(baseline) if several else [baseline]


def _layer(runs: Runs, layer: str | None) -> tuple[nn.Module, str, bool]:
    """The module whose positions are explained, its path, and whether what it reads is meant instead of what it gives.

    Cost: one forward, but for a module's path.
    """
    model, batch = runs.subject.model, runs.batch
    modules = dict(model.named_modules())
    if layer in modules and layer:
        return modules[layer], layer, False
    wanted = None
    if layer is not None:
        try:
            wanted = Address.parse(layer)
        except ValueError as cause:
            raise ValueError(f"no layer {layer!r}: neither a module's path nor an address such as L3") from cause
        if wanted.part not in ("layer", "in") or wanted.layer is None or wanted.position is not None:
            raise ValueError(f"layer {layer!r} is not one whole layer; give L3, or the path of a module")
    runs.count(batch.rows)
    parts = anatomy(model, batch.args, batch.kwargs)
    if wanted is None:
        return modules[parts.layers[0].path], parts.layers[0].path, True
    (_, tap), = parts.resolve(wanted)
    return modules[tap.path], tap.path, tap.side == "input"


def _held(runs: Runs, module: nn.Module, path: str, reads: bool, source: Tensor) -> tuple[Tensor, Tensor]:
    """What the module reads or gives on this input, in at least float32, and the target there, (B,)."""
    with torch.no_grad(), Held(module, reads=reads) as held:
        value = runs.ids(source)
    if held.value is None or len(held.value) != len(source):
        found = "no features" if held.value is None else f"{tuple(held.value.shape)} for {len(source)} rows"
        raise ValueError(f"{path} {'reads' if reads else 'gives'} {found}; give a layer of (B, T, D) or (B, D, Gy, Gx)")
    return held.value.to(torch.promote_types(held.value.dtype, torch.float32)), value.detach()


def _placed(shares: Tensor, batch: Batch, path: str) -> tuple[Tensor, Tensor | None]:
    """Relevance of positions as a map, and what prefix tokens hold, (B,).

    Args: shares: of a layer, (B, T, D), or (B, D, Gy, Gx) or (B, Gy, Gx, D) of patches.
    """
    source, shape = rows.leaf(batch)[1], tuple(shares.shape)
    if source.ndim != 4:
        if shares.ndim != 3 or shape[:2] != tuple(source.shape[:2]):
            raise ValueError(f"{path} gives {shape}, which are not the positions of an input {tuple(source.shape)}")
        return shares.sum(-1), None
    size = tuple(source.shape[-2:])
    patch, grid = (batch.units.patch, batch.units.grid) if isinstance(batch.units, ImageUnits) else (None, None)
    if shares.ndim == 4:
        last = grid is not None and shape[1:3] == grid
        cells, patch, grid = shares.sum(-1 if last else 1).flatten(1), None, shape[1:3] if last else shape[2:]
    elif shares.ndim == 3:
        cells, grid = shares.sum(-1), grid or units.grid(size, shape[1])
    else:
        raise ValueError(f"{path} gives {shape}, which are no positions; give a layer of (B, T, D) or (B, D, Gy, Gx)")
    places = units.patches(size, patch=patch, grid=grid).expand(len(cells), -1, -1)
    count = grid[0] * grid[1]
    if count > cells.shape[1]:
        raise ValueError(f"{path} gives {cells.shape[1]} positions, fewer than the {count} patches; give a layer "
                         "before they are merged")
    prefix = cells[:, :-count].sum(1) if cells.shape[1] > count else None  # class and register tokens come first
    return units.spread(cells[:, -count:], places), prefix
