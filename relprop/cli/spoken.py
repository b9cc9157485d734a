"""Targets as a command takes them: POSITIVE, p:POSITIVE, tag:B-LOC@Paris, span:two words, answer: Paris, a - b."""
from __future__ import annotations

from typing import Any

WITHOUT = " - "  # between what is contrasted


def spoken(text: str) -> Any:
    """The target that a text means; what is of no kind, a label or a token, as it is.

    >>> spoken("tag:B-LOC@Paris"), spoken("p:POSITIVE")  # doctest: +ELLIPSIS
    (Tag(tag='B-LOC', word='Paris', ...), Probability(of='POSITIVE', function=None))
    >>> spoken("POSITIVE - NEGATIVE"), spoken(" she")
    (Contrast(a='POSITIVE', b='NEGATIVE'), ' she')

    Raises: ValueError for a tag without its word.
    """
    from ..target import Answer, Contrast, End, Probability, Similarity, Span, Start

    kind, sign, what = text.partition(":")
    if WITHOUT in text:
        a, b = text.split(WITHOUT, 1)
        return Contrast(_one(a), _one(b))
    kinds = {"p": Probability, "span": Span, "start": Start, "end": End, "answer": Answer,
             "similarity": Similarity, "tag": None}
    if not sign or kind not in kinds:
        return text
    if kind == "tag":
        return _tag(what)
    return kinds[kind](_one(what) if kind == "p" else what) if what else kinds[kind]()


def _one(text: str) -> Any:
    """One side of a contrast; a number is an index."""
    return int(text) if text.strip().lstrip("-").isdecimal() else spoken(text)


def _tag(text: str) -> Any:
    from ..target import Tag

    tag, sign, word = text.rpartition("@")
    if not sign or not word:
        raise ValueError(f"which word has the tag? write tag:{text.strip('@') or 'TAG'}@WORD, its text or its number")
    return Tag(_one(tag) if tag else None, word=int(word) if word.isdecimal() else word)
