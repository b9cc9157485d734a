"""What is made of other targets, or of the whole output: a contrast, a probability, a function."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .entry import Token
from .prediction import Prediction
from .scalar import Choice, Target

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Contrast(Target):
    """The value of `a` minus that of `b`; each is a target, an index, a label or a token."""

    a: Target | int | str
    b: Target | int | str

    @property
    def ruled(self) -> bool:
        return self.a.ruled or self.b.ruled

    @property
    def left_open(self) -> bool:
        return self.a.left_open or self.b.left_open

    def value(self, reading: Reading) -> Tensor:
        return self.a.value(reading) - self.b.value(reading)

    def resolved(self, vocabulary: Vocabulary) -> Contrast:
        return Contrast(vocabulary.target(self.a), vocabulary.target(self.b))

    def fixed(self, reading: Reading) -> list[Target]:
        return [Contrast(a, b) for a, b in zip(self.a.fixed(reading), self.b.fixed(reading))]

    def named(self, fixed: Target) -> Target:
        return Contrast(self.a.named(fixed.a), self.b.named(fixed.b))

    def name(self, vocabulary: Vocabulary) -> str:
        return f"{self.a.name(vocabulary)} - {self.b.name(vocabulary)}"


@dataclass(frozen=True)
class Probability(Target):
    """The probability of a class, tag, token, start or end, of the prediction if none is given.

    `function` is "softmax" or "sigmoid"; without it, sigmoid where the model decides each class for itself (multi-label
    heads, and heads of a single logit), softmax elsewhere.
    """

    of: Target | int | str | None = None
    function: str | None = None

    @property
    def left_open(self) -> bool:
        return self.of.left_open

    def value(self, reading: Reading) -> Tensor:
        z = self.of.choices(reading)
        each = not isinstance(self.of, Token) and (reading.vocabulary.multilabel or z.shape[1] == 1)
        function = self.function or ("sigmoid" if each else "softmax")
        p = z.sigmoid() if function == "sigmoid" else z.softmax(1)
        if isinstance(self.of, Prediction):
            return p.amax(1)
        return p.gather(1, self.of.column(reading)[:, None])[:, 0]

    def resolved(self, vocabulary: Vocabulary) -> Probability:
        if self.function not in (None, "softmax", "sigmoid"):
            raise ValueError(f"a probability is a softmax or a sigmoid, not {self.function!r}")
        of = vocabulary.target(self.of)
        if vocabulary.regression or not isinstance(of, Choice):
            what = "an output of a regression" if vocabulary.regression else repr(of)
            raise ValueError(f"a probability is of a class or a token, not of {what}; explain that itself instead")
        return Probability(of, self.function)

    def fixed(self, reading: Reading) -> list[Target]:
        return [Probability(of, self.function) for of in self.of.fixed(reading)]

    def named(self, fixed: Target) -> Target:
        return Probability(self.of.named(fixed.of), self.function)

    def name(self, vocabulary: Vocabulary) -> str:
        return f"P({self.of.name(vocabulary)})"


@dataclass(frozen=True)
class Scaled(Target):
    """A multiple of a target."""

    of: Target
    factor: float

    @property
    def ruled(self) -> bool:
        return self.of.ruled

    def value(self, reading: Reading) -> Tensor:
        return self.factor * self.of.value(reading)

    def fixed(self, reading: Reading) -> list[Target]:
        return [Scaled(of, self.factor) for of in self.of.fixed(reading)]

    def name(self, vocabulary: Vocabulary) -> str:
        return f"{self.factor:g} x {self.of.name(vocabulary)}"


@dataclass(frozen=True)
class Summed(Target):
    """The sum of what is asked of each of the sequences that the model runs for a row; see `tokens.Layout`."""

    parts: tuple[Target, ...]

    def value(self, reading: Reading) -> Tensor:
        return sum(part.value(reading.sequence(number)) for number, part in enumerate(self.parts))

    def name(self, vocabulary: Vocabulary) -> str:
        halves = {one.of if isinstance(one, Scaled) else one for one in self.parts}
        if len(halves) == 1:
            return halves.pop().name(vocabulary)
        said = [(one.of, one.factor) if isinstance(one, Scaled) else (one, 1) for one in self.parts]
        signs = ["-" if factor < 0 else "+" if number else "" for number, (_, factor) in enumerate(said)]
        return " ".join(f"{sign} {of.name(vocabulary)}" for sign, (of, _) in zip(signs, said)).strip()


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
