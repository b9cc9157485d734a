"""What the model says by itself."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .entry import Class, Regression, Token
from .output import ALIKE, STARTS, field, logits
from .question import Span
from .scalar import Choice, Target, listed
from .similarity import Similarity
from .tag import Tag

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Prediction(Choice):
    """What the model says: the class with the largest logit, the token at the position where it answers, the answer in
    a context, the output of a regression, how alike the image and the text are.

    Raises: ValueError of models that say several things at once: tags of tokens, several outputs of a regression.
    """

    @property
    def left_open(self) -> bool:
        return True

    def value(self, reading: Reading) -> Tensor:
        other = self._else(reading)
        return self.choices(reading).amax(1) if other is None else other.value(reading)

    def choices(self, reading: Reading) -> Tensor:
        """Logits of which the largest is taken, (R, C)."""
        return reading.tokens(None) if self._of_tokens(reading) else reading.classes()

    def column(self, reading: Reading) -> Tensor:
        return self.choices(reading).argmax(1)

    def fixed(self, reading: Reading) -> list[Target]:
        other = self._else(reading)
        if other is not None:
            return other.fixed(reading)
        best = self.choices(reading).argmax(1).tolist()
        if not self._of_tokens(reading):
            return [Class(index) for index in best]
        return [Token(token, position) for token, position in zip(best, reading.position(None))]

    def named(self, fixed: Target) -> Target:
        return Token(fixed.token) if isinstance(fixed, Token) else fixed

    def name(self, vocabulary: Vocabulary) -> str:
        return "prediction"

    def _of_tokens(self, reading: Reading) -> bool:
        return reading.vocabulary.labels is None and logits(reading.output).dim() == 3

    def _else(self, reading: Reading) -> Target | None:
        """What is predicted where it is no class and no token."""
        if field(reading.output, STARTS) is not None:
            return Span()
        if field(reading.output, ALIKE) is not None:
            return Similarity()
        if reading.vocabulary.of_tags:
            return Tag()
        if not reading.vocabulary.regression:
            return None
        count, labels = reading.classes().shape[1], reading.vocabulary.labels
        if count > 1:
            names = "" if labels is None else f" ({listed(labels)})"
            raise ValueError(f"this regression has {count} outputs{names}, and none is the prediction; say which, by "
                             "index or label")
        return Regression()
