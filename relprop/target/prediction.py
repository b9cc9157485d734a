"""What the model says by itself."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .entry import Class, Token
from .output import logits
from .scalar import Target

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Prediction(Target):
    """The largest logit: of the classes, or of the tokens at the position where the model answers."""

    def value(self, reading: Reading) -> Tensor:
        return self.choices(reading).amax(1)

    def choices(self, reading: Reading) -> Tensor:
        """Logits of which the largest is taken, (R, C)."""
        return reading.tokens(None) if self._of_tokens(reading) else reading.classes()

    def fixed(self, reading: Reading) -> list[Target]:
        best = self.choices(reading).argmax(1).tolist()
        if not self._of_tokens(reading):
            return [Class(index) for index in best]
        return [Token(token, position) for token, position in zip(best, reading.position(None))]

    def name(self, vocabulary: Vocabulary) -> str:
        return "prediction"

    def _of_tokens(self, reading: Reading) -> bool:
        return reading.vocabulary.labels is None and logits(reading.output).dim() == 3
