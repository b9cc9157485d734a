"""Words set in lines, each on the colour of its relevance."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from ..result import Relevance
from ..result.number import percent, signed
from . import color
from .sheet import SMALL, TINY, extent, families, shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 10.5  # of words, in points
SPACE, GLUED, PAD = 4.0, 1.2, 2.0  # between words, before a comma, inside a box
PITCH, SMALL_PITCH = 25.0, 15.0  # from line to line, with and without numbers beneath
TOLD = 0.25  # words from this share of the scale on have their number beneath
_CLOSING, _OPENING = set(".,;:!?)]}…%»”’'、。，！？"), set("([{«“‘")


@dataclass(frozen=True)
class Box:
    """A word at its place on a line, in points; `note` stands beneath it."""

    text: str
    value: float
    x: float
    width: float
    note: str = ""


def glued(before: str, word: str) -> bool:
    """Whether no space is set between two words: before a comma, after a bracket, in scripts without spaces."""
    wide = lambda text: unicodedata.east_asian_width(text[0]) in "WF"
    return not before or word[:1] in _CLOSING or before[-1:] in _OPENING or bool(word) and wide(word) and wide(before)


def spelled(token: str) -> str:
    """A token as people write it: without the sign that a space stands before it, unless it is nothing else.

    >>> spelled("\u0120nurse"), spelled("\u2581he"), spelled("\u0120"), spelled("##se")
    ('nurse', 'he', '\u2423', '##se')
    """
    return (token.lstrip("\u0120\u2581") or "\u2423") if token else token


def rightward(text: str) -> bool:
    """Whether a text reads from left to right, by its first letter that says so."""
    for letter in text:
        direction = unicodedata.bidirectional(letter)
        if direction in ("L", "R", "AL"):
            return direction == "L"
    return True


def lines(words: list[tuple[str, float]], width: float, end: float, *, size: float = SIZE) -> list[list[Box]]:
    """Words in lines of at most this many points; a word that is longer than a line is cut short.

    Args: words: with their relevance. end: of the colour scale.
    """
    found: list[list[Box]] = [[]]
    before, x = "", 0.0
    for word, value in words:
        text = shortened(word, width - 2 * PAD, size)
        note = signed(value, 2) if end and abs(value) >= TOLD * end else ""
        needed = max(extent(text, size), extent(note, TINY)) + 2 * PAD
        x += (GLUED if glued(before, word) else SPACE) if found[-1] else 0
        if found[-1] and x + needed > width:
            found.append([])
            x = 0.0
        found[-1].append(Box(text, value, x, needed, note))
        before, x = word, x + needed
    if words and not rightward("".join(word for word, _ in words)):
        return [
            [Box(box.text, box.value, width - box.x - box.width, box.width, box.note) for box in line] for line in found
        ]
    return found


def texts(relevance: Relevance, row: int) -> list[list[tuple[str, float]]]:
    """The words of a text with their relevance; of a pair, those of each of its texts."""
    said, units = relevance.words(row), relevance.units
    if units.seconds is None:
        return [said]
    places = zip(units.word_ids[row], units.offsets[row], strict=True)
    later = [index for index, (start, _) in places if index is not None and start >= units.seconds[row]]
    split = min(later, default=len(said))
    return [part for part in (said[:split], said[split:]) if part]


def text_lines(relevance: Relevance, row: int, width: float, end: float) -> list[list[Box]]:
    """The words of a text in lines of at most this many points; the second one of a pair starts on a new line."""
    return [line for said in texts(relevance, row) for line in lines(said, width, end)]


def draw(axes: Axes, found: list[list[Box]], end: float) -> None:
    """Draws the lines onto axes whose unit is the point, y downwards."""
    from matplotlib.patches import FancyBboxPatch

    for number, line in enumerate(found):
        top = number * PITCH
        for box in line:
            fill = color.paint(box.value, end) / 255
            axes.add_patch(
                FancyBboxPatch(
                    (box.x + 1, top + 1),
                    box.width - 2,
                    SIZE * 1.35,
                    boxstyle="round,pad=1,rounding_size=2",
                    facecolor=fill,
                    edgecolor="none",
                )
            )
            _say(axes, box.x + box.width / 2, top + SIZE * 1.12, box.text, SIZE, color.on(box.value, end))
            _say(axes, box.x + box.width / 2, top + SIZE * 1.35 + TINY + 2.5, box.note, TINY, color.FAINT)


def draw_specials(axes: Axes, found: list[list[Box]]) -> None:
    """Draws lines of tokens that are no words, grey, onto axes whose unit is the point, y downwards."""
    from matplotlib.patches import FancyBboxPatch

    for number, line in enumerate(found):
        top = number * SMALL_PITCH
        for box in line:
            axes.add_patch(
                FancyBboxPatch(
                    (box.x + 1, top + 1),
                    box.width - 2,
                    SMALL * 1.5,
                    boxstyle="round,pad=0.5,rounding_size=2",
                    facecolor="#efefef",
                    edgecolor="none",
                )
            )
            _say(axes, box.x + box.width / 2, top + SMALL * 1.25, box.text, SMALL, color.FAINT)


def specials(relevance: Relevance, row: int) -> list[str]:
    """Tokens that are no words, each with its relevance; equal ones next to each other, as those in the place of a
    picture are, and padding, as one.
    """
    units = relevance.units
    padding, said = units.padding[row], units.answers[row] if units.answers is not None else []
    outside = [t for t, word in enumerate(units.word_ids[row]) if word is None and not (said and said[t])]
    told = [(t, *pair) for t, pair in zip(outside, relevance.specials(row), strict=True)]
    own = [one for one in told if not padding[one[0]]]
    place = lambda numbered: (numbered[1][0] - numbered[0], numbered[1][1])  # the same all along a run of equal tokens
    runs = [[one for _, one in run] for _, run in groupby(enumerate(own), key=place)]
    return [_told(run) for run in (*runs, [one for one in told if padding[one[0]]]) if run]


def _told(run: list[tuple[int, str, float]]) -> str:
    """Equal tokens, (place, token, relevance), as one."""
    times = f"{len(run)} × " if len(run) > 1 else ""
    return f"{times}{visible(run[0][1])} {signed(sum(value for _, _, value in run))}"


def _say(axes: Axes, x: float, y: float, text: str, size: float, ink: str) -> None:
    if text:
        axes.text(
            x, y, text, fontsize=size, color=ink, ha="center", va="baseline", fontfamily=families(), parse_math=False
        )


def aside(relevance: Relevance, row: int) -> list[tuple[str, list[str]]]:
    """What stands apart from the words, each group with the share of all |relevance| that it has: special tokens, the
    tokens of an answer, and the first token of a text without a special one before it, which attention may sink into.
    """
    shares = relevance.shares(row)
    first = next((t for t, gone in enumerate(relevance.units.padding[row]) if not gone), 0)
    said = [(visible(token), value) for token, value in relevance.answered(row)]
    groups = {"special tokens": specials(relevance, row),
              "answer": [f"{token} {signed(value)}" for token, value in said],
              "first token": [_told([(first, relevance.units.tokens[row][first], float(relevance.map[row, first]))])]}
    return [(f"{name} {percent(shares[name])}", told) for name, told in groups.items() if told and name in shares]


def aside_lines(relevance: Relevance, row: int, width: float) -> list[tuple[str, list[list[Box]]]]:
    """The groups that stand apart, each in lines of at most this many points."""
    return [(name, lines([(text, 0.0) for text in told], width, 0.0, size=SMALL))
            for name, told in aside(relevance, row)]
