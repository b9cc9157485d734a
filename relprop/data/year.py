"""Year spans: something starts in a year and ends in a later one.

Reference: Hanna et al. 2023 (How does GPT-2 compute greater-than?). Nouns are our own.
"""
from __future__ import annotations

import random

from ..target.continuation import continuing
from .pair import Pair, Pairs, drawn, ending
from .template import filled

NOUNS = tuple("""
    war siege festival voyage drought trial project strike reign plague famine truce boom mission search dispute feud
    campaign journey experiment
    """.split())
SENTENCE = "The {noun} lasted from the year {century}{year} to the year {century}"
CENTURIES = tuple(map(str, range(11, 20)))
YEARS = tuple(f"{year:02d}" for year in range(100))
EARLIEST = "01"  # the corrupted start, after which nearly every year is later


def greater_than(tokenizer: object, count: int = 100, *, seed: int = 0, sentence: str = SENTENCE) -> Pairs:
    """Sentences that end with the century of a year later than the one named, beside ones that start in the year 01.

    Answers are the tokens of all later years of the century, wrong answers those of the others, the named one among
    them. Spans are "noun", "century" and "YY" of the start, and "end".

    Args: sentence: a template with the slots noun, century (twice, its second time at the end) and year.
    Raises: ValueError for a tokenizer that does not read the last two digits of a year as one token, with how it does.

    >>> from relprop.load import load
    >>> one = greater_than(load("tasks-gpt2").tokenizer, 1).pairs[0]
    >>> one.said("YY") == (one.facts["year"], "01"), len(one.answers) == 99 - int(one.facts["year"])
    (True, True)
    """
    tokens = _tokens(tokenizer)
    centuries = [century for century in CENTURIES if _split(tokenizer, century, EARLIEST) is not None]
    rng = random.Random(f"greater-than {seed}")

    def make(row: int) -> Pair:
        values = {"noun": rng.choice(NOUNS), "century": rng.choice(centuries)}
        years = [year for year in YEARS[2:99] if _split(tokenizer, values["century"], year) is not None]
        year = rng.choice(years)
        sides = [_side(sentence, {**values, "year": one}, tokenizer) for one in (year, EARLIEST)]
        of = lambda some: tuple((tokens[one],) for one in some)
        return Pair(*(side[0] for side in sides), (), *(side[1] for side in sides), {**values, "year": year},
                    answers=of(YEARS[int(year) + 1:]), wrong=of(YEARS[:int(year) + 1]))

    pairs = drawn(make, count, tokenizer, ("YY",), what="sentences")
    return Pairs("greater-than", "text", pairs, {"count": count, "seed": seed, "sentence": sentence})


def _side(sentence: str, values: dict[str, str], tokenizer: object) -> tuple[str, dict]:
    text, spans = filled(sentence, values)
    return text, {"noun": spans["noun"], "century": spans["century"][:1], "YY": spans["year"],
                  "end": ending(text, tokenizer)}


def _split(tokenizer: object, century: str, year: str) -> int | None:
    """The token of a year's last two digits behind its first two, None where they are not one."""
    whole, first = continuing(f" {century}{year}", tokenizer), continuing(f" {century}", tokenizer)
    return whole[-1] if len(whole) == len(first) + 1 and whole[:-1] == first else None


def _tokens(tokenizer: object) -> dict[str, int]:
    """The token of the last two digits of every year: as in a year, or where that is a token of its own (" 1700"), as
    alone, if the others are read alike.
    """
    found = {year: next((token for century in CENTURIES if (token := _split(tokenizer, century, year)) is not None),
                        None) for year in YEARS}
    alone = {year: continuing(year, tokenizer) for year in YEARS}
    if all(alone[year] == [token] for year, token in found.items() if token is not None):
        found = {year: one[0] for year, one in alone.items() if len(one) == 1}
    missing = [year for year in YEARS if found.get(year) is None]
    if missing or len({*found.values()}) < len(YEARS):
        text = f" 17{missing[-1] if missing else '32'}"
        spelled = tokenizer.convert_ids_to_tokens(continuing(text, tokenizer))
        raise ValueError(f"the tokenizer reads{text} as {spelled}; "
                         "greater-than needs each two last digits of a year as one token of their own")
    return found
