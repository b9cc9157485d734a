"""How alike two texts are, or an image and a text.

References: N. Reimers and I. Gurevych, "Sentence-BERT", EMNLP 2019 (pooling and cosine); A. Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", ICML 2021 (CLIP).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Batch, TextUnits
from .output import ALIKE, field, instead, named, wide
from .scalar import Target

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary

EMBEDDED = ("sentence_embedding", "text_embeds", "image_embeds")  # what models that pool by themselves call it
POOLS = ("mean", "cls", "last", "pooler")
COSINE, DOT = "cosine", "dot"


@dataclass(frozen=True, eq=False)
class Similarity(Target):
    """How alike two texts are: the cosine, or the "dot" product, of their embeddings. Of a model of images and texts,
    such as CLIP, how alike the image and the text of a row are, by the model's own logit.

    The two texts are given as a pair, (a, b), and each goes through the model by itself; the map covers both. With `to`
    each input is compared with that one, which is held constant.

    Half of a product's relevance goes to each factor: the map of each text is that of half the similarity, with the
    embedding of the other held constant, and both together make up the whole.

    Args: pool: of models that give a state a token, what the embedding is: the "mean" over a row's own tokens (the
        default), the state of the first ("cls") or "last" token, or the model's own "pooler".
    """

    to: object = None
    pool: str | None = None
    by: str = COSINE
    ruled = True

    def resolved(self, vocabulary: Vocabulary) -> Similarity:
        if self.pool not in (None, *POOLS) or self.by not in (COSINE, DOT):
            wrong, known = (self.by, (COSINE, DOT)) if self.pool in (None, *POOLS) else (self.pool, POOLS)
            raise ValueError(f"a similarity has no {wrong!r}; there are {', '.join(known)}")
        return self

    def value(self, reading: Reading) -> Tensor:
        z, batch = field(reading.output, ALIKE), reading.batch
        rows = reading.indices
        if z is not None:
            if self.to is not None or z.shape != (batch.rows, batch.rows):
                raise ValueError(f"the output has {z.shape[0]} images and {z.shape[1]} texts for {batch.rows} rows; "
                                 "give one image and one text a row, and Similarity() without to=")
            return wide(z[rows.to(z.device), rows.to(z.device)])
        if batch.layout is None:
            raise ValueError("a similarity is of two texts: give pairs (a, b), or Similarity(to=...) for texts that "
                             "are all compared with one" + ("" if field(reading.output, "last_hidden_state") is not None
                                                        else f"; or {instead(reading.output)}"))
        first, second = self._pairs(reading)
        return alike(first, second, self.by)

    def references(self, reading: Reading) -> list[tuple[Target, Target]]:
        """For each row, what is asked of each of its two texts alone: half the similarity to the other, held."""
        first, second = (one.detach() for one in self._pairs(reading))
        half = [Likeness(one, self.pool, self.by, 0.5) for one in (*second, *first)]
        return list(zip(half[:len(first)], half[len(first):]))

    def name(self, vocabulary: Vocabulary) -> str:
        if self.to is None:
            return "similarity"
        return f"similarity to {self.to!r}" if isinstance(self.to, str) else "similarity to what was given"

    def _pairs(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """Embeddings of the first and second texts, (R, D) each."""
        e = embedded(reading.output, reading.batch.flat, self.pool)
        rows = reading.indices.to(e.device)
        return e[2 * rows], e[2 * rows + 1]


@dataclass(frozen=True, eq=False)
class Likeness(Target):
    """`factor` times how alike an embedding is to another one, (D,), that is constant."""

    other: Tensor
    pool: str | None = None
    by: str = COSINE
    factor: float = 1.0
    called: str = "similarity"
    ruled = True

    def value(self, reading: Reading) -> Tensor:
        e = embedded(reading.output, reading.batch, self.pool)
        e = e if reading.rows is None else e[reading.rows.to(e.device)]
        return self.factor * alike(e, self.other.to(e).expand_as(e), self.by)

    def name(self, vocabulary: Vocabulary) -> str:
        return self.called


def alike(a: Tensor, b: Tensor, by: str) -> Tensor:
    """Cosine or dot product of two embeddings, (R,)."""
    return F.cosine_similarity(a, b, dim=-1) if by == COSINE else (a * b).sum(-1)


def embedded(output: object, batch: Batch, pool: str | None) -> Tensor:
    """The embedding of each row, (B, D), in at least float32.

    Raises: TypeError for an output that has none.
    """
    own = next((found for name in EMBEDDED if (found := field(output, name)) is not None), None)
    if pool is None and own is not None:
        return wide(own)
    if pool == "pooler":
        return named(output, "pooler_output", "pooler output")
    states = output if isinstance(output, Tensor) else field(output, "last_hidden_state")
    if states is None or states.dim() not in (2, 3):
        named(output, "last_hidden_state", "states of tokens")
        raise TypeError(f"states of shape {tuple(states.shape)} are not (rows, positions, features)")
    return wide(states) if states.dim() == 2 else _pooled(wide(states), batch, pool or "mean")


def _pooled(states: Tensor, batch: Batch, pool: str) -> Tensor:
    real = batch.real(states.shape[1]).to(states.device)
    if pool == "mean":
        share = (real / real.sum(1, keepdim=True)).to(states.dtype)
        return (states * share[..., None]).sum(1)
    rows = torch.arange(len(states), device=states.device)
    length = torch.arange(states.shape[1], device=states.device)
    first, last = real.int().argmax(1), (real * length).amax(1)
    return states[rows, first if pool == "cls" else last]


def paired(batch: Batch) -> list[str]:
    """The texts of a batch of pairs, both of a row next to each other.

    Raises: ValueError for what is no pair of texts.
    """
    units = batch.units
    if not isinstance(units, TextUnits) or units.seconds is None:
        raise ValueError("a similarity is of two texts: give pairs (a, b), or Similarity(to=...) for inputs that are "
                         "all compared with one")
    return [part for text, begin in zip(units.texts, units.seconds) for part in (text[:begin - 1], text[begin:])]


def joined(units: TextUnits) -> TextUnits:
    """Units of texts by themselves as those of pairs: each row has the tokens and words of two neighbours."""
    both: dict[str, list] = {name: [] for name in ("tokens", "words", "special", "padding", "texts")}
    for a in range(0, units.rows, 2):
        for name, column in both.items():
            sides: Sequence = getattr(units, name)[a:a + 2]
            column.append(" ".join(sides) if name == "texts" else [*sides[0], *sides[1]])
    begins = [len(text) + 1 for text in units.texts[::2]]
    word_ids, offsets = [], []
    for row, begin in enumerate(begins):
        a, b, more = units.word_ids[2 * row], units.word_ids[2 * row + 1], len(units.words[2 * row])
        word_ids.append([*a, *(None if index is None else index + more for index in b)])
        moved = [(s + begin, e + begin) if e else (s, e) for s, e in units.offsets[2 * row + 1]]
        offsets.append([*units.offsets[2 * row], *moved])
    return replace(units, **both, word_ids=word_ids, offsets=offsets, seconds=begins)
