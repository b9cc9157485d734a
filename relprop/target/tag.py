"""Token classification, such as named entities: the tag of a token or of a word."""
from __future__ import annotations

from collections import Counter
from dataclasses import KW_ONLY, dataclass, replace
from operator import index as as_index
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import TextUnits
from . import place
from .scalar import Choice, Target, in_range, listed

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary

SHOWN = 12  # words that an error lists
FIRST, MEAN = "first", "mean"


@dataclass(frozen=True)
class Tag(Choice):
    """The logit of a tag, given by index or label (None: the one that is predicted), of one token or word.

    Which one: `word`, its index among the words of the row, as `r.words(row)` counts them, or its text, which may be of
    several words; `chars`, its characters (start, end) in the text; or `token`, a position that counts from a row's
    first token, or from its last if negative. Of a word of several tokens it is the tag of its "first", as models are
    trained, or the "mean" over them.
    """

    tag: int | str | None = None
    _: KW_ONLY
    word: int | str | None = None
    chars: tuple[int, int] | None = None
    token: int | tuple[int, ...] | None = None
    over: str = FIRST
    called: str | None = None

    @property
    def index(self) -> int | None:
        return self.tag

    @property
    def left_open(self) -> bool:
        return self.tag is None or isinstance(self.word, str) or self.chars is not None

    def choices(self, reading: Reading) -> Tensor:
        """Logits of the tags that it competes with, (R, C)."""
        z = reading.tagged()  # (B, T, C)
        found = [z[row, tokens].mean(0) for row, tokens in zip(reading.indices.tolist(), self._tokens(reading, z))]
        return torch.stack(found)

    def column(self, reading: Reading) -> Tensor:
        z = self.choices(reading)
        if self.tag is None:
            return z.argmax(1)
        in_range(self.tag, z.shape[1], "tag index")
        return torch.full((len(z),), self.tag, device=z.device)

    def resolved(self, vocabulary: Vocabulary) -> Tag:
        if sum(at is not None for at in (self.word, self.chars, self.token)) > 1:
            raise ValueError("a tag is of a word, of characters or of a token; give one of them")
        if self.over not in (FIRST, MEAN):
            raise ValueError(f"a word's tag is that of its 'first' token or the 'mean' of them, not {self.over!r}")
        if isinstance(self.tag, str):
            return replace(self, tag=vocabulary.label(self.tag))
        if self.tag is not None and vocabulary.labels is not None:
            in_range(self.tag, len(vocabulary.labels), "tag index", f" ({listed(vocabulary.labels)})")
        return replace(self, tag=None if self.tag is None else as_index(self.tag))

    def fixed(self, reading: Reading) -> list[Target]:
        z, units, found = reading.tagged(), reading.batch.units, []
        best = self.column(reading).tolist()
        for row, tokens, tag in zip(reading.indices.tolist(), self._tokens(reading, z), best):
            own = place.positions(units, row)
            at = tuple(own.index(t) for t in tokens)
            called = self.called
            if called is None and isinstance(units, TextUnits):
                called = place.spelled(units, row, self._whole(reading, row))
            found.append(Tag(tag, token=at[0] if len(at) == 1 else at, over=self.over, called=called))
        return found

    def named(self, fixed: Target) -> Target:
        if not self.left_open or isinstance(self.word, str) or self.chars is not None:
            return fixed if self.left_open else self
        return replace(self, tag=fixed.tag)

    def other(self, index: int) -> Tag:
        return replace(self, tag=index)

    def name(self, vocabulary: Vocabulary) -> str:
        tag = "predicted tag" if self.tag is None else vocabulary.name(self.tag, token=False)
        at = next((repr(one) for one in (self.called, self.word) if isinstance(one, str)), None)
        at = at or next((f"{name} {one}" for name, one in (("word", self.word), ("token", self.token),
                                                            ("characters", self.chars)) if one is not None), "a token")
        return f"{tag} of {at}"

    def _whole(self, reading: Reading, row: int) -> list[int]:
        """All tokens of the word."""
        units = reading.batch.units
        if self.token is not None:
            given = self.token if isinstance(self.token, tuple) else (self.token,)
            return [place.token(units, row, one) for one in given]
        units = place.text(units)
        if self.chars is not None:
            return place.characters(units, row, self.chars)
        if isinstance(self.word, str):
            return place.part(units, row, self.word)
        return place.word(units, row, self.word)

    def _tokens(self, reading: Reading, z: Tensor) -> list[list[int]]:
        """The tokens whose tag it is, of each row."""
        if self.word is None and self.chars is None and self.token is None:
            raise ValueError("a token classifier tags each token, so say which one to explain: Tag(word='...'), or "
                             f"chars= or token=. {_predicted(reading, z)}")
        found = [self._whole(reading, row) for row in reading.indices.tolist()]
        return found if self.over == MEAN or self.token is not None else [tokens[:1] for tokens in found]


def _predicted(reading: Reading, z: Tensor) -> str:
    """What the model tags the words of the first row as, the most frequent tag left out."""
    row, units = int(reading.indices[0]), reading.batch.units
    if not isinstance(units, TextUnits):
        return ""
    first = {index: t for t, index in reversed(list(enumerate(units.word_ids[row]))) if index is not None}
    tags = {units.words[row][index]: int(z[row, first[index]].argmax()) for index in sorted(first)}
    usual = Counter(tags.values()).most_common(1)[0][0] if tags else None
    names = [f"{word!r} {reading.vocabulary.name(tag, token=False)}" for word, tag in tags.items() if tag != usual]
    rest = "all words" if not names else "the rest"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    said = f"{', '.join(names[:SHOWN])}{more}; {rest}" if names else rest
    return f"In row {row} it says {said} {reading.vocabulary.name(usual, token=False)}" if tags else ""
