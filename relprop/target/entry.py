"""One entry of the logits: a class, or a token at a position."""
from __future__ import annotations

from dataclasses import dataclass, replace
from operator import index as as_index
from typing import TYPE_CHECKING

from torch import Tensor

from .scalar import Target, entry, in_range, listed

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Class(Target):
    """The logit of a class, given by index or label."""

    index: int | str

    def value(self, reading: Reading) -> Tensor:
        return entry(self.choices(reading), self.index, "class index")

    def choices(self, reading: Reading) -> Tensor:
        """Logits that the class competes with, (R, C)."""
        return reading.classes()

    def resolved(self, vocabulary: Vocabulary) -> Class:
        if isinstance(self.index, str):
            return Class(vocabulary.label(self.index))
        if vocabulary.labels is not None:
            in_range(self.index, len(vocabulary.labels), "class index", f" ({listed(vocabulary.labels)})")
        return Class(as_index(self.index))

    def name(self, vocabulary: Vocabulary) -> str:
        return vocabulary.name(self.index, token=False)


@dataclass(frozen=True)
class Token(Target):
    """The logit of a token, given by id or text, at a position.

    A position counts from a row's first token, or from its last one if it is negative; padding does not count. Without
    one it is where the model answers: at the last token, or at the one mask token of a masked language model.
    """

    token: int | str
    position: int | None = None

    @property
    def index(self) -> int:
        return self.token

    def value(self, reading: Reading) -> Tensor:
        return entry(self.choices(reading), self.token, "token id")

    def choices(self, reading: Reading) -> Tensor:
        """Logits that the token competes with, (R, V)."""
        return reading.tokens(self.position)

    def resolved(self, vocabulary: Vocabulary) -> Token:
        if isinstance(self.token, str):
            return replace(self, token=vocabulary.token(self.token))
        return replace(self, token=as_index(self.token))

    def fixed(self, reading: Reading) -> list[Target]:
        return [replace(self, position=position) for position in reading.position(self.position)]

    def name(self, vocabulary: Vocabulary) -> str:
        return vocabulary.name(self.token, token=True)
