"""Induction: a list that is said twice goes on as it did the first time.

Reference: Olsson et al. 2022 (In-context learning and induction heads).
"""
from __future__ import annotations

import random

from .docstring import WORDS
from .pair import Pair, Pairs, asking, drawn, ending, singles

BEGINNING = "Words:"


def induction(tokenizer: object, count: int = 100, *, seed: int = 0, length: int = 8) -> Pairs:
    """A list of random tokens and its beginning again, up to one, A; beside the same with another token behind the
    first A.

    The answer is what stands behind the first A, the wrong answer what the other list has there. Spans are "A1", "B1"
    (what is behind it) and "end" (where the model answers, at the second A).

    Args: tokenizer: or the number of tokens of a model without one, whose ids are then drawn. length: of the list.
    Raises: ValueError for a list that is too short, or a tokenizer that reads too few of our words as one token each.

    >>> one = induction(50, 1, length=4).pairs[0]
    >>> (a, b), end = (one.spans[name][0][0] for name in ("A1", "B1")), one.spans["end"][0][0]
    >>> one.base[a] == one.base[end], one.answers == ((one.base[b],),)
    (True, True)
    """
    if length < 3:
        raise ValueError(f"a list of {length} cannot be gone on with; give a length of at least 3")
    rng = random.Random(f"induction {seed}")
    of_ids = isinstance(tokenizer, int)
    pool = range(tokenizer) if of_ids else singles(tuple(dict.fromkeys(WORDS)), tokenizer, least=length + 1,
                                                   what="words")
    if len(pool) <= length:
        raise ValueError(f"{len(pool)} tokens are too few for lists of {length} and one more; give a smaller length")

    def make(row: int) -> Pair:
        *listed, other = rng.sample(pool, length + 1)
        at = rng.randrange(1, length - 1)
        changed = [*listed[:at + 1], other, *listed[at + 2:]]
        return _of_ids(listed, changed, at) if of_ids else _of_words(listed, changed, at, tokenizer)

    if of_ids:
        pairs = [make(row) for row in range(count)]
    else:
        pairs = drawn(make, count, tokenizer, ("A1", "B1"), what="lists")
    return Pairs("induction", "tokens" if of_ids else "text", pairs, {"count": count, "seed": seed, "length": length})


def _of_ids(listed: list[int], changed: list[int], at: int) -> Pair:
    spans = {"A1": ((at, at + 1),), "B1": ((at + 1, at + 2),), "end": ((len(listed) + at, len(listed) + at + 1),)}
    again = listed[:at + 1]
    return Pair([*listed, *again], [*changed, *again], (), spans, spans, answers=((listed[at + 1],),),
                wrong=((changed[at + 1],),))


def _of_words(listed: list[str], changed: list[str], at: int, tokenizer: object) -> Pair:
    sides = []
    for words in (listed, changed):
        text, places = BEGINNING, []
        for word in [*words, *listed[:at + 1]]:
            places.append((len(text) + 1, len(text) + 1 + len(word)))
            text += f" {word}"
        text = asking(text, tokenizer)
        sides.append((text, {"A1": (places[at],), "B1": (places[at + 1],), "end": ending(text, tokenizer)}))
    return Pair(*(side[0] for side in sides), (), *(side[1] for side in sides), answers=(f" {listed[at + 1]}",),
                wrong=(f" {changed[at + 1]}",))
