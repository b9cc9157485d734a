"""One input with what should matter in it, and a set of them."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MODALITIES = ("image", "text", "tokens")


@dataclass(frozen=True, eq=False)
class Example:
    """An input, what is asked about it, and which parts of it should matter for that.

    Args: input: a picture (path, or uint8 array (Y, X) or (Y, X, 3)), a text, or a list of token ids.
        target: what is explained, as `relprop.explain` takes it; None: the prediction.
        words: of a text, where its words are: (start, end) in characters.
        marked: what should matter, bool: pixels (Y, X) of the picture as it is, words (U,), or tokens (T,).
        labels: how much each word speaks for the target, signed, (U,).
        others: pixels of what other targets name, by target, for the contrast of classes.
        group: rows of the same group are not independent (passages of one text); None: a group of its own.
    """

    input: object
    target: object = None
    words: tuple[tuple[int, int], ...] | None = None
    marked: Tensor | None = None
    labels: Tensor | None = None
    others: Mapping[object, Tensor] = field(default_factory=dict)
    group: str | None = None

    def __post_init__(self) -> None:
        units = None if self.words is None else len(self.words)
        for name in ("marked", "labels"):
            value = getattr(self, name)
            if value is not None and units is not None and tuple(value.shape) != (units,):
                raise ValueError(f"{name} of shape {tuple(value.shape)} for {units} words; they do not align: "
                                 "give one for each word")
        if isinstance(self.input, list) and self.marked is not None and self.marked.shape != (len(self.input),):
            raise ValueError(f"marked of shape {tuple(self.marked.shape)} for {len(self.input)} tokens; give one for "
                             "each token")


class Lazy(Sequence):
    """Examples that are read when they are looked at, for more pictures than memory holds.

    >>> read = Lazy(lambda line: Example(input=line), ["a", "b"])
    >>> len(read), read[1].input
    (2, 'b')
    """

    def __init__(self, make: Callable[[object], Example], lines: Sequence[object]) -> None:
        self._make, self._lines = make, lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> Example:
        return self._make(self._lines[row])


@dataclass(frozen=True, eq=False)
class Data:
    """Examples of one kind under a name; `about` says how they were made, and becomes part of every report."""

    name: str
    modality: str  # of MODALITIES
    examples: Sequence[Example]
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"data of modality {self.modality!r}; there are {', '.join(MODALITIES)}")
        if not len(self.examples):
            raise ValueError(f"data {self.name!r} has no example")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def share(self) -> float | None:
        """Mean share of the words, or tokens, that are marked; None where there are no marks or pictures."""
        if self.modality == "image":
            return None
        shares = [float(one.marked.double().mean()) for one in self.examples if one.marked is not None]
        return sum(shares) / len(shares) if shares else None

    def has(self, what: str) -> bool:
        """Whether any example has `marked`, `labels` or `others`."""
        found = (getattr(one, what) for one in self.examples)
        return any(value is not None and len(value) for value in found)

    def take(self, rows: Sequence[int]) -> Data:
        """The data of these rows."""
        return Data(self.name, self.modality, [self.examples[row] for row in rows], self.about)

    def fingerprint(self) -> str:
        """A hash of the name and all examples, to tell two sets of data apart."""
        digest = hashlib.sha256(f"{self.name} {self.modality} {len(self)}".encode())
        for one in self.examples:
            said = (one.target, one.words, one.group, list(one.others))
            digest.update(repr(said).encode())
            for value in (one.input, one.marked, one.labels, *one.others.values()):
                digest.update(_bytes(value))
        return digest.hexdigest()[:16]


def joined(words: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Words as a text with a space between, and where each is in it.

    >>> joined(["a", "fine", "film"])
    ('a fine film', ((0, 1), (2, 6), (7, 11)))
    """
    spans, at = [], 0
    for word in words:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(words), tuple(spans)


def within(spans: Sequence[Sequence[int]], count: int) -> Tensor:
    """Which of `count` units lie in any of the spans (start, end), bool (count,).

    Raises: ValueError for a span that is empty or goes beyond the units.
    """
    marked = torch.zeros(count, dtype=torch.bool)
    for start, end in spans:
        if not 0 <= start < end <= count:
            raise ValueError(f"span [{start}, {end}) of {count} words: a start before its end, both within the words")
        marked[start:end] = True
    return marked


def limited(make: Callable[[object], Example], lines: Sequence[object], count: int | None, seed: int) -> list[Example]:
    """Examples of `count` lines drawn by the seed, in their order; of all of them if there are not more."""
    return [make(line) for line in chosen(lines, count, seed)]


def chosen(lines: Sequence[object], count: int | None, seed: int) -> Sequence[object]:
    """`count` of the lines, drawn by the seed, in their order; all of them if there are not more, or for None."""
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if count is not None and count < len(lines):
        drawn = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))[:count]
        lines = [lines[row] for row in drawn.sort().values.tolist()]
    return lines


def _bytes(value: object) -> bytes:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes()
    if hasattr(value, "tobytes"):  # a NumPy array or a PIL image
        return str(getattr(value, "shape", None)).encode() + value.tobytes()
    return repr(value).encode()
