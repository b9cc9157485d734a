"""Pairs from sentences with slots: every two values of a slot make a pair."""
from __future__ import annotations

import itertools
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..zoo.tasks import PROFESSIONS
from .example import chosen
from .pair import Pair, Pairs, Ranges

OPPOSITE = {"man": (" he", " she"), "woman": (" she", " he")}
"""The counterfactual word, and the two continuations: the first is its own."""


def filled(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, Ranges]]:
    """A template with its slots filled, and where each slot is in it; one that comes several times has several ranges.

    >>> filled("The {job} said that", {"job": "nurse"})
    ('The nurse said that', {'job': ((4, 9),)})

    Raises: ValueError for a slot without a value, or with an empty one.
    """
    text, spans = "", {}
    for literal, name, *_ in string.Formatter().parse(template):
        text += literal
        if name is None:
            continue
        if not values.get(name):
            raise ValueError(f"slot {name!r} of {template!r} has no value; there are values for "
                             f"{', '.join(values) or 'none'}")
        spans[name] = (*spans.get(name, ()), (len(text), len(text) + len(values[name])))
        text += values[name]
    return text, spans


def templates(texts: str | Sequence[str], slots: Mapping[str, Sequence[str]], count: int | None = None, *,
              seed: int = 0, swap: str | Sequence[str] | None = None, continuations: Sequence[str] = ()) -> Pairs:
    """All pairs of filled templates that differ in one slot: each ordered pair of its values, all else the same.

    Args: texts: templates such as "The {profession} said that {pronoun}". slots: the values of each. count: how many
        pairs, drawn by the seed; None: all. swap: slots that may differ; None: each. continuations: of every pair; they
        may have slots, which take the values of the base.
    Raises: ValueError for a slot without values, one that no template has, or a slot to swap with a single value.

    >>> made = templates("The {job} {verb}", {"job": ["nurse", "cook"], "verb": ["said", "ran"]}, swap="job")
    >>> len(made), made.pairs[0].base, made.pairs[0].counterfactual
    (4, 'The nurse said', 'The cook said')
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    used = {name for text in texts for _, name, *_ in string.Formatter().parse(text) if name is not None}
    swap = tuple(slots) if swap is None else (swap,) if isinstance(swap, str) else tuple(swap)
    _check(used, slots, swap)
    lines = [(text, values, name, other) for text in texts for values in _assignments(text, slots)
             for name in swap if name in values for other in slots[name] if other != values[name]]
    if not lines:
        raise ValueError(f"no slot of {', '.join(swap)} has two values, so that nothing can be swapped")
    pairs = [_pair(*line, continuations) for line in chosen(lines, count, seed)]
    about = {"templates": texts, "slots": {name: list(values) for name, values in slots.items()}, "count": count,
             "seed": seed}
    return Pairs("templates", "text", pairs, about)


def professions(path: str | Path, count: int | None = None, *, seed: int = 0, texts: Sequence[str] = PROFESSIONS,
                counterfactual: str = "both", definitional: float = 1.0) -> Pairs:
    """The professions of Vig et al. 2020: each in each template, against "man" and "woman" in its place.

    Of the continuations " he" and " she" the first is that of the counterfactual, so that p(first) / p(second) is
    their outcome. The facts hold the profession, how far it is definitional and how far stereotypical, from -1 (female)
    to 1 (male), and the template. `Pairs.single` keeps the professions that are one token, as their code needs.

    Args: path: `professions.json`, a list of [name, definitional, stereotypical], or its folder. texts: templates with
        the slot "profession". counterfactual: "man", "woman", "both", or "stereotype" for the one against which the
        profession is stereotyped (none where it is not). definitional: the largest size of it that is kept.
    Raises: ValueError for a folder without the file, or an unknown counterfactual.
    """
    path = Path(path) / "professions.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"no {path}; a list of [profession, definitional, stereotypical] is expected there")
    words = {"man": lambda score: ("man",), "woman": lambda score: ("woman",), "both": lambda score: ("man", "woman"),
             "stereotype": lambda score: ("man",) if score < 0 else ("woman",) if score > 0 else ()}
    if counterfactual not in words:
        raise ValueError(f"a counterfactual is {', '.join(words)}, not {counterfactual!r}")
    known = [(name.replace("_", " "), by, score) for name, by, score in json.loads(path.read_text(encoding="utf-8"))]
    lines = [(text, *line, word) for line in known if abs(line[1]) <= definitional for text in texts
             for word in words[counterfactual](line[2]) if line[0] != word]
    return Pairs("professions", "text", [_profession(*line) for line in chosen(lines, count, seed)],
                 {"counterfactual": counterfactual, "definitional": definitional, "count": count, "seed": seed})


def _check(used: set[str], slots: Mapping[str, Sequence[str]], swap: Sequence[str]) -> None:
    wrong = next((name for name in (*slots, *swap) if name not in used), None)
    if wrong is not None:
        raise ValueError(f"no template has the slot {wrong!r}; they have {', '.join(sorted(used)) or 'none'}")
    missing = next((name for name in used if not slots.get(name)), None)
    if missing is not None:
        raise ValueError(f"slot {missing!r} has no values; give slots={{{missing!r}: [...], ...}}")


def _assignments(text: str, slots: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    names = list(dict.fromkeys(name for _, name, *_ in string.Formatter().parse(text) if name is not None))
    return [dict(zip(names, values)) for values in itertools.product(*(slots[name] for name in names))]


def _pair(text: str, values: Mapping[str, str], name: str, other: str, continuations: Sequence[str]) -> Pair:
    base, spans = filled(text, values)
    counterfactual, other_spans = filled(text, {**values, name: other})
    return Pair(base, counterfactual, tuple(filled(one, values)[0] for one in continuations), spans, other_spans,
                {**values, "template": text, "swapped": name, "to": other}, group=base)


def _profession(text: str, name: str, definitional: float, stereotype: float, word: str) -> Pair:
    pair = _pair(text, {"profession": name}, "profession", word, OPPOSITE[word])
    facts = {"profession": name, "definitional": definitional, "stereotype": stereotype, "template": text, "to": word}
    return Pair(pair.base, pair.counterfactual, pair.continuations, pair.spans, pair.counterfactual_spans, facts, name)
