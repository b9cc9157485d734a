"""Pairs as a model takes them: both sides tokenised, which position stands for which, and where each named thing is."""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..subject import Subject
from ..tokens import Batch, TextUnits
from ..units import groups
from .alignment import TAKES, absolute, own_tokens, padded, placed, tokenised, word_of_tokens
from .pair import Pair, Pairs, known_ids, token

Align = str | Sequence[Sequence[int]] | None
Positions = list[list[int]]
"""For each row, positions among its own tokens, padding left out: as spans of addresses, "L3@profession"."""


@dataclass(frozen=True, eq=False)
class Matched:
    """Pairs ready for a model.

    `align` is, for each position of the base (padding among them), the one of the counterfactual that stands for it, -1
    for none, (B, T); None where they are the same. `continuations` are token ids, by candidate and row; of pictures
    labels. `spans` are positions by name on the base, `counterfactual_spans` on the other side. `groups` are the pairs'
    own, None where a pair is in none.
    """

    base: Batch
    counterfactual: Batch
    align: Tensor | None
    continuations: tuple[list[object], ...]
    spans: dict[str, Positions]
    counterfactual_spans: dict[str, Positions]
    groups: tuple[str | None, ...] = ()

    @property
    def rows(self) -> int:
        return self.base.rows


def matched(subject: Subject, pairs: Pairs, *, align: Align = None) -> Matched:
    """Pairs as the model takes them.

    Args: align: where both sides differ in their number of tokens: "slots", so that what is outside of the named spans
            stands for itself, and within a span the last token for the last one, the one before it for the one before;
            or for each pair, the position in the counterfactual for each one of the base, -1 for none, both counted
            without padding.
    Raises: ValueError for sides that differ in their number of tokens, with both tokenisations; for data that the model
        does not read; for pairs with unlike numbers of continuations; and for continuations outside of the vocabulary.
    Warns: UserWarning of sides with words outside of the vocabulary.
    """
    if TAKES[pairs.modality] != subject.modality:
        raise ValueError(f"pairs {pairs.name!r} are of {pairs.modality}, and {subject.name} reads {subject.modality}")
    ready = partial(padded, subject) if pairs.modality == "tokens" else subject.prepare
    base, other = ready(pairs.bases), ready(pairs.counterfactuals)
    grouped = tuple(one.group for one in pairs.pairs)
    counts = {len(one.continuations) for one in pairs.pairs}
    if len(counts) > 1:
        raise ValueError(f"pairs with {' and '.join(map(str, sorted(counts)))} continuations; give each as many")
    each = [[one.continuations[which] for one in pairs.pairs] for which in range(counts.pop())]
    spans, other_spans = ({name: [_positions(subject, batch, row, _spans(one, side)[name], pairs.modality)
                                  for row, one in enumerate(pairs.pairs)] for name in pairs.names}
                          for batch, side in ((base, 0), (other, 1)))
    if not isinstance(base.units, TextUnits):
        return Matched(base, other, None, tuple(each), spans, other_spans, grouped)
    _warn_of_unknown(subject, base, other)
    each = [[known_ids(text, subject.tokenizer) for text in one] for one in each]
    return Matched(base, other, _aligned(pairs, base, other, align), tuple(each), spans, other_spans, grouped)


def _warn_of_unknown(subject: Subject, base: Batch, other: Batch) -> None:
    """Tells of words that the model knows nothing of: an effect of changing one is that of any of them."""
    reader = subject.tokenizer
    unknown = getattr(reader, "unk_token", None)
    if unknown is None or unknown in (reader.bos_token, reader.eos_token):  # GPT-2's stands at the end of texts
        return
    rows = [row for row in range(base.rows) if any(unknown in own_tokens(side, row) for side in (base, other))]
    if rows:
        warnings.warn(f"{len(rows)} of {base.rows} pairs have words that are not in the vocabulary of {subject.name}: "
                      f"{tokenised(base, other, rows[0])}", stacklevel=3)


def single(subject: Subject, pairs: Pairs) -> list[list[int]]:
    """The continuations as one token each, by candidate and row.

    Raises: ValueError for one that is several, with how it is tokenised.
    """
    return [[token(one.continuations[which], subject.tokenizer) for one in pairs.pairs]
            for which in range(len(pairs.pairs[0].continuations))]


def by_slots(base: Sequence[str | None], other: Sequence[str | None]) -> list[int]:
    """Position in `other` for each one of `base`, -1 for none; both say which slot each token is of.

    >>> by_slots([None, "job", None], [None, "job", "job", None])
    [0, 2, 3]

    Raises: ValueError if tokens outside of slots, or the slots, are not the same.
    """
    runs = [_runs(side) for side in (base, other)]
    if [name for name, _ in runs[0]] != [name for name, _ in runs[1]]:
        raise ValueError("the slots do not come in the same order, or are not all there")
    found: list[int] = []
    for (name, mine), (_, theirs) in zip(*runs):
        if name is None and len(mine) != len(theirs):
            raise ValueError("the tokens outside of the slots are not as many")
        missing = max(0, len(mine) - len(theirs))
        found += [-1] * missing + theirs[len(theirs) - len(mine) + missing:]
    return found


def _runs(side: Sequence[str | None]) -> list[tuple[str | None, list[int]]]:
    """Slots and what is between them, in order, with the positions of each: between two slots there may be none."""
    found: list[tuple[str | None, list[int]]] = [(None, [])]
    for position, name in enumerate(side):
        if name != found[-1][0]:
            found += [(None, [])] if name is not None and found[-1][0] is not None else []
            found.append((name, []))
        found[-1][1].append(position)
    return found if found[-1][0] is None else [*found, (None, [])]


def _spans(pair: Pair, side: int) -> Mapping[str, object]:
    return (pair.spans, pair.counterfactual_spans)[side]


def _positions(subject: Subject, batch: Batch, row: int, span: object, modality: str) -> list[int]:
    """Positions of a span among a row's own tokens; of pixels the patches that they touch, behind the prefix tokens."""
    if modality == "tokens":
        return [at for start, end in span for at in range(start, end)]
    if isinstance(span, Tensor):
        mask = placed(subject.pixels, span, tuple(span.shape))
        touched = groups(batch)[row][mask]
        return [subject.prefix_tokens + patch for patch in touched[touched >= 0].unique().tolist()]
    units = batch.units
    own = [place for place, gone in enumerate(units.padding[row]) if not gone]
    offsets = [(0, 0) if units.special[row][place] else units.offsets[row][place] for place in own]
    return [at for at, word in enumerate(word_of_tokens(offsets, span)) if word >= 0]


def _aligned(pairs: Pairs, base: Batch, other: Batch, align: Align) -> Tensor | None:
    own = [(~torch.tensor(batch.units.padding)) for batch in (base, other)]
    if align is None:
        for row, (mine, theirs) in enumerate(zip(*(side.sum(1).tolist() for side in own))):
            if mine != theirs:
                raise ValueError(f"{tokenised(base, other, row)}; they are not as many, so what stands for what is "
                                 'open: give align="slots", or a list of positions for each pair')
        if own[0].shape == own[1].shape and torch.equal(*own):
            return None
        lists = [list(range(count)) for count in own[0].sum(1).tolist()]
    elif isinstance(align, str):
        if align != "slots":
            raise ValueError(f'align is "slots" or a list of positions for each pair, not {align!r}')
        lists = [_of_row(base, other, row, one) for row, one in enumerate(pairs.pairs)]
    else:
        lists = [list(one) for one in align]
    return absolute(lists, base, other)


def _of_row(base: Batch, other: Batch, row: int, pair: Pair) -> list[int]:
    try:
        return by_slots(*(_slots(batch, row, spans) for batch, spans in
                          ((base, pair.spans), (other, pair.counterfactual_spans))))
    except ValueError as cause:
        raise ValueError(f"{tokenised(base, other, row)}: {cause}; give a list of positions for each pair") from cause


def _slots(batch: Batch, row: int, spans: Mapping[str, object]) -> list[str | None]:
    """Which slot each own token of a row is of; of a slot that comes several times, which time. A space that is a token
    belongs to the slot behind it.
    """
    units, text = batch.units, batch.units.texts[row]
    own = [place for place, gone in enumerate(units.padding[row]) if not gone]
    offsets = [(0, 0) if units.special[row][place] else units.offsets[row][place] for place in own]
    found: list[str | None] = [None] * len(own)
    for name, ranges in spans.items():
        for at, word in enumerate(word_of_tokens(offsets, ranges)):
            found[at] = f"{name} {word}" if word >= 0 else found[at]
    for at in range(len(own) - 2, -1, -1):
        if text[slice(*offsets[at])].isspace():
            found[at] = found[at + 1]
    return found
