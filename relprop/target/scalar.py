"""A target: one scalar of the output, and what is said of entries that are not there."""
from __future__ import annotations

import difflib
from collections.abc import Sequence
from operator import index as as_index
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary

SHOWN = 20  # labels that an error lists


class Target:
    """A scalar of the output. Subclass it as a frozen dataclass with a `value`; the other methods are optional.

    `ruled` says that the value is computed under the rules of the composite, as if the model did it. `left_open` says
    that `fixed` names something which this leaves open, such as the class that is predicted.
    """

    ruled = False

    @property
    def left_open(self) -> bool:
        return False

    def value(self, reading: Reading) -> Tensor:
        """The number explained, (R,), differentiable, in its natural unit."""
        raise NotImplementedError

    def resolved(self, vocabulary: Vocabulary) -> Target:
        """The target with its labels and tokens looked up."""
        return self

    def fixed(self, reading: Reading) -> list[Target]:
        """For each row, the target that stays the same when the input changes."""
        return [self] * len(reading.indices)

    def named(self, fixed: Target) -> Target:
        """The target with what was left open named as in `fixed`, but where it was: another input may have its answer
        at another position.
        """
        return fixed if self.left_open else self

    def name(self, vocabulary: Vocabulary) -> str:
        """What the target is called in reports."""
        return repr(self)


class Choice(Target):
    """One of several entries that compete, so that it has a probability."""

    def value(self, reading: Reading) -> Tensor:
        return self.choices(reading).gather(1, self.column(reading)[:, None])[:, 0]

    def choices(self, reading: Reading) -> Tensor:
        """Logits that it competes with, (R, C)."""
        raise NotImplementedError

    def column(self, reading: Reading) -> Tensor:
        """Which of them it is, (R,), on the device of the output."""
        raise NotImplementedError

    def other(self, index: int) -> Choice:
        """The choice in its place that has this number."""
        raise TypeError(f"a {type(self).__name__} has no others by number; explain a class, tag or token")


def entry(z: Tensor, index: int, what: str) -> Tensor:
    in_range(index, z.shape[1], what)
    return z[:, index]


def in_range(index: int, size: int, what: str, names: str = "") -> None:
    if not 0 <= as_index(index) < size:
        raise ValueError(f"no {what} {index}; the model has 0 to {size - 1}{names}")


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def meant(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=1)
    return f"; did you mean {next(other for other in names if other.lower() == close[0])!r}?" if close else ""
