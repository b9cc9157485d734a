"""What effects are asked of: two inputs, or pairs that bring their outcome, spans, groups and alignment with them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..address import Spans
from ..data import Matched, Pairs, matched
from ..data.pair import token
from ..subject import Subject
from ..target import Token
from .continuation import LogOdds
from .counterpart import Align

SHOWN = 4
"""Choices of two candidates that reports tell, at most."""


@dataclass(frozen=True, eq=False)
class Given:
    """Inputs, an outcome, and what is known of the inputs, as of `effects`; of pairs the name of the `data`, and the
    `words` of their continuations.
    """

    base: object
    counterfactual: object
    outcome: object = None
    spans: Spans | None = None
    align: Align | str | None = None
    groups: Sequence[object] | None = None
    data: str | None = None
    words: Sequence[tuple[str, ...]] = ()

    def opened(self, subject: Subject) -> Given:
        """With pairs in the place of the base taken apart. Nothing that was given beside them is overridden.

        Raises: ValueError for pairs with a counterfactual beside them, one alone, or an alignment by slots of inputs
            that are no pairs.
        """
        if not isinstance(self.base, (Pairs, Matched)):
            if self.counterfactual is None:
                raise ValueError("effects are of a base and a counterfactual; give both, or relprop.data.Pairs in the "
                                 "place of the base")
            if isinstance(self.align, str):
                raise ValueError(f"align={self.align!r} is of pairs, whose slots are known; give relprop.data.Pairs, "
                                 "or the position in the counterfactual for each one of the base, -1 for none")
            return self
        if self.counterfactual is not None:
            raise ValueError("pairs have their counterfactuals themselves; leave counterfactual= out")
        found = self._matched(subject)
        outcome = standard(subject, found.continuations) if self.outcome is None else self.outcome
        groups = found.groups or None if self.groups is None else self.groups
        spans = {**found.spans, **(self.spans or {})}
        made = Given(found.base, found.counterfactual, outcome, spans, found.align, groups)
        if not isinstance(self.base, Pairs):
            return made
        return replace(made, data=self.base.name, words=[one.continuations for one in self.base.pairs])

    def _matched(self, subject: Subject) -> Matched:
        if isinstance(self.base, Pairs):
            return labelled(subject, self.base, matched(subject, self.base, align=self.align))
        return self.base if self.align is None else replace(self.base, align=self.align)


def told(name: str, words: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """What reports say of pairs: their name, and what the two candidates a and b are where they differ.

    >>> told("texts", [(" he", " she"), (" she", " he")])
    {'data': 'texts', 'a, b': "' he', ' she'; or ' she', ' he'"}
    """
    found = list(dict.fromkeys(one for one in words if len(one) == 2))
    said = "; or ".join(f"{a!r}, {b!r}" for a, b in found)
    return {"data": name, **({"a, b": said} if 1 < len(found) <= SHOWN else {})}


def named(outcome: str, words: Sequence[tuple[str, ...]]) -> str:
    """An outcome's name, its candidates by their words where all pairs have the same.

    >>> named("log P(a) - log P(b)", [(" he", " she"), (" he", " she")])
    "log P(' he') - log P(' she')"
    """
    first = words[0] if len(set(words)) == 1 else ()
    for letter, word in zip("ab", first):
        outcome = outcome.replace(f"P({letter})", f"P({word!r})")
    return outcome


def labelled(subject: Subject, pairs: Pairs, found: Matched) -> Matched:
    """Matched pairs whose continuations are labels, as they stand, where the model tells classes apart."""
    if subject.targets(None, 1).vocabulary.of_tokens:
        return found
    return replace(found, continuations=tuple(map(list, zip(*(one.continuations for one in pairs.pairs)))))


def standard(subject: Subject, continuations: Sequence[Sequence[object]]) -> object:
    """What effects are on where nothing else is said: the log-odds of two continuations, the logit of one, which must
    be a single token, and without any the prediction, None.

    Raises: ValueError for one of several tokens, with what they are, and for more than two.
    """
    if len(continuations) > 2:
        raise ValueError(f"pairs with {len(continuations)} continuations; say which number of them effects are on, "
                         "outcome=Ratio(a, b)")
    if len(continuations) == 2:
        return LogOdds(*continuations)
    if not continuations:
        return None
    if not subject.targets(None, 1).vocabulary.of_tokens:
        return list(continuations[0])
    return [Token(token(ids, subject.tokenizer)) for ids in continuations[0]]


__all__ = ["SHOWN", "Given", "labelled", "named", "standard", "told"]
