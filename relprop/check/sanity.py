"""Sanity: whether a map depends on what the model has learned, and on what was asked for.

References: J. Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (section 3, randomisation of weights);
L. Sixt, M. Granz and T. Landgraf, "When Explanations Lie: Why Many Modified BP Attributions Fail", ICML 2020 (maps of
two classes that are the same).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import units
from ..anatomy import anatomy
from ..still import settled
from ..subject import Subject
from ..tokens import Batch
from . import statistics


@dataclass(frozen=True)
class Stage:
    """A part of the model and the names of its parameters."""

    name: str
    parameters: tuple[str, ...]


def cascading(subject: Subject, batch: Batch, relevance: Tensor, explain: Callable[[], Tensor], *, seed: int = 0
              ) -> Tensor:
    """Rank correlation of the map with those of the model as its weights are randomised from the output down. Best is
    0: a map of what was learned must not survive.

    Stage s has all parameters of the stages up to s drawn anew (Adebayo et al. 2018, section 3.1); the last one is a
    model that has learned nothing. All rows meet the same drawn weights. Cost: as many maps as there are stages.

    Args: relevance: the map, (B, T) or (B, Y, X). explain: () -> the map of the same inputs and targets, by the model
        as it is then.
    Returns: Spearman's correlation over the entries of each row, (S, B); NaN where a randomised model's map is the same
        everywhere.
    Raises: Undefined for a map that says nothing.
    """
    parts = stages(subject, batch)
    names = [[name for part in parts[:depth + 1] for name in part.parameters] for depth in range(len(parts))]
    return _correlations(subject, batch, relevance, explain, names, seed)


def independent(subject: Subject, batch: Batch, relevance: Tensor, explain: Callable[[], Tensor], *, seed: int = 0
                ) -> Tensor:
    """The same as `cascading` with one stage randomised at a time, the others as they were (Adebayo et al. 2018,
    section 3.2). Best is 0 at every stage."""
    names = [list(part.parameters) for part in stages(subject, batch)]
    return _correlations(subject, batch, relevance, explain, names, seed)


def class_contrast(relevance: Tensor, other: Tensor, batch: Batch) -> Tensor:
    """Rank correlation of the map with that of another class, (B,). Lower is better: 1 says that the method did not
    hear which class was asked for (Sixt et al. 2020, section 4). Args: both (B, T) or (B, Y, X)."""
    return correlation(relevance, other, units.groups(batch) >= 0)


def stages(subject: Subject, batch: Batch) -> list[Stage]:
    """The parts of the model from its output to its input: the head, the layers from the last on, the embeddings.

    Where no stack of layers is found, every module with parameters is a part. A shared parameter belongs to the part
    that registers it first.
    """
    names = [name for name, _ in subject.model.named_parameters()]
    try:
        with settled(subject.model):
            paths = [layer.path for layer in anatomy(subject.model, batch.args, batch.kwargs).layers]
    except ValueError:
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    own = [tuple(name for name in names if name.startswith(f"{path}.") or not path) for path in paths]
    inside = {name for group in own for name in group}
    first = next((at for at, name in enumerate(names) if name in inside), 0)
    before = tuple(name for name in names[:first] if name not in inside)
    after = tuple(name for name in names[first:] if name not in inside)
    layers = [Stage(path, group) for path, group in zip(paths, own, strict=True)]
    return [stage for stage in (Stage("head", after), *reversed(layers), Stage("embeddings", before))
            if stage.parameters]


@contextmanager
def randomised(model: nn.Module, names: Sequence[str], *, seed: int = 0) -> Iterator[None]:
    """The model with these parameters drawn anew, each from a normal distribution of its own mean and spread, so that
    activations keep their size; given back bit by bit.

    Raises: ValueError for a name that is no parameter of the model.
    """
    known = dict(model.named_parameters())
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no parameter {unknown[0]!r} in the model")
    kept = {name: known[name].detach().clone() for name in names}
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for name, value in kept.items():
                wide = value.double().cpu()
                spread = wide.std() if wide.numel() > 1 else wide.abs().sum()
                drawn = wide.mean() + spread * torch.randn(wide.shape, generator=generator, dtype=torch.float64)
                known[name].copy_(drawn)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                known[name].copy_(value)


def correlation(one: Tensor, other: Tensor, inside: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps over the entries that are `inside`, row by row, (B,).

    NaN where the second map is the same everywhere, or holds NaN.

    Raises: ValueError for maps of two shapes; Undefined where the first says nothing.
    """
    from scipy import stats

    if one.shape != other.shape:
        raise ValueError(f"maps of shape {tuple(one.shape)} and {tuple(other.shape)} do not compare")
    found = []
    for a, b, own in zip(one, other, inside, strict=True):
        a, b = statistics.told(a[own].double()), b[own].double()
        flat = not b.isfinite().all() or bool((b == b[0]).all())
        found.append(torch.nan if flat else float(stats.spearmanr(a.numpy(), b.numpy()).statistic))
    return torch.tensor(found, dtype=torch.float64)


def _correlations(subject: Subject, batch: Batch, relevance: Tensor, explain: Callable[[], Tensor],
                  names: list[list[str]], seed: int) -> Tensor:
    inside, found = units.groups(batch) >= 0, []
    for drawn in names:
        with randomised(subject.model, drawn, seed=seed):
            found.append(correlation(relevance.cpu(), explain().cpu(), inside))
    return torch.stack(found)
