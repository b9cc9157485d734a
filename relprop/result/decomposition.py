"""What a decomposition found: of each source, the part of the target and of places inside that it makes up."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Part:
    """What is relevant at a place: `rel`, (S, B, P, W), of `total`, (B, P, W): S sources, P positions, W entries.

    Of rules that do not sum (`Division.published`) each source has a total of its own, (S, B, P, W).
    """

    rel: Tensor
    total: Tensor

    @property
    def irrel(self) -> Tensor:
        """The rest, (S, B, P, W): total - rel."""
        return self.total - self.rel


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A target split in two by each source: total = rel + irrel.

    Args: sources: their names. rel: (S, B), unit of the target. total: the target, (B,). target: its name, one a row.
        at: parts at places asked for, by address. rules, ablation: how it was made. forwards: what it cost, a source
        counted as one. provenance: the model, the rules in words, and versions.
    """

    sources: tuple[str, ...]
    rel: Tensor
    total: Tensor
    target: list[str]
    at: Mapping[str, Part]
    rules: str
    ablation: str
    forwards: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rel.shape != (len(self.sources), len(self.total)):
            raise ValueError(f"rel is {tuple(self.rel.shape)}, but {(len(self.sources), len(self.total))} goes with "
                             f"{len(self.sources)} sources and {len(self.total)} rows")

    @property
    def irrel(self) -> Tensor:
        """The rest of the target, (S, B): total - rel."""
        return self.total - self.rel

    def __getitem__(self, source: str) -> Tensor:
        """The relevant part of the target by one source, (B,).

        Raises: KeyError for a source that was not decomposed.
        """
        if source not in self.sources:
            raise KeyError(f"no source {source!r}; there are {', '.join(self.sources[:8])}"
                           f"{' ...' if len(self.sources) > 8 else ''}")
        return self.rel[self.sources.index(source)]

    def top(self, count: int = 10, *, absolute: bool = True) -> dict[str, float]:
        """The sources with the largest relevant part, mean over the rows, by name and in order; `absolute`: of whatever
        sign.
        """
        mean = self.rel.mean(1)
        order = (mean.abs() if absolute else mean).argsort(descending=True, stable=True)[:count]
        return {self.sources[i]: float(mean[i]) for i in order.tolist()}

    def frame(self) -> DataFrame:
        """One line a source and row: source, row, target, rel, irrel, total."""
        from pandas import DataFrame

        S, B = self.rel.shape
        rows = torch.arange(B).repeat(S).tolist()
        return DataFrame({
            "source": [name for name in self.sources for _ in range(B)], "row": rows,
            "target": [self.target[row] for row in rows], "rel": self.rel.flatten().tolist(),
            "irrel": self.irrel.flatten().tolist(), "total": self.total.repeat(S).tolist()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the parts inside."""
        return {"sources": list(self.sources), "rel": self.rel.tolist(), "total": self.total.tolist(),
                "target": list(self.target), "rules": self.rules, "ablation": self.ablation,
                "forwards": self.forwards, "provenance": dict(self.provenance)}

    def __repr__(self) -> str:
        lines = [f"{name:<24} {value:+.4g}" for name, value in self.top(8).items()]
        more = len(self.sources) - len(lines)
        rest = [f"... {more} more"] if more > 0 else []
        return "\n".join([f"{self.rules}, ablation {self.ablation}, of {self.target[0]} = {float(self.total[0]):.4g}",
                          *lines, *rest])
