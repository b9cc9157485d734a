"""Which position of one input stands for each one of the other, where the two differ in their number of tokens."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.alignment import absolute, relative
from ..intervene import Intervention, Places, Resample
from ..intervene.inputs import real_of
from ..tokens import Batch, TextUnits
from .outcome import Question

Align = Tensor | Sequence[Sequence[int]]
"""For each position of the base the one of the counterfactual: (T,) or (B, T) of the batches, padding counted; or for
each pair a list counted without padding. -1 for none."""
Lists = list[list[int]]


@dataclass(frozen=True, eq=False)
class Counterpart:
    """The position in another run for each one of this run, `at`, (R, P), -1 for none; the other one has `width`."""

    at: Tensor
    width: int

    def back(self) -> Counterpart:
        """From the other run to this one.

        Raises: ValueError where two positions have the same counterpart, so that there is no way back.
        """
        found = torch.full((len(self.at), self.width), -1)
        row, place = (self.at >= 0).nonzero(as_tuple=True)
        found[row, self.at[row, place]] = place
        twice = (found[row, self.at[row, place]] != place).nonzero().flatten().tolist()
        if twice:
            where = int(row[twice[0]]), int(self.at[row, place][twice[0]])
            raise ValueError(f"align= puts two positions of base {where[0]} at position {where[1]} of its "
                             "counterfactual, so that it is open which of them direct and controlled effects mean; "
                             "give each its own, or -1, or ask for indirect effects alone")
        return Counterpart(found, self.at.shape[1])

    def shifted(self, here: int, there: int) -> Counterpart:
        """Of runs without their first positions, so many each; what stands for one that is not run is none."""
        at = self.at[:, here:] - there
        return Counterpart(torch.where((self.at[:, here:] < 0) | (at < 0), -1, at), self.width - there)


@dataclass(frozen=True, eq=False)
class Taken(Intervention):
    """The value of the other input's run at the counterpart of each position; a position without one keeps its own.

    A value whose positions are not those of the two inputs, such as a decoder's behind inputs of an encoder, is taken
    at the same position.
    """

    between: Counterpart

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        shared = (now.shape[2], there.shape[2]) == (self.between.at.shape[1], self.between.width)
        return Resample(None, self.between.at if shared else None).value(now, there)


@dataclass(frozen=True, eq=False, kw_only=True)
class Across(Places):
    """Positions of the counterfactual that stand for those of the base that an address means.

    Args: between: from the base to the counterfactual. base: which positions of the base count, bool (R, P).
    """

    between: Counterpart
    base: Tensor

    def at(self, position: int | str, real: Tensor) -> Tensor:
        if real.shape[1] != self.between.width:
            return super().at(position, real)
        row, place = (super().at(position, self.base) & (self.between.at >= 0)).nonzero(as_tuple=True)
        found = torch.zeros_like(real)
        found[row, self.between.at[row, place]] = True
        return found


def lists_of(align: Align, base: Batch, other: Batch) -> Lists | None:
    """An alignment as lists counted without padding, None if each position stands for itself.

    Raises: ValueError for inputs that are no texts, and for an alignment that does not go with their tokens.
    """
    if not isinstance(base.units, TextUnits) or not isinstance(other.units, TextUnits):
        raise ValueError("align= says which token stands for which, and these inputs are no texts; make them of one "
                         "size, and leave it out")
    if isinstance(align, Tensor):
        lists = relative(align, base, other)
    else:
        lists = [list(one) for one in align]
        absolute(lists, base, other)  # for its errors
    counts = (~torch.tensor(other.units.padding)).sum(1).tolist()
    if all(one == list(range(count)) for one, count in zip(lists, counts)):
        return None
    decoder = base.kwargs.get("decoder_input_ids")
    if decoder is not None and decoder.shape[1] == len(base.units.padding[0]) == len(other.units.padding[0]):
        raise ValueError("encoder and decoder have as many positions, so that align= would be of both; pad the "
                         "encoder's inputs by one more token")
    return lists


def counterpart(base: Question, other: Question, lists: Lists) -> Counterpart:
    """Of what is run for a question: the prompt's tokens as the lists say, what was added to it one after the other."""
    sides = [(_prompt(one), real_of(one.batch.kwargs, *_prompt(one).shape)) for one in (base, other)]
    found = torch.full(sides[0][0].shape, -1)
    for row, own in enumerate(lists):
        (here, all_here), (there, all_there) = (tuple(mask[row] for mask in side) for side in sides)
        at, to = torch.tensor(own), there.nonzero().flatten()
        found[row, here] = torch.where(at >= 0, to[at.clamp_min(0)], -1)
        added = (all_there & ~there).nonzero().flatten()
        found[row, all_here & ~here] = added[:int((all_here & ~here).sum())]
    return Counterpart(found, sides[1][0].shape[1])


def _prompt(question: Question) -> Tensor:
    """Which positions of a question's run are the prompt's, bool (R, P); of an encoder those that are no padding."""
    return ~torch.tensor(question.batch.units.padding) if question.prompt is None else question.prompt


def take(lists: Lists | None, rows: Tensor) -> Lists | None:
    """The lists of these rows."""
    return None if lists is None else [lists[row] for row in rows.tolist()]


__all__ = ["Across", "Align", "Counterpart", "Lists", "Taken", "counterpart", "lists_of", "take"]
