"""What an explanation will take, from how it goes with a few tokens and rows.

A run makes the same tensors in the same order however long the input is. Each of them is seen at two lengths, and with
one row and two; its size at the full length follows, and the peak from all of them, in their order. Where the order
depends on the length (a loop over tokens), the peak itself is taken for such a tensor.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import rows
from ..ops.chunk import shrunk
from ..subject import Subject
from ..target import Prediction, Targets
from ..tokens import Batch, TextUnits
from .budget import free, held_by
from .trace import Trace, grown, levels, traced

Run = Callable[[Subject, Batch, Targets], Any]
SHARES, LEAST = (32, 16), (16, 32)
"""The tokens of the two lengths: the 32nd and the 16th part, but at least 16 and 32."""
GIB = 2 ** 30


@dataclass(frozen=True)
class Estimate:
    """Bytes that an explanation takes at its peak, by kind.

    `weights` are there already; `kept` is what is held for the way back once the model has run, `working` what comes
    on top of it at the peak, on the way back or in a layer. `free`: what is left on `device`, None where nobody says.
    """

    weights: int
    kept: int
    working: int
    device: str
    free: int | None = None

    @property
    def needed(self) -> int:
        """What has to be free, beside the weights."""
        return self.kept + self.working

    @property
    def total(self) -> int:
        """All that is held at the peak, weights included."""
        return self.weights + self.needed

    @property
    def fits(self) -> bool:
        """Whether that much is free, as far as is known."""
        return self.free is None or self.needed <= self.free

    def __str__(self) -> str:
        needed = _size(self.needed)
        unit = "" if needed.endswith("GiB") else " GiB"
        known = "" if self.free is None else f" of {self.free / GIB:.1f}{unit} free"
        return (f"about {needed}{known} on {self.device}: {_size(self.kept)} kept for the way back, "
                f"{_size(self.working)} at work; beside {_size(self.weights)} of weights")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, in bytes."""
        return {"weights": self.weights, "kept": self.kept, "working": self.working, "needed": self.needed,
                "total": self.total, "free": self.free, "device": self.device}


def _size(size: int) -> str:
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / 2**20:.{0 if size >= 10 * 2**20 else 1}f} MiB"


def predicted(run: Run, subject: Subject, batch: Batch, targets: Targets) -> Estimate:
    """What `run(subject, batch, targets)` will take, from runs on less of the batch.

    Cost: runs on one row and on two, of up to a 16th of the tokens, four in all, or six where one row is a special
    case. Pictures are run whole, one of them and two, and what cannot be made smaller, such as one picture, as it is.
    Raises: what the runs raise.
    """
    small = _Small(run, subject, batch, targets)
    small.traced(min(2, batch.rows), small.lengths[0])  # what is made once is made here
    peak, kept = small.whole(1 if batch.rows > 2 else batch.rows)
    kept = min(kept, peak)
    return Estimate(held_by(subject.model), round(kept), round(peak - kept), str(subject.device), free(subject.device))


@dataclass(frozen=True)
class _Small:
    """A run on less of its batch."""

    run: Run
    subject: Subject
    batch: Batch
    targets: Targets

    @property
    def lengths(self) -> tuple[int, int] | tuple[None, None]:
        """The two lengths, in tokens; None where there is nothing to cut."""
        length = tokens(self.batch)
        if length is None or length <= LEAST[0]:
            return None, None
        return tuple(min(length, max(length // share, least)) for share, least in zip(SHARES, LEAST, strict=True))

    def whole(self, few: int) -> tuple[float, float]:
        """The peak and what is held when the model has run, for all rows and tokens, by `few` rows and one more."""
        short, long = self.lengths
        base = self.traced(few, short)
        longer = base if long is None else self.traced(few, long)
        wider = self.traced(few + 1, short) if self.batch.rows > few else base
        columns = base.sizes, longer.sizes, wider.sizes
        if all(_alike(base, other) for other in (longer, wider)):
            return levels([self._grown(few, *sizes) for sizes in zip(*columns, strict=True)], base.marks)
        if few == 1 and self.batch.rows > 2 and _alike(base, longer):
            return self.whole(2)
        found = [levels(one.sizes, one.marks) for one in (base, longer, wider)]  # more takes no less, but by chance
        peak, kept = (self._grown(few, one, max(one, a), max(one, b)) for one, a, b in zip(*found, strict=True))
        return peak, kept

    def _grown(self, few: int, base: float, longer: float, wider: float) -> float:
        """A size for all rows and tokens."""
        whole = base if self.lengths[0] is None else grown(base, longer, self.lengths, tokens(self.batch))
        return whole * (1 + (wider - base) / base * (self.batch.rows - few)) if base else whole

    def traced(self, count: int, length: int | None) -> Trace:
        """The run on the first rows, and tokens."""
        batch, asked, share = self.batch, self.targets, 1.0
        if count < batch.rows:
            batch, asked = batch.take(range(count)), asked.take(range(count))
        if length is not None:
            share, batch = length / tokens(batch), cut(batch, length)
            asked = replace(asked, targets=tuple(Prediction() if _placed(one) else one for one in asked.targets))
        batch, rows_ = _padded(batch, self.batch), count / self.batch.rows
        with shrunk(share * rows_, share * share * rows_), traced() as trace:
            handle = self.subject.model.register_forward_hook(lambda module, args, output: trace.mark())
            try:
                found = self.run(self.subject, batch, asked)
            finally:
                handle.remove()
            del found
        return trace


def _alike(a: Trace, b: Trace) -> bool:
    """Whether two runs took and gave back the same tensors in the same order, of whatever size."""
    return a.marks == b.marks and len(a.sizes) == len(b.sizes) and all(
        (x > 0) == (y > 0) for x, y in zip(a.sizes, b.sizes, strict=True))


def _placed(target: Any) -> bool:
    """Whether a target names positions, which a shorter text may not have."""
    return any(name in vars(target) and vars(target)[name] is not None for name in ("position", "start", "end")) or any(
        _placed(part) for part in vars(target).values() if hasattr(part, "value") and hasattr(part, "__dict__"))


def tokens(batch: Batch) -> int | None:
    """Number of tokens of each row of a text; None for what is not cut along them."""
    name, t = rows.leaf(batch)
    plain = isinstance(batch.units, TextUnits) and batch.layout is None and batch.pictures is None
    return t.shape[1] if plain and name == "input_ids" and t.dim() == 2 else None


def cut(batch: Batch, length: int) -> Batch:
    """The batch with the first tokens of each row, or its last ones where padding is in front."""
    whole = tokens(batch)
    left = _left(batch)
    places = slice(whole - length, None) if left else slice(length)

    def part(value: Any) -> Any:
        along = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == whole
        return value[:, places] if along else value

    units = replace(batch.units, **{
        name: column and [row[places] for row in column] for name, column in vars(batch.units).items()
        if name in ("tokens", "word_ids", "offsets", "special", "padding", "answers")})
    last = None if batch.last is None else (batch.last - (whole - length) if left else batch.last).clamp(0, length - 1)
    return replace(batch, kwargs={name: part(value) for name, value in batch.kwargs.items()}, units=units, last=last,
                   read=None if batch.read is None else batch.read.clamp(max=length - 1))


def _left(batch: Batch) -> bool:
    return any(padding[0] for padding in batch.units.padding)


def _padded(part: Batch, whole: Batch) -> Batch:
    """The part of a batch with padding if the whole has some: models without any leave out their masks, which cost
    memory as well.
    """
    mask = whole.kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return part
    mask, left = part.kwargs["attention_mask"].clone(), _left(whole)
    mask[:, -1 if left else 0] = 1
    mask[0, 0 if left else -1] = 0
    return replace(part, kwargs={**part.kwargs, "attention_mask": mask})


def worth(subject: Subject, batch: Batch) -> bool:
    """Whether a run on this batch could take half of what is free, by the outputs of all linear maps: then it is worth
    the cost of an estimate. A glance at the model.
    """
    left = free(subject.device)
    if left is None:
        return False
    _, t = rows.leaf(batch)
    positions = t.shape[0] * (t.shape[1] if t.dim() < 4 else t.shape[-1] * t.shape[-2] // 64)
    width = sum(one.out_features for one in subject.model.modules() if isinstance(one, nn.Linear))
    return 16 * positions * width > left / 2


def advice(estimate: Estimate, *, several: bool, checkpoint: bool) -> str:
    """What to do where an explanation does not fit."""
    ways: Sequence[str] = [way for way, there in (("batch_size=1", several), ("checkpoint=True", not checkpoint))
                           if there] or ["a shorter input, or a device with more memory"]
    return f"this explanation takes {estimate}; try {' or '.join(ways)}"
