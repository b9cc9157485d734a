"""What a census found: for each architecture what was asked of it, what passed, and why the rest did not."""
from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

EXPLAINED = ("attnlrp", "cp-lrp")


@dataclass(frozen=True)
class Failure:
    """Why a question was answered with no: the kind of error and the first line of what it said."""

    kind: str
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        text = re.sub(r"\s+", " ", str(error)).strip()
        return cls(type(error).__name__, text if len(text) <= 200 else f"{text[:197]}...")


@dataclass
class Entry:
    """One architecture's line. `passed` and `failures` are by question: "builds", "runs", the methods, "anatomy",
    "intervention", "decompose", "time"; a question that was not asked is in neither.
    """

    library: str
    task: str
    family: str
    name: str
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
        """JSON-able; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Entry:
        failures = {name: Failure(**one) for name, one in data["failures"].items()}
        return cls(**{**data, "failures": failures})
