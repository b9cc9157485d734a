"""What is made of other targets, or of the whole output: a contrast, a probability, a function."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .entry import Class, Token
from .prediction import Prediction
from .scalar import Target, entry

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Contrast(Target):
    """The value of `a` minus that of `b`; each is a target, an index, a label or a token."""

    a: Target | int | str
    b: Target | int | str

    def value(self, reading: Reading) -> Tensor:
        return self.a.value(reading) - self.b.value(reading)

    def resolved(self, vocabulary: Vocabulary) -> Contrast:
        return Contrast(vocabulary.target(self.a), vocabulary.target(self.b))

    def fixed(self, reading: Reading) -> list[Target]:
        return [Contrast(a, b) for a, b in zip(self.a.fixed(reading), self.b.fixed(reading))]

    def name(self, vocabulary: Vocabulary) -> str:
        return f"{self.a.name(vocabulary)} - {self.b.name(vocabulary)}"


@dataclass(frozen=True)
class Probability(Target):
    """The probability of a class or token, of the prediction if none is given.

    `function` is "softmax" or "sigmoid"; without it, sigmoid where the model decides each class for itself (multi-label
    heads, and heads of a single logit), softmax elsewhere.
    """

    of: Target | int | str | None = None
    function: str | None = None

    def value(self, reading: Reading) -> Tensor:
        z = self.of.choices(reading)
        each = not isinstance(self.of, Token) and (reading.vocabulary.multilabel or z.shape[1] == 1)
        function = self.function or ("sigmoid" if each else "softmax")
        p = z.sigmoid() if function == "sigmoid" else z.softmax(1)
        return p.amax(1) if isinstance(self.of, Prediction) else entry(p, self.of.index, "index")

    def resolved(self, vocabulary: Vocabulary) -> Probability:
        if self.function not in (None, "softmax", "sigmoid"):
            raise ValueError(f"a probability is a softmax or a sigmoid, not {self.function!r}")
        of = vocabulary.target(self.of)
        if not isinstance(of, (Class, Token, Prediction)):
            raise ValueError(f"a probability is of a class or a token, not of {of!r}; explain that itself instead")
        return Probability(of, self.function)

    def fixed(self, reading: Reading) -> list[Target]:
        return [Probability(of, self.function) for of in self.of.fixed(reading)]

    def name(self, vocabulary: Vocabulary) -> str:
        return f"P({self.of.name(vocabulary)})"


@dataclass(frozen=True)
class Function(Target):
    """What a function makes of the whole output: one number a row, (B,)."""

    function: Callable[[object], Tensor]
    called: str | None = None

    def value(self, reading: Reading) -> Tensor:
        value = self.function(reading.output)
        rows = reading.batch.rows
        if not isinstance(value, Tensor) or value.shape != (rows,) or not value.is_floating_point():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{self.name(reading.vocabulary)} must return a floating tensor of shape ({rows},), "
                             f"one number a row, not {got}")
        return value if reading.rows is None else value[reading.rows.to(value.device)]

    def name(self, vocabulary: Vocabulary) -> str:
        return self.called or getattr(self.function, "__name__", type(self.function).__name__)
