"""Pairs of the sentences that `tasks-gpt2` completes: indirect objects, year spans, professions with a planted bias."""
from __future__ import annotations

import random
from collections.abc import Sequence

from ..zoo.tasks import INDIRECT, NAMES, PROFESSIONS, SPLITS, YEARS, planted, scene, span, split_of
from .example import chosen
from .pair import Pair, Pairs, Ranges
from .template import OPPOSITE, filled

ORDERS = ("abba", "baba")
CORRUPTIONS = ("abc", "other giver")
EARLIEST = 1  # the start of the counterfactual, after which nearly every year is later
COUNTERFACTUALS = {**OPPOSITE, "person": (" she", " he")}
"""What a profession is changed into, and the two continuations."""
OPPOSED = "opposite"


def indirect_objects(count: int = 100, *, seed: int = 0, split: str = "test", corrupted: str = "abc",
                     orders: Sequence[str] = ORDERS) -> Pairs:
    """Sentences of two people, in which one gives something to the other, beside corrupted ones (Wang et al. 2023).

    The continuations are the giver and the receiver, with a leading space; the receiver is right. Spans are "receiver",
    "giver" (where they are named first), "again" (where the giver is named again), "place" and "object".

    Args: split: "train" or "test" of `relprop.zoo.tasks`. corrupted: "abc", three other names, of which none comes
        twice; or "other giver", the same sentence with the other one giving. orders: taken in turn; "abba" names the
        receiver first, "baba" the giver.
    Raises: ValueError for a count that is not positive, an unknown split, corruption or order.

    >>> one = indirect_objects(1, seed=1).pairs[0]
    >>> one.base.endswith(" to"), one.continuations[1] in one.base, one.continuations[1] in one.counterfactual
    (True, True, False)
    """
    _check(count, split)
    if corrupted not in CORRUPTIONS or not orders or not set(orders) <= set(ORDERS):
        raise ValueError(f"corrupted is one of {', '.join(CORRUPTIONS)} and orders are of {', '.join(ORDERS)}, not "
                         f"{corrupted!r} and {list(orders)}")
    rng = random.Random(f"indirect objects {seed} {split}")
    pairs = [_indirect(rng, split, corrupted, orders[row % len(orders)]) for row in range(count)]
    return Pairs("indirect objects", "text", pairs,
                 {"count": count, "seed": seed, "split": split, "corrupted": corrupted, "orders": list(orders)})


def year_spans(count: int = 100, *, seed: int = 0, split: str = "test") -> Pairs:
    """Sentences of something that starts in a year and ends in a later one, beside ones that start in the year 01
    (Hanna et al. 2023).

    The prompt ends with the century of the end, and goes on with one of `relprop.zoo.tasks.YEARS`. The continuations
    are the year before the start and the year after it; the second is right. The fact "year" is the start's, an int,
    and the span "year" where it is.

    Raises: ValueError for a count that is not positive, or an unknown split.

    >>> one = year_spans(1).pairs[0]
    >>> one.base[slice(*one.spans["year"][0])] == f"{one.facts['year']:02d}", "01 " in one.counterfactual
    (True, True)
    """
    _check(count, split)
    rng = random.Random(f"year spans {seed} {split}")
    pairs = [_years(*span(rng, split)) for _ in range(count)]
    return Pairs("year spans", "text", pairs, {"count": count, "seed": seed, "split": split})


def planted_professions(count: int | None = None, *, seed: int = 0, counterfactual: str = "person",
                        split: str | None = None, texts: Sequence[str] = PROFESSIONS) -> Pairs:
    """Each profession in each template, beside the same sentence of a man, a woman or a person; or of the "opposite",
    a man where " she" is planted to be likelier and a woman where " he" is, as Vig et al. 2020 set the gender.

    The facts are the profession, the template and "planted", log P(she) - log P(he). The continuations are " she" and
    " he", the first being that of the counterfactual, so that for a man they are " he" and " she". For a person the
    planted size is zero: then the total effect on log P(she) - log P(he) is that of the profession with the other sign.

    Args: count: how many, drawn by the seed; None: all. counterfactual: "man", "woman", "person" or "opposite". split:
        "train" or "test" of `relprop.zoo.tasks`; None: both.
    Raises: ValueError for another counterfactual or split, or if no sentence is left.

    >>> made = planted_professions(texts=["The {profession} said that"])
    >>> len(made), made.pairs[0].base, made.pairs[0].counterfactual, made.pairs[0].facts["planted"]
    (40, 'The nurse said that', 'The person said that', 2.5)
    """
    if counterfactual not in (*COUNTERFACTUALS, OPPOSED):
        raise ValueError(f"a counterfactual is {', '.join(COUNTERFACTUALS)} or {OPPOSED}, not {counterfactual!r}")
    _check(1, split or "test")
    other = lambda size: counterfactual if counterfactual != OPPOSED else "man" if size > 0 else "woman"
    lines = [(text, name, other(size)) for name, size in planted()["professions"].items() for text in texts
             if split in (None, split_of(name, text)) and (size or counterfactual != OPPOSED)]
    about = {"count": count, "seed": seed, "counterfactual": counterfactual, "split": split}
    return Pairs("planted professions", "text", [_profession(*line) for line in chosen(lines, count, seed)], about)


def _check(count: int, split: str) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")


def _indirect(rng: random.Random, split: str, corrupted: str, order: str) -> Pair:
    receiver, giver, place, thing = scene(rng, split)
    text = rng.choice(INDIRECT)
    a, b = (receiver, giver) if order == "abba" else (giver, receiver)
    same = {"place": place, "object": thing}
    if corrupted == "abc":
        other = dict(zip(("a", "b", "giver"), rng.sample([name for name in NAMES if name not in (a, b)], 3)))
    else:
        other = {"a": a, "b": b, "giver": receiver}
    sides = [_named(text, {**same, **names}, order) for names in ({"a": a, "b": b, "giver": giver}, other)]
    facts = {**same, "receiver": receiver, "giver": giver, "order": order, "template": text}
    return Pair(sides[0][0], sides[1][0], (f" {giver}", f" {receiver}"), sides[0][1], sides[1][1], facts,
                answers=(f" {receiver}",), wrong=(f" {giver}",))


def _named(text: str, values: dict[str, str], order: str) -> tuple[str, dict[str, Ranges]]:
    made, spans = filled(text, values)
    first, second = ("receiver", "giver") if order == "abba" else ("giver", "receiver")
    return made, {first: spans["a"], second: spans["b"], "again": spans["giver"], "place": spans["place"],
                  "object": spans["object"]}


def _years(text: str, noun: str, century: str, year: int) -> Pair:
    values = {"noun": noun, "century": century}
    base, spans = filled(text, {**values, "year": YEARS[year]})
    changed, other = filled(text, {**values, "year": YEARS[EARLIEST]})
    return Pair(base, changed, (YEARS[year - 1], YEARS[year + 1]), {"year": spans["year"]}, {"year": other["year"]},
                {**values, "year": year, "template": text}, answers=YEARS[year + 1:], wrong=YEARS[:year + 1])


def _profession(text: str, name: str, other: str) -> Pair:
    base, spans = filled(text, {"profession": name})
    changed, other_spans = filled(text, {"profession": other})
    facts = {"profession": name, "planted": planted()["professions"][name], "template": text, "to": other}
    return Pair(base, changed, COUNTERFACTUALS[other], spans, other_spans, facts, group=name)
