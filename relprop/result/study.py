"""A circuit put to the test: what was found, and what the model itself says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .circuit import Circuit, Item, said
from .faithfulness import Faithfulness
from .filed import Filed
from .number import amount, percent

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Study(Filed):
    """A circuit, what it does alone, and what each part of it does.

    Args: circuit: with the scores of all items, narrowed to those that are kept. curve: faithfulness over the size of
        the circuit. alone: that of the circuit itself. exact: of each kept item, the change of the metric's mean when
        it alone is ablated in the whole model, in the unit of the scores. chance: of "random" circuits of its size:
        "count", how faithful each is, and the share "beaten" with "low" and "high", and "p"; None: not asked for.
        tests: rows of the tests of Shi et al. 2024; None: not asked for.
        about: of the first example, "tokens", "pair", "pictures" and "patterns".
    """

    kind, called = "study", "a study"
    suffixes = (".json", ".csv", ".graphml", ".dot")

    circuit: Circuit
    curve: Faithfulness
    alone: Faithfulness
    exact: Mapping[Item, float]
    chance: Mapping[str, object] | None = None
    tests: list[dict] | None = None
    about: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.exact) != self.circuit.kept:
            raise ValueError(f"exact effects are of the {len(self.circuit)} kept {self.circuit.noun}, got "
                             f"{len(self.exact)}")

    def table(self) -> DataFrame:
        """One row a kept item, the one that matters most first: its score, and its exact effect."""
        from pandas import DataFrame

        items = [item for item in self.circuit.ranking() if item in self.circuit.kept]
        return DataFrame({"score": [self.circuit.scores[item] for item in items],
                          "exact": [self.exact[item] for item in items]},
                         index=list(map(said, items))).rename_axis(self.circuit.noun.removesuffix("s"))

    def summary(self) -> str:
        """A few lines: the circuit, its strongest items, and how faithful it is, beside random ones."""
        found, one = self.circuit, self.alone
        what = found.noun if found.level == found.noun else f"{found.noun} ({found.level})"
        lines = [f"{len(found)} of {len(found.scores)} {what} by {found.method}"]
        lines += [f"  {name:<24} score {amount(line.score, 3):>9}   exact {amount(line.exact, 3):>9}"
                  for name, line in self.table().head(10).iterrows()]
        lines.append(one.summary())
        if self.chance is not None:
            lines.append(f"  more faithful than {percent(self.chance['beaten'])} of {self.chance['count']} random "
                         "circuits of its size")
        for test in self.tests or ():
            lines.append(f"  {test['test']}: {'passed' if test['passed'] else 'not passed'} ({test['hypothesis']})")
        return "\n".join(lines)

    # -- files --------------------------------------------------------------------------------------------------------

    def _lines(self) -> DataFrame:
        return self.table()

    def tree(self) -> dict:
        """Plain data and tensors."""
        return {"circuit": self.circuit.to_dict(), "curve": self.curve.to_dict(), "alone": self.alone.to_dict(),
                "exact": [self.exact[item] for item in self.circuit],
                "chance": None if self.chance is None else dict(self.chance), "tests": self.tests, "about": self.about}

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """The study that has this tree. Raises: KeyError, TypeError or AttributeError for what has none, and ValueError
        for one whose parts are of another circuit.
        """
        found = Circuit.from_dict(data["circuit"])
        both = (Faithfulness.from_dict(data[name]) for name in ("curve", "alone"))
        return cls(found, *both, dict(zip(found, data["exact"])), data["chance"], data["tests"], dict(data["about"]))

    def _write(self, path: Path, suffix: str) -> None:
        """Besides .json, everything, and .csv, the table: the circuit as a graph."""
        if suffix in (".graphml", ".dot"):
            self.circuit.save(path)
        else:
            super()._write(path, suffix)


__all__ = ["Study"]
