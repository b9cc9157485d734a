"""What mediation found: total, direct and indirect effects of each mediator on each example, and what holds of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from torch import Tensor

from . import archive
from .filed import Filed
from .number import amount, chance

if TYPE_CHECKING:
    from pandas import DataFrame

SCALES = ("difference", "ratio")
KINDS = ("total", "direct", "indirect", "controlled")


@dataclass(frozen=True, eq=False)
class Summary:
    """Of each mediator, (M,): the mean over examples, its 95 % interval, the p-value of "it is zero" and the same
    corrected over the mediators (`q`). None with a single example, which has no spread.
    """

    mean: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Effects(Filed):
    """Effects of M mediators on B examples, all float64.

    What was measured are outcomes: `base` and `counterfactual`, (B,), of the two inputs; `indirect_outcome`, of the
    base with the mediator as in the counterfactual, and `direct_outcome`, of the counterfactual with the mediator as in
    the base, (M, B); `controlled_outcome`, of both with the mediator at a given value, (2, M, B). None: not asked for.
    Effects are made of them on a `scale`: "difference", y - y_0, or "ratio", y / y_0 - 1 (Vig et al. 2020).
    """

    kind = called = "effects"

    mediators: tuple[str, ...]
    base: Tensor
    counterfactual: Tensor
    indirect_outcome: Tensor | None
    direct_outcome: Tensor | None
    controlled_outcome: Tensor | None
    scale: str
    outcome: str
    summaries: dict[str, Summary] = field(default_factory=dict)
    about: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        M, B = len(self.mediators), len(self.base)
        wanted = {"counterfactual": (B,), "indirect_outcome": (M, B), "direct_outcome": (M, B),
                  "controlled_outcome": (2, M, B)}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, but {shape} goes with {M} mediators, {B} examples")
        if self.scale not in SCALES:
            raise ValueError(f"effects are on the scale {' or '.join(SCALES)}, not {self.scale!r}")

    @property
    def total(self) -> Tensor:
        """Total effect, y(x') against y(x), (B,)."""
        return self._against(self.counterfactual, self.base)

    @property
    def indirect(self) -> Tensor | None:
        """Natural indirect effect: y(x) with the mediator as under x', against y(x), (M, B)."""
        return self._against(self.indirect_outcome, self.base)

    @property
    def direct(self) -> Tensor | None:
        """Natural direct effect: y(x') with the mediator as under x, against y(x), (M, B)."""
        return self._against(self.direct_outcome, self.base)

    @property
    def controlled(self) -> Tensor | None:
        """Controlled direct effect: y(x') against y(x), the mediator at the same given value in both, (M, B)."""
        return None if self.controlled_outcome is None else self._against(*self.controlled_outcome.flip(0))

    @property
    def interaction(self) -> Tensor | None:
        """What total = direct + indirect leaves open: total - direct - indirect, (M, B)."""
        if self.direct is None or self.indirect is None:
            return None
        return self.total - self.direct - self.indirect

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of effect that are there."""
        return tuple(kind for kind in (*KINDS, "interaction") if getattr(self, kind) is not None)

    def effect(self, kind: str) -> Tensor:
        """Effects of a kind, (M, B); the total's M is 1.

        Raises: ValueError for a kind that was not asked for.
        """
        if kind not in self.kinds:
            raise ValueError(f"no {kind} effect here; there are {', '.join(self.kinds)}")
        found = getattr(self, kind)
        return found[None] if found.dim() == 1 else found

    def top(self, k: int = 10, kind: str = "indirect") -> list[str]:
        """The k mediators of the largest mean effect, in absolute value."""
        mean = self.effect(kind).mean(1).abs()
        return [self.mediators[index] for index in mean.topk(min(k, len(mean))).indices.tolist()]

    def table(self) -> DataFrame:
        """One row a kind and mediator: mean over examples, interval, p-value, q-value (Benjamini and Hochberg), and
        the mean over that of the total effect."""
        from pandas import DataFrame

        lines = []
        for kind in self.kinds:
            one, total = self.summaries[kind], self.total.mean()
            columns = {name: [None] * len(one.mean) if value is None else value.tolist()
                       for name, value in vars(one).items()}
            shares = (one.mean / total).tolist() if total else [None] * len(one.mean)
            names = [""] if kind == "total" else self.mediators
            lines += [{"kind": kind, "mediator": name, **{key: column[i] for key, column in columns.items()},
                       "share": shares[i]} for i, name in enumerate(names)]
        frame = DataFrame(lines).set_index(["kind", "mediator"])
        return frame.astype(float)

    def summary(self) -> str:
        """A few lines: the total effect with its p, and the mediators of the largest indirect (else direct) effects,
        each with its q, Benjamini-Hochberg's over all of them."""
        count = f"{len(self.base)} example{'s' * (len(self.base) != 1)}"
        groups = self.about.get("groups", len(self.base))
        count += f" in {groups} group{'s' * (groups != 1)}" if groups != len(self.base) else ""
        lines = [f"{self.outcome}: total effect {self._said('total', 0)} ({self.scale}, {count})"]
        kind = next((kind for kind in ("indirect", "direct", "controlled") if kind in self.kinds), None)
        for name in self.top(5, kind) if kind else []:
            lines.append(f"  {name}: {kind} effect {self._said(kind, self.mediators.index(name))}")
        return "\n".join(lines)

    def _said(self, kind: str, index: int) -> str:
        one = self.summaries[kind]
        mean = amount(float(one.mean[index]), 3)
        if one.low is None:
            return mean
        interval = f"[{amount(float(one.low[index]), 3)}, {amount(float(one.high[index]), 3)}]"
        shown = chance(float(one.p[index])) if kind == "total" else chance(float(one.q[index]), "q")
        return f"{mean} {interval}, {shown}"

    def _against(self, y: Tensor | None, before: Tensor) -> Tensor | None:
        if y is None:
            return None
        return y - before if self.scale == "difference" else y / before - 1

    # -- files -----------------------------------------------------------------------------------------------------

    def _lines(self) -> DataFrame:
        return self.table()

    def tree(self) -> dict:
        """Plain data and tensors."""
        return {**vars(self), "mediators": list(self.mediators),
                "summaries": {kind: dict(vars(one)) for kind, one in self.summaries.items()}}

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """The effects that have this tree. Raises: KeyError, TypeError or AttributeError for what has none."""
        names = ("base", "counterfactual", "indirect_outcome", "direct_outcome", "controlled_outcome")
        outcomes = {name: None if data[name] is None else archive.tensor(data, name) for name in names}
        summaries = {kind: Summary(**{name: None if one[name] is None else archive.tensor(one, name)
                                      for name in ("mean", "low", "high", "p", "q")})
                     for kind, one in data["summaries"].items()}
        return cls(mediators=tuple(data["mediators"]), scale=data["scale"], outcome=data["outcome"],
                   summaries=summaries, about=dict(data["about"]), **outcomes)
