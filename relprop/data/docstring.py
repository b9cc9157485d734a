"""Docstrings of functions: the next parameter that is described is the next one of the definition.

Reference: Heimersheim and Janiak 2023 (A circuit for Python docstrings in a 4-layer attention-only transformer). Words
are our own.
"""
from __future__ import annotations

import random

from .pair import Pair, Pairs, asking, drawn, ending, singles
from .template import filled

WORDS = tuple("""
    old first files page names size read image update project target new run model fields match order value key node
    path text color width height label count index state level user group item list table event test line word line
    price score point angle speed limit region sample batch layer token parent child source data name file type
    """.split())
SENTENCE = '''def {function}(self, {x}, {y}, {A}, {B}, {C}, {z}):
    """{first} {second} {third}

    :param {A_doc}: {fourth} {fifth}
    :param {B_doc}: {sixth} {seventh}
    :param'''
_SAID = ("function", "x", "y", "A", "B", "C", "z", "first", "second", "third", "fourth", "fifth", "sixth", "seventh")


def docstring(tokenizer: object, count: int = 100, *, seed: int = 0) -> Pairs:
    """Definitions of functions with a docstring of which the third parameter comes next, beside ones in which other
    names stand in the definition and in the docstring.

    The answer is the third parameter; wrong are the other names of the definition, and those that the corrupted text
    has in their place. Spans are "A_def", "B_def", "C_def", "A_doc", "B_doc" and "end".

    Raises: ValueError for a tokenizer that reads fewer than 20 of our words as one token each.
    """
    words = singles(tuple(dict.fromkeys(WORDS)), tokenizer, least=20, what="words")
    rng = random.Random(f"docstring {seed}")

    def make(row: int) -> Pair:
        chosen = rng.sample(words, len(_SAID) + 5)
        values, others = dict(zip(_SAID, chosen)), chosen[len(_SAID):]
        clean = {**values, "A_doc": values["A"], "B_doc": values["B"]}
        changed = {**values, **dict(zip(("A", "B", "C", "A_doc", "B_doc"), others))}
        sides = [_side(one, tokenizer) for one in (clean, changed)]
        wrong = [values[name] for name in ("x", "y", "A", "B", "z")] + others
        return Pair(*(side[0] for side in sides), (), *(side[1] for side in sides), answers=(f" {values['C']}",),
                    wrong=tuple(f" {one}" for one in wrong))

    pairs = drawn(make, count, tokenizer, ("A_def", "B_def", "C_def", "A_doc", "B_doc"), what="definitions")
    return Pairs("docstring", "text", pairs, {"count": count, "seed": seed})


def _side(values: dict[str, str], tokenizer: object) -> tuple[str, dict]:
    text, spans = filled(SENTENCE, values)
    text = asking(text, tokenizer)
    named = {f"{name}_def": spans[name] for name in "ABC"}
    return text, {**named, "A_doc": spans["A_doc"], "B_doc": spans["B_doc"], "end": ending(text, tokenizer)}
