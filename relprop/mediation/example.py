"""Which examples count, and what holds of layers: as Vig et al. 2020 report it."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import Undefined
from ..result.effects import Effects

if TYPE_CHECKING:
    from pandas import DataFrame

_LAYER = re.compile(r"L(\d+)(?=[.\[@]|$)")


def susceptible(found: Effects, *, quantile: float = 0.25) -> Tensor:
    """Which examples the counterfactual moves in the direction that is studied, bool (B,): those whose ratio
    y(x') / y(x) exceeds this quantile of the ratios above 1 (Vig et al. 2020, as their code filters WinoBias).

    Raises: Undefined if no ratio is above 1, or an outcome of a base is zero.
    """
    if not found.base.all():
        raise Undefined("the outcome of a base is zero, so that a ratio to it is undefined")
    ratio = found.counterfactual / found.base
    above = ratio[ratio > 1]
    if not len(above):
        raise Undefined("no outcome of a counterfactual exceeds that of its base, so that no example is susceptible")
    return ratio > torch.quantile(above, quantile)


def by_mediator(found: Effects) -> DataFrame:
    """A row for each mediator: mean and sample standard deviation over examples of every kind of effect."""
    from pandas import DataFrame

    columns = {f"{kind} {name}": take(found.effect(kind).expand(len(found.mediators), -1)).tolist()
               for kind in found.kinds for name, take in (("mean", lambda x: x.mean(1)), ("std", lambda x: x.std(1)))}
    return DataFrame(columns, index=list(found.mediators)).rename_axis("mediator")


def by_layer(found: Effects, *, kind: str = "indirect", share: float = 0.025) -> DataFrame:
    """A row for each layer, "" for what is in none: how many mediators, the sum and mean of their mean effects, and the
    mean over the `share` of largest effects, at least one (their figure of neurons by layer takes 2.5 %).

    Raises: ValueError for a share that is none, or a kind that was not asked for.
    """
    from pandas import DataFrame

    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; give a number above 0, up to 1")
    layers: dict[str, list[int]] = {}
    for index, name in enumerate(found.mediators):
        layer = _LAYER.match(name)
        layers.setdefault(layer[0] if layer else "", []).append(index)
    mean = found.effect(kind).mean(1)
    if kind == "total":
        raise ValueError("the total effect is of no layer")
    lines = []
    for layer, own in layers.items():
        top = mean[own].sort(descending=True).values[:max(1, round(share * len(own)))]
        lines.append({"layer": layer, "count": len(own), "sum": float(mean[own].sum()), "mean": float(mean[own].mean()),
                      "top": float(top.mean())})
    return DataFrame(lines).set_index("layer")
