"""An answer of several tokens that a language model gives to a prompt, explained as a whole or in part.

The answer is put behind the prompt (or into the decoder), so that one forward pass reads the log-probabilities of all
its tokens, each behind those before it, and one backward pass explains their sum.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import from_ids
from . import place
from .continuation import continuing
from .output import logits
from .scalar import Target, in_range

if TYPE_CHECKING:
    from .reading import Reading
    from .vocabulary import Vocabulary

LOGPROB, LOGIT = "logprob", "logit"
Part = str | int | tuple[int, int]


@dataclass(frozen=True)
class Answer(Target):
    """The log-probability of an answer to the prompt: sum_i log p(a_i | prompt, a_1 ... a_i-1), or the sum of logits.

    The map is of the prompt's words; the answer's own tokens, which later ones read, are in it too, marked as such:
    `r.answered()`. Two answers of any lengths are contrasted by `Contrast(Answer(a), Answer(b))`; the map is then the
    difference of both maps.

    Args: answer: a text as it goes on from the prompt, its leading space included, or token ids; None: what the model
        writes by itself, greedily, up to `length` tokens. part: which part of the answer is explained, the rest being
        given: its text, the number of a token, or a range of tokens (start, end), the end not included; None: all.
        measure: "logprob", or "logit" for the sum of logits, which is linear.
    """

    answer: str | tuple[int, ...] | None = None
    part: Part | None = None
    _: KW_ONLY
    measure: str = LOGPROB
    length: int = 20

    @property
    def left_open(self) -> bool:
        return self.answer is None

    def resolved(self, vocabulary: Vocabulary) -> Answer:
        if self.measure not in (LOGPROB, LOGIT):
            raise ValueError(f"an answer is measured by {LOGPROB} or {LOGIT}, not by {self.measure!r}")
        if not vocabulary.writes:
            raise ValueError(f"an answer is written by a language model, and the task here is {vocabulary.task!r}; "
                             "an answer that stands in a context is Span(text)")
        if self.answer is None:
            return self
        if isinstance(self.answer, str) and vocabulary.tokenizer is None:
            raise ValueError(f"no tokenizer to read the answer {self.answer!r}; give its token ids")
        return replace(self, answer=tuple(map(int, _tokens(self.answer, vocabulary.tokenizer))))

    def value(self, reading: Reading) -> Tensor:
        raise ValueError("an answer is read where it stands behind its prompt, which this run has not; "
                         "relprop.explain, compare and effects put it there")

    def written(self, first: int, vocabulary: Vocabulary) -> Written:
        """The target of a run that has the answer, the first token of which is read at this position.

        Raises: ValueError for a part that is not in the answer.
        """
        tokens, steps = self.answer, self._steps(vocabulary)
        said = repr(_said(tokens, vocabulary))
        if self.part is not None:
            said = f"{_said([tokens[step] for step in steps], vocabulary)!r} in {said}"
        return Written(tuple(tokens[step] for step in steps), tuple(first + step for step in steps), self.measure, said)

    def _steps(self, vocabulary: Vocabulary) -> list[int]:
        """Which tokens of the answer are explained."""
        count, part = len(self.answer), self.part
        if part is None:
            return list(range(count))
        if isinstance(part, str):
            units = from_ids(torch.tensor([self.answer]), torch.ones(1, count), vocabulary.tokenizer,
                             special=torch.zeros(1, count))
            try:
                return place.part(units, 0, part.strip())
            except ValueError as cause:
                raise ValueError(f"{part!r} is not a part of the answer {units.texts[0]!r}, or is several; give the "
                                 f"numbers of its tokens, {list(enumerate(units.tokens[0]))}") from cause
        first, last = (part, part + 1) if isinstance(part, int) else part
        if isinstance(part, int) and part < 0:
            first, last = part + count, part + count + 1
        if not 0 <= first < last <= count:
            raise ValueError(f"the part {part} lies outside of the answer, which has {count} tokens; give the number "
                             f"of one, or a range (start, end) of 0 to {count}, the end not included")
        return list(range(first, last))

    def name(self, vocabulary: Vocabulary) -> str:
        return f"{_SAID[self.measure]} {'the answer' if self.answer is None else repr(_said(self.answer, vocabulary))}"


@dataclass(frozen=True)
class Written(Target):
    """The log-probabilities, or logits, of tokens at these positions, summed; positions count from a row's first token.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    measure: str = LOGPROB
    called: str = ""

    def value(self, reading: Reading) -> Tensor:
        z = logits(reading.output)
        if z.dim() != 3:
            raise ValueError(f"logits of shape {tuple(z.shape)} are not (rows, positions, tokens); an answer is "
                             "read from those")
        in_range(max(self.tokens), z.shape[2], "token id")
        real = reading.batch.real(z.shape[1])[reading.indices]
        at = real.int().argmax(1)[:, None] + torch.tensor(self.positions)  # (R, P)
        rows = reading.indices.to(z.device)[:, None]
        found = z[rows, at.to(z.device)]  # (R, P, V)
        found = found.log_softmax(-1) if self.measure == LOGPROB else found
        return found.gather(2, torch.tensor(self.tokens, device=z.device).expand(len(found), -1)[..., None]).sum((1, 2))

    def name(self, vocabulary: Vocabulary) -> str:
        return f"{_SAID[self.measure]} {self.called}"


_SAID = {LOGPROB: "log P of", LOGIT: "logit of"}


def _said(tokens: Sequence[int], vocabulary: Vocabulary) -> str:
    """What these tokens say."""
    return str(list(tokens)) if vocabulary.tokenizer is None else vocabulary.tokenizer.decode(list(tokens))


def _tokens(answer: object, tokenizer: object) -> list[int]:
    found = continuing(answer, tokenizer)
    if not found:
        raise ValueError("an answer without a token; give at least one")
    return found
