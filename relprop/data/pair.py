"""Inputs in pairs, a base and a counterfactual that differs in one thing, for effects of what differs."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .example import Data, Example

Ranges = tuple[tuple[int, int], ...]
"""Parts of a text, (start, end) in characters each."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A base and its counterfactual, what the outcome weighs against each other, and where each thing is that has a
    name.

    Args: base, counterfactual: texts, or pictures (paths, or uint8 arrays (Y, X) or (Y, X, 3)).
        continuations: of a text, other texts, or lists of token ids; of a picture, labels. Of two, the first is what
            the base makes unlikely, so that effects are on p(first) / p(second) (Vig et al. 2020, section 3).
        spans, counterfactual_spans: by name, parts of the text in characters, or of a picture bool pixels (Y, X).
        facts: what is known of the pair, for tables.
        answers, wrong: what is right and what is wrong on the base, for tasks of circuits: as of continuations.
        group: pairs of the same group are not independent; None: a group of its own.
    """

    base: object
    counterfactual: object
    continuations: tuple[object, ...] = ()
    spans: Mapping[str, Ranges | Tensor] = field(default_factory=dict)
    counterfactual_spans: Mapping[str, Ranges | Tensor] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    group: str | None = None
    answers: tuple[object, ...] = ()
    wrong: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.base, str) != isinstance(self.counterfactual, str):
            raise TypeError("a base and a counterfactual are both texts, or both pictures")
        if isinstance(self.base, str) and self.base == self.counterfactual:
            raise ValueError(f"base and counterfactual are both {self.base!r}, so nothing has an effect; change one")
        if set(self.spans) != set(self.counterfactual_spans):
            raise ValueError(f"spans {sorted(self.spans)} of the base and {sorted(self.counterfactual_spans)} of the "
                             "counterfactual; name the same")
        for text, spans in ((self.base, self.spans), (self.counterfactual, self.counterfactual_spans)):
            for name, ranges in spans.items() if isinstance(text, str) else ():
                if not ranges or not all(0 <= start < end <= len(text) for start, end in ranges):
                    raise ValueError(f"span {name!r} is {ranges} of a text of {len(text)} characters, {text!r}")

    def said(self, name: str) -> tuple[str, str]:
        """The words of a span, in the base and in the counterfactual."""
        words = lambda text, spans: " ".join(text[start:end] for start, end in spans[name])
        return words(self.base, self.spans), words(self.counterfactual, self.counterfactual_spans)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one kind under a name; `about` says how they were made, and becomes part of every report."""

    name: str
    modality: str  # "text" or "image"
    pairs: Sequence[Pair]
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.modality not in ("text", "image"):
            raise ValueError(f"pairs of modality {self.modality!r}; there are text and image")
        if not len(self.pairs):
            raise ValueError(f"{self.name!r} has no pair")
        wrong = next((one for one in self.pairs if isinstance(one.base, str) != (self.modality == "text")), None)
        if wrong is not None:
            raise TypeError(f"{self.name!r} is of {self.modality}, and has a {type(wrong.base).__name__}")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def bases(self) -> list[Any]:
        return [one.base for one in self.pairs]

    @property
    def counterfactuals(self) -> list[Any]:
        return [one.counterfactual for one in self.pairs]

    @property
    def names(self) -> tuple[str, ...]:
        """Spans that every pair has."""
        shared = set.intersection(*(set(one.spans) for one in self.pairs))
        return tuple(name for name in self.pairs[0].spans if name in shared)

    def take(self, rows: Sequence[int]) -> Pairs:
        """The pairs of these rows."""
        return Pairs(self.name, self.modality, [self.pairs[row] for row in rows], self.about)

    def keep(self, wanted: Callable[[Pair], bool]) -> Pairs:
        """The pairs of which this is true.

        Raises: ValueError if there is none.
        """
        return self.take([row for row, one in enumerate(self.pairs) if wanted(one)])

    def single(self, tokenizer: object, *names: str) -> Pairs:
        """The pairs that suit outcomes and mediators of single tokens: each of these spans is one token on both sides,
        and so is each continuation; both sides have as many tokens.

        Raises: ValueError if there is none.
        """
        return self.keep(lambda one: len(ids(one.base, tokenizer)) == len(ids(one.counterfactual, tokenizer))
                         and all(len(ids(text, tokenizer)) == 1 for text in one.continuations)
                         and all(_one(tokenizer, *side, name) for name in names
                                 for side in ((one.base, one.spans), (one.counterfactual, one.counterfactual_spans))))

    def fingerprint(self) -> str:
        """A hash of the name and all pairs, to tell two sets apart."""
        said = lambda spans: [(name, "pixels" if isinstance(span, Tensor) else tuple(span))
                              for name, span in sorted(spans.items())]
        sides = [Example(one.base, target=(one.continuations, said(one.spans), said(one.counterfactual_spans),
                                           *((one.answers, one.wrong) if one.answers else ())))
                 for one in self.pairs]
        return Data(self.name, self.modality, [*sides, *map(Example, self.counterfactuals)]).fingerprint()


def ids(text: object, tokenizer: object) -> list[int]:
    """The tokens of a text that continues another one, without special tokens; ids as they are.

    Raises: ValueError for a text that has no token.
    """
    if not isinstance(text, str):
        return list(text)
    found = tokenizer.encode(text, add_special_tokens=False)
    if text.startswith(" "):  # SentencePiece puts the leading space itself, so that one given to it is a second one
        bare = tokenizer.encode(text.lstrip(" "), add_special_tokens=False)
        found = bare if bare and tokenizer.convert_ids_to_tokens(bare)[0].startswith("\u2581") else found
    if not found:
        raise ValueError(f"the tokenizer finds no token in {text!r}")
    return found


def token(text: object, tokenizer: object) -> int:
    """The one token of a continuation.

    Raises: ValueError if it is several, with how it is tokenised.
    """
    found = ids(text, tokenizer)
    if len(found) != 1:
        raise ValueError(f"{text!r} is {len(found)} tokens, {tokenizer.convert_ids_to_tokens(found)}, where one is "
                         "needed; give one of them, or an outcome of several tokens")
    return found[0]


def _one(tokenizer: object, text: str, spans: Mapping[str, Ranges], name: str) -> bool:
    """Whether each part of a span is one token in its place: as many before it and after it as without it."""
    return all(len(ids(text[:end].rstrip(), tokenizer)) == 1 + (len(ids(text[:start].rstrip(), tokenizer))
               if text[:start].strip() else 0) for start, end in spans[name])
