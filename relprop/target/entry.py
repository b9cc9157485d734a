"""One entry of the logits: a class, an output of a regression, or a token at a position."""
from __future__ import annotations

from dataclasses import dataclass, replace
from operator import index as as_index
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .scalar import Choice, Target, entry, in_range, listed

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary


class Entry(Choice):
    """A choice that is known by its number, `index`."""

    index: int | str
    what = "class index"

    def value(self, reading: Reading) -> Tensor:
        return entry(self.choices(reading), self.index, self.what)

    def column(self, reading: Reading) -> Tensor:
        z = self.choices(reading)
        in_range(self.index, z.shape[1], self.what)
        return torch.full((len(z),), self.index, device=z.device)


@dataclass(frozen=True)
class Class(Entry):
    """The logit of a class, given by index or label; of a multi-label model, of one of its labels."""

    index: int | str

    def choices(self, reading: Reading) -> Tensor:
        """Logits that the class competes with, (R, C)."""
        return reading.classes()

    def resolved(self, vocabulary: Vocabulary) -> Class:
        return Class(_index(self.index, vocabulary))

    def other(self, index: int) -> Class:
        return Class(index)

    def name(self, vocabulary: Vocabulary) -> str:
        return vocabulary.name(self.index, token=False)


@dataclass(frozen=True)
class Regression(Target):
    """An output of a regression, given by index or label; without one, the only one that there is."""

    index: int | str = 0

    def value(self, reading: Reading) -> Tensor:
        return entry(reading.classes(), self.index, "output of the regression")

    def resolved(self, vocabulary: Vocabulary) -> Regression:
        return Regression(_index(self.index, vocabulary))

    def name(self, vocabulary: Vocabulary) -> str:
        alone = vocabulary.labels is None or vocabulary.labels == ("LABEL_0",)  # the name that transformers gives
        return f"output {self.index}" if alone else vocabulary.name(self.index, token=False)


@dataclass(frozen=True)
class Token(Entry):
    """The logit of a token, given by id or text, at a position.

    A position counts from a row's first token, or from its last one if it is negative; padding does not count. Without
    one it is where the model answers: at the last token, or at the one mask token of a masked language model.
    """

    token: int | str
    position: int | None = None
    what = "token id"

    @property
    def index(self) -> int:
        return self.token

    def choices(self, reading: Reading) -> Tensor:
        """Logits that the token competes with, (R, V)."""
        return reading.tokens(self.position)

    def resolved(self, vocabulary: Vocabulary) -> Token:
        if isinstance(self.token, str):
            return replace(self, token=vocabulary.token(self.token))
        return replace(self, token=as_index(self.token))

    def fixed(self, reading: Reading) -> list[Target]:
        return [replace(self, position=position) for position in reading.position(self.position)]

    def other(self, index: int) -> Token:
        return replace(self, token=index)

    def name(self, vocabulary: Vocabulary) -> str:
        return vocabulary.name(self.token, token=True)


def _index(index: int | str, vocabulary: Vocabulary) -> int:
    if isinstance(index, str):
        return vocabulary.label(index)
    if vocabulary.labels is not None:
        in_range(index, len(vocabulary.labels), "class index", f" ({listed(vocabulary.labels)})")
    return as_index(index)
