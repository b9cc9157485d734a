"""What a user writes for a target, and a target for each row of a batch."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index as as_index

import torch
from torch import Tensor

from ..tokens import Batch
from .combination import Function
from .entry import Class, Regression, Token
from .output import wide
from .prediction import Prediction
from .question import Span
from .reading import Reading
from .scalar import Target, listed, meant
from .tag import Tag

# tasks whose output has a logit a token
LANGUAGE_MODELING = ("text-generation", "fill-mask", "text2text-generation", "image-text-to-text")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What the entries of a model's logits are called.

    `labels` name classes; `tokenizer` spells tokens; `task` is one of transformers' task names; `multilabel` says that
    each class is decided for itself, so that its probability is a sigmoid; `regression` that the outputs are numbers.
    """

    labels: tuple[str, ...] | None = None
    tokenizer: object | None = None
    task: str | None = None
    multilabel: bool = False
    regression: bool = False

    @property
    def of_tags(self) -> bool:
        """Whether the logits are of a class for each token."""
        return self.task == "token-classification"

    @property
    def writes(self) -> bool:
        """Whether the model may write an answer, as far as its task is known."""
        return self.task in (None, "text-generation", "text2text-generation", "image-text-to-text")

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
            return self._choice(spec).resolved(self)
        if isinstance(spec, bool):
            raise TypeError(f"a target is an index, a label, a Target or a function of the output, not {spec}")
        if callable(spec):
            return Function(spec)
        try:
            number = as_index(spec)
        except TypeError as cause:
            raise TypeError("a target is an index, a label, a Target or a function of the output, not "
                            f"{type(spec).__name__} ({spec!r})") from cause
        return self._choice(number).resolved(self)

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
        raise ValueError(f"no label {name!r}; there are {listed(self.labels)}{meant(name, self.labels)}")

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
        whole = f", or Answer({text!r}) for all of them" if self.writes else ""
        raise ValueError(f"{text!r} is {len(pieces)} tokens, {spelled}, where one is needed"
                         f"{hint or f'; give one of them, or its id{whole}'}")

    def name(self, index: int, *, token: bool) -> str:
        """What a class or a token is called."""
        if token:
            return repr(self.tokenizer.decode([index])) if self.tokenizer is not None else f"token {index}"
        return self.labels[index] if self.labels is not None else f"class {index}"

    def _choice(self, which: str | int) -> Target:
        """What a label, a token, an answer or an index alone means."""
        if self.task == "question-answering" and isinstance(which, str):
            return Span(which)
        kinds = (self.of_tokens, Token), (self.of_tags, Tag), (self.regression, Regression), (True, Class)
        return next(kind for is_one, kind in kinds if is_one)(which)


@dataclass(frozen=True)
class Targets:
    """A target for each row of a batch, ready to read outputs."""

    targets: tuple[Target, ...]
    vocabulary: Vocabulary

    @property
    def ruled(self) -> bool:
        """Whether a value is computed under the rules of a composite, as if the model did it."""
        return any(target.ruled for target in self.targets)

    def value(self, output: object, batch: Batch) -> Tensor:
        """The numbers explained, (B,), differentiable, in at least float32.

        Raises: ValueError if the batch has another number of rows, or an index or position is outside the output.
        """
        groups = self._groups(batch)
        parts = [target.value(self._reading(output, batch, rows)) for target, rows in groups.items()]
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        value = torch.cat([wide(part) for part in parts])
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

    >>> from relprop.target import Contrast
    >>> resolve(["cat", Contrast("dog", 0)], rows=2, labels=("cat", "dog")).targets
    (Class(index=0), Contrast(a=Class(index=1), b=Class(index=0)))
    """
    return Vocabulary(None if labels is None else tuple(labels), tokenizer).targets(spec, rows)
