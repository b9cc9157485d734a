"""Indirect objects: sentences in which two people are named, and one of them gives something to the other.

Reference: Wang et al. 2023 (Interpretability in the wild: a circuit for indirect object identification in GPT-2 small).
Names, places, things and sentences are our own.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from .pair import Pair, Pairs, asking, drawn, ending, singles
from .template import filled

NAMES = tuple("""
    Mary John Tom Anna Paul Lucy Mark Jane Peter Alice David Emma Henry Laura James Sarah Kevin Julia Martin Frank Helen
    George Victor Walter Ruth Grace Philip Arthur Joan Robert Linda Daniel Karen Steven Brian Nancy Simon Eric Adam Kate
    """.split())
PLACES = tuple("store park school beach market library station museum garden hospital church hotel bridge".split())
THINGS = tuple("drink book ball letter map kite ticket ring key coin photo pencil basket bottle computer".split())
SENTENCES = (
    "When {a} and {b} went to the {place}, {giver} gave a {thing} to",
    "After {a} and {b} got to the {place}, {giver} handed a {thing} to",
    "Then, {a} and {b} walked to the {place}. {giver} gave a {thing} to",
    "Yesterday {a} and {b} met at the {place}, where {giver} showed a {thing} to",
    "While {a} and {b} were at the {place}, {giver} decided to give a {thing} to",
    "Last week {a} and {b} came to the {place} and {giver} brought a {thing} to",
)
ORDERS = ("abba", "baba")
CORRUPTIONS = ("abc", "other giver")


def ioi(tokenizer: object, count: int = 100, *, seed: int = 0, corruption: str = "abc",
        orders: Sequence[str] = ORDERS, sentences: Sequence[str] = SENTENCES) -> Pairs:
    """Sentences in which the receiver, IO, comes next, beside ones in which that cannot be told.

    The answer is IO, the wrong answer the giver, S. Spans are "IO", "S1" (where S is named first), "S1_next" (the token
    behind it), "S2" (where S gives) and "end" (where the model answers). The facts "template" and "order" are of
    sentences that go together where means are taken.

    Args: tokenizer: names are used that it reads as one token each. corruption: "abc", three other names, none of them
            twice; or "other giver", the same sentence with IO giving. orders: "abba" names IO first, "baba" S.
        sentences: templates with the slots a, b, place, giver and thing.
    Raises: ValueError for an unknown corruption or order, and for a tokenizer that reads fewer than five names as one
        token each.

    >>> from relprop.load import load
    >>> one = ioi(load("tasks-gpt2").tokenizer, 1).pairs[0]
    >>> one.answers == (f" {one.facts['IO']}",), one.base.count(one.facts["S"]), one.facts["S"] in one.counterfactual
    (True, 2, False)
    """
    if corruption not in CORRUPTIONS or not orders or not set(orders) <= set(ORDERS):
        raise ValueError(f"corruption is one of {', '.join(CORRUPTIONS)} and orders are of {', '.join(ORDERS)}, not "
                         f"{corruption!r} and {list(orders)}")
    names = singles(NAMES, tokenizer, least=5, what="names")
    rng = random.Random(f"ioi {seed}")

    def make(row: int) -> Pair:
        order, text = orders[row % len(orders)], rng.choice(sentences)
        known = {"place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        receiver, giver, *others = rng.sample(names, 5)
        first, second = (receiver, giver) if order == "abba" else (giver, receiver)
        other = {"a": others[0], "b": others[1], "giver": others[2]} if corruption == "abc" else \
            {"a": first, "b": second, "giver": receiver}
        sides = [_side(text, {**known, **values}, order, tokenizer) for values in
                 ({"a": first, "b": second, "giver": giver}, other)]
        facts = {"template": text, "order": order, "IO": receiver, "S": giver}
        return Pair(sides[0][0], sides[1][0], (), sides[0][1], sides[1][1], facts, answers=(f" {receiver}",),
                    wrong=(f" {giver}",))

    pairs = drawn(make, count, tokenizer, ("IO", "S1", "S2"), what="sentences")
    return Pairs("ioi", "text", pairs, {"count": count, "seed": seed, "corruption": corruption, "orders": list(orders)})


def _side(text: str, values: dict[str, str], order: str, tokenizer: object) -> tuple[str, dict]:
    made, spans = filled(text, values)
    made = asking(made, tokenizer)
    receiver, giver = ("a", "b") if order == "abba" else ("b", "a")
    after = spans[giver][0][1]
    behind = after + len(made[after:]) - len(made[after:].lstrip())
    return made, {"IO": spans[receiver], "S1": spans[giver], "S1_next": ((behind, behind + 1),), "S2": spans["giver"],
                  "end": ending(made, tokenizer)}
