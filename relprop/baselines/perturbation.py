"""Maps from taking units out of the input and running the model: occlusion, feature ablation, KernelSHAP and LIME, all
Captum's.

Captum sees which units are present, ones and zeros, and not the input; `check.removal` makes the input of it. So all
four take out what the ablation check takes out, and put in its place what that puts.

Units. Text: words by default, since half a word is no input that a model ever met; `by="token"` takes pieces of words
alone. A word's relevance is divided evenly over its tokens. Special tokens and padding stay and get none. Pictures:
the model's patches, or `patch` pixels; a patch's relevance is divided evenly over its pixels. In place of what is out
stands what `neutral` has: for text the mask token where there is one (a token's name or id, or "delete", by the
attention mask), for pictures each one's median colour ("mean", "zero" or "blur"). Its name is in the provenance.

References: M. Zeiler and R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (occlusion); S.
Lundberg and S.-I. Lee, "A Unified Approach to Interpreting Model Predictions", NIPS 2017 (KernelSHAP); M. Ribeiro et
al., "Why Should I Trust You? Explaining the Predictions of Any Classifier", KDD 2016 (LIME).
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import rows, sight, units
from ..check.removal import Removal, removal
from ..errors import IndependentOutput
from ..result import Ledger, Relevance
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, ImageUnits, TextUnits
from .chance import seeded
from .leaf import at_least_one, captum, content

FEW = 256  # samples of KernelSHAP and LIME beyond two for each unit
KERNEL_WIDTH = 0.25  # of the authors' code of LIME
Side = int | tuple[int, int]
Values = Callable[[Tensor], Tensor]


def feature_ablation(subject: Subject, batch: Batch, targets: Targets, *, by: str | None = None,
                     patch: Side | None = None, baseline: str | int | None = None, batch_size: int = 32,
                     show_progress: bool = False) -> Relevance:
    """How far the target falls when a unit alone is taken out: Captum's `FeatureAblation`.

    R_u = y(x) - y(x without u). Unit: that of the target. Sums to y(x) - y(nothing) for models that are additive in
    the units; not conservative otherwise. Cost a row: U + 1 forwards.

    Args: by: "word" (the default) or "token", for text. patch: side of the units of pictures in pixels, or (Py, Px);
        None: the model's own. baseline: what stands in place of a unit (see the module). batch_size: changed inputs at
        once. show_progress: a bar of the changed inputs.
    Returns: map (B, T), (B, Y, X), or of the positions or features of a plain tensor.
    Raises: ValueError for an unknown option, or a row without units; IndependentOutput if the target never changes;
        ImportError without captum.
    """
    run = _Run.of(subject, batch, targets, by=by, patch=patch, baseline=baseline, batch_size=batch_size)
    return run.map("feature-ablation", lambda values, there, row: _ablated(values, there, batch_size),
                   total=lambda count: count, shown=show_progress)


def occlusion(subject: Subject, batch: Batch, targets: Targets, *, window: Side | None = None,
              stride: Side | None = None, by: str | None = None, baseline: str | int | None = None,
              batch_size: int = 32, show_progress: bool = False) -> Relevance:
    """How far the target falls when a window is taken out, slid over the input: Captum's `Occlusion`.

    R_p = mean over the windows w that hold p of (y(x) - y(x without w)) / |w| (Zeiler and Fergus 2014, section 4.1, who
    show y itself). |w| counts the pixels or units of w, so that windows that tile the input sum to what they took.
    Unit: that of the target. Not conservative. Cost a row: a forward for each place of the window, and one.

    Args: window: of pictures, side in pixels or (Wy, Wx), by default the model's patch; of text, a number of units in a
        row, by default 1. stride: from one window to the next, at most the window, which is the default. by, baseline,
        batch_size, show_progress: as of `feature_ablation`.
    Returns, Raises: as `feature_ablation`.
    """
    pictured = _pictured(batch)
    # for pictures each pixel is a unit, and Captum slides the window over the grid of them
    run = _Run.of(subject, batch, targets, by=by, patch=1 if pictured else None, baseline=baseline,
                  batch_size=batch_size)
    size = tuple(rows.leaf(batch)[1].shape[-2:]) if pictured else None
    window, stride = _window(window, stride, _own_patch(batch) if pictured else (1,))
    if size is not None and any(wide > side for wide, side in zip(window, size, strict=True)):
        raise ValueError(f"a window of {window} pixels does not fit a picture of {size}")

    def places(count: int) -> int:
        shape = size or (count,)
        steps = (math.ceil(max(0, side - w) / s) + 1 for side, w, s in zip(shape, window, stride, strict=True))
        return math.prod(steps)

    def attribute(values: Values, there: Tensor, row: int) -> Tensor:
        grid = there if size is None else there.view(1, *size)
        share = lambda present: _shared(values, present.flatten(1))
        wide = tuple(min(w, side) for w, side in zip(window, grid.shape[1:], strict=True))
        steps = tuple(min(s, w) for s, w in zip(stride, wide, strict=True))
        found = captum().Occlusion(share).attribute(grid, sliding_window_shapes=wide, strides=steps, baselines=0,
                                                    perturbations_per_eval=batch_size)
        return found.flatten()

    return run.map("occlusion", attribute, total=places, shown=show_progress,
                   about={"window": list(window), "stride": list(stride)})


def kernel_shap(subject: Subject, batch: Batch, targets: Targets, *, samples: int | None = None, seed: int = 0,
                by: str | None = None, patch: Side | None = None, baseline: str | int | None = None,
                batch_size: int = 32, show_progress: bool = False) -> Relevance:
    """Shapley value of each unit, from a regression over random subsets of them: Captum's `KernelShap`.

    The additive model of the units that fits y best under the Shapley kernel (Lundberg and Lee 2017, theorem 2), its
    ends held at y(x) and y(nothing) by a large weight. Unit: that of the target. Complete up to that: sum R = y(x) -
    y(nothing), which the ledger books as "baseline". With fewer samples than units it is no more than the smallest of
    many fits. Cost a row: at most `samples` + 1 forwards; equal subsets run once. Chance depends on the seed and the
    row's own input.

    Args: samples: subsets, the whole and the empty one among them; None: 2 U + 256. by, patch, baseline, batch_size,
        show_progress: as of `feature_ablation`.
    Returns, Raises: as `feature_ablation`.
    """
    drawn = _samples(samples)
    run = _Run.of(subject, batch, targets, by=by, patch=patch, baseline=baseline, batch_size=batch_size)

    def attribute(values: Values, there: Tensor, row: int) -> Tensor:
        if there.shape[1] == 1:  # whose one subset is the empty one, and of which Captum's kernel is 0 / 0
            return _ablated(values, there, batch_size)
        with seeded(seed, content(batch, row)):
            return captum().KernelShap(values).attribute(
                there, baselines=0, n_samples=drawn(there.shape[1]), perturbations_per_eval=batch_size).flatten()

    found = run.map("kernel-shap", attribute, total=drawn, shown=show_progress, about={"seed": seed})
    ledger = Ledger(found.value, sum(found.totals.values()).to(found.value), {"baseline": run.empty()})
    return replace(found, ledger=ledger, conservation="complete up to the fit", forwards=run.forwards)


def lime(subject: Subject, batch: Batch, targets: Targets, *, samples: int | None = None,
         kernel_width: float = KERNEL_WIDTH, alpha: float = 1.0, seed: int = 0, by: str | None = None,
         patch: Side | None = None, baseline: str | int | None = None, batch_size: int = 32,
         show_progress: bool = False) -> Relevance:
    """Weights of a linear model of the units that fits the target near the input: Captum's `Lime`.

    R = argmin_w sum_z exp(-d_z^2 / 2 k^2) (y(z) - w z - c)^2 + alpha |w|^2 over random subsets z, each unit present by
    an even chance, d_z the cosine distance of z from all units (Ribeiro et al. 2016, eq. 2 and section 3.4; ridge, as
    their code has it, where Captum's own default is a lasso). Unit: that of the target. Not conservative. Cost a row:
    at most `samples` + 1 forwards; equal subsets run once. Chance as of `kernel_shap`.

    Args: samples: subsets; None: 2 U + 256. kernel_width: k. alpha: of the ridge, 0 for least squares. The rest as of
        `feature_ablation`.
    Returns, Raises: as `feature_ablation`.
    """
    drawn = _samples(samples)
    if not kernel_width > 0 or not alpha >= 0:
        raise ValueError(f"kernel_width is above 0 and alpha at least 0, got {kernel_width} and {alpha}")
    run = _Run.of(subject, batch, targets, by=by, patch=patch, baseline=baseline, batch_size=batch_size)

    def attribute(values: Values, there: Tensor, row: int) -> Tensor:
        from captum._utils.models.linear_model import SkLearnRidge
        from captum.attr._core.lime import get_exp_kernel_similarity_function

        near = get_exp_kernel_similarity_function("cosine", kernel_width=kernel_width)
        method = captum().Lime(values, interpretable_model=SkLearnRidge(alpha=alpha), similarity_func=near)
        with seeded(seed, content(batch, row)):
            return method.attribute(there, baselines=0, n_samples=drawn(there.shape[1]),
                                    perturbations_per_eval=batch_size).flatten()

    return run.map("lime", attribute, total=drawn, shown=show_progress,
                   about={"seed": seed, "kernel_width": kernel_width, "alpha": alpha})


@dataclass
class _Run:
    """The target as a function of which units are there; every subset runs once."""

    subject: Subject
    batch: Batch  # as given
    targets: Targets  # fixed by the whole input
    names: list[str]
    value: Tensor  # (B,), float64
    out: Removal
    by: str | None
    batch_size: int
    known: list[dict[bytes, float]]  # of each row, less its value
    ran: int = 0

    @classmethod
    def of(cls, subject: Subject, batch: Batch, targets: Targets, *, by: str | None, patch: Side | None,
           baseline: str | int | None, batch_size: int) -> _Run:
        at_least_one(batch_size=batch_size)
        by = "word" if by is None and isinstance(batch.units, TextUnits) else by
        out = removal(subject, _cut(batch, patch), baseline=baseline, by=by)
        with settled(subject.model), torch.no_grad():
            output = subject.forward(batch)
            fixed = targets.fixed(output, batch)
            value, names = fixed.value(output, batch), fixed.names(output, batch)
        return cls(subject, batch, fixed, names, value.double().cpu(), out, by, batch_size,
                   [{} for _ in range(batch.rows)])

    @property
    def forwards(self) -> int:
        """Passes of the batch: rows that ran, by rows of the batch, rounded up; the whole input is one of them."""
        return 1 + math.ceil(self.ran / self.batch.rows)

    def map(self, method: str, attribute: Callable[[Values, Tensor, int], Tensor], *, total: Callable[[int], int],
            shown: bool, about: dict | None = None) -> Relevance:
        """The map of the method that gives a row's relevance of units, (U,), from `values` and the whole, (1, U)."""
        from tqdm.auto import tqdm

        counts = self.out.counts.tolist()
        relevance = torch.zeros(self.batch.rows, max(counts), dtype=torch.float64)
        bar = tqdm(total=sum(map(total, counts)), desc=method, unit="row", disable=not shown, leave=False)
        with settled(self.subject.model), torch.no_grad(), bar, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="captum|sklearn")  # of subsets fewer than units
            for row, count in enumerate(counts):
                values = lambda present, row=row: self._values(row, present, bar.update)
                relevance[row, :count] = attribute(values, torch.ones(1, count), row).double()
                if not any(self.known[row].values()):
                    raise IndependentOutput(f"the target of row {row} ({self.names[row]}) stays the same whatever is "
                                            "taken out of the input, so there is nothing to explain")
        provenance = {"model": self.subject.name, "baseline": self.out.baseline, **(about or {})}
        provenance |= {"by": self.by} if self.by else {}
        whole, pictures = sight.parted(units.spread(relevance, self.out.groups), self.batch)
        return Relevance(map=whole.float(), value=self.value.float(), target=self.names, method=method,
                         conservation="not conservative", units=self.batch.units, forwards=self.forwards,
                         provenance=provenance, pictures=pictures)

    def empty(self) -> Tensor:
        """Target of the rows without any unit, (B,)."""
        with settled(self.subject.model), torch.no_grad():
            nothing = [self._values(row, torch.zeros(1, count), lambda rows: None)
                       for row, count in enumerate(self.out.counts.tolist())]
        return (self.value + torch.cat(nothing)).float()

    def _values(self, row: int, present: Tensor, seen: Callable[[int], object]) -> Tensor:
        """Target of the row with these units, less that of the whole row, (n,), float64.

        Less the whole, because Captum fits in float32, where a large value leaves few digits for the differences.
        """
        gone = present.bool().logical_not()
        keys = [each.numpy().tobytes() for each in gone]
        known = self.known[row]
        known.setdefault(bytes(gone.shape[1]), 0.0)  # nothing gone
        new = {key: each for key, each in zip(keys, gone, strict=True) if key not in known}
        for part in (list(new)[i:i + self.batch_size] for i in range(0, len(new), self.batch_size)):
            known.update(zip(part, self._run(row, torch.stack([new[key] for key in part])).tolist(), strict=True))
        seen(len(keys))
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)

    def _run(self, row: int, gone: Tensor) -> Tensor:
        device = rows.leaf(self.batch)[1].device
        which = torch.full((len(gone),), row, device=device)
        spare = torch.zeros(len(gone), int(self.out.counts.max()) - gone.shape[1], dtype=torch.bool)  # of longer rows
        changed = self.out.without(which, torch.cat([gone, spare], 1).to(device))
        value = self.targets.take(which.tolist()).value(self.subject.forward(changed), changed)
        self.ran += len(gone)
        if not value.isfinite().all():
            raise ValueError(f"the target turns {value[~value.isfinite()][0].item()} under the baseline "
                             f"{self.out.baseline!r}; choose another one")
        return value.double().cpu() - self.value[row]


def _ablated(values: Values, there: Tensor, batch_size: int) -> Tensor:
    return captum().FeatureAblation(values).attribute(there, baselines=0, perturbations_per_eval=batch_size).flatten()


def _shared(values: Values, present: Tensor) -> Tensor:
    """Values, what they change by divided over the units that are gone."""
    return values(present) / (present == 0).sum(1).clamp(min=1)


def _samples(samples: int | None) -> Callable[[int], int]:
    """From a row's units to the number of subsets that are drawn."""
    if samples is not None:
        at_least_one(samples=samples)
    return lambda count: 2 * count + FEW if samples is None else samples


def _pictured(batch: Batch) -> bool:
    return isinstance(batch.units, ImageUnits) or rows.leaf(batch)[1].ndim == 4


def _cut(batch: Batch, patch: Side | None) -> Batch:
    """The batch with its pictures cut into patches of this size."""
    if patch is None:
        return batch
    if not _pictured(batch):
        raise ValueError("only pictures are cut into patches; leave `patch` out")
    size = tuple(rows.leaf(batch)[1].shape[-2:])
    patch = _pair(patch, "patch")
    if any(part > side for part, side in zip(patch, size, strict=True)):
        raise ValueError(f"a patch of {patch} pixels does not fit a picture of {size}")
    seen = batch.units.images if isinstance(batch.units, ImageUnits) else torch.zeros(batch.rows, 0)
    return replace(batch, units=ImageUnits(size, patch, None, seen))


def _own_patch(batch: Batch) -> tuple[int, int]:
    """Pixels of the model's patches, or of the cells that stand for them."""
    size = tuple(rows.leaf(batch)[1].shape[-2:])
    known = batch.units if isinstance(batch.units, ImageUnits) else ImageUnits(size, None, None, torch.zeros(0))
    if known.patch is not None:
        return known.patch
    return tuple(math.ceil(side / count) for side, count in zip(size, known.grid or (units.CELLS,) * 2, strict=True))


def _window(window: Side | None, stride: Side | None, own: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sides of the window and of its steps, two for pictures and one for others."""
    def sides(given: Side, name: str) -> tuple[int, ...]:
        if len(own) == 2:
            return _pair(given, name)
        at_least_one(**{name: given})
        return (given,)

    wide = own if window is None else sides(window, "window")
    steps = wide if stride is None else sides(stride, "stride")
    if any(step > side for step, side in zip(steps, wide, strict=True)):
        raise ValueError(f"a stride of {steps} is wider than the window of {wide} and would leave gaps")
    return wide, steps


def _pair(given: Side, name: str) -> tuple[int, int]:
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2:
        raise ValueError(f"{name} is a side or a pair of sides, got {given!r}")
    at_least_one(**{name: pair[0]})
    at_least_one(**{name: pair[1]})
    return pair
