"""How much of what a model does is done by circuits of it: the metric of each with all else ablated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from . import archive
from .filed import Filed
from .number import amount

if TYPE_CHECKING:
    from pandas import DataFrame

_TENSORS = ("outcome", "full", "empty", "kept", "low", "high")


@dataclass(frozen=True, eq=False)
class Faithfulness(Filed):
    """The metric of N circuits on B inputs, beside that of the whole model and of nothing of it, float64.

    Args: names: of the circuits. outcome: (N, B), with all that a circuit leaves out ablated; full, empty: (B,), with
        nothing and with everything ablated. kept: items of each circuit, (N,), of `items` in all. low, high: 95 %
        interval over the inputs of `share`, (N,); None with one input. fractions: sizes that were asked for, (N,), as
        shares of all items, where the circuits are of rising size. about: ablation, metric, ranking.
    """

    kind = called = "faithfulness"
    suffixes = (".json", ".csv")

    names: tuple[str, ...]
    outcome: Tensor
    full: Tensor
    empty: Tensor
    kept: Tensor
    items: int
    low: Tensor | None = None
    high: Tensor | None = None
    fractions: Tensor | None = None
    about: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        N, B = len(self.names), len(self.full)
        wanted = {"outcome": (N, B), "empty": (B,), "kept": (N,), "low": (N,), "high": (N,), "fractions": (N,)}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, but {shape} goes with {N} circuits, {B} inputs")

    @property
    def share(self) -> Tensor:
        """Faithfulness, (m(C) - m(empty)) / (m(full) - m(empty)) of the means over inputs, (N,): 1 for all, 0 for
        nothing (Hsu et al. 2024, section 3; Mueller et al. 2025). Of the metric KL that is 1 - KL(C) / KL(empty).
        """
        floor = self.empty.mean()
        return (self.outcome.mean(1) - floor) / (self.full.mean() - floor)

    @property
    def shares(self) -> Tensor:
        """The same of each input, (N, B)."""
        return (self.outcome - self.empty) / (self.full - self.empty)

    @property
    def mean_of_shares(self) -> Tensor:
        """Mean over inputs of the faithfulness of each, (N,): what `share` is not, where inputs differ (Miller et al.
        2024). Inputs on which the ablation of everything changes little weigh much.
        """
        return self.shares.mean(1)

    @property
    def recovered(self) -> Tensor:
        """Share of the metric itself, m(C) / m(full) of the means, (N,): of a logit difference, what is kept of it."""
        return self.outcome.mean(1) / self.full.mean()

    @property
    def mean_of_recovered(self) -> Tensor:
        """Mean over inputs of m(C) / m(full) of each, (N,) (auto-circuit's "percent", over 100)."""
        return (self.outcome / self.full).mean(1)

    @property
    def cpr(self) -> float:
        """Area under faithfulness over the fractions, by the trapezoid rule (MIB's CPR, Mueller et al. 2025): higher is
        better, and there is no bound. What is left of the smallest fraction is not counted.
        """
        return float(torch.trapezoid(self.share, self._curve()))

    @property
    def cmd(self) -> float:
        """Area between faithfulness and 1 over the fractions (MIB's CMD): lower is better, 0 the best."""
        return float(torch.trapezoid((1 - self.share).abs(), self._curve()))

    def smallest(self, share: float) -> str | None:
        """Name of the circuit of the fewest items with at least this faithfulness; None if there is none."""
        enough = [index for index, one in enumerate(self.share.tolist()) if one >= share]
        return self.names[min(enough, key=lambda index: int(self.kept[index]))] if enough else None

    def frame(self) -> DataFrame:
        """One row a circuit: what it keeps, its metric, and faithfulness in all forms, with the interval of `share`."""
        from pandas import DataFrame

        columns = {"kept": self.kept, "metric": self.outcome.mean(1), "share": self.share, "low": self.low,
                   "high": self.high, "mean of shares": self.mean_of_shares, "recovered": self.recovered,
                   "mean of recovered": self.mean_of_recovered}
        return DataFrame({name: [None] * len(self.names) if value is None else value.tolist()
                          for name, value in columns.items()}, index=list(self.names)).rename_axis("circuit")

    def summary(self) -> str:
        """A few lines: the metric of the whole model and of nothing, and each circuit's faithfulness."""
        lines = [f"{self.about.get('metric', 'metric')}: {amount(float(self.full.mean()))} whole, "
                 f"{amount(float(self.empty.mean()))} with everything ablated ({self.about.get('ablation', '')})"]
        for index, name in enumerate(self.names):
            spread = "" if self.low is None else \
                f" [{amount(float(self.low[index]), 3)}, {amount(float(self.high[index]), 3)}]"
            lines.append(f"  {name}: {int(self.kept[index])} of {self.items} kept, faithfulness "
                         f"{amount(float(self.share[index]), 3)}{spread}")
        return "\n".join(lines)

    def _curve(self) -> Tensor:
        if self.fractions is None:
            raise ValueError("these are circuits without sizes in order, and an area is of a curve over sizes; see "
                             "relprop.circuit.evaluation.curve")
        return self.fractions

    # -- files --------------------------------------------------------------------------------------------------------

    def _lines(self) -> DataFrame:
        return self.frame()

    def tree(self) -> dict:
        """Plain data and tensors."""
        return {**vars(self), "names": list(self.names)}

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """What has this tree. Raises: KeyError, TypeError or AttributeError for what has none."""
        tensors = {name: None if data[name] is None else archive.tensor(data, name)
                   for name in (*_TENSORS, "fractions")}
        return cls(names=tuple(data["names"]), items=data["items"], about=dict(data["about"]), **tensors)
