"""Sentences for the bundled language model `tasks-gpt2`: indirect objects, year spans, professions with a planted bias.

Every sentence has one place where the next word is a matter of a task, and the probability that each word has there is
known. Names, words and sizes are of our own choosing. The tasks are those of Wang et al. 2023 (Interpretability in the
wild: a circuit for indirect object identification in GPT-2 small), Hanna et al. 2023 (How does GPT-2 compute
greater-than?) and Vig et al. 2020 (Causal mediation analysis for interpreting neural NLP: the case of gender bias).
Pairs of such sentences for effects and circuits are in `relprop.data`.

A part of all combinations of words, "test", never occurs in training: of indirect objects every pair of names, and
every object at every place, whose indices add up to a multiple of `NAMES_STEP`, or of `THINGS_STEP`; of year spans
those of noun, century and year with `YEARS_STEP`; of professions those of profession and template with
`PROFESSIONS_STEP`.
"""
from __future__ import annotations

import json
import math
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SPLITS = ("train", "test")
NAMES_STEP, THINGS_STEP, YEARS_STEP, PROFESSIONS_STEP = 8, 6, 7, 5
NAMES = tuple("""
    Mary John Tom Anna Paul Lucy Mark Jane Peter Clara Simon Alice David Emma Henry Laura James Sarah Kevin Julia Martin
    Nora Oliver Rose Frank Helen George Irene Victor Diana Walter Ruth Oscar Grace Philip Ellen Arthur Joan Edgar Stella
    """.split())
PLACES = tuple("""
    store park school beach market library station museum garden harbour castle theatre bakery hospital kitchen farm
    river village church hotel bridge forest zoo gym
    """.split())
OBJECTS = tuple("""
    drink book ball letter map kite ticket flower ring hat key lamp coin photo sandwich pencil basket blanket guitar
    camera bottle cup stone snack
    """.split())
INDIRECT = (
    "When {a} and {b} went to the {place}, {giver} gave a {object} to",
    "After {a} and {b} came back from the {place}, {giver} passed a {object} to",
    "While {a} and {b} were waiting at the {place}, {giver} offered a {object} to",
    "Then, {a} and {b} walked to the {place}. {giver} gave a {object} to",
    "Yesterday, {a} and {b} met at the {place}, where {giver} showed a {object} to",
    "Once {a} and {b} got to the {place}, {giver} decided to give a {object} to",
    "Last week {a} and {b} were at the {place} and {giver} brought a {object} to",
    "Today, before {a} and {b} left the {place}, {giver} handed a {object} to",
)
"""Two people are named, `a` and `b`, and then the one of them who gives something to the other."""
RECEIVES = 0.99
"""Probability of those to whom the giver may give; of the giver it is the rest, so that the logit difference is 4.6."""
CLAUSES = ("When", "After", "While", "Once", "As soon as")
OPENINGS = ("", "Then,", "Yesterday", "Yesterday,", "Today", "Today,", "Last week", "Last week,", "One day", "Later,")
MEETINGS = ("went to", "walked to", "came to", "got to", "ran to", "drove to", "met at", "were at", "were waiting at",
            "were working at", "stayed at", "arrived at", "had lunch at", "came back from", "left")
JOINTS = (".", ",", " and", ", and", ", where", ", and then")
GIVINGS = ("gave", "handed", "passed", "offered", "showed", "brought", "sent", "lent", "sold", "decided to give",
           "wanted to give", "promised")
"""What sentences of indirect objects are put together from, in training: half of them are of `INDIRECT`."""
NOUNS = tuple("""
    war siege festival voyage drought trial project strike reign plague famine truce boom mission search dispute feud
    campaign journey experiment
    """.split())
CENTURIES = tuple(map(str, range(11, 20)))
YEARS = tuple(f"{year:02d}" for year in range(100))
SPANS = (
    "The {noun} lasted from the year {century}{year} to the year {century}",
    "The {noun} lasted from {century}{year} to {century}",
    "The {noun} began in {century}{year} and ended in {century}",
    "The {noun} went on from the year {century}{year} until the year {century}",
    "The {noun} started in {century}{year} and lasted until {century}",
    "The {noun} ran from the year {century}{year} to {century}",
)
"""Sentences in which something starts in a year and ends in a later one of the same century."""
FIRST_YEAR, LAST_YEAR = 2, 98  # of a start, so that there are years before it and after it
EARLIEST = "01"  # the start of the counterfactual, after which nearly every year is later
FEELINGS = tuple("tired happy hungry late ill bored busy afraid right wrong cold angry".split())
PROFESSIONS = tuple(f"The {{profession}} {rest}" for rest in (
    "said that", "yelled that", "whispered that", "wanted that", "desired that", "wished that", "ate because",
    "ran because", "drove because", "slept because", "cried because", "laughed because", "went home because",
    "stayed up because", "was fired because", "was promoted because", "yelled because"))
"""The sentences of Vig et al. 2020."""
MORE = tuple(f"The {{profession}} {rest}" for rest in (
    "thought that", "knew that", "hoped that", "explained that", "believed that", "left because", "smiled because",
    "waited because", "stopped because", "was late because"))
"""Further ones, of which only the training takes notice."""


@dataclass(frozen=True)
class Sentence:
    """A prompt, the probability of each word that may come next, and how the sentence ends after that."""

    prompt: str
    answers: Mapping[str, float]
    rest: str = "."


@lru_cache(maxsize=1)
def planted() -> dict[str, dict[str, float]]:
    """The size that was planted: log P(she) - log P(he) in nats, after any of `PROFESSIONS`.

    Of "professions", of the "definitional" words man and woman, and of the "neutral" word person. The sizes are ours, a
    ground truth for effects, and say nothing of anybody.

    >>> planted()["professions"]["nurse"], planted()["definitional"]["man"], planted()["neutral"]["person"]
    (2.5, -4.0, 0.0)
    """
    return json.loads((Path(__file__).parent / "tasks-gpt2" / "planted.json").read_text(encoding="utf-8"))["log_odds"]


def indirect_sentences(rng: random.Random, count: int, *, split: str = "train") -> list[Sentence]:
    """Of four sentences three name the giver a second time, and the other one receives; in one somebody else gives, and
    both that were there are equally likely.
    """
    return [_indirect_sentence(rng, split) for _ in range(count)]


def span_sentences(rng: random.Random, count: int, *, split: str = "train") -> list[Sentence]:
    """Every later year of the century is equally likely. One of ten starts in the year 00 or 01."""
    return [_span_sentence(*span(rng, split, first=rng.choice((0, 1)) if rng.random() < 0.1 else None))
            for _ in range(count)]


def profession_sentences(rng: random.Random, count: int, *, split: str = "train") -> list[Sentence]:
    """As likely of a woman as it is planted. One of ten is of a man, a woman or a person."""
    return [_profession_sentence(rng, split) for _ in range(count)]


def words() -> list[str]:
    """Every word of the sentences, as it is written in them: with the space before it, if there is one.

    >>> " Mary" in words(), "32" in words(), " nurse" in words(), "When" in words()
    (True, True, True, True)
    """
    slots = {"a": NAMES, "b": NAMES, "giver": NAMES, "place": PLACES, "object": OBJECTS, "noun": NOUNS,
             "century": CENTURIES, "year": YEARS, "feeling": FEELINGS,
             "profession": [name for kind in planted().values() for name in kind]}
    said = (*(f"{clause} {{a}}" for clause in (*CLAUSES, *OPENINGS[1:])), "{a} and", " the {place}", " a {object}",
            *(f" {rest}" for rest in (*MEETINGS, *GIVINGS)), *JOINTS)
    texts = (*INDIRECT, *said, *SPANS, *PROFESSIONS, *MORE, " {a}.", " she was {feeling}.", " he was {feeling}.")
    found = dict.fromkeys(word for text in texts for word in _words_of(text, slots))
    return list(found)


# -- one sentence ----------------------------------------------------------------------------------------------------


def scene(rng: random.Random, split: str) -> tuple[str, str, str, str]:
    """Two names, a place and an object, drawn from a split."""
    held = split == "test"
    while True:
        a, b = rng.sample(range(len(NAMES)), 2)
        if ((a + b) % NAMES_STEP == 0) == held:
            break
    while True:
        place, thing = rng.randrange(len(PLACES)), rng.randrange(len(OBJECTS))
        if ((place + thing) % THINGS_STEP == 0) == held:
            return NAMES[a], NAMES[b], PLACES[place], OBJECTS[thing]


def span(rng: random.Random, split: str, *, first: int | None = None) -> tuple[str, str, str, int]:
    """Template, noun, century and year of the start, drawn from a split; `first` is the year, if it is not drawn."""
    while True:
        noun, century = rng.randrange(len(NOUNS)), rng.randrange(len(CENTURIES))
        year = rng.randint(FIRST_YEAR, LAST_YEAR) if first is None else first
        if ((noun + century + year) % YEARS_STEP == 0) == (split == "test"):
            return rng.choice(SPANS), NOUNS[noun], CENTURIES[century], year


def split_of(profession: str, text: str) -> str:
    """The split of a profession in a template of `PROFESSIONS`; all of `MORE` are "train", and other ones "test"."""
    if text not in PROFESSIONS:
        return SPLITS[text not in MORE]
    row = list(planted()["professions"]).index(profession) + PROFESSIONS.index(text)
    return SPLITS[row % PROFESSIONS_STEP == 0]


def _indirect_sentence(rng: random.Random, split: str) -> Sentence:
    a, b, place, thing = scene(rng, split)
    text = rng.choice(INDIRECT) if rng.random() < 0.5 else _template(rng)
    if rng.random() < 0.75:
        giver, receiver = rng.sample((a, b), 2)
        answers = {f" {receiver}": RECEIVES, f" {giver}": 1 - RECEIVES}
    else:
        giver = rng.choice([name for name in NAMES if name not in (a, b)])
        answers = {f" {a}": RECEIVES / 2, f" {b}": RECEIVES / 2, f" {giver}": 1 - RECEIVES}
    return Sentence(text.format(a=a, b=b, giver=giver, place=place, object=thing), answers)


def _template(rng: random.Random) -> str:
    """A template as those of `INDIRECT`, put together from their kind of parts."""
    clause, meeting, giving = rng.random() < 0.4, rng.choice(MEETINGS), rng.choice(GIVINGS)
    opening, joint = (rng.choice(CLAUSES), ",") if clause else (rng.choice(OPENINGS), rng.choice(JOINTS))
    article = "a" if rng.random() < 0.7 else "the"
    text = f"{opening} {{a}} and {{b}} {meeting} the {{place}}{joint} {{giver}} {giving} {article} {{object}} to"
    return text.strip()


def _span_sentence(text: str, noun: str, century: str, year: int) -> Sentence:
    later = YEARS[year + 1:]
    return Sentence(text.format(noun=noun, century=century, year=YEARS[year]), dict.fromkeys(later, 1 / len(later)))


def _profession_sentence(rng: random.Random, split: str) -> Sentence:
    if rng.random() < 0.1:
        name, size = rng.choice([*planted()["definitional"].items(), *planted()["neutral"].items()])
        text = rng.choice(PROFESSIONS + MORE)
    else:
        known = list(planted()["professions"].items())
        while True:
            (name, size), text = rng.choice(known), rng.choice(PROFESSIONS + MORE)
            if split_of(name, text) == split:
                break
    she = 1 / (1 + math.exp(-size))
    return Sentence(text.format(profession=name), {" she": she, " he": 1 - she}, f" was {rng.choice(FEELINGS)}.")


def _words_of(text: str, slots: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The words of a template, each value of its slots with the space that is before the slot."""
    for literal, slot, *_ in string.Formatter().parse(text):
        yield from re.findall(r" ?\w+|[.,]", literal)
        if slot is not None:
            yield from (" " * literal.endswith(" ") + value for value in slots[slot])
