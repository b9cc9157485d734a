"""Question answering: where an answer starts and ends in its context."""
from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from . import place
from .output import ENDS, STARTS
from .scalar import Choice, Target

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary


class Located(Target):
    """What has an answer at a place of the context: by its `text`, its characters or the positions of its tokens."""

    text: str | None
    chars: tuple[int, int] | None
    called: str | None

    @property
    def given(self) -> tuple[int, int] | None:
        """First and last token, by position, where they were given."""
        raise NotImplementedError

    @property
    def left_open(self) -> bool:
        return self.given is None

    def resolved(self, vocabulary: Vocabulary) -> Target:
        if sum(at is not None for at in (self.text, self.chars, self.given)) > 1:
            raise ValueError("an answer is given by its text, its characters or its tokens; give one of them")
        return self

    def spans(self, reading: Reading) -> list[tuple[int, int]]:
        """First and last token of the answer, of each row; None given: of the best one that the context has."""
        units, found = reading.batch.units, []
        reading.ends(STARTS)  # refuses a model that gives no answers
        for i, row in enumerate(reading.indices.tolist()):
            if self.given is not None:
                found.append(tuple(place.token(units, row, one) for one in self.given))
            elif self.text is not None or self.chars is not None:
                units = place.text(units)
                tokens = (place.part(units, row, self.text, second=True) if self.text is not None else
                          place.characters(units, row, self.chars, second=True))
                found.append((tokens[0], tokens[-1]))
            else:
                found.append(_best(reading, i, place.context(place.text(units), row)))
            first, last = found[-1]
            if last < first:
                raise ValueError(f"an answer from token {first} to token {last} of row {row} ends before it starts")
        return found

    def fixed(self, reading: Reading) -> list[Target]:
        units, found = reading.batch.units, []
        for row, (first, last) in zip(reading.indices.tolist(), self.spans(reading)):
            own = place.positions(units, row)
            called = self.called or place.spelled(units, row, range(first, last + 1))
            found.append(self.at(own.index(first), own.index(last), called))
        return found

    def at(self, first: int, last: int, called: str) -> Target:
        """The same of the answer with this first and last token, by position."""
        raise NotImplementedError

    def said(self) -> str:
        """The answer, for people."""
        if self.called is not None or self.text is not None:
            return repr(self.called or self.text)
        places = ("the predicted answer" if self.given is None else f"tokens {self.given[0]} to {self.given[1]}")
        return places if self.chars is None else f"characters {self.chars[0]} to {self.chars[1]}"


@dataclass(frozen=True)
class Boundary(Located, Choice):
    """One end of an answer: which of the model's logits these are, and which of an answer's two tokens it reads."""

    text: str | None = None
    _: KW_ONLY
    chars: tuple[int, int] | None = None
    token: int | None = None
    called: str | None = None

    logits: ClassVar[str]
    side: ClassVar[int]

    @property
    def given(self) -> tuple[int, int] | None:
        return None if self.token is None else (self.token, self.token)

    def choices(self, reading: Reading) -> Tensor:
        """Logits of this end at all tokens, (R, T)."""
        return reading.ends(self.logits)

    def column(self, reading: Reading) -> Tensor:
        return torch.tensor([span[self.side] for span in self.spans(reading)], device=self.choices(reading).device)

    def at(self, first: int, last: int, called: str) -> Self:
        return type(self)(token=(first, last)[self.side], called=called)

    def name(self, vocabulary: Vocabulary) -> str:
        return f"{type(self).__name__.lower()} of {self.said()}"


@dataclass(frozen=True)
class Start(Boundary):
    """The logit of an answer's start: of the answer with this `text` in the context, with these characters (start, end)
    of the context, or of the `token` at this position; without any, of the answer that the model gives.
    """

    logits, side = STARTS, 0


@dataclass(frozen=True)
class End(Boundary):
    """The logit of an answer's end; as of `Start`."""

    logits, side = ENDS, 1


@dataclass(frozen=True)
class Span(Located):
    """The logits of an answer's start and end, summed: of the answer with this `text` in the context, with these
    characters (start, end) of the context, or of the `tokens` (first, last) at these positions, the last included.

    Without any it is the answer that the model gives: the best span with its start not behind its end, inside the
    context, which is the second text of a pair (question, context). Positions count from a row's first token.
    """

    text: str | None = None
    _: KW_ONLY
    chars: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    called: str | None = None

    @property
    def given(self) -> tuple[int, int] | None:
        return self.tokens

    def value(self, reading: Reading) -> Tensor:
        starts, ends = reading.ends(STARTS), reading.ends(ENDS)
        first, last = torch.tensor(self.spans(reading), device=starts.device).T
        return starts.gather(1, first[:, None])[:, 0] + ends.gather(1, last[:, None])[:, 0]

    def at(self, first: int, last: int, called: str) -> Span:
        return replace(self, text=None, chars=None, tokens=(first, last), called=called)

    def name(self, vocabulary: Vocabulary) -> str:
        return f"answer {self.said()}"


def _best(reading: Reading, i: int, context: list[int]) -> tuple[int, int]:
    """First and last token of the best span among the tokens of the context."""
    row = int(reading.indices[i])
    if not context:
        raise ValueError(f"row {row} has no context to answer from; give pairs (question, context)")
    starts, ends = (reading.ends(name)[i, context].detach() for name in (STARTS, ENDS))
    scores = (starts[:, None] + ends).masked_fill(starts.new_ones(len(context), len(context)).tril(-1).bool(),
                                                  -torch.inf)
    first, last = divmod(int(scores.argmax()), len(context))
    return context[first], context[last]
