"""One input, made ready to be run many times with a few of its values changed: what the changes cannot reach is
computed once.

Copies of the input's rows are run together, copy by copy, each with a change of its own. Modules that end before the
first change are replayed; of a causal model the positions before it come from the key-value cache; behind the last
attention only the positions that are read are computed. Each of these is tried on the unchanged input first, and left
out where the result is not the plain one's.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import family
from ..intervene import Group, canonical, changed
from ..numerics import tolerance
from ..target import logits
from ..tokens import Batch
from ..trace import Tap
from ..trace.intervention import edited
from .outcome import Question
from .replay import Narrow, Recording, Replay, again, record, replaced

Feed = Callable[[list[int]], Any]
"""The model's output for these rows of an input; a row may come more than once."""


CACHED, FITTING = 512, 1 << 15
"""Positions that are run at once, on a processor and on a GPU."""


@dataclass(frozen=True, eq=False)
class Stage:
    """An input with the question that is asked of it, ready for `answers`.

    `offset` positions are left to the cache, so that positions of the run count from there; `narrow` says whether the
    tail may be narrowed. `plain` is the answer of the unchanged run, (B, ...).
    """

    model: nn.Module
    question: Question
    feed: Feed
    recording: Recording
    offset: int
    narrow: bool
    plain: Tensor

    @property
    def rows(self) -> int:
        return self.question.batch.rows

    def there(self, tap: Tap) -> Tensor:
        """The values at a tap in the unchanged run, (R, P, C)."""
        return canonical(tap, self.recording.layouts[tap], self.recording.values[tap])

    @property
    def room(self) -> int:
        """Rows to run at once where nothing else is said: more would leave the processor's cache, or the GPU."""
        tap = next(iter(self.recording.values))
        positions = self.there(tap).shape[1]
        device = self.recording.values[tap].device
        return max(1, (CACHED if device.type == "cpu" else FITTING) // positions)

    def answers(self, copies: int, groups: Mapping[Tap, list[Group]]) -> Tensor:
        """What the model answers in `copies` of the input that are changed by these groups, (copies, B, ...)."""
        when = [self.recording.when[tap] for tap in groups]
        changes = {tap: changed(tap, self.recording.layouts[tap], copies, found) for tap, found in groups.items()}
        modules: dict[str, Callable[[nn.Module], nn.Module]] = {
            kept.call.path: partial(Replay, output=partial(kept.output, copies))
            for kept in self.recording.before(min(when, default=0))}
        rows, at = list(range(self.rows)) * copies, self._at(copies)
        tail = [call.path for call in self.recording.tail if call.start > max(when, default=0)] if self.narrow else []
        modules |= {path: partial(Narrow, at=at, compact=False) for path in tail}
        picked = bool(tail) and self.question.tokens is not None and _linear(self.model.get_submodule(tail[-1]))
        if tail:
            entries = self.question.tokens if picked else None
            modules[tail[-1]] = partial(Narrow, at=at, compact=True, entries=entries)
        with replaced(self.model, modules), edited(self.model, changes):
            output = self.feed(rows)
        found = read(self.question, output, at, rows=rows, compact=bool(tail), picked=picked)
        return found.unflatten(0, (copies, self.rows))

    def _at(self, copies: int) -> Tensor | None:
        at = self.question.at
        return None if at is None else (at - self.offset).repeat(copies, 1)


def _linear(module: nn.Module) -> bool:
    """Whether a module is a linear map and nothing more, so that some of its outputs can be computed alone."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def read(question: Question, output: Any, at: Tensor | None, *, rows: list[int] | None = None,
         compact: bool = False, picked: bool = False) -> Tensor:
    """The answers in an output, (R, ...), in at least float32.

    Args: at: positions that are read of each row, (R, P); None: the whole output. rows: of the question that the
        output is of; None: all. compact: the output has these positions alone. picked: and only the question's tokens.
    """
    index = torch.arange(question.batch.rows) if rows is None else torch.tensor(rows)
    if at is None:
        return question.answer(output, index)
    z = logits(output)
    if not compact:
        z = z[torch.arange(len(z), device=z.device)[:, None], at.to(z.device)]  # (R, P, V)
    if question.tokens is not None and not picked:
        z = z[..., question.tokens.to(z.device)]
    return question.answer(z, index)


def stage(model: nn.Module, question: Question, taps: Iterable[Tap], *, since: int = 0) -> Stage:
    """An input made ready. Cost: two forward passes, and up to three more to try what saves passes later.

    Args: question: the input and what is read of its output. taps: where it will be changed. since: no change is at a
        position before this one.
    """
    feed, offset = _whole(model, question.batch), 0
    if since and question.at is not None and (since := min(since, int(question.at.min()))):
        cached = _continued(model, question.batch, since)
        if cached is not None and _same(question, feed, cached, since):
            feed, offset = cached, since
    recording = record(model, feed, question.batch.rows, taps)
    plain = read(question, recording.output, None if question.at is None else question.at - offset)
    made = Stage(model, question, feed, recording, offset, True, plain)
    if question.at is None or not recording.tail or not _tried(made):
        made = replace(made, narrow=False)
    return made


def staged_like(other: Stage, question: Question, *, light: bool = False) -> Stage:
    """A second input made ready in the ways that were tried on the first, of the same length. Cost: one forward pass.

    Args: light: keep only the values at taps and the answer, for an input that is not changed itself.
    """
    model, offset = other.model, other.offset
    feed = _continued(model, question.batch, offset) if offset else _whole(model, question.batch)
    recording = again(model, feed, question.batch.rows, other.recording, light=light)
    plain = read(question, recording.output, None if question.at is None else question.at - offset)
    return Stage(model, question, feed, recording, offset, other.narrow, plain)


def staged_apart(other: Stage, question: Question, *, light: bool = False) -> Stage:
    """A second input made ready that is not as long as the first, for the same taps: `stage` of all its positions.

    Args: light: as of `staged_like`.
    """
    made = stage(other.model, question, other.recording.values)
    return replace(made, recording=replace(made.recording, kept=[], tail=[]), narrow=False) if light else made


def _tried(made: Stage) -> bool:
    """Whether narrowing the tail leaves the answer of the unchanged input as it is."""
    try:
        return _close(made.answers(1, {})[0], made.plain)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # the model does something to its positions that was not foreseen


def _same(question: Question, whole: Feed, cached: Feed, since: int) -> bool:
    """Whether the answer with a cache is the plain one, for two rows: the shortest text and the longest."""
    counts = question.batch.rows * [0] if question.prompt is None else question.prompt.sum(1).tolist()
    rows = sorted({counts.index(min(counts)), counts.index(max(counts))})
    at = question.at[rows]
    try:
        found = read(question, cached(rows), at - since, rows=rows)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    return _close(found, read(question, whole(rows), at, rows=rows))


def _close(found: Tensor, plain: Tensor) -> bool:
    """Whether two answers differ by rounding alone."""
    scale = plain.abs().amax().clamp_min(torch.finfo(plain.dtype).tiny)
    return found.shape == plain.shape and bool((found - plain).abs().amax() <= 0.1 * tolerance(plain.dtype) * scale)


# -- feeds -----------------------------------------------------------------------------------------------------------


def _whole(model: nn.Module, batch: Batch) -> Feed:
    """The model on rows of a batch, without a cache of keys and values, which nobody would read."""
    more = {"use_cache": False} if "use_cache" in family.arguments(model) else {}

    def feed(rows: list[int]) -> Any:
        index = torch.tensor(rows)
        args = tuple(_rows(value, index, batch.rows) for value in batch.args)
        return model(*args, **{name: _rows(value, index, batch.rows) for name, value in batch.kwargs.items()}, **more)

    return feed


def _rows(value: Any, index: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == rows:
        return value[index.to(value.device)]
    return value


def _continued(model: nn.Module, batch: Batch, since: int) -> Feed | None:
    """The model on the positions from `since` on, the ones before in its cache; None if it keeps none."""
    name = family.cache_argument(model)
    if name is None or "input_ids" not in batch.kwargs:
        return None
    length = batch.kwargs["input_ids"].shape[1]
    positioned = lambda value: isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length
    before = {key: value[:, :since] if positioned(value) else value for key, value in batch.kwargs.items()}
    after = {key: value[:, since:] if positioned(value) and key != "attention_mask" else value
             for key, value in batch.kwargs.items()}
    short = {"logits_to_keep": 1} if "logits_to_keep" in family.arguments(model) else {}  # nobody reads them
    past = getattr(model(**before, use_cache=True, **short), name, None)
    if not hasattr(past, "batch_select_indices") or not hasattr(past, "layers"):
        return None

    def feed(rows: list[int]) -> Any:
        index = torch.tensor(rows)
        kwargs = {key: _rows(value, index, batch.rows) for key, value in after.items()}
        return model(**kwargs, use_cache=True, **{name: _selected(past, index)})

    return feed


def _selected(past: Any, index: Tensor) -> Any:
    """A cache of these rows, which the model may add to; a layer's rows are picked when the model comes to it."""
    chosen = copy.copy(past)
    chosen.layers = [_picked(layer, index) for layer in past.layers]
    return chosen


def _picked(layer: Any, index: Tensor) -> Any:
    mine = copy.copy(layer)

    def update(*args: Any, **kwargs: Any) -> Any:
        del mine.update  # the class's own from now on
        mine.batch_select_indices(index)
        return mine.update(*args, **kwargs)

    mine.update = update
    return mine
