"""Where in a text: a token, a word or a part of it, as the tokens that it is made of."""
from __future__ import annotations

import re
from collections.abc import Sequence

from ..tokens import TensorUnits, TextUnits, Units

SHOWN = 12  # words that an error lists
Chars = tuple[int, int]


def positions(units: Units, row: int) -> list[int]:
    """The positions of a row's own tokens, padding left out; of a plain tensor, (B, T, ...), all.

    Raises: ValueError for what has no positions.
    """
    if isinstance(units, TensorUnits) and len(units.shape) > 1:
        return list(range(units.shape[1]))
    return [t for t, padding in enumerate(text(units).padding[row]) if not padding]


def text(units: Units) -> TextUnits:
    """The units of a text. Raises: ValueError for what is none."""
    if not isinstance(units, TextUnits):
        raise ValueError("a place in a text was asked for, and the input is none; give text or token ids, or the "
                         "position of a token")
    return units


def token(units: Units, row: int, position: int) -> int:
    """Where the token at a position is that counts from the first one, or from the last if it is negative.

    Raises: ValueError outside of the text.
    """
    own = positions(units, row)
    if not -len(own) <= position < len(own):
        raise ValueError(f"no position {position} in row {row}, which has {len(own)} tokens; "
                         f"give 0 to {len(own) - 1}, or -1 to {-len(own)} from the end")
    return own[position]


def word(units: TextUnits, row: int, index: int) -> list[int]:
    """The tokens of a word, by its index among the words of the row. Raises: ValueError outside of them."""
    words = units.words[row]
    if not -len(words) <= index < len(words):
        raise ValueError(f"no word {index} in row {row}, which has {len(words)}: {listed(words)}")
    index %= len(words)
    return [t for t, own in enumerate(units.word_ids[row]) if own == index]


def part(units: TextUnits, row: int, text: str, *, second: bool = False) -> list[int]:
    """The tokens of a part of the text, as it stands there; `second`: in the second text of a pair.

    Whole words come before parts of words. Raises: ValueError where it does not stand there, or several times.
    """
    whole, begin = units.texts[row], start(units, row) if second else 0
    edges = [r"(?<!\w)" if text[:1].isalnum() else "", r"(?!\w)" if text[-1:].isalnum() else ""]
    patterns = re.escape(text).join(edges), re.escape(text)
    found = next(filter(None, ([m.span() for m in re.finditer(p, whole) if m.start() >= begin] for p in patterns)), [])
    if not text.strip() or not found:
        raise ValueError(f"{text!r} does not stand in {_where(second)} of row {row}; its words are "
                         f"{listed(units.words[row])}")
    if len(found) > 1:
        places = ", ".join(f"({start - begin}, {end - begin})" for start, end in found)
        raise ValueError(f"{text!r} stands {len(found)} times in {_where(second)} of row {row}; say which by its "
                         f"characters, chars= one of {places}")
    return _covered(units, row, found[0])


def characters(units: TextUnits, row: int, chars: Chars, *, second: bool = False) -> list[int]:
    """The tokens that hold characters `start` to `end` of the text; `second`: of the second text of a pair.

    Raises: ValueError outside of the text, or where no token is.
    """
    begin = start(units, row) if second else 0
    length, (first, last) = len(units.texts[row]) - begin, chars
    if not 0 <= first < last <= length:
        raise ValueError(f"no characters {chars} in {_where(second)} of row {row}, which has {length}; "
                         "give (start, end), the end not included")
    return _covered(units, row, (first + begin, last + begin))


def start(units: TextUnits, row: int) -> int:
    """The character with which the second text of a pair begins; 0 of a text alone."""
    return 0 if units.seconds is None else units.seconds[row]


def context(units: TextUnits, row: int) -> list[int]:
    """The tokens of the second text of a pair; without texts, those behind the first special token between others."""
    own = [t for t in positions(units, row) if not units.special[row][t]]
    if units.seconds is not None:
        return [t for t in own if units.offsets[row][t][0] >= units.seconds[row]]
    gaps = [t for before, t in zip(own, own[1:]) if t > before + 1]
    return [t for t in own if t >= gaps[0]] if gaps else own


def spelled(units: Units, row: int, tokens: Sequence[int]) -> str:
    """The text that these neighbouring tokens stand for; of a plain tensor, where they are."""
    if not isinstance(units, TextUnits):
        return ", ".join(map(str, tokens))
    spans = [units.offsets[row][t] for t in tokens if units.offsets[row][t][1] > units.offsets[row][t][0]]
    if not spans:
        return " ".join(units.tokens[row][t] for t in tokens)
    return units.texts[row][min(s for s, _ in spans):max(e for _, e in spans)].strip()


def listed(words: Sequence[str]) -> str:
    """The first words of a text, with their indices."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(f"{index} {word!r}" for index, word in enumerate(words[:SHOWN])) + more


def _covered(units: TextUnits, row: int, span: Chars) -> list[int]:
    found = [t for t in positions(units, row) if not units.special[row][t]
             and units.offsets[row][t][0] < span[1] and span[0] < units.offsets[row][t][1]]
    if not found:
        raise ValueError(f"{units.texts[row][slice(*span)]!r} of row {row} is not among the tokens that the model "
                         "reads; was the text cut?")
    return found


def _where(second: bool) -> str:
    return "the context" if second else "the text"
