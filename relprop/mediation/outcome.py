"""Outcomes: the number that an effect is an effect on, and what has to be asked of the model to know it.

An outcome asks one or more questions: runs of the model on the prompt, or on the prompt with something after it, and
what to read there. Reference: Vig et al. 2020 (Causal mediation analysis for interpreting neural NLP), sections 3, 4.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..posed import apart, posed, written
from ..subject import Subject
from ..target import Contrast, Probability, Similarity, Target, Targets, Token, logits
from ..tokens import Batch, TextUnits
from .memory import PIECE, by_piece


@dataclass(frozen=True, eq=False)
class Question:
    """A run that an outcome needs: the input, the positions `at` which its logits are read, (B, P), and the `answer`
    there, (R, ...), from the logits (R, P, V) of rows (R,) of the input; `at` None: from the whole output.

    `prompt` says which tokens of the input are the prompt's, bool (B, T); the rest was added, or is padding. `tokens`,
    where not None, are the only ones whose logits the answer is given, (V',) ids, V' in the place of V.
    """

    batch: Batch
    at: Tensor | None
    answer: Callable[[Any, Tensor], Tensor]
    prompt: Tensor | None
    tokens: Tensor | None = None

    def take(self, rows: Tensor) -> Question:
        """The question of these rows alone."""
        at, prompt = (one if one is None else one[rows] for one in (self.at, self.prompt))
        return Question(self.batch.take(rows), at, lambda found, index: self.answer(found, rows[index]), prompt,
                        self.tokens)


class Outcome:
    """A number that effects are measured on. `pairs` are its questions, each of the base and of the counterfactual;
    `value` makes the number of each row, (R,), of their answers.
    """

    def pairs(self, subject: Subject, base: Batch, counterfactual: Batch) -> list[tuple[Question, Question]]:
        raise NotImplementedError

    def value(self, answers: Sequence[Tensor]) -> Tensor:
        return answers[0]

    def name(self, subject: Subject) -> str:
        """What it is called in reports."""
        return type(self).__name__


@dataclass(frozen=True, eq=False)
class Value(Outcome):
    """The value of a target: a logit, a probability, a contrast, a function of the output ...; see `relprop.Target`.

    A target that is left open, such as the prediction, is that of the base; so is an answer that the model writes. An
    answer is put behind the prompts of both; a contrast of two answers asks a question of each.
    """

    of: object = None

    def pairs(self, subject: Subject, base: Batch, counterfactual: Batch) -> list[tuple[Question, Question]]:
        targets = subject.targets(self.of, base.rows)
        if any(isinstance(target, Similarity) and target.to is None for target in targets.targets):
            raise ValueError("effects are on the similarity to one text, Similarity(to=...), not on that of pairs")
        targets = written(subject, base, targets)
        asked = [posed(subject, batch, targets) for batch in (base, counterfactual)]
        (first, own), _ = asked
        if first is base and any(target.left_open for target in own.targets):
            own = _fixed(subject, own, base)
            asked = [(base, own), (counterfactual, own)]
        return list(zip(*(_each(subject, *one) for one in asked), strict=True))

    def value(self, answers: Sequence[Tensor]) -> Tensor:
        return sum(answers)

    def name(self, subject: Subject) -> str:
        several = isinstance(self.of, (list, tuple))
        given = subject.targets(self.of, len(self.of) if several else 1)
        names = list(dict.fromkeys(one.name(given.vocabulary) for one in given.targets))
        return names[0] + (", others in other rows" if len(names) > 1 else "")


def _each(subject: Subject, batch: Batch, targets: Targets) -> list[Question]:
    """A question of each of the sequences that the rows run as."""
    flat, own = apart(subject, batch, targets)
    count = flat.rows // batch.rows
    if count == 1:  # the very batch, by which it is known that nothing was added
        return [_asked(own, flat)]
    every = [torch.arange(number, flat.rows, count) for number in range(count)]
    return [_asked(own.take(rows), flat.take(rows)) for rows in every]


def _fixed(subject: Subject, targets: Targets, base: Batch) -> Targets:
    """The targets, those that are left open as the base's run has them, read where the model answers in each input."""
    found: dict[int, Target] = {}

    def run(rows: Tensor) -> dict[str, Tensor]:
        batch = base.take(rows)
        with torch.no_grad():
            fixed = targets.take(rows).fixed(subject.forward(batch), batch).targets
        found.update((row, targets.targets[row].named(one)) for row, one in zip(rows.tolist(), fixed))
        return {}

    by_piece(run, torch.arange(base.rows).split(PIECE))
    return Targets(tuple(found[row] for row in range(base.rows)), targets.vocabulary)


def _asked(targets: Targets, batch: Batch) -> Question:
    leaves = [_leaves(target) for target in targets.targets]
    prompt = prompt_of(batch)
    if any(found is None for found in leaves) or prompt is None:
        whole = lambda output, rows: targets.take(rows).value(output, batch.take(rows))
        return Question(batch, None, whole, prompt)
    P = max(map(len, leaves))
    at = torch.tensor([[answered_at(batch, row, token) for token in (found + found[:1] * P)[:P]]
                       for row, found in enumerate(leaves)])

    tokens = None
    if all(_of_logits(target) for target in targets.targets):
        tokens = torch.tensor(sorted({token.token for found in leaves for token in found}))

    def answer(z: Tensor, rows: Tensor) -> Tensor:
        value = z.new_empty(len(rows))
        for target in dict.fromkeys(targets.targets):
            mine = torch.tensor([targets.targets[row] == target for row in rows.tolist()], device=z.device)
            value[mine] = _evaluated(target, iter(z[mine].unbind(1)), tokens)
        return value

    return Question(batch, at, answer, prompt, tokens)


def _of_logits(target: Target) -> bool:
    """Whether a target of tokens needs no other logits than theirs, as a probability does."""
    return isinstance(target, Token) or isinstance(target, Contrast) and _of_logits(target.a) and _of_logits(target.b)


def _leaves(target: Target) -> list[Token] | None:
    """The tokens that a target is made of, None if it reads anything else."""
    if isinstance(target, Token):
        return [target]
    if isinstance(target, Probability):
        return _leaves(target.of)
    if isinstance(target, Contrast):
        a, b = _leaves(target.a), _leaves(target.b)
        return None if a is None or b is None else a + b
    return None


def _evaluated(target: Target, z: Any, tokens: Tensor | None) -> Tensor:
    """The value of a target from the logits of its tokens' positions, (R, V) each, or of `tokens`, taken in order."""
    if isinstance(target, Token):
        place = target.token if tokens is None else int((tokens == target.token).nonzero())
        return next(z)[:, place]
    if isinstance(target, Contrast):
        a = _evaluated(target.a, z, tokens)
        return a - _evaluated(target.b, z, tokens)
    chances = next(z)
    chances = chances.sigmoid() if target.function == "sigmoid" else chances.softmax(1)
    return chances[:, target.of.token]


def answered_at(batch: Batch, row: int, token: Token) -> int:
    """The position that a target of tokens reads in a row."""
    if token.position is None and batch.read is not None:
        if int(batch.read[row]) < 0:
            raise ValueError(f"row {row} has no mask token, or several; give one, or Token(..., position=...)")
        return int(batch.read[row])
    own = prompt_of(batch)[row].nonzero().flatten()
    position = -1 if token.position is None else token.position
    if not -len(own) <= position < len(own):
        raise ValueError(f"no position {position} in row {row}, which has {len(own)} tokens; give 0 to {len(own) - 1}, "
                         f"or -1 to -{len(own)} from the end")
    return int(own[position])


def prompt_of(batch: Batch) -> Tensor | None:
    """Which tokens are the prompt's, no padding and no answer behind it, bool (B, T); None where the input is not text
    that the output has positions of.
    """
    if not isinstance(batch.units, TextUnits) or "decoder_input_ids" in batch.kwargs:
        return None
    own = ~torch.tensor(batch.units.padding)
    return own if batch.units.answers is None else own & ~torch.tensor(batch.units.answers)


@dataclass(frozen=True, eq=False)
class KL(Outcome):
    """KL divergence of the answer from the base run's, sum_v p_0(v) (log p_0(v) - log p(v)), in nats: over the tokens
    where the model answers, or over its classes. Zero in the base run.
    """

    def pairs(self, subject: Subject, base: Batch, counterfactual: Batch) -> list[tuple[Question, Question]]:
        told = subject.targets(None, 1).vocabulary.of_tokens and prompt_of(base) is not None
        at, there = (torch.tensor([[answered_at(batch, row, Token(0))] for row in range(batch.rows)]) if told else None
                     for batch in (base, counterfactual))

        def run(rows: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                z = logits(subject.forward(base.take(rows)))
            z = z if at is None else z[torch.arange(len(rows)), at[rows, 0].to(z.device)]
            return {"before": z.log_softmax(-1).T}

        before = by_piece(run, torch.arange(base.rows).split(PIECE))["before"].T  # (B, V)

        def answer(output: Any, rows: Tensor) -> Tensor:
            now = (logits(output) if at is None else output[:, 0]).log_softmax(-1)
            p = before[rows.to(before.device)]
            return (p.exp() * (p - now)).sum(-1)

        return [(Question(base, at, answer, prompt_of(base)),
                 Question(counterfactual, there, answer, prompt_of(counterfactual)))]

    def name(self, subject: Subject) -> str:
        return "KL from the base run"


def outcome(spec: object) -> Outcome:
    """The outcome that a user's word for it means: itself, or the `Value` of a target."""
    return spec if isinstance(spec, Outcome) else Value(spec)


__all__ = ["KL", "Outcome", "Question", "Value", "answered_at", "outcome", "prompt_of"]
