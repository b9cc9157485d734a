"""Outcomes of two candidates, continuations of several tokens or classes: the ratio, difference or log-odds of their
probabilities.

Reference: Vig et al. 2020 (Causal mediation analysis for interpreting neural NLP), sections 3, 4.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import family
from ..data.pair import known_ids
from ..errors import Undefined
from ..subject import Subject
from ..target import Probability, Targets, Token
from ..tokens import Batch, TextUnits
from .outcome import Outcome, Question, answered_at, prompt_of


@dataclass(frozen=True, eq=False)
class Pair(Outcome):
    """A number made of the log-probabilities of two candidates, `a` and `b`.

    A candidate is a continuation of one or more tokens (a text, a list of ids, or a list of either, one a row), or of
    a classifier a class. The log-probability of a continuation c is sum_i log p(c_i | prompt, c_<i), over the number
    of its tokens with `normalised` (the default, as of Vig et al. 2020).

    Args: following: of masked language models, in which each token of a candidate is predicted at a mask of its own,
        behind those before it: what stands after the mask, "nothing", the candidate's later "tokens", or "masks" for
        them (approaches 1, 2 and 3 of Vig et al.'s code). Special tokens at the end of the prompt stay at the end.
    """

    a: object
    b: object
    normalised: bool = True
    following: str = "nothing"
    only_odds = False  # whether the number depends on p(a) / p(b) alone

    def pairs(self, subject: Subject, base: Batch, counterfactual: Batch) -> list[tuple[Question, Question]]:
        if self.following not in ("nothing", "tokens", "masks"):
            raise ValueError(f"what follows a mask is 'nothing', 'tokens' or 'masks', not {self.following!r}")
        asked = [self._questions(subject, batch) for batch in (base, counterfactual)]
        return list(zip(*asked, strict=True))

    def value(self, answers: Sequence[Tensor]) -> Tensor:
        whole = sum(answers)  # (..., 2): each question adds its part
        return self.combined(whole[..., 0], whole[..., 1])

    def combined(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def name(self, subject: Subject) -> str:
        return self.said(*(repr(one) if isinstance(one, (str, int)) else side for one, side in
                           ((self.a, "a"), (self.b, "b"))))

    def said(self, a: str, b: str) -> str:
        raise NotImplementedError

    def _refuse_zero(self, a: Tensor, b: Tensor) -> None:
        """Raises: Undefined for a candidate of probability zero, (..., R), with which one and in which row."""
        for side, value in (("a", a), ("b", b)):
            rows = value.isneginf().flatten(0, -2).any(0) if value.dim() > 1 else value.isneginf()
            if rows.any():
                one, row = getattr(self, side), int(rows.nonzero()[0])
                said = f"{one!r}" if isinstance(one, (str, int)) else f"candidate {side}"
                raise Undefined(f"{said} has probability zero in row {row}, so that the ratio of the two is undefined; "
                                "take their Difference, or candidates that the model may give")

    def _questions(self, subject: Subject, batch: Batch) -> list[Question]:
        vocabulary = subject.targets(None, 1).vocabulary
        if not vocabulary.of_tokens and not _of_ids(self.a):
            return [self._of_classes(subject, batch)]
        if vocabulary.labels is not None and not vocabulary.of_tokens:
            raise ValueError(f"{subject.name} tells {', '.join(vocabulary.labels[:5])} apart, and predicts no tokens; "
                             "give two labels")
        candidates = [_continuations(one, subject, batch.rows) for one in (self.a, self.b)]
        single = all(len(ids) == 1 for one in candidates for ids in one)
        if single and (subject.task != "fill-mask" or batch.read is not None and bool((batch.read >= 0).all())):
            return [_single(batch, candidates, self.only_odds)]
        if subject.task == "fill-mask":
            return _masked(subject, batch, candidates, self.normalised, self.following)
        if "decoder_input_ids" in batch.kwargs:
            return [_decoded(batch, one, side, self.normalised) for side, one in enumerate(candidates)]
        return [_continued(subject, batch, one, side, self.normalised) for side, one in enumerate(candidates)]

    def _of_classes(self, subject: Subject, batch: Batch) -> Question:
        sides = [Targets(tuple(map(Probability, found.targets)), found.vocabulary)
                 for found in (subject.targets(one, batch.rows) for one in (self.a, self.b))]

        def answer(output: Any, rows: Tensor) -> Tensor:
            many = batch.take(rows)
            return torch.stack([side.take(rows).value(output, many).log() for side in sides], -1)

        return Question(batch, None, answer, prompt_of(batch))


class Ratio(Pair):
    """p(a) / p(b)."""

    only_odds = True

    def combined(self, a: Tensor, b: Tensor) -> Tensor:
        self._refuse_zero(a, b)
        return (a - b).exp()

    def said(self, a: str, b: str) -> str:
        return f"P({a}) / P({b})"


class Difference(Pair):
    """p(a) - p(b)."""

    def combined(self, a: Tensor, b: Tensor) -> Tensor:
        return a.exp() - b.exp()

    def said(self, a: str, b: str) -> str:
        return f"P({a}) - P({b})"


class LogOdds(Pair):
    """log p(a) - log p(b)."""

    only_odds = True

    def combined(self, a: Tensor, b: Tensor) -> Tensor:
        self._refuse_zero(a, b)
        return a - b

    def said(self, a: str, b: str) -> str:
        return f"log P({a}) - log P({b})"


def _of_ids(one: object) -> bool:
    return isinstance(one, (list, tuple)) and bool(one) and isinstance(one[0], (list, tuple))


def _continuations(one: object, subject: Subject, rows: int) -> list[list[int]]:
    """The tokens of a candidate for each row.

    Raises: ValueError for an empty one, or another number than rows.
    """
    each = isinstance(one, (list, tuple)) and bool(one) and not isinstance(one[0], int)
    many = list(one) if each else [one] * rows
    if len(many) != rows:
        raise ValueError(f"{len(many)} candidates for {rows} rows; give one, or a list with one a row")
    return [_ids(text, subject) for text in many]


def _ids(one: object, subject: Subject) -> list[int]:
    if isinstance(one, int):
        one = [one]
    if isinstance(one, str):
        if subject.tokenizer is None:
            raise ValueError(f"{subject.name} came without a tokenizer to read {one!r}; give token ids")
        return known_ids(one, subject.tokenizer)
    found = list(one)
    if not found or not all(isinstance(token, int) for token in found):
        raise ValueError(f"a continuation is a text or a list of token ids, at least one, not {one!r}")
    size = family.vocabulary_size(subject.model)
    wrong = [token for token in found if not 0 <= token < (size or token + 1)]
    if wrong:
        raise ValueError(f"no token {wrong[0]} in {subject.name}, whose vocabulary has {size}; give ids of 0 to "
                         f"{(size or 1) - 1}")
    return found


def _single(batch: Batch, candidates: list[list[list[int]]], only_odds: bool) -> Question:
    """The question of two candidates of one token each, where the model answers. For the odds alone their logits do:
    what turns them into log-probabilities is the same for both.
    """
    at = torch.tensor([[answered_at(batch, row, Token(0))] for row in range(batch.rows)])
    ids = torch.tensor(candidates)  # (2, B, 1)
    if not only_odds:
        weight = torch.ones(batch.rows, 1, dtype=torch.float64)
        answer = lambda z, rows: _log_probabilities(z, ids[:, rows], weight[rows], (0, 1))
        return Question(batch, at, answer, prompt_of(batch))
    tokens, places = ids.unique(return_inverse=True)
    answer = lambda z, rows: z[:, 0].gather(1, places[:, rows, 0].T.to(z.device))  # (R, 2)
    return Question(batch, at, answer, prompt_of(batch), tokens)


def _continued(subject: Subject, batch: Batch, candidate: list[list[int]], side: int, normalised: bool) -> Question:
    """The question of a candidate behind each prompt; its last token need not be read by the model."""
    prompts = [_tokens(batch, row) for row in range(batch.rows)]
    whole = _batch(subject, [prompt + ids[:-1] for prompt, ids in zip(prompts, candidate)])
    sizes = torch.tensor([*map(len, prompts)])[:, None]
    prompt = torch.arange(whole.kwargs["input_ids"].shape[1]) < sizes
    step, answer = _steps(candidate, side, normalised)
    return Question(whole, sizes - 1 + step, answer, prompt)


def _decoded(batch: Batch, candidate: list[list[int]], side: int, normalised: bool) -> Question:
    """The question of a candidate that a decoder gives, behind what it has begun with."""
    begun = batch.kwargs["decoder_input_ids"]
    P = max(map(len, candidate)) - 1
    added = torch.tensor([(ids[:-1] + ids[-1:] * P)[:P] for ids in candidate], dtype=begun.dtype)  # (B, P)
    whole = replace(batch, kwargs={**batch.kwargs, "decoder_input_ids": torch.cat([begun, added.to(begun.device)], 1)})
    step, answer = _steps(candidate, side, normalised)
    return Question(whole, begun.shape[1] - 1 + step, answer, None)


def _steps(candidate: list[list[int]], side: int, normalised: bool) -> tuple[Tensor, Callable[[Any, Tensor], Tensor]]:
    """How far behind the last token that is there each token of a candidate is read, (B, P), and what is read there."""
    P, lengths = max(map(len, candidate)), torch.tensor([*map(len, candidate)])[:, None]
    step = torch.arange(P).expand(len(candidate), P)
    weight = (step < lengths).double() / (lengths if normalised else 1)  # (B, P)
    tokens = torch.tensor([(ids + ids[-1:] * P)[:P] for ids in candidate])[None]  # (1, B, P)
    answer = lambda z, rows: _log_probabilities(z, tokens[:, rows], weight[rows], (side,))
    return step.minimum(lengths - 1), answer


def _log_probabilities(z: Tensor, tokens: Tensor, weight: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Weighted sum over positions of log p of the tokens, (R, 2); zero for the side that is not asked for.

    Args: z: logits, (R, P, V). tokens: (sides, R, P). weight: (R, P).
    """
    logp = z.log_softmax(-1)
    found = z.new_zeros(len(z), 2)
    for side, ids in zip(sides, tokens):
        chosen = logp.gather(-1, ids.to(z.device)[..., None])[..., 0]  # (R, P)
        weights = weight.to(chosen)
        found[:, side] = torch.where(weights > 0, chosen * weights, 0).sum(-1)
    return found


def _masked(subject: Subject, batch: Batch, candidates: list[list[list[int]]], normalised: bool, following: str
            ) -> list[Question]:
    """A question for each token of each candidate."""
    mask = subject.mask_token_id
    if mask is None:
        raise ValueError(f"{subject.name} came without a tokenizer that has a mask token, which continuations need; "
                         "load it with its tokenizer, relprop.load(model, tokenizer)")
    return [_at_mask(subject, batch, one, step, side, normalised, following, mask)
            for side, one in enumerate(candidates) for step in range(max(map(len, one)))]


def _at_mask(subject: Subject, batch: Batch, candidate: list[list[int]], step: int, side: int, normalised: bool,
             following: str, mask: int) -> Question:
    """The question of one token of a candidate. Rows whose candidate is shorter ask its last token again, for
    nothing."""
    rows, at, prompts, weights, tokens = [], [], [], [], []
    for row, ids in enumerate(candidate):
        mine = min(step, len(ids) - 1)
        body, end = _ended(batch, row, mask)
        later = {"nothing": [], "tokens": ids[mine + 1:], "masks": [mask] * (len(ids) - mine - 1)}[following]
        rows.append([*body, *ids[:mine], mask, *later, *end])
        at.append(len(body) + mine)
        prompts.append([True] * len(body) + [False] * (mine + 1 + len(later)) + [True] * len(end))
        weights.append((step < len(ids)) / (len(ids) if normalised else 1))
        tokens.append(ids[mine])
    whole = _batch(subject, rows)
    width = whole.kwargs["input_ids"].shape[1]
    prompt = torch.tensor([one + [False] * (width - len(one)) for one in prompts])
    token, weight = torch.tensor(tokens)[None, :, None], torch.tensor(weights, dtype=torch.float64)[:, None]
    answer = lambda z, index: _log_probabilities(z, token[:, index], weight[index], (side,))
    return Question(whole, torch.tensor(at)[:, None], answer, prompt)


def _tokens(batch: Batch, row: int) -> list[int]:
    """A row's tokens without padding."""
    if "input_ids" not in batch.kwargs or not isinstance(batch.units, TextUnits):
        raise TypeError("continuations need token ids, and this input has none")
    return batch.kwargs["input_ids"][row].cpu()[prompt_of(batch)[row]].tolist()


def _ended(batch: Batch, row: int, mask: int) -> tuple[list[int], list[int]]:
    """A row's tokens, and the special ones at its end apart."""
    ids = _tokens(batch, row)
    special = [said for said, gone in zip(batch.units.special[row], batch.units.padding[row]) if not gone]
    end = len(ids)
    while end and special[end - 1] and ids[end - 1] != mask:
        end -= 1
    return ids[:end], ids[end:]


def _batch(subject: Subject, rows: list[list[int]]) -> Batch:
    """Rows of token ids as a batch, padded on the right."""
    width, size, pad = max(map(len, rows)), family.vocabulary_size(subject.model), subject.pad_token_id
    pad = pad if size is None or pad < size else 0  # configs name ids that a small vocabulary does not have
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return subject.prepare({"input_ids": ids, "attention_mask": mask})


__all__ = ["Difference", "LogOdds", "Pair", "Ratio"]
