"""Inputs in pairs, a base and a counterfactual that differs in one thing, for effects of what differs."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..target.continuation import continuing
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
        spans, counterfactual_spans: by name, parts of the text in characters, or of token ids in tokens, or of a
            picture bool pixels (Y, X).
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
        if modality(self.base) != modality(self.counterfactual):
            raise TypeError("a base and a counterfactual are both texts, both token ids, or both pictures")
        if modality(self.base) != "image" and self.base == self.counterfactual:
            raise ValueError(f"base and counterfactual are both {self.base!r}, so nothing has an effect; change one")
        if set(self.spans) != set(self.counterfactual_spans):
            raise ValueError(f"spans {sorted(self.spans)} of the base and {sorted(self.counterfactual_spans)} of the "
                             "counterfactual; name the same")
        for text, spans in ((self.base, self.spans), (self.counterfactual, self.counterfactual_spans)):
            for name, ranges in spans.items() if modality(text) != "image" else ():
                if not ranges or not all(0 <= start < end <= len(text) for start, end in ranges):
                    units = "a text of {} characters" if isinstance(text, str) else "{} tokens"
                    raise ValueError(f"span {name!r} is {ranges} of {units.format(len(text))}, {text!r}")

    def said(self, name: str) -> tuple[str, str]:
        """The words of a span, in the base and in the counterfactual."""
        words = lambda text, spans: " ".join(text[start:end] for start, end in spans[name])
        return words(self.base, self.spans), words(self.counterfactual, self.counterfactual_spans)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one kind under a name; `about` says how they were made, and becomes part of every report."""

    name: str
    modality: str  # "text", "tokens" or "image"
    pairs: Sequence[Pair]
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.modality not in ("text", "tokens", "image"):
            raise ValueError(f"pairs of modality {self.modality!r}; there are text, tokens and image")
        if not len(self.pairs):
            raise ValueError(f"{self.name!r} has no pair")
        wrong = next((one for one in self.pairs if modality(one.base) != self.modality), None)
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
        return self.keep(lambda one: _suits(one, tokenizer, names)
                         and all(len(continuing(text, tokenizer)) == 1 for text in one.continuations))

    def fingerprint(self) -> str:
        """A hash of the name and all pairs, to tell two sets apart."""
        said = lambda spans: [(name, "pixels" if isinstance(span, Tensor) else tuple(span))
                              for name, span in sorted(spans.items())]
        sides = [Example(one.base, target=(one.continuations, said(one.spans), said(one.counterfactual_spans),
                                           *((one.answers, one.wrong) if one.answers else ())))
                 for one in self.pairs]
        return Data(self.name, self.modality, [*sides, *map(Example, self.counterfactuals)]).fingerprint()


def modality(one: object) -> str:
    """Of a side of a pair: "text", "tokens" or "image".

    >>> modality("a word"), modality([3, 1, 2]), modality("a word"[:0])
    ('text', 'tokens', 'text')
    """
    if isinstance(one, str):
        return "text"
    return "tokens" if isinstance(one, (list, tuple)) and all(isinstance(each, int) for each in one) else "image"


def known_ids(text: object, tokenizer: object) -> list[int]:
    """The `ids` of a continuation whose every word is in the vocabulary; ids as they are.

    Raises: ValueError for a text with an unknown word, whose probability would be that of any other one.
    """
    found, unknown = continuing(text, tokenizer), getattr(tokenizer, "unk_token_id", None)
    if isinstance(text, str) and unknown is not None and unknown in found and tokenizer.unk_token not in text:
        raise ValueError(f"{text!r} is read as {tokenizer.convert_ids_to_tokens(found)}, {tokenizer.unk_token} for "
                         "what is not in the vocabulary; give words that are in it, or token ids")
    return found


def token(text: object, tokenizer: object) -> int:
    """The one token of a continuation.

    Raises: ValueError if it is several, with how it is tokenised.
    """
    found = continuing(text, tokenizer)
    if len(found) != 1:
        raise ValueError(f"{text!r} is {len(found)} tokens, {tokenizer.convert_ids_to_tokens(found)}, where one is "
                         "needed; give one of them, or an outcome of several tokens")
    return found[0]


def singles(words: Sequence[str], tokenizer: object, *, least: int, what: str) -> list[str]:
    """The words that a tokenizer knows as one token behind a space.

    Raises: ValueError if they are fewer than `least`, with how it reads another one.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = [word for word in words if len(read := continuing(f" {word}", tokenizer)) == 1 and read != [unknown]]
    if len(found) < least:
        other = next(word for word in words if word not in found)
        raise ValueError(f"{len(found)} of our {len(words)} {what} are one token each, and {least} are needed; the "
                         f"tokenizer reads {' ' + other!r} as "
                         f"{tokenizer.convert_ids_to_tokens(continuing(f' {other}', tokenizer))}")
    return found


def drawn(make: Callable[[int], Pair], count: int, tokenizer: object, names: Sequence[str], *, what: str) -> list[Pair]:
    """Pairs that are drawn until there are `count` of which both sides have as many tokens, and these spans are one
    each.

    Raises: ValueError for a count that is not positive, or where most that is drawn does not suit the tokenizer.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    found: list[Pair] = []
    for _ in range(2 * count + 20):
        one = make(len(found))
        found += [one] if _suits(one, tokenizer, names) else []
        if len(found) == count:
            return found
    raise ValueError(f"the tokenizer reads {', '.join(names)} of most of our {what} as several tokens, or both sides "
                     f"as unlike numbers of them; among them {one.base!r}, as "
                     f"{tokenizer.convert_ids_to_tokens(continuing(one.base, tokenizer))}")


def asking(text: str, tokenizer: object) -> str:
    """The text as a model is asked to go on with it: as it is, or of a tokenizer with a mask token, that behind it.

    >>> asking("Mary gave a drink to", None)
    'Mary gave a drink to'
    """
    mask = getattr(tokenizer, "mask_token", None)
    return f"{text} {mask}." if mask else text


def ending(text: str, tokenizer: object) -> Ranges:
    """Where a model answers that reads this text: at its mask token, or at its last one.

    >>> ending("Mary gave a drink to", None)
    ((19, 20),)
    """
    mask = getattr(tokenizer, "mask_token", None)
    at = text.find(mask) if mask else -1
    return ((at, at + len(mask)),) if at >= 0 else ((len(text) - 1, len(text)),)


def _suits(one: Pair, tokenizer: object, names: Sequence[str]) -> bool:
    return len(continuing(one.base, tokenizer)) == len(continuing(one.counterfactual, tokenizer)) \
        and all(_one(tokenizer, *side, name) for name in names
                for side in ((one.base, one.spans), (one.counterfactual, one.counterfactual_spans)))


def _one(tokenizer: object, text: str, spans: Mapping[str, Ranges], name: str) -> bool:
    """Whether each part of a span is one token in its place: as many before it and after it as without it."""
    return all(len(continuing(text[:end].rstrip(), tokenizer)) == 1 + (len(continuing(text[:start].rstrip(), tokenizer))
               if text[:start].strip() else 0) for start, end in spans[name])
