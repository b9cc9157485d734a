"""Gendered pronouns: sentences that go on with the pronoun of the one they are about.

Reference: Mathwin et al. 2023 (Identifying a preliminary circuit for predicting gendered pronouns in GPT-2 small).
Names and sentences are our own.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from .pair import Pair, Pairs, asking, drawn, ending, singles
from .template import filled

FEMALE = tuple("Mary Anna Lucy Jane Alice Emma Laura Sarah Julia Helen Ruth Grace Joan Linda Karen Nancy Kate".split())
MALE = tuple("John Tom Paul Mark Peter David Henry James Kevin Martin Frank George Victor Walter Robert Daniel".split())
SENTENCES = (
    "So {name} is a really great friend, isn't",
    "I think that {name} is late again, isn't",
    "My neighbour {name} was at home, wasn't",
    "Then {name} was very happy because",
)


def pronouns(tokenizer: object, count: int = 100, *, seed: int = 0, sentences: Sequence[str] = SENTENCES) -> Pairs:
    """Sentences about a woman or a man, beside the same ones about somebody of the other gender.

    The answer is the pronoun, " she" or " he", the wrong answer the other one. Spans are "name" and "end".

    Args: sentences: templates with the slot name.
    Raises: ValueError for a tokenizer that reads fewer than two names of women or men as one token each.

    >>> from relprop.load import load
    >>> [one.answers for one in pronouns(load("tasks-gpt2").tokenizer, 2).pairs]
    [(' she',), (' he',)]
    """
    groups = [singles(names, tokenizer, least=2, what=f"names of {who}") for names, who in
              ((FEMALE, "women"), (MALE, "men"))]
    rng = random.Random(f"pronouns {seed}")

    def make(row: int) -> Pair:
        text, own = rng.choice(sentences), row % 2
        sides = [_side(text, rng.choice(groups[which]), tokenizer) for which in (own, 1 - own)]
        said = (" she", " he")
        return Pair(*(side[0] for side in sides), (), *(side[1] for side in sides), {"template": text},
                    answers=(said[own],), wrong=(said[1 - own],))

    pairs = drawn(make, count, tokenizer, ("name",), what="sentences")
    return Pairs("pronouns", "text", pairs, {"count": count, "seed": seed, "sentences": list(sentences)})


def _side(text: str, name: str, tokenizer: object) -> tuple[str, dict]:
    made, spans = filled(text, {"name": name})
    made = asking(made, tokenizer)
    return made, {"name": spans["name"], "end": ending(made, tokenizer)}
