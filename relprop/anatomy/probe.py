"""What cannot be read off a graph, found by running the model with a value changed."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..trace import Tap
from ..trace.intervention import Change, edited

MIXED = 1e-4
"""Change elsewhere, relative to that where a position was changed, from which on positions are mixed."""


@dataclass(frozen=True)
class Question:
    """Whether a part mixes positions: what it reads, what it gives, and the operands of its linear maps."""

    read: Tap
    given: Tap
    maps: tuple[Tap, ...] = ()


Answer = bool | Tap | None
"""Whether a part mixes positions; of one whose linear maps read along positions, and not features, such a map; None
where it has only one position, or gives something of another shape.
"""


def mixing(model: nn.Module, args: tuple, kwargs: dict, questions: Iterable[Question]) -> dict[Question, Answer]:
    """Whether what a part gives at one position depends on what it reads at another. Cost: two forward passes, in the
    second of which every part reads what it read in the first but for one position, whatever the parts before it give.
    """
    questions = list(questions)
    reads = {one.read for one in questions}
    looks = {tap for one in questions for tap in (one.given, *one.maps)}
    plain, moved = {}, {}
    _run(model, args, kwargs, {tap: _kept(plain, tap) for tap in reads | looks})
    changes = {tap: _kept(moved, tap) for tap in looks}
    changes |= {tap: _moved(plain[tap], tap, _kept(moved, tap)) for tap in reads & plain.keys()}
    _run(model, args, kwargs, changes)
    return {one: _mixes(one, plain, moved) for one in questions}


def _run(model: nn.Module, args: tuple, kwargs: dict, changes: Mapping[Tap, Change]) -> Any:
    with edited(model, changes):
        return model(*args, **kwargs)


def _kept(where: dict[Tap, Tensor], tap: Tap) -> Change:
    return lambda value: where.__setitem__(tap, value.detach().clone())


def _position(x: Tensor) -> int:
    """An axis of positions of a tensor of one row with its vectors on the last axis: not the row's."""
    return next((axis for axis in range(1, x.dim() - 1) if x.shape[axis] > 1), 0)


def _moved(plain: Tensor, tap: Tap, keep: Change) -> Change:
    """Puts there what was there before, but for one position, at which every entry is another: the second, which has
    one before it, and is no padding.
    """
    axis = _position(plain)
    changed = plain.clone()
    place = changed.select(axis, min(1, plain.shape[axis] - 1))
    wave = torch.arange(1, place.numel() + 1, device=plain.device).mul(2.4).sin().view(place.shape).to(plain)
    place.add_(wave * plain.float().std().to(plain).clamp_min(1e-6))

    def change(now: Tensor) -> Tensor | None:
        keep(changed)
        return changed if now.shape == changed.shape else None

    return change


def _mixes(question: Question, plain: dict[Tap, Tensor], moved: dict[Tap, Tensor]) -> bool | Tap | None:
    read, before, after = (where.get(tap) for where, tap in
                           ((plain, question.read), (plain, question.given), (moved, question.given)))
    if read is None or before is None or after is None or before.shape != after.shape:
        return None
    axis = _position(read)
    if before.shape != read.shape or read.shape[axis] < 2:
        return None
    change = (after - before).abs()
    elsewhere = torch.cat([change.narrow(axis, 0, 1), change.narrow(axis, 2, change.shape[axis] - 2)], axis)
    if not elsewhere.max() > MIXED * change.max():
        return False
    return next((tap for tap in question.maps if _along(plain.get(tap), moved.get(tap))), True)


def _along(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether what a linear map reads has changed in one entry of its vectors alone, though in every vector: they lie
    along positions.
    """
    if before is None or after is None or before.shape != after.shape or before.shape[-1] < 2:
        return False
    changed = (before != after).flatten(0, -2)
    return bool(changed.any(0).sum() == 1 and changed.any(1).all())


def silent(model: nn.Module, args: tuple, kwargs: dict, taps: Iterable[Tap]) -> bool:
    """Whether the output is the same whatever stands at these places. Cost: two forward passes."""
    plain = _run(model, args, kwargs, {})
    changed = _run(model, args, kwargs, {tap: torch.zeros_like for tap in taps})
    return same(plain, changed)


def same(plain: Any, output: Any) -> bool:
    """Whether all tensors of two outputs are equal."""
    pairs = zip(tree_leaves(plain), tree_leaves(output), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


__all__ = ["Answer", "Question", "mixing", "same", "silent"]
