"""Inputs as their targets need them: a prompt with an answer behind it, the two texts of a pair each by itself.

A target that is read from the run of the input alone leaves the batch as it is.
"""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import family
from .still import settled
from .subject import Subject
from .target import Answer, Contrast, Reading, Similarity, Target, Targets, Vocabulary
from .target.combination import Scaled, Summed
from .target.continuation import Continued, continued, repeated
from .target.similarity import Likeness, embedded, joined, paired
from .tokens import Batch, Layout, TextUnits


@dataclass(frozen=True)
class Run:
    """A run that a target needs: behind this answer, None for the prompt alone, where it counts `factor` times."""

    answer: Answer | None
    of: Target
    factor: float = 1.0


def posed(subject: Subject, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
    """The batch as the targets need it, and the targets of it; where they need nothing, both as they are.

    Cost: where the model is to write an answer, what that takes.
    Raises: ValueError for an answer whose part is outside of it, prompts that are no text, pairs that are none.
    """
    if any(map(_similarities, targets.targets)) and batch.layout is None:
        return _compared(subject, batch, targets)
    if not any(_answers(target) for target in targets.targets):
        return batch, targets
    return _answered(subject, batch, written(subject, batch, targets))


def written(subject: Subject, batch: Batch, targets: Targets) -> Targets:
    """The targets with the answers that the model writes to these prompts, greedily, where none are given.

    Raises: ValueError where it writes nothing, or cannot.
    """
    return replace(targets, targets=tuple(_filled(subject, batch, row, target)
                                          for row, target in enumerate(targets.targets)))


def apart(subject: Subject, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
    """The sequences of a batch each as a row of its own, and what is asked of each; the rows' values are their sums.

    Cost: of similarities a forward pass, else none.
    """
    if batch.layout is None:
        return batch, targets
    flat: list[Target] = []
    if any(isinstance(target, Similarity) for target in targets.targets):
        with settled(subject.model), torch.no_grad():
            output = subject.forward(batch)
        for row, target in enumerate(targets.targets):
            reading = Reading(output, batch, targets.vocabulary, torch.tensor([row]))
            flat += target.references(reading)[0]
    else:
        flat = [part for target in targets.targets for part in target.parts]
    return batch.flat, replace(targets, targets=tuple(flat))


# -- answers ---------------------------------------------------------------------------------------------------------

def _answers(target: Target) -> bool:
    """Whether a target is of an answer."""
    if isinstance(target, Contrast):
        return _answers(target.a) or _answers(target.b)
    return isinstance(target, Answer)


def _filled(subject: Subject, batch: Batch, row: int, target: Target) -> Target:
    if isinstance(target, Contrast):
        return Contrast(_filled(subject, batch, row, target.a), _filled(subject, batch, row, target.b))
    if not isinstance(target, Answer) or target.answer is not None:
        return target
    _check_prompts(batch)
    return replace(target, answer=tuple(_generated(subject, batch, row, target.length)))


def _check_prompts(batch: Batch) -> None:
    if batch.layout is not None or not isinstance(batch.units, TextUnits) or "input_ids" not in batch.kwargs:
        raise ValueError("an answer is one to a prompt, and the input is none; give a text or token ids for each row")


def _runs(target: Target) -> list[Run]:
    """The runs that a target needs, with what is read of each."""
    if isinstance(target, Answer):
        return [Run(target, target)]
    if isinstance(target, Contrast) and _answers(target):
        return [*_runs(target.a), *(replace(run, factor=-run.factor) for run in _runs(target.b))]
    return [Run(None, target)]


def _answered(subject: Subject, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
    _check_prompts(batch)
    runs = [_runs(target) for target in targets.targets]
    count = max(map(len, runs))
    vocabulary = targets.vocabulary
    said: list[list[list[int]]] = []
    asked: list[Target] = []
    decoder = "decoder_input_ids" in batch.kwargs
    for row, own in enumerate(runs):
        # a row of fewer runs shares its last one out, since every row has as many
        share = count - len(own) + 1
        own = [*own[:-1], *[replace(own[-1], factor=own[-1].factor / share)] * share]
        said.append([_given(subject, batch, row, run.answer) for run in own])
        first = (batch.kwargs["decoder_input_ids"].shape[1] if decoder else batch.units.padding[row].count(False)) - 1
        parts = [_read(run, first, vocabulary) for run in own]
        asked.append(parts[0] if count == 1 else Summed(tuple(parts)))
    make = _decoded if decoder else _behind
    return make(subject, batch, said), replace(targets, targets=tuple(asked))


def _read(run: Run, first: int, vocabulary: Vocabulary) -> Target:
    of = run.of if run.answer is None else run.answer.written(first, vocabulary)
    return of if run.factor == 1 else Scaled(of, run.factor)


def _given(subject: Subject, batch: Batch, row: int, answer: Answer | None) -> list[int]:
    """The tokens of an answer to a row.

    Raises: ValueError where the model does not know one of them, or takes no text so long.
    """
    found = [] if answer is None else list(answer.answer)
    size = family.vocabulary_size(subject.model)
    wrong = [token for token in found if not 0 <= token < (size or token + 1)]
    if wrong:
        raise ValueError(f"no token {wrong[0]} in {subject.name}, whose vocabulary has {size}; "
                         "use the tokenizer that belongs to it")
    limit = family.longest(subject.model, subject.tokenizer)
    length = len(found) + (0 if "decoder_input_ids" in batch.kwargs else batch.units.padding[row].count(False))
    if limit is not None and length > limit:
        raise ValueError(f"the prompt of row {row} and its answer have {length} tokens, {subject.name} takes {limit}; "
                         "give a shorter one")
    return found


def _generated(subject: Subject, batch: Batch, row: int, length: int) -> list[int]:
    """What the model writes behind a row's prompt, greedily; without what ends it."""
    if not hasattr(subject.model, "generate"):
        raise ValueError(f"{subject.name} cannot write by itself (it has no generate); give Answer(text)")
    one = batch.take([row])
    own = ~torch.tensor(one.units.padding[0])
    ids = one.kwargs["input_ids"]
    # a row alone has no padding, on whose side the next token would depend
    kwargs = {name: value[:, own.to(value.device)] if value.dim() == 2 and value.shape == ids.shape else value
              for name, value in one.kwargs.items() if name not in ("decoder_input_ids", "position_ids")}
    if "attention_mask" in family.arguments(subject.model):
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    begun = one.kwargs.get("decoder_input_ids")
    if begun is not None:
        kwargs["decoder_input_ids"] = begun
    with settled(subject.model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = subject.model.generate(**kwargs, max_new_tokens=length, do_sample=False, num_beams=1,
                                       pad_token_id=subject.pad_token_id)[0]
    found = whole[(kwargs["input_ids"] if begun is None else begun).shape[1]:].tolist()
    ends = _ends(subject)
    found = found[:next((i for i, token in enumerate(found) if token in ends), len(found))]
    if not found:
        raise ValueError(f"{subject.name} writes nothing behind row {row}; give an answer, Answer(text)")
    return found


def _ends(subject: Subject) -> set[int]:
    """Tokens that end an answer."""
    owners = (subject.tokenizer, getattr(subject.model, "generation_config", None),
              getattr(subject.model, "config", None))
    found: set[int] = set()
    for owner in owners:
        said = getattr(owner, "eos_token_id", None)
        found |= {said} if isinstance(said, int) else set(said or ())
    return found


def _behind(subject: Subject, batch: Batch, said: list[list[list[int]]]) -> Batch:
    """Answers behind the prompts of a model that reads and writes in one sequence."""
    ids, units, count = batch.kwargs["input_ids"], batch.units, len(said[0])
    spell = lambda tokens: _spelled(subject, tokens)
    found = continued(ids, units, said, pad=subject.pad_token_id, spelled=[list(map(spell, each)) for each in said],
                      padding=spell([subject.pad_token_id])[0])
    flat = found.units if found.layout is None else found.layout.units
    more = {name: _moved(name, value, batch, found) for name, value in batch.kwargs.items()
            if name not in ("input_ids", "attention_mask", "position_ids")}
    kwargs = {"input_ids": found.ids, "attention_mask": found.mask, **more}
    made = subject.spoken(kwargs, flat, batch.pictures).to(ids.device)
    made = replace(made, args=tuple(_each(value, count) for value in batch.args))
    return _as(made, batch, found.units, found.layout)


def _moved(name: str, value: Tensor, batch: Batch, found: Continued) -> Tensor:
    """An argument beside the ids: one of as many tokens is put where they are, zero behind them."""
    count = len(found.ids) // batch.rows
    if batch.pictures is not None and name in batch.pictures.packing:
        items = batch.pictures.items([row for row in range(batch.rows) for _ in range(count)])[name]
        return value[items.to(value.device)]
    if not isinstance(value, Tensor) or value.shape[:2] != batch.kwargs["input_ids"].shape:
        return _each(value, count) if isinstance(value, Tensor) and len(value) == batch.rows else value
    rows = []
    for line, gone in zip(value, batch.units.padding):
        own = line[~torch.tensor(gone, device=line.device)]
        filled = own.new_zeros(found.ids.shape[1], *own.shape[1:])
        filled[:len(own)] = own
        rows += [filled] * count
    return torch.stack(rows)


def _decoded(subject: Subject, batch: Batch, said: list[list[list[int]]]) -> Batch:
    """Answers in the decoder of a model that reads and writes apart."""
    begun, count = batch.kwargs["decoder_input_ids"], len(said[0])
    width = max(len(tokens) for each in said for tokens in each)
    pad = subject.pad_token_id
    added = torch.tensor([tokens + [pad] * (width - len(tokens)) for each in said for tokens in each])
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for each in said for tokens in each])
    kwargs = {name: _each(value, count) for name, value in batch.kwargs.items()}
    kwargs["decoder_input_ids"] = torch.cat([kwargs["decoder_input_ids"], added.to(begun)], 1)
    if "decoder_attention_mask" in family.arguments(subject.model):
        before = kwargs.get("decoder_attention_mask", torch.ones_like(_each(begun, count)))
        kwargs["decoder_attention_mask"] = torch.cat([before, mask.to(before)], 1)
    last, read = (_each(value, count) for value in (batch.last, batch.read))
    layout = None if count == 1 else repeated(batch.units, count)
    return replace(batch, kwargs=kwargs, last=last, read=read, layout=layout)


def _each(value: Tensor | None, count: int) -> Tensor | None:
    return value.repeat_interleave(count, 0) if isinstance(value, Tensor) and count > 1 else value


def _spelled(subject: Subject, tokens: Sequence[int]) -> list[str]:
    if subject.tokenizer is None:
        return list(map(str, tokens))
    return [str(one) if token is None else token
            for one, token in zip(tokens, subject.tokenizer.convert_ids_to_tokens(list(tokens)))]


# -- similarity ------------------------------------------------------------------------------------------------------

def _compared(subject: Subject, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
    """Pairs, each text by itself; or inputs that are compared with one that is held."""
    alike = [_similarities(target) for target in targets.targets]
    paired_up = [any(one.to is None for one in each) for each in alike]
    if "pixel_values" in batch.kwargs and "input_ids" in batch.kwargs:  # the model compares both itself
        if not all(one.to is None for each in alike for one in each):
            raise ValueError("an image and a text are compared with each other; leave to= out")
        return batch, targets
    if all(paired_up) and all(isinstance(target, Similarity) for target in targets.targets):
        flat = subject.prepare(paired(batch)).to(next(iter(batch.kwargs.values())).device)
        units = joined(flat.units)
        width = len(flat.units.tokens[0])
        padding = torch.tensor(flat.units.padding).view(batch.rows, 2, width)
        source = torch.arange(2 * width).view(1, 2, width).masked_fill(padding, -1)
        return _as(flat, batch, units, Layout(source, flat.units)), targets
    if any(paired_up):
        raise ValueError("some targets compare the texts of a pair with each other and some do not; explain them apart")
    return batch, replace(targets, targets=tuple(_held(subject, target) for target in targets.targets))


def _similarities(target: Target) -> list[Similarity]:
    """The similarities that a target is made of."""
    if isinstance(target, Contrast):
        return [*_similarities(target.a), *_similarities(target.b)]
    return [target] if isinstance(target, Similarity) else []


def _held(subject: Subject, target: Target) -> Target:
    """A target with the embeddings that inputs are compared with."""
    if isinstance(target, Contrast):
        return Contrast(_held(subject, target.a), _held(subject, target.b))
    if not isinstance(target, Similarity):
        return target
    other = subject.prepare(target.to)
    with settled(subject.model), torch.no_grad():
        e = embedded(subject.forward(other), other, target.pool)
    if len(e) != 1:
        raise ValueError(f"to= is one input that all are compared with, not {len(e)}")
    return Likeness(e[0], target.pool, target.by, called=target.name(None))


def _as(made: Batch, batch: Batch, units: TextUnits, layout: Layout | None) -> Batch:
    """A batch of the sequences of another one, with its rows."""
    pictures = batch.pictures
    if pictures is not None and layout is not None:
        pictures = pictures.take([row for row in range(batch.rows) for _ in range(layout.count)])
    return replace(batch, args=made.args, kwargs=made.kwargs, units=units, last=made.last, read=made.read,
                   layout=layout, pictures=pictures)
