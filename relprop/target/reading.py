"""An output as a target reads it: of which rows, and where."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import Batch
from .output import logits, named

if TYPE_CHECKING:
    from .vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Reading:
    """An output, as a target reads it: `rows` are the rows asked for, None for all."""

    output: object
    batch: Batch
    vocabulary: Vocabulary
    rows: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """The rows asked for, (R,)."""
        return torch.arange(self.batch.rows) if self.rows is None else self.rows

    def classes(self) -> Tensor:
        """Logits of the classes, (R, C).

        Raises: ValueError if the output has a position axis.
        """
        z = logits(self.output)
        self._check_rows(z)
        if z.dim() != 2:
            raise ValueError(f"logits of shape {tuple(z.shape)} are not (rows, classes); say which position with "
                             "Token(index, position=...), or give a function of the output")
        return z if self.rows is None else z[self.rows.to(z.device)]

    def tokens(self, position: int | None) -> Tensor:
        """Logits of the tokens at a position, (R, V)."""
        z = logits(self.output)
        self._check_rows(z)
        if z.dim() != 3:
            raise ValueError(f"logits of shape {tuple(z.shape)} are not (rows, positions, tokens); "
                             "give the index or the label of a class")
        at = self._absolute(position, z.shape[1])
        return z[self.indices.to(z.device), at.to(z.device)]

    def tagged(self) -> Tensor:
        """Logits of the tags of each token of all rows, (B, T, C)."""
        z = logits(self.output)
        self._check_rows(z)
        if z.dim() != 3:
            raise ValueError(f"logits of shape {tuple(z.shape)} are not (rows, positions, tags); give the index or the "
                             "label of a class")
        return z

    def ends(self, name: str) -> Tensor:
        """Logits of the starts or ends of an answer, `output.start_logits` or `output.end_logits`, (R, T)."""
        z = named(self.output, name, name.replace("_", " "))
        self._check_rows(z)
        return z if self.rows is None else z[self.rows.to(z.device)]

    def sequence(self, number: int) -> Reading:
        """The same output read for one of the sequences of each row; see `tokens.Layout`."""
        flat = self.batch.flat
        return Reading(self.output, flat, self.vocabulary, self.indices * (flat.rows // self.batch.rows) + number)

    def position(self, position: int | None) -> list[int]:
        """A position counted from each row's first token, None being where the model answers; (R,)."""
        length = logits(self.output).shape[1]
        first = self.batch.real(length).int().argmax(1)[self.indices]
        return (self._absolute(position, length) - first).tolist()

    def _check_rows(self, z: Tensor) -> None:
        if len(z) != self.batch.rows:
            many = f"the output has {len(z)} rows, the input {self.batch.rows}"
            raise ValueError(f"{many}; give a function of the output")

    def _absolute(self, position: int | None, length: int) -> Tensor:
        """Index (R,) into the output's positions, of one that is counted from a row's first or last token."""
        real = self.batch.real(length)[self.indices]
        first = real.int().argmax(1)
        counts = real.sum(1)
        if position is None and self.batch.read is not None:
            return self._answered()
        position = -1 if position is None else position
        for row, count in zip(self.indices.tolist(), counts.tolist()):
            if not -count <= position < count:
                rest = "the rest is padding; " if count < length else ""
                raise ValueError(f"no position {position} in row {row}, which has {count} tokens; {rest}"
                                 f"give 0 to {count - 1}, or -1 to {-count} from the end")
        return first + position if position >= 0 else first + counts + position

    def _answered(self) -> Tensor:
        read = self.batch.read.cpu()[self.indices]
        for row, at in zip(self.indices.tolist(), read.tolist()):
            if at < 0:
                raise ValueError(f"row {row} has no mask token, or several, so which one to read is open; "
                                 "give one mask token, or Token(..., position=...)")
        return read
