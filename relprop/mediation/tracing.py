"""Causal tracing: noise is put on a part of the input, and each place restored alone to its clean value.

    >>> import relprop
    >>> found = tracing("reviews-bert", "A wonderful film.", "POSITIVE", corrupt="wonderful", draws=2)
    >>> bool(found.total > 0), len(found.mediators) == 4 * 6
    (True, True)

The clean run is the counterfactual and the corrupted run the base, so that indirect effects are what restoring a place
gives back, and the total effect is what the noise took. Reference: Meng et al. 2022 (Locating and editing factual
associations in GPT), section 2.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..address import Spans
from ..data.alignment import word_of_tokens
from ..intervene import Noise, Places, Spot, canonical
from ..intervene.change import Shapes
from ..intervene.inputs import real_of
from ..load import load
from ..result.effects import SCALES
from ..subject import Subject
from ..target import Probability
from ..tokens import Batch, TextUnits
from ..trace import Tap
from ..trace.intervention import captured, edited
from ..trace.layout import Layout
from .experiment import TAKEN
from .finding import Effects
from .measurement import progress, result
from .outcome import Question
from .outcome import outcome as outcome_of
from .stage import stage, staged_like
from .statistic import RESAMPLES
from .sweep import sweep
from .task import At, Report, Task, mediators_of, placed, ready, several

EVERY = "@*"
"""At the end of a pattern: each position for itself."""
WHERE = "embed"
"""What noise is put on."""
_WORDS = "words"  # the span of words that are under noise
_POSITIONS = re.compile(r"cls|-?p?\d+([-,]-?p?\d+)*")


def tracing(subject: str | Subject | nn.Module | tuple, inputs: object, outcome: object = None, *, corrupt: str | int,
            at: At = "L*@*", window: int = 1, strength: float = 3.0, draws: int = 10, scale: str = "difference",
            spans: Spans | None = None, batch_size: int | None = None, resamples: int = RESAMPLES, seed: int = 0,
            show_progress: bool = False) -> Effects:
    """What restoring each place alone gives back, where part of the embedded input is under noise.

    Args:
        subject, outcome, scale, spans, batch_size, resamples, seed: as of `effects`; an outcome of None is the
            probability of what the clean run predicts.
        inputs: clean inputs; see `Subject.prepare`.
        corrupt: the positions under noise: as after the @ of an address, 2, "1-3", "-4", "p12", the name of a span; or
            words of every text, "Space Needle", where they come first in it.
        at: what is restored, as of `effects`; "@*" is each position that all rows have, for itself.
        window: restore as many layers around each one together, as the paper does with 10 of attention and of MLPs.
        strength: standard deviation of the noise, in that of the entries of the embedded inputs.
        draws: of noise; outcomes are their mean.
    Returns: effects of kinds "total", what the noise took, and "indirect"; `about` has the noise and the positions.
    Cost: for each draw that of `effects` with indirect effects alone.
    Raises: ValueError as of `effects`, and for a window, a strength or draws that are none.
    """
    if window < 1 or draws < 1 or not strength > 0:
        raise ValueError(f"window is {window}, draws {draws}, strength {strength:g}; give at least 1, and a strength "
                         "above 0")
    if scale not in SCALES:
        raise ValueError(f"effects are on the scale {' or '.join(SCALES)}, not {scale!r}")
    asked = _task(subject, inputs, outcome, spans, batch_size)
    where = corrupt
    if isinstance(corrupt, str) and corrupt not in (spans or {}) and not _POSITIONS.fullmatch(corrupt):
        where, asked = _WORDS, replace(asked, spans={**(spans or {}), _WORDS: _worded(asked.base, corrupt, spans)})
    with ready(asked.subject.model):
        noise = _Noise.of(asked, where, strength, seed)
        mediators = windowed(mediators_of(asked.subject, asked.base, everywhere(at, asked.base)), window)
        total = len(mediators) * len(asked.pieces) * len(asked.pairs) * draws
        with progress(total, show_progress) as report:
            pieces = [_traced(asked, rows, list(mediators.values()), noise, draws, report) for rows in asked.pieces]
    found = {name: torch.cat([one[name] for one in pieces], -1) for name in pieces[0]}
    at_first = noise.places.at(noise.position, _real(asked.base)[:1])[0].nonzero().flatten().tolist()
    about = {"corrupt": str(corrupt), "corrupted": at_first, "noise": float(noise.std), "draws": draws,
             "window": window}
    return result(asked, tuple(mediators), found, scale=scale, resamples=resamples, seed=seed, about=about)


def everywhere(at: At, batch: Batch) -> At:
    """The patterns of sites with `EVERY` as every position that all rows of the batch have.

    Raises: ValueError for inputs that have neither tokens nor patches.
    """
    if isinstance(at, Mapping) or not any(str(one).endswith(EVERY) for one in several(at)):
        return at
    units = batch.units
    if isinstance(units, TextUnits):
        names = [f"@{place}" for place in range(min(row.count(False) for row in units.padding))]
    elif getattr(units, "grid", None) is not None:
        names = ["@cls", *(f"@p{patch}" for patch in range(units.grid[0] * units.grid[1]))]
    else:
        raise ValueError(f"{EVERY} needs tokens or patches, and this model's input has neither")
    return [str(one).removesuffix(EVERY) + name for one in several(at)
            for name in (names if str(one).endswith(EVERY) else [""])]


def _worded(batch: Batch, words: str, spans: Spans | None) -> list[list[int]]:
    """Where these words stand first in each text, as positions without padding.

    Raises: ValueError for a text that does not have them.
    """
    units = batch.units
    texts = units.texts if isinstance(units, TextUnits) else [""]
    found = []
    for row, text in enumerate(texts):
        start = text.find(words)
        if start < 0:
            known = ", ".join(spans or ()) or "of which none is given"
            raise ValueError(f"noise on {words!r}: input {row} has no such words, and there is no span of this name; "
                             f"give words of every text, positions such as 1-3, or the name of a span, {known}")
        own = [place for place, gone in enumerate(units.padding[row]) if not gone]
        offsets = [(0, 0) if units.special[row][place] else units.offsets[row][place] for place in own]
        told = word_of_tokens(offsets, [(start, start + len(words))])
        found.append([at for at, word in enumerate(told) if word >= 0])
    return found


def windowed(mediators: Mapping[str, Sequence[Spot]], window: int) -> dict[str, list[Spot]]:
    """Mediators with the same place in so many layers around their own, as far as there are layers."""
    if window == 1:
        return {name: list(spots) for name, spots in mediators.items()}
    bare = lambda spot: replace(spot.site, address=replace(spot.site.address, layer=None))
    layers: dict[object, dict[int | None, list[Spot]]] = {}
    for spots in mediators.values():
        for spot in spots:
            layers.setdefault(bare(spot), {}).setdefault(spot.site.address.layer, []).append(spot)
    return {name: [other for spot in spots for layer, found in layers[bare(spot)].items()
                   if _near(layer, spot.site.address.layer, window) for other in found]
            for name, spots in mediators.items()}


def _near(layer: int | None, centre: int | None, window: int) -> bool:
    if layer is None or centre is None:
        return layer == centre
    return centre - (window - 1) // 2 <= layer <= centre + window // 2


def _task(subject: object, inputs: object, outcome: object, spans: Spans | None, batch_size: int | None) -> Task:
    """The clean inputs as both sides of a task."""
    subject = load(subject)
    batch = subject.prepare(inputs)
    asked = outcome_of(Probability() if outcome is None else outcome)
    with ready(subject.model):
        pairs = asked.pairs(subject, batch, batch)
    return Task(subject, batch, batch, asked, pairs, torch.arange(batch.rows), spans, False, batch_size)


def _real(batch: Batch) -> Tensor:
    """Which positions are no padding, (B, T)."""
    units = batch.units
    if isinstance(units, TextUnits):
        return ~torch.tensor(units.padding)
    length = next(iter(batch.kwargs.values())).shape[1] if batch.kwargs else batch.args[0].shape[1]
    return real_of(batch.kwargs, batch.rows, length)


@dataclass(frozen=True, eq=False)
class _Noise:
    """Noise of standard deviation `std` at positions of what is embedded, at `tap`."""

    tap: Tap
    position: int | str
    places: Places
    std: float
    seed: int

    @staticmethod
    def of(task: Task, corrupt: str | int, strength: float, seed: int) -> _Noise:
        (spots,) = mediators_of(task.subject, task.base, {"": f"{WHERE}@{corrupt}"}).values()
        tap, position = spots[0].tap, spots[0].site.address.position
        value, layout = _embedded(task.subject.model, task.base, tap)
        whole = canonical(tap, layout, value)
        real = real_of(task.base.kwargs, *whole.shape[:2]).to(whole.device)
        return _Noise(tap, position, placed(task.subject, task.spans, task.rows),
                      float(strength * whole[real].double().std()), seed)

    @contextmanager
    def on(self, model: nn.Module, question: Question, draw: int) -> Iterator[None]:
        """A `with` block in which runs of rows of this question are under noise; it depends on the embedded values
        that it is put on, so that it is the same in a batch, alone, and whatever follows.
        """
        value, layout = _embedded(model, question.batch, self.tap)
        clean = canonical(self.tap, layout, value)  # (R, P, C)
        real = question.prompt
        if real is None or real.shape != clean.shape[:2]:
            real = real_of(question.batch.kwargs, *clean.shape[:2])
        where = self.places.at(self.position, real).to(clean.device)
        noisy, one = clean.clone(), Noise(self.std, self.seed + draw)
        for row, chosen in enumerate(where):
            noisy[row, chosen] = one.value(clean[row, chosen][None, None], None)[0, 0]

        def change(x: Tensor) -> Tensor:
            y = x.clone(memory_format=torch.contiguous_format)
            view = layout.view(y)[0]  # (rows, P, C), of any rows of the question
            which, known = _rows(view, clean, 1e-3 * self.std)
            view.copy_(torch.where((where[which] & known[:, None])[..., None], noisy[which], view))
            return y

        with edited(model, {self.tap: change}):
            yield


def _rows(value: Tensor, clean: Tensor, close: float) -> tuple[Tensor, Tensor]:
    """Which row of `clean` each row of `value` is, (N,), and whether it is one: what has its noise already is none.

    Rows are told by what is in them, since a model is run on some rows of a question, several times each; first taken
    for copies of all of them in turn.
    """
    N, R = len(value), len(clean)
    which = torch.arange(N, device=value.device) % R
    apart = (value - clean[which]).abs().flatten(1).amax(1)
    for row in (apart > close).nonzero().flatten().tolist():
        distance = (value[row] - clean).abs().flatten(1).amax(1)
        which[row], apart[row] = distance.argmin(), distance.min()
    return which, apart <= close


def _embedded(model: nn.Module, batch: Batch, tap: Tap) -> tuple[Tensor, Layout]:
    """The embedded input as the model has it, and where its rows are.

    Raises: ValueError for one that does not depend on the rows.
    """
    _, found = captured(model, [tap], lambda: model(*batch.args, **batch.kwargs))
    layout = Shapes(model, batch.args, batch.kwargs, [tap], found).layout(tap)
    if layout is None:
        raise ValueError("the embedded input of this model has no rows, so that noise cannot be put on it")
    return found[tap], layout


def _traced(task: Task, rows: Tensor, mediators: list[list[Spot]], noise: _Noise, draws: int, report: Report
            ) -> dict[str, Tensor]:
    """Outcomes of these rows, means over draws: under noise, without it, and with each mediator restored."""
    noise = replace(noise, places=placed(task.subject, task.spans, rows))
    questions = [question.take(rows) for question, _ in task.pairs]
    values = lambda answers: task.outcome.value([one.double().cpu() for one in answers])
    found = []
    for draw in range(draws):
        runs = [_restored(task, question, mediators, noise, draw, report) for question in questions]
        corrupted, clean, restored = (values(answers) for answers in zip(*runs))
        found.append({"base": corrupted, "counterfactual": clean, "indirect_outcome": restored})
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def _restored(task: Task, question: Question, mediators: list[list[Spot]], noise: _Noise, draw: int, report: Report
              ) -> tuple[Tensor, Tensor, Tensor]:
    """What the model answers under noise, without it, and under noise with each mediator as without it."""
    model, taps = task.subject.model, list(dict.fromkeys(spot.tap for mediator in mediators for spot in mediator))
    with noise.on(model, question, draw):
        corrupted = stage(model, question, taps)
    clean = staged_like(corrupted, question, light=True)
    with noise.on(model, question, draw):
        restored = sweep(corrupted, mediators, TAKEN, {tap: clean.there(tap) for tap in taps},
                         batch_size=task.batch_size, places=noise.places, report=report)
    return corrupted.plain, clean.plain, restored
