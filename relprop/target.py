"""What is explained: the scalar of the output, one a row, whose relevance is asked for.

A target is a frozen dataclass with a `value`; a user's own kind is one more such class. `resolve` turns what a user
writes (7, "cat", " Paris", a Target, a function, or a list of these, one a row) into `Targets`, which read an output.
"""
from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index as as_index

import torch
from torch import Tensor

from .tokens import Batch

LANGUAGE_MODELING = ("text-generation", "fill-mask", "text2text-generation")  # tasks whose output has a logit a token
SHOWN = 20  # labels that an error lists


def logits(output: object) -> Tensor:
    """The logits in a model's output: `output.logits`, `output["logits"]`, the tensor itself, or the first of a tuple.

    Returns: logits, (B, C) or (B, T, V), in at least float32. One number a row, (B,), becomes (B, 1).
    Raises: TypeError if there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or not found.dim():
        has = f" (it has {', '.join(output)})" if isinstance(output, Mapping) else ""
        raise TypeError(f"no logits in an output of type {type(output).__name__}{has}; "
                        "give target=a function of the output that returns one number a row")
    return _wide(found if found.dim() > 1 else found[:, None])


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What the entries of a model's logits are called.

    `labels` name classes; `tokenizer` spells tokens; `task` is one of transformers' task names; `multilabel` says that
    each class is decided for itself, so that its probability is a sigmoid.
    """

    labels: tuple[str, ...] | None = None
    tokenizer: object | None = None
    task: str | None = None
    multilabel: bool = False

    @property
    def of_tokens(self) -> bool:
        """Whether the logits are of tokens and not of classes."""
        if self.task is not None:
            return self.task in LANGUAGE_MODELING
        return self.labels is None and self.tokenizer is not None

    def target(self, spec: object) -> Target:
        """The target that a user's word for it means, its labels and tokens looked up.

        Raises: ValueError for an unknown label, token or index; TypeError for what can be no target.
        """
        if spec is None:
            return Prediction()
        if isinstance(spec, Target):
            return spec.resolved(self)
        if isinstance(spec, str):
            return self._word(spec).resolved(self)
        if isinstance(spec, bool):
            raise TypeError(f"a target is an index, a label, a Target or a function of the output, not {spec}")
        if callable(spec):
            return Function(spec)
        try:
            number = as_index(spec)
        except TypeError as cause:
            raise TypeError("a target is an index, a label, a Target or a function of the output, not "
                            f"{type(spec).__name__} ({spec!r})") from cause
        return (Token(number) if self.of_tokens else Class(number)).resolved(self)

    def targets(self, spec: object, rows: int) -> Targets:
        """A target for each row.

        Args: spec: None for the prediction, an index, a label (a token's text if the logits are of tokens), a Target, a
            function of the output that returns (B,), or a list of these, one a row.
        Raises: ValueError for an unknown label, token or index, or a list of another length; TypeError for no target.
        """
        if hasattr(spec, "tolist"):  # of torch or numpy
            if spec.ndim > 1:
                raise ValueError(f"targets of shape {tuple(spec.shape)}; give one index a row, ({rows},)")
            spec = spec.tolist()
        if not isinstance(spec, (list, tuple)):
            return Targets((self.target(spec),) * rows, self)
        if len(spec) != rows:
            many = f"{len(spec)} targets for {rows} row{'s' * (rows != 1)}"
            raise ValueError(f"{many}; give one target, or a list with one a row")
        return Targets(tuple(map(self.target, spec)), self)

    def label(self, name: str) -> int:
        """Index of a class, by its label in any case, or by one of the names that a label lists with commas."""
        if self.labels is None:
            raise ValueError(f"no label {name!r}: the classes of this model have no labels; "
                             "give the index of a class, or load the model with labels=[...]")
        same = [i for i, label in enumerate(self.labels) if label == name]
        near = [i for i, label in enumerate(self.labels) if name.lower() in [label.lower(), *label.lower().split(", ")]]
        found = same or near
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"label {name!r} stands for classes {found}; give the index of one")
        raise ValueError(f"no label {name!r}; there are {_listed(self.labels)}{_meant(name, self.labels)}")

    def token(self, text: str) -> int:
        """Id of a token: a text that is one token, or the token as the vocabulary spells it.

        Raises: ValueError for a text of several tokens, or one that is not in the vocabulary.
        """
        if self.tokenizer is None:
            raise ValueError(f"no tokenizer to look up token {text!r}; give its id, or load the model with a tokenizer")
        pieces = self.tokenizer.encode(text, add_special_tokens=False)
        # SentencePiece adds the leading space itself, so that a space given to it is a second one
        bare = self.tokenizer.encode(text.lstrip(" "), add_special_tokens=False) if text.startswith(" ") else []
        unknown = None if text == self.tokenizer.unk_token else self.tokenizer.unk_token_id
        for ids in (pieces, [self.tokenizer.convert_tokens_to_ids(text)], bare):
            if len(ids) == 1 and ids[0] not in (None, unknown):
                return ids[0]
        spelled = self.tokenizer.convert_ids_to_tokens(pieces)
        spaced = self.tokenizer.encode(" " + text, add_special_tokens=False)
        hint = f'; with a space before it, " {text}", it is one' if len(spaced) == 1 else ""
        if len(pieces) < 2:
            raise ValueError(f"no token {text!r} in the vocabulary{hint or '; give one of its tokens or an id'}")
        raise ValueError(f"{text!r} is {len(pieces)} tokens, {spelled}, where one is needed"
                         f"{hint or '; give one of them, or its id'}")

    def name(self, index: int, *, token: bool) -> str:
        """What a class or a token is called."""
        if token:
            return repr(self.tokenizer.decode([index])) if self.tokenizer is not None else f"token {index}"
        return self.labels[index] if self.labels is not None else f"class {index}"

    def _word(self, word: str) -> Target:
        return Token(word) if self.of_tokens else Class(word)


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


class Target:
    """A scalar of the output. Subclass it as a frozen dataclass with a `value`; the other methods are optional."""

    def value(self, reading: Reading) -> Tensor:
        """The number explained, (R,), differentiable, in its natural unit."""
        raise NotImplementedError

    def resolved(self, vocabulary: Vocabulary) -> Target:
        """The target with its labels and tokens looked up."""
        return self

    def fixed(self, reading: Reading) -> list[Target]:
        """For each row, the target that stays the same when the input changes."""
        return [self] * len(reading.indices)

    def name(self, vocabulary: Vocabulary) -> str:
        """What the target is called in reports."""
        return repr(self)


@dataclass(frozen=True)
class Class(Target):
    """The logit of a class, given by index or label."""

    index: int | str

    def value(self, reading: Reading) -> Tensor:
        return _entry(self.choices(reading), self.index, "class index")

    def choices(self, reading: Reading) -> Tensor:
        """Logits that the class competes with, (R, C)."""
        return reading.classes()

    def resolved(self, vocabulary: Vocabulary) -> Class:
        if isinstance(self.index, str):
            return Class(vocabulary.label(self.index))
        if vocabulary.labels is not None:
            _in_range(self.index, len(vocabulary.labels), "class index", f" ({_listed(vocabulary.labels)})")
        return Class(as_index(self.index))

    def name(self, vocabulary: Vocabulary) -> str:
        return vocabulary.name(self.index, token=False)


@dataclass(frozen=True)
class Token(Target):
    """The logit of a token, given by id or text, at a position.

    A position counts from a row's first token, or from its last one if it is negative; padding does not count. Without
    one it is where the model answers: at the last token, or at the one mask token of a masked language model.
    """

    token: int | str
    position: int | None = None

    @property
    def index(self) -> int:
        return self.token

    def value(self, reading: Reading) -> Tensor:
        return _entry(self.choices(reading), self.token, "token id")

    def choices(self, reading: Reading) -> Tensor:
        """Logits that the token competes with, (R, V)."""
        return reading.tokens(self.position)

    def resolved(self, vocabulary: Vocabulary) -> Token:
        if isinstance(self.token, str):
            return replace(self, token=vocabulary.token(self.token))
        return replace(self, token=as_index(self.token))

    def fixed(self, reading: Reading) -> list[Target]:
        return [replace(self, position=position) for position in reading.position(self.position)]

    def name(self, vocabulary: Vocabulary) -> str:
        return vocabulary.name(self.token, token=True)


@dataclass(frozen=True)
class Prediction(Target):
    """The largest logit: of the classes, or of the tokens at the position where the model answers."""

    def value(self, reading: Reading) -> Tensor:
        return self.choices(reading).amax(1)

    def choices(self, reading: Reading) -> Tensor:
        """Logits of which the largest is taken, (R, C)."""
        return reading.tokens(None) if self._of_tokens(reading) else reading.classes()

    def fixed(self, reading: Reading) -> list[Target]:
        best = self.choices(reading).argmax(1).tolist()
        if not self._of_tokens(reading):
            return [Class(index) for index in best]
        return [Token(token, position) for token, position in zip(best, reading.position(None))]

    def name(self, vocabulary: Vocabulary) -> str:
        return "prediction"

    def _of_tokens(self, reading: Reading) -> bool:
        return reading.vocabulary.labels is None and logits(reading.output).dim() == 3


@dataclass(frozen=True)
class Contrast(Target):
    """The value of `a` minus that of `b`; each is a target, an index, a label or a token."""

    a: Target | int | str
    b: Target | int | str

    def value(self, reading: Reading) -> Tensor:
        return self.a.value(reading) - self.b.value(reading)

    def resolved(self, vocabulary: Vocabulary) -> Contrast:
        return Contrast(vocabulary.target(self.a), vocabulary.target(self.b))

    def fixed(self, reading: Reading) -> list[Target]:
        return [Contrast(a, b) for a, b in zip(self.a.fixed(reading), self.b.fixed(reading))]

    def name(self, vocabulary: Vocabulary) -> str:
        return f"{self.a.name(vocabulary)} - {self.b.name(vocabulary)}"


@dataclass(frozen=True)
class Probability(Target):
    """The probability of a class or token, of the prediction if none is given.

    `function` is "softmax" or "sigmoid"; without it, sigmoid where the model decides each class for itself (multi-label
    heads, and heads of a single logit), softmax elsewhere.
    """

    of: Target | int | str | None = None
    function: str | None = None

    def value(self, reading: Reading) -> Tensor:
        z = self.of.choices(reading)
        each = not isinstance(self.of, Token) and (reading.vocabulary.multilabel or z.shape[1] == 1)
        function = self.function or ("sigmoid" if each else "softmax")
        p = z.sigmoid() if function == "sigmoid" else z.softmax(1)
        return p.amax(1) if isinstance(self.of, Prediction) else _entry(p, self.of.index, "index")

    def resolved(self, vocabulary: Vocabulary) -> Probability:
        if self.function not in (None, "softmax", "sigmoid"):
            raise ValueError(f"a probability is a softmax or a sigmoid, not {self.function!r}")
        of = vocabulary.target(self.of)
        if not isinstance(of, (Class, Token, Prediction)):
            raise ValueError(f"a probability is of a class or a token, not of {of!r}; explain that itself instead")
        return Probability(of, self.function)

    def fixed(self, reading: Reading) -> list[Target]:
        return [Probability(of, self.function) for of in self.of.fixed(reading)]

    def name(self, vocabulary: Vocabulary) -> str:
        return f"P({self.of.name(vocabulary)})"


@dataclass(frozen=True)
class Function(Target):
    """What a function makes of the whole output: one number a row, (B,)."""

    function: Callable[[object], Tensor]
    called: str | None = None

    def value(self, reading: Reading) -> Tensor:
        value = self.function(reading.output)
        rows = reading.batch.rows
        if not isinstance(value, Tensor) or value.shape != (rows,) or not value.is_floating_point():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{self.name(reading.vocabulary)} must return a floating tensor of shape ({rows},), "
                             f"one number a row, not {got}")
        return value if reading.rows is None else value[reading.rows.to(value.device)]

    def name(self, vocabulary: Vocabulary) -> str:
        return self.called or getattr(self.function, "__name__", type(self.function).__name__)


@dataclass(frozen=True)
class Targets:
    """A target for each row of a batch, ready to read outputs."""

    targets: tuple[Target, ...]
    vocabulary: Vocabulary

    def value(self, output: object, batch: Batch) -> Tensor:
        """The numbers explained, (B,), differentiable, in at least float32.

        Raises: ValueError if the batch has another number of rows, or an index or position is outside the output.
        """
        groups = self._groups(batch)
        parts = [target.value(self._reading(output, batch, rows)) for target, rows in groups.items()]
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        value = torch.cat([_wide(part) for part in parts])
        return value if len(groups) == 1 else value[order.to(value.device)]

    def fixed(self, output: object, batch: Batch) -> Targets:
        """The targets with what depends on this output written down: a prediction's class, a position left open.

        With them, an input that is ablated is read for the same class at the same position.
        """
        targets = list(self.targets)
        for target, rows in self._groups(batch).items():
            for row, fixed in zip(rows, target.fixed(self._reading(output, batch, rows))):
                targets[row] = fixed
        return replace(self, targets=tuple(targets))

    def names(self, output: object, batch: Batch) -> list[str]:
        """What is explained, for people, one a row; a prediction is named by its class."""
        return [target.name(self.vocabulary) for target in self.fixed(output, batch).targets]

    def take(self, rows: Sequence[int]) -> Targets:
        """The targets of these rows, in this order; a row may come more than once."""
        rows = torch.as_tensor(rows, dtype=torch.long).tolist()
        return replace(self, targets=tuple(self.targets[row] for row in rows))

    def _groups(self, batch: Batch) -> dict[Target, list[int]]:
        """Rows by target, so that each target reads all its rows at once."""
        if len(self.targets) != batch.rows:
            raise ValueError(f"{len(self.targets)} targets for {batch.rows} rows; take(rows) repeats or selects them")
        groups: dict[Target, list[int]] = {}
        for row, target in enumerate(self.targets):
            groups.setdefault(target, []).append(row)
        return groups

    def _reading(self, output: object, batch: Batch, rows: list[int]) -> Reading:
        return Reading(output, batch, self.vocabulary, None if len(rows) == batch.rows else torch.tensor(rows))


def resolve(
    spec: object, *, rows: int, labels: Sequence[str] | None = None, tokenizer: object | None = None
) -> Targets:
    """A target for each row from what a user writes; see `Vocabulary.targets`.

    >>> resolve(["cat", Contrast("dog", 0)], rows=2, labels=("cat", "dog")).targets
    (Class(index=0), Contrast(a=Class(index=1), b=Class(index=0)))
    """
    return Vocabulary(None if labels is None else tuple(labels), tokenizer).targets(spec, rows)


def _entry(z: Tensor, index: int, what: str) -> Tensor:
    _in_range(index, z.shape[1], what)
    return z[:, index]


def _in_range(index: int, size: int, what: str, names: str = "") -> None:
    if not 0 <= as_index(index) < size:
        raise ValueError(f"no {what} {index}; the model has 0 to {size - 1}{names}")


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _meant(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=1)
    return f"; did you mean {next(other for other in names if other.lower() == close[0])!r}?" if close else ""
