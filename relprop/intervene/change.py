"""From spots and values to changes of tapped tensors, whatever their layout."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..trace import Tap
from ..trace.intervention import PATTERN, Change, Heads, captured
from ..trace.layout import Layout, guess, learn
from .inputs import arguments, picked, real_of, rows_of
from .site import Site
from .value import Intervention


@dataclass(frozen=True, eq=False)
class Group:
    """Spots of one tap that are changed alike: N of them, each in its `copy` of the batch, and what `change` makes of
    their values, (N, R, P, W).
    """

    copy: Tensor
    unit: Tensor
    units: int | None
    change: Callable[[Tensor], Tensor]


def changed(tap: Tap, layout: Layout | None, copies: int, groups: list[Group]) -> Change | Heads:
    """The change of a tapped tensor that these groups make, one after the other."""
    if tap.side == PATTERN:
        return _patterns(copies, groups)

    def change(x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        whole = y[None, None] if layout is None else layout.view(y, copies)
        for group in groups:
            units = split(whole, group.units)
            _check(group.unit, units, tap)
            now = units[group.copy, :, :, group.unit]
            units[group.copy, :, :, group.unit] = group.change(now).to(now)
        return y

    return change


def split(whole: Tensor, units: int | None) -> Tensor:
    """(..., C) as (..., U, W): C entries as U units of W each, `units` None being C units."""
    units = whole.shape[-1] if units is None else units
    if whole.shape[-1] % units:
        raise ValueError(f"{whole.shape[-1]} entries cannot be {units} heads")
    return whole.unflatten(-1, (units, -1))


def units_of(whole: Tensor, units: int | None, unit: Tensor, tap: Tap) -> Tensor:
    """Some units of a tap's vectors, (R, P, C), as (N, R, P, W).

    Raises: ValueError for a unit that they do not have.
    """
    found = split(whole, units)
    _check(unit, found, tap)
    return found[:, :, unit].movedim(2, 0)


def _check(unit: Tensor, split: Tensor, tap: Tap) -> None:
    """Raises: ValueError for a unit of (..., U, W) that there is not."""
    if int(unit.max()) >= split.shape[-2]:
        raise ValueError(f"no entry {int(unit.max())} of the vectors at {tap.path or 'the output'}, which have "
                         f"{split.shape[-2]}; give [0] to [{split.shape[-2] - 1}], or [*] for each")


def _patterns(copies: int, groups: list[Group]) -> Heads:
    sizes = [len(group.copy) for group in groups]

    def change(now: Tensor) -> Tensor:
        return torch.cat([group.change(part) for group, part in zip(groups, now.split(sizes))])

    return Heads(copies, torch.cat([group.copy for group in groups]), torch.cat([group.unit for group in groups]),
                 change)


def canonical(tap: Tap, layout: Layout | None, value: Tensor) -> Tensor:
    """A captured tensor as (R, P, C): rows, positions, entries; a pattern, (B, H, T, S), as (B, T, H S)."""
    if tap.side == PATTERN:
        return value.transpose(1, 2).flatten(2)
    return value[None] if layout is None else layout.view(value)[0]


def reference(model: nn.Module, one: Intervention, taps: list[Tap]) -> dict[Tap, Tensor]:
    """The values at taps in the run that an intervention refers to, (R, P, C) each; none if it refers to none."""
    if one.source is None:
        return {}
    args, kwargs = arguments(one.source)
    return values_at(model, args, kwargs, taps)


def values_at(model: nn.Module, args: Any, kwargs: Any, taps: list[Tap]) -> dict[Tap, Tensor]:
    with torch.no_grad():
        _, found = captured(model, taps, lambda: model(*args, **kwargs))
    shapes = Shapes(model, args, kwargs, taps, found)
    return {tap: canonical(tap, shapes.layout(tap), value) for tap, value in found.items()}


class Shapes:
    """Layouts of the tapped tensors of one forward pass, found when they are asked for."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, taps: list[Tap],
                 values: Mapping[Tap, Tensor] | None = None) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.taps = [tap for tap in taps if tap.side != PATTERN]
        self.rows = rows_of(args, kwargs)
        self.values = values
        self.layouts: dict[Tap, Layout | None] = {}

    def layout(self, tap: Tap) -> Layout | None:
        if tap.side == PATTERN:
            return None
        if tap not in self.layouts:
            if self.values is None:
                self.values = self._run(range(self.rows))
            shapes = {one: self.values[one].shape for one in self.taps}
            guessed = {one: guess(shape, self.rows) for one, shape in shapes.items()}
            if any(found is None for found in guessed.values()):  # a pass with one row more tells
                more = self._run([*range(self.rows), 0])
                guessed = {one: learn(shape, self.rows, more[one].shape, self.rows + 1) for one, shape in
                           shapes.items()}
            self.layouts = guessed
        return self.layouts[tap]

    def real(self, count: int, length: int, site: Site) -> Tensor:
        """Which of the positions at a site are not padding, (rows, length)."""
        if count != self.rows:
            raise ValueError(f"{site}: positions cannot be told apart there, {count} windows of {self.rows} rows")
        return real_of(self.kwargs, count, length)

    def _run(self, chosen: Any) -> dict[Tap, Tensor]:
        args, kwargs = picked(self.args, self.kwargs, list(chosen))
        with torch.no_grad():
            return captured(self.model, self.taps, lambda: self.model(*args, **kwargs))[1]
