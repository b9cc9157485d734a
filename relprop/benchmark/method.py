"""The methods that are compared, and the controls that go with every comparison."""
from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from .. import neutral, units
from ..check import control
from ..composite import Composite
from ..data import Data
from ..data.alignment import prepared
from ..errors import IndependentOutput, Undefined
from ..explain import explain
from ..method import METHODS
from ..result import Relevance
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch

RANDOM, CENTRE, REVERSED, FREQUENCY = CONTROLS = ("random", "centre-prior", "reversed", "token-frequency")

Function = Callable[[Subject, Batch, Targets], Relevance]


@dataclass(frozen=True)
class Made:
    """Maps of a batch (B, ...), NaN in rows that have none, and why; the cost of a row."""

    relevance: Tensor
    reasons: list[str | None]
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Method:
    """A method under its name in the table. `run` makes the maps of a batch; `about` is what a report says of it."""

    name: str
    run: Callable[[Batch, Targets], Tensor | Relevance]
    about: object = None
    control: bool = False

    def made(self, batch: Batch, targets: Targets) -> Made:
        """The maps of a batch. Where one row has none, all are made one by one, so that the others have theirs."""
        start = _clock(batch)
        try:
            found = self.run(batch, targets)
        except (IndependentOutput, Undefined) as why:
            if batch.rows == 1:
                empty = torch.full(units.groups(batch).shape, torch.nan)
                return Made(empty, [str(why)], seconds=_clock(batch) - start)
            parts = [self.made(batch.take([row]), targets.take([row])) for row in range(batch.rows)]
            return Made(torch.cat([part.relevance for part in parts]), [part.reasons[0] for part in parts],
                        max(part.forwards for part in parts), max(part.backwards for part in parts),
                        _clock(batch) - start)
        seconds = _clock(batch) - start
        if isinstance(found, Tensor):
            return Made(found, [None] * batch.rows)
        return Made(found.map, [None] * batch.rows, found.forwards, found.backwards, seconds)


def listed(subject: Subject, methods: Sequence[str | Composite] | Mapping[str, object],
           options: Mapping[str, dict] | None = None, *, baseline: str | int | None = None) -> list[Method]:
    """The methods by what a user writes.

    Args: methods: names and composites, or by name in the table: a name, a composite, or a function (subject, batch,
        targets) -> `Relevance`. options: of a method, by its name in the table. baseline: of removed units.
    Raises: ValueError for no method, one that comes twice, an unknown one, or options of one that is not there.
    """
    if isinstance(methods, str | Composite):
        methods = [methods]
    named = dict(methods) if isinstance(methods, Mapping) else _by_name(methods)
    options = dict(options or {})
    if not named:
        raise ValueError(f"no method to compare; the methods are {', '.join(METHODS)}")
    if unknown := [name for name in options if name not in named]:
        raise ValueError(f"options of {unknown[0]!r}, which is not among the methods {', '.join(named)}")
    if taken := [name for name in named if name in CONTROLS[1:]]:
        raise ValueError(f"{taken[0]!r} is the name of a control, which every table has; choose another name")
    return [_method(subject, name, what, _start(subject, what, baseline) | options.get(name, {}))
            for name, what in named.items()]


def _start(subject: Subject, what: object, baseline: str | int | None) -> dict[str, int]:
    """The token id that stands for removed ones as a method's own baseline, where the tokenizer has none to offer."""
    takes = isinstance(what, str) and what in METHODS and "baseline" in signature(METHODS[what]).parameters
    if not takes or not isinstance(baseline, int) or subject.modality == "image":
        return {}
    try:
        neutral.token(subject.tokenizer)
    except ValueError:
        return {"baseline": baseline}
    return {}


def controls(subject: Subject, data: Data, first: Method, *, seed: int, batch_size: int) -> list[Method]:
    """Noise, the centre prior, the first method reversed and, for text, the rarity of tokens among the data."""
    drawn = partial(explain, subject, method=RANDOM, options={"seed": seed})
    found = [Method(RANDOM, lambda batch, targets: drawn(batch, list(targets.targets)).map, {"seed": seed}, True),
             Method(CENTRE, lambda batch, targets: control.centre_prior(batch), None, True),
             Method(REVERSED, lambda batch, targets: control.reversed_map(_map(first.run(batch, targets))),
                    first.name, True)]
    if data.modality == "image":
        return found
    counts: Counter[str] = Counter()
    for start in range(0, len(data), batch_size):
        part = data.take(range(start, min(start + batch_size, len(data))))
        counts += control.counted([prepared(subject, part).units])
    rare = Method(FREQUENCY, lambda batch, targets: control.token_frequency(batch, counts), len(counts), True)
    return [*found, rare]


def plain_seconds(subject: Subject, batch: Batch, targets: Targets) -> float:
    """Seconds of one forward and one backward to the input, the method "gradient", which is nothing else."""
    start = _clock(batch)
    with suppress(IndependentOutput):  # said once both are done
        METHODS["gradient"](subject, batch, targets)
    return _clock(batch) - start


def _by_name(methods: Sequence[str | Composite]) -> dict[str, str | Composite]:
    named = {}
    for method in methods:
        name = method.name if isinstance(method, Composite) else str(method)
        if name in named:
            raise ValueError(f"method {name!r} comes twice; give a mapping from names to methods to tell them apart")
        named[name] = method
    return named


def _method(subject: Subject, name: str, what: object, options: dict) -> Method:
    if isinstance(what, str) and what not in METHODS:
        close = difflib.get_close_matches(what.lower(), METHODS, n=1)
        raise ValueError(f"unknown method {what!r}; the methods are {', '.join(METHODS)}"
                         f"{f'; did you mean {close[0]!r}?' if close else ''}")
    if isinstance(what, str | Composite):
        run = partial(explain, subject, method=what, ledger=False, options=options or None)
        about = what.describe() if isinstance(what, Composite) else {"method": what, **options}
        return Method(name, lambda batch, targets: run(batch, list(targets.targets)), about)
    if not callable(what):
        raise TypeError(f"method {name!r} is a {type(what).__name__}; give a name, a Composite or a function")
    called = f"{getattr(what, '__module__', '')}.{getattr(what, '__qualname__', type(what).__name__)}"
    return Method(name, lambda batch, targets: what(subject, batch, targets, **options),
                  {"function": called, **options})


def _map(found: Tensor | Relevance) -> Tensor:
    return found if isinstance(found, Tensor) else found.map


def _clock(batch: Batch) -> float:
    """Now, in seconds, once the device has done what it was told."""
    if any(isinstance(value, Tensor) and value.is_cuda for value in [*batch.args, *batch.kwargs.values()]):
        torch.cuda.synchronize()
    return time.perf_counter()
