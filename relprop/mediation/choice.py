"""Outcomes of several tokens that are right and several that are wrong, at the position where the model answers.

References: Hanna, Liu and Variengien 2023 (How does GPT-2 compute greater-than?) for the difference of probabilities;
Heimersheim and Janiak 2023 (A circuit for Python docstrings in a 4-layer attention-only transformer) for the smallest
logit difference.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..subject import Subject
from ..target import Token
from ..tokens import Batch
from .outcome import Outcome, Question, answered_at, prompt_of

Tokens = Sequence[int] | Sequence[Sequence[int]]
"""Ids that hold for every row, or for each row its own; rows may have unlike numbers of them."""


@dataclass(frozen=True, eq=False)
class Choice(Outcome):
    """A number made of the logits of tokens that are `right` and tokens that are `wrong`, each at least one."""

    right: Tokens
    wrong: Tokens

    def pairs(self, subject: Subject, base: Batch, counterfactual: Batch) -> list[tuple[Question, Question]]:
        sides = [_padded(one, base.rows, name) for one, name in ((self.right, "right"), (self.wrong, "wrong"))]
        return [tuple(self._question(batch, sides) for batch in (base, counterfactual))]

    def combined(self, right: Tensor, wrong: Tensor) -> Tensor:
        """The number of each row, (R,), from what is read of its tokens, (R, N) each; NaN stands for none."""
        raise NotImplementedError

    def read(self, z: Tensor) -> Tensor:
        """What is read of the tokens, from logits (R, V)."""
        return z

    def _question(self, batch: Batch, sides: list[Tensor]) -> Question:
        at = torch.tensor([[answered_at(batch, row, Token(0))] for row in range(batch.rows)])

        def answer(z: Tensor, rows: Tensor) -> Tensor:
            found = self.read(z[:, 0])
            picked = [_picked(found, side[rows].to(z.device)) for side in sides]
            return self.combined(*picked)

        return Question(batch, at, answer, prompt_of(batch))


class Mass(Choice):
    """The difference of probability, sum over right tokens of p minus sum over wrong ones (Hanna et al. 2023)."""

    def read(self, z: Tensor) -> Tensor:
        return z.softmax(-1)

    def combined(self, right: Tensor, wrong: Tensor) -> Tensor:
        return right.nansum(-1) - wrong.nansum(-1)

    def name(self, subject: Subject) -> str:
        return "P(right) - P(wrong)"


class Margin(Choice):
    """The smallest logit difference of a right token and a wrong one (Heimersheim and Janiak 2023)."""

    def combined(self, right: Tensor, wrong: Tensor) -> Tensor:
        return right.nan_to_num(torch.inf).amin(-1) - wrong.nan_to_num(-torch.inf).amax(-1)

    def name(self, subject: Subject) -> str:
        return "smallest logit(right) - logit(wrong)"


def _padded(tokens: Tokens, rows: int, name: str) -> Tensor:
    """Ids (B, N), -1 where a row has fewer than another.

    Raises: ValueError for no token, or another number of rows.
    """
    each = [list(one) for one in tokens] if len(tokens) and not isinstance(tokens[0], int) else [list(tokens)] * rows
    if len(each) != rows:
        raise ValueError(f"{name} tokens of {len(each)} rows, and there are {rows}; give a list for each, or one")
    empty = next((row for row, one in enumerate(each) if not one), None)
    if empty is not None:
        raise ValueError(f"row {empty} has no {name} token; give at least one")
    width = max(map(len, each))
    return torch.tensor([one + [-1] * (width - len(one)) for one in each])


def _picked(found: Tensor, ids: Tensor) -> Tensor:
    """Entries (R, N) of (R, V), NaN for ids of -1."""
    return found.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, torch.nan)


__all__ = ["Choice", "Margin", "Mass"]
