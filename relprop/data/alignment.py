"""What stands for what: words and tokens, masks and the model's own pixels, positions of a base and of its
counterfactual.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..pixels import Pixels, picture
from ..subject import Subject
from ..tokens import Batch, TextUnits
from .example import Data, Example
from .pair import Ranges

if TYPE_CHECKING:
    from numpy import ndarray

TAKES = {"image": "image", "text": "text", "tokens": "text"}  # modality of data: of the model that reads it


@dataclass(frozen=True, eq=False)
class Truth:
    """What should matter in one row, in the units of its map.

    `groups` is the word of each entry of the map, -1 for none; None where entries themselves are marked. `marked`,
    `labels` and `others` are as of `Example`, one for each word or entry.
    """

    groups: Tensor | None = None
    marked: Tensor | None = None
    labels: Tensor | None = None
    others: Mapping[object, Tensor] = field(default_factory=dict)

    def units(self, relevance: Tensor) -> Tensor:
        """Relevance of what can be marked: words (sums over their tokens), or the entries of a map (T,) or (Y, X)."""
        if self.groups is None:
            return relevance
        inside, count = self.groups >= 0, int(self.groups.max()) + 1
        return torch.zeros(count, dtype=relevance.dtype).index_add_(0, self.groups[inside], relevance[inside])


def prepared(subject: Subject, data: Data) -> Batch:
    """The inputs of the data as the model takes them; token ids of unequal length are padded on the right.

    Raises: ValueError for data that the model does not read.
    """
    if TAKES[data.modality] != subject.modality:
        raise ValueError(f"data {data.name!r} is of {data.modality}, and {subject.name} reads {subject.modality}")
    inputs = [one.input for one in data.examples]
    return padded(subject, inputs) if data.modality == "tokens" else subject.prepare(inputs)


def padded(subject: Subject, rows: Sequence[Sequence[int]]) -> Batch:
    """Token ids of unequal length as the model takes them, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[subject.pad_token_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return subject.prepare({"input_ids": ids, "attention_mask": mask})


def aligned(subject: Subject, batch: Batch, examples: Sequence[Example]) -> list[Truth]:
    """The truth of each row of a batch that `prepared` made of these examples.

    Raises: ValueError for words that do not align with the tokens, and for a mask of another size than its picture.
    """
    if isinstance(batch.units, TextUnits):
        return [_words(batch.units, row, one) if one.words is not None else _tokens(batch.units, row, one)
                for row, one in enumerate(examples)]
    return [_pixels(subject.pixels, one) for one in examples]


def word_of_tokens(offsets: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]) -> list[int]:
    """For each token the word that it shares most characters with, -1 for none.

    >>> word_of_tokens([(0, 0), (0, 3), (3, 6), (6, 11)], [(0, 6), (7, 11)])
    [-1, 0, 0, 1]
    """
    found = []
    for start, end in offsets:
        shared = [min(end, stop) - max(start, begin) for begin, stop in words]
        best = max(range(len(words)), key=shared.__getitem__) if words else -1
        found.append(best if words and shared[best] > 0 else -1)
    return found


def _words(units: TextUnits, row: int, example: Example) -> Truth:
    """Truth of a text whose words are known. Words behind the end of a text that was cut are left out."""
    if units.texts[row] != example.input:
        raise ValueError(f"where the tokens of row {row} stand in its text is not known, so that its words do not "
                         "align; use a fast tokenizer")
    offsets = [(0, 0) if special else place for special, place in zip(units.special[row], units.offsets[row])]
    found = word_of_tokens(offsets, example.words)
    covered, last = set(found), max(end for _, end in offsets)
    lost = next((word for word, (start, _) in enumerate(example.words) if word not in covered and start < last), None)
    if lost is not None:
        start, end = example.words[lost]
        raise ValueError(f"word {lost} of row {row}, {example.input[start:end]!r}, has no token of its own, so that "
                         "words and tokens do not align; join it to its neighbour")
    kept = max(covered) + 1
    cut = lambda value: None if value is None else value[:kept]
    return Truth(torch.tensor(found), cut(example.marked), cut(example.labels))


def _tokens(units: TextUnits, row: int, example: Example) -> Truth:
    """Truth of token ids: the tokens that are no padding are what is marked."""
    if example.marked is None:
        return Truth()
    own = [not padding for padding in units.padding[row]]
    groups = torch.tensor([sum(own[:at]) if inside else -1 for at, inside in enumerate(own)])
    if int(groups.max()) + 1 != len(example.marked):
        raise ValueError(f"{len(example.marked)} marks for the {int(groups.max()) + 1} tokens of row {row}; "
                         "they do not align")
    return Truth(groups, example.marked)


def _pixels(pixels: Pixels, example: Example) -> Truth:
    if example.marked is None:
        return Truth()
    shape = (example.input.shape[:2] if hasattr(example.input, "shape") else picture(example.input).size[::-1])
    place = lambda mask: placed(pixels, mask, tuple(shape))
    return Truth(None, place(example.marked), None, {name: place(mask) for name, mask in example.others.items()})


def placed(pixels: Pixels, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """A mask as the model's preparation of pictures moves it (it may resize and crop a picture of the right size, too):
    drawn white on black, prepared, and cut halfway."""
    import numpy as np

    if tuple(mask.shape) != shape:
        raise ValueError(f"a mask of {tuple(mask.shape)} for a picture of {shape}; a mask has the size of its picture")
    drawn = (np.where(mask.numpy(), 255, 0)).astype(np.uint8)
    white, black, moved = pixels.read([_levels(one, pixels) for one in (np.full_like(drawn, 255), 0 * drawn, drawn)])
    return ((moved - black) / (white - black)).mean(0) > 0.5


def _levels(plane: ndarray, pixels: Pixels) -> ndarray:
    import numpy as np

    return plane if pixels.channels == 1 else np.repeat(plane[..., None], 3, -1)


# -- base and counterfactual -----------------------------------------------------------------------------------------


def tokenised(base: Batch, other: Batch, row: int) -> str:
    """Both tokenisations of a row, for people."""
    sides = [f"{len(tokens)} tokens, {' | '.join(tokens)}" for tokens in
             (own_tokens(one, row) for one in (base, other))]
    return f"row {row}: the base has {sides[0]}; the counterfactual has {sides[1]}"


def own_tokens(batch: Batch, row: int) -> list[str]:
    """Tokens of a row of texts without its padding, as they are spelled."""
    return [spelled for spelled, gone in zip(batch.units.tokens[row], batch.units.padding[row]) if not gone]


def differing(base: str, other: str) -> tuple[Ranges, Ranges] | None:
    """What differs between two texts, word by word: parts of each in characters, as many, which stand for each other.
    None where there is nothing, or words are only added, so that something stands for nothing.

    >>> differing("The nurse said", "The young cook said")
    (((4, 9),), ((4, 14),))
    """
    words = [list(re.finditer(r"\w+|[^\w\s]", text)) for text in (base, other)]
    matcher = difflib.SequenceMatcher(None, *([match[0] for match in side] for side in words), autojunk=False)
    changed = [(words[0][a:b], words[1][c:d]) for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal"]
    if not changed or any(not side for both in changed for side in both):
        return None
    mine, theirs = (tuple((both[side][0].start(), both[side][-1].end()) for both in changed) for side in (0, 1))
    return mine, theirs


def absolute(lists: Sequence[Sequence[int]], base: Batch, other: Batch) -> Tensor:
    """For each position of the base's batch the one of the counterfactual's that stands for it, -1 for none, (B, T).

    Args: lists: the same for each row, counted without padding.
    Raises: ValueError for an alignment that does not go with the tokens, with both tokenisations.
    """
    mine, theirs = (~torch.tensor(batch.units.padding) for batch in (base, other))
    if len(lists) != len(mine):
        raise ValueError(f"alignments of {len(lists)} pairs, and there are {len(mine)}")
    found = torch.full(mine.shape, -1)
    for row, positions in enumerate(lists):
        here, there = mine[row].nonzero().flatten(), theirs[row].nonzero().flatten()
        wrong = [at for at in positions if not -1 <= at < len(there)]
        if len(positions) != len(here) or wrong:
            raise ValueError(f"{tokenised(base, other, row)}; the alignment has {len(positions)} positions"
                             + (f", {wrong[0]} among them" if wrong else "") + ", one of the counterfactual, or -1, is "
                             "needed for each token of the base")
        at = torch.tensor(positions)
        found[row, here] = torch.where(at >= 0, there[at.clamp_min(0)], -1)
    return found


def relative(align: Tensor, base: Batch, other: Batch) -> list[list[int]]:
    """The way back of `absolute`: for each row positions counted without padding.

    Raises: ValueError for an alignment of another shape, or to positions that are not there, or are padding.
    """
    mine, theirs = (~torch.tensor(batch.units.padding) for batch in (base, other))
    if align.dim() > 2 or align.shape[-1] != mine.shape[1] or align.dim() == 2 and len(align) != len(mine):
        raise ValueError(f"align= of shape {tuple(align.shape)} for a base of {tuple(mine.shape)} (rows, positions); "
                         "give the position in the counterfactual for each one of the base, -1 for none")
    at = align.cpu().expand(len(mine), -1)
    there = theirs.long().cumsum(1) - 1
    there[~theirs] = -2
    there = torch.cat([there, torch.full((len(mine), 1), -1)], 1)  # of -1, the last entry
    width = theirs.shape[1]
    bad = (at < -1) | (at >= width)
    found = there.gather(1, torch.where(bad | (at < 0), width, at))
    bad = mine & (bad | (found == -2))
    if bad.any():
        row, place = bad.nonzero()[0].tolist()
        raise ValueError(f"{tokenised(base, other, row)}; align= has {int(at[row, place])} for position {place}, where "
                         "the counterfactual has no token; give one of its positions, or -1 for none")
    return [row[kept].tolist() for row, kept in zip(found, mine)]
