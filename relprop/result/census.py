"""What a census found: for each architecture what was asked of it, what passed, and why the rest did not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .. import search
from .filed import Filed
from .number import percent

if TYPE_CHECKING:
    from pandas import DataFrame

EXPLAINED = ("attnlrp", "cp-lrp")
QUESTIONS = {
    "builds": "a tiny instance can be made of its config",
    "runs": "it runs by itself, and gives finite numbers",
    "attnlrp": "explained by AttnLRP: outputs unchanged, books balanced",
    "cp-lrp": "explained by CP-LRP likewise",
    "anatomy": "layers, heads and MLPs were found, and an edit of each changes the output",
    "intervention": "a head of the first, the middle and the last layer, set to zero, changes the output",
    "decompose": "such a head makes up some of the value, and by difference what the value loses with a little of it",
}
"""What is asked of each architecture, in this order; what is told apart in the tables."""
FIGURES = {
    "rules": "every operation that was met has a rule",
    "change": "largest change of an output while it is explained, relative to the largest entry",
    "ledger": "largest error of the books, relative to the value",
    "time": "of a map with its ledger, in forwards + backwards of the tiny model: mostly Python's own",
}
"""What else the tables have."""
LONGEST = 200  # characters of a reason
SHOWN = 20  # failures that a summary lists


@dataclass(frozen=True)
class Failure:
    """Why a question was answered with no: the kind of error and the first line of what it said."""

    kind: str
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        text = re.sub(r"\s+", " ", str(error)).strip()
        return cls(type(error).__name__, text if len(text) <= LONGEST else f"{text[:LONGEST - 3]}...")

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass
class Entry:
    """One architecture's line, filled in as it is asked.

    `passed` and `failures` are by question; a question that was not asked, since one before it failed, is in neither.
    `parameters` are those of the tiny instance; `change` is the largest change of its output, relative to the largest
    entry, and `ledger` the largest error of the books, both by method; `time` is that of a map with its ledger in
    forwards + backwards of the tiny model, which is mostly that of Python. `stands` is how many names of the library it
    stands for.
    """

    library: str
    task: str
    family: str
    name: str
    stands: int = 1
    parameters: int = 0
    ruled: bool | None = None
    layers: int = 0
    heads: int = 0
    time: float | None = None
    change: dict[str, float] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    failures: dict[str, Failure] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What it is found by: "transformers/text-generation/llama/LlamaForCausalLM"."""
        return f"{self.library}/{self.task}/{self.family}/{self.name}"

    @property
    def works(self) -> bool:
        """Whether it builds and runs by itself."""
        return "runs" in self.passed

    @property
    def explained(self) -> bool:
        """Whether every method explains it with unchanged outputs and balanced books."""
        return all(method in self.passed for method in EXPLAINED)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, numbers with three digits; `from_dict` is the way back."""
        rounded = {name: {method: _short(one) for method, one in getattr(self, name).items()}
                   for name in ("change", "ledger")}
        return {**asdict(self), **rounded, "time": None if self.time is None else _short(self.time)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        failures = {name: Failure(**one) for name, one in data["failures"].items()}
        return cls(**{**data, "failures": failures})


def _short(value: float) -> float:
    return float(f"{value:.3g}")


@dataclass(frozen=True, eq=False)
class Census(Filed):
    """The entries, in the order of the libraries' own tables, and the versions that they are of, by package."""

    kind, called, suffixes = "census", "a census", (".json", ".csv", ".md")

    entries: tuple[Entry, ...]
    versions: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def matching(self, pattern: str) -> Census:
        """The entries in whose key ("transformers/text-generation/llama/LlamaForCausalLM") a regular expression is
        found, in any case.

        Raises: ValueError if there is none, or for what is no regular expression.
        """
        keys = set(search.found((one.key for one in self.entries), pattern, what="architecture"))
        return Census(tuple(one for one in self.entries if one.key in keys), self.versions)

    @cached_property
    def works(self) -> tuple[Entry, ...]:
        """The entries that build and run by themselves: what all shares are of."""
        return tuple(one for one in self.entries if one.works)

    def share(self, question: str) -> float:
        """Share of those that work which passed a question; "explained" is all methods at once. NaN of none."""
        passed = [one.explained if question == "explained" else question in one.passed for one in self.works]
        return sum(passed) / len(passed) if passed else float("nan")

    def counts(self) -> DataFrame:
        """One row a library and task, and one for each library: how many were asked, run, and passed each question."""
        from pandas import DataFrame

        groups = self._grouped()
        for library in dict.fromkeys(one.library for one in self.entries):
            groups[library, "all"] = [one for one in self.entries if one.library == library]
        return DataFrame([{"library": library, "task": task, **_counted(some)} for (library, task), some in
                          groups.items()]).set_index(["library", "task"])

    def table(self) -> DataFrame:
        """One row an architecture: what passed (None: not asked), the errors of the books, and the first failure."""
        from pandas import DataFrame

        return DataFrame([_line(one) for one in self.entries]).set_index("architecture")

    def summary(self) -> str:
        """Shares of what works, and the first failures of what does."""
        lines = [f"{len(self.works)} of {len(self)} architectures build and run by themselves ({self._made_with()}); "
                 "of these"]
        lines += [f"  {percent(self.share(name)):>7}  {about}" for name, about in QUESTIONS.items()
                  if name not in ("builds", "runs")]
        failed = [(one, name, why) for one in self.works for name, why in one.failures.items()]
        lines += [f"{one.key}: {name}: {why}" for one, name, why in failed[:SHOWN]]
        if len(failed) > SHOWN:
            lines.append(f"and {len(failed) - SHOWN} more failures, in the table")
        return "\n".join(lines)

    def written(self) -> str:
        """Counts, every architecture and every reason, as Markdown."""
        head = f"# Architectures\n\nMade by `relprop models --census` with {self._made_with()}.\n\n"
        asked = "\n".join(f"- **{name}**: {about}" for name, about in (QUESTIONS | FIGURES).items())
        tables = "\n\n".join(f"## {library}: {task}\n\n{_architectures(some)}" for (library, task), some in
                             self._grouped().items())
        return f"{head}{asked}\n\n{self.written_counts()}\n\n{tables}\n"

    def written_counts(self) -> str:
        """The counts alone, as a table of Markdown."""
        counts = self.counts().reset_index()
        return _markdown(list(counts.columns), counts.itertuples(index=False))

    def verdicts(self) -> dict[str, Any]:
        """What `relprop models` prints, in little: the versions and, by key, a letter for each question, "+" passed,
        "-" failed, "." not asked; with the first reason where one failed.
        """
        return {"versions": dict(self.versions), "questions": list(QUESTIONS),
                "architectures": {one.key: _letters(one) for one in self.entries}}

    def _grouped(self) -> dict[tuple[str, str], list[Entry]]:
        found: dict[tuple[str, str], list[Entry]] = {}
        for one in self.entries:
            found.setdefault((one.library, one.task), []).append(one)
        return found

    def _made_with(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())

    # -- files --------------------------------------------------------------------------------------------------------

    def _lines(self) -> DataFrame:
        return self.table()

    def _write(self, path: Path, suffix: str) -> None:
        if suffix == ".md":
            path.write_text(self.written(), encoding="utf-8")
        elif suffix == ".json":  # a line an entry, so that two can be compared
            head = self.to_json()
            path.write_text(head.replace('{"library"', '\n{"library"') + "\n", encoding="utf-8")
        else:
            super()._write(path, suffix)

    def tree(self) -> dict:
        """Plain data."""
        return {"versions": dict(self.versions), "entries": [one.to_dict() for one in self.entries]}

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """The census that has this tree. Raises: KeyError or TypeError for what has none."""
        return cls(tuple(map(Entry.from_dict, data["entries"])), dict(data["versions"]))


def _counted(some: list[Entry]) -> dict[str, int]:
    working = [one for one in some if one.works]
    asked = {"asked": len(some), "run": len(working), "explained": sum(one.explained for one in working)}
    return asked | {name: sum(name in one.passed for one in working) for name in list(QUESTIONS)[2:]}


def _line(one: Entry) -> dict[str, Any]:
    passed = {name: True if name in one.passed else False if name in one.failures else None for name in QUESTIONS}
    return {"architecture": one.key, "stands for": one.stands, "parameters": one.parameters, "layers": one.layers,
            "heads": one.heads, **passed, "rules": one.ruled,
            **{f"ledger {name}": one.ledger.get(name) for name in EXPLAINED},
            "change": max(one.change.values(), default=None), "time": one.time, "why": _why(one)}


def _why(one: Entry) -> str:
    return "; ".join(f"{name}: {failure}" for name, failure in one.failures.items())


def _letters(one: Entry) -> str | list[str]:
    letters = "".join("+" if name in one.passed else "-" if name in one.failures else "." for name in QUESTIONS)
    first = next(iter(one.failures.items()), None)
    return letters if first is None else [letters, f"{first[0]}: {first[1]}"]


def _architectures(some: Iterable[Entry]) -> str:
    mark = lambda one, name: "yes" if name in one.passed else "**no**" if name in one.failures else ""
    most = lambda found: f"{max(found.values()):.0e}" if found else ""
    ruled = {None: "", True: "yes", False: "**no**"}
    rows = [[f"`{one.family}`", f"`{one.name}`", *(mark(one, name) for name in QUESTIONS), ruled[one.ruled],
             most(one.change), most(one.ledger), "" if one.time is None else f"{one.time:.1f}", _why(one)]
            for one in some]
    return _markdown(["family", "architecture", *QUESTIONS, "rules", "change", "ledger", "time", "why"], rows)


def _markdown(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


__all__ = ["EXPLAINED", "QUESTIONS", "Census", "Entry", "Failure"]
