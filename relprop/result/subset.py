"""Few mediators that were chosen to do together what all do: their effects, and what holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from torch import Tensor

from . import archive
from .filed import Filed
from .number import amount, percent

if TYPE_CHECKING:
    from pandas import DataFrame

_TENSORS = ("effects", "alone", "whole", "total")


@dataclass(frozen=True, eq=False)
class Subset(Filed):
    """Mediators in the order in which they were chosen, and indirect effects on B examples, float64.

    `effects`, (k, B): of the first i of the `chosen` together. `alone`, (M, B): of each of all `mediators` by itself;
    `whole`, (B,): of all together. `total`, (B,): of the counterfactual.
    """

    kind, called = "subset", "a subset"

    how: str
    chosen: tuple[str, ...]
    effects: Tensor
    mediators: tuple[str, ...]
    alone: Tensor
    whole: Tensor
    total: Tensor
    scale: str
    outcome: str
    about: dict = field(default_factory=dict)

    @property
    def parts(self) -> Tensor:
        """What the effects would be if they added up: sums of those of the first i alone, (k, B)."""
        at = [self.mediators.index(name) for name in self.chosen]
        return self.alone[at].cumsum(0)

    @property
    def synergy(self) -> Tensor:
        """Concurrent effect minus the sum of its parts, of the first i, (k, B)."""
        return self.effects - self.parts

    @property
    def whole_synergy(self) -> Tensor:
        """The same of all mediators, (B,)."""
        return self.whole - self.alone.sum(0)

    def reaches(self, share: float = 1.0, *, of: str = "whole") -> int | None:
        """How few of the chosen have this share of the mean effect of all mediators, or `of` the "total" effect; None
        if all of the chosen have less.

        Raises: ValueError for another `of`.
        """
        if of not in ("whole", "total"):
            raise ValueError(f'a share is of the effect of the "whole" or of the "total", not {of!r}')
        goal = float(getattr(self, of).mean())
        done = (self.effects.mean(1) * (1 if goal >= 0 else -1) >= share * abs(goal)).nonzero().flatten().tolist()
        return done[0] + 1 if done else None

    def table(self) -> DataFrame:
        """A row for each number of mediators: the one that was added, means over examples of its effect alone, of the
        concurrent effect, the sum of parts and their difference, and the share of the effect of all.
        """
        from pandas import DataFrame

        at, whole = [self.mediators.index(name) for name in self.chosen], float(self.whole.mean())
        effect = self.effects.mean(1)
        columns = {"mediator": list(self.chosen), "alone": self.alone[at].mean(1), "effect": effect,
                   "parts": self.parts.mean(1), "synergy": self.synergy.mean(1)}
        columns["share"] = effect / whole if whole else [None] * len(at)
        frame = DataFrame({name: one.tolist() if isinstance(one, Tensor) else one for name, one in columns.items()})
        return frame.set_index(frame.index + 1).rename_axis("count")

    def summary(self) -> str:
        """A few lines: how few have what all do, and the effect of the first of them together, one more in each line.
        """
        whole, few = float(self.whole.mean()), self.reaches() if self.whole.mean() else None
        count = f"{self.rows} example{'s' * (self.rows != 1)}"
        said = f"{few} reach it" if few else f"{len(self.chosen)} do not reach it"
        lines = [f"{self.outcome}: total effect {amount(float(self.total.mean()), 3)} ({self.scale}, {count}), all "
                 f"{len(self.mediators)} mediators together {amount(whole, 3)}; {said}"]
        for line in self.table().itertuples():
            lines.append(f"  {line.Index}: + {line.mediator}: together {amount(line.effect, 3)}, sum of parts "
                         f"{amount(line.parts, 3)}" + (f", {percent(line.share)} of all" if whole else ""))
        return "\n".join(lines)

    @property
    def rows(self) -> int:
        """Examples."""
        return len(self.total)

    def _lines(self) -> DataFrame:
        return self.table()

    def tree(self) -> dict:
        """Plain data and tensors."""
        return dict(vars(self))

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """The subset that has this tree. Raises: KeyError, TypeError or AttributeError for what has none."""
        found = {name: archive.tensor(data, name) for name in _TENSORS}
        return cls(how=data["how"], chosen=tuple(data["chosen"]), mediators=tuple(data["mediators"]),
                   scale=data["scale"], outcome=data["outcome"], about=dict(data["about"]), **found)


class Subsets(Filed, dict[str, Subset]):
    """Subsets by name, such as that of each layer."""

    kind, called = "subsets", "a subset"
    of = Subset

    def table(self) -> DataFrame:
        """The tables of all, one beneath the other."""
        from pandas import concat

        return concat({name or "none": one.table() for name, one in self.items()}, names=["of"])

    def summary(self) -> str:
        """The summaries of all, one beneath the other."""
        return "\n".join(f"{name or 'all'}: {one.summary()}" for name, one in self.items())

    def _lines(self) -> DataFrame:
        return self.table()

    def tree(self) -> dict:
        """Plain data and tensors."""
        return {"subsets": {name: archive.sealed(one.kind, one.tree()) for name, one in self.items()}}

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """The subsets that have this tree. Raises: KeyError, TypeError or AttributeError for what has none."""
        return cls({name: cls.of.from_dict(one) for name, one in data["subsets"].items()})
