"""What is put at a site: zero, a given value, noise, a mean, the value or pattern of another run."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import rows
from .inputs import arguments, real_of


@dataclass(frozen=True, eq=False)
class Intervention:
    """What is put at a site. `value` makes it of what is there `now`, (N, R, P, W): N sites alike, R rows, P positions
    (of queries, where it is an attention pattern), W entries; and of what is `there` in the run of `source`.
    """

    source: Any = field(default=None, kw_only=True)

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """Zeros."""

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        return torch.zeros_like(now)


@dataclass(frozen=True, eq=False)
class Given(Intervention):
    """A value of the user's, (P, W) or any shape that spreads to (rows, positions, entries) of the site."""

    given: Tensor | float

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        value = torch.as_tensor(self.given, dtype=now.dtype, device=now.device)
        try:
            return value.expand_as(now)
        except RuntimeError as cause:
            raise ValueError(f"a given value of shape {tuple(value.shape)} for a site of {tuple(now.shape[1:])} "
                             "(rows, positions, entries)") from cause


@dataclass(frozen=True, eq=False)
class Noise(Intervention):
    """Gaussian noise of this standard deviation added to what is there (Meng et al. 2022, at `embed`).

    What is drawn for a row depends on the seed and the row's own value, so a batch draws what its rows would alone.
    """

    std: float
    seed: int = 0

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        drawn = [torch.randn(one.shape, generator=rows.generator(self.seed, one), dtype=torch.float64)
                 for one in now.flatten(0, 1)]
        return now + self.std * torch.stack(drawn).view(now.shape).to(now)


@dataclass(frozen=True, eq=False)
class Resample(Intervention):
    """The value in the run of another input, of as many rows or one, at the same position.

    Args: inputs: as the model takes them: tensors by name, a tuple of arguments, a tensor, or a prepared batch.
        align: position in that run for each position of this one, (P,) or (rows, P); -1 leaves a position as it is.
            Needed where the inputs differ in length.
    """

    inputs: Any
    align: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.inputs)

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        if self.align is None:
            if there.shape[2:] != now.shape[2:] or there.shape[1] not in (1, now.shape[1]):
                raise ValueError(f"the other input has {tuple(there.shape[1:3])} (rows, positions) where this one has "
                                 f"{tuple(now.shape[1:3])}; make them equal, or give align=")
            return there.expand_as(now)
        at = torch.as_tensor(self.align, device=now.device).expand(now.shape[1], -1)  # (R, P)
        if at.shape[1] != now.shape[2] or int(at.max()) >= there.shape[2]:
            raise ValueError(f"align of {at.shape[1]} positions up to {int(at.max())}, for an input of {now.shape[2]} "
                             f"and another of {there.shape[2]}")
        if there.shape[3] != now.shape[3]:
            raise ValueError("attention patterns of inputs of different length cannot be aligned")
        row = torch.arange(now.shape[1], device=now.device)[:, None].clamp_max(there.shape[1] - 1)
        return torch.where((at >= 0)[None, :, :, None], there[:, row, at.clamp_min(0)], now)


@dataclass(frozen=True, eq=False)
class Hold(Resample):
    """The value in the run of the base input, whatever the input of this run: for direct effects.

    Without inputs, the value that this run's own input gives without any intervention: whatever is done elsewhere does
    not pass through here.
    """

    inputs: Any = None


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """The mean over the rows and positions of a reference set, padding left out; with `per_position`, over rows only.

    Args: inputs: of the reference set, as of `Resample`.
    """

    inputs: Any
    per_position: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.inputs)

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        real = real_of(arguments(self.inputs)[1], there.shape[1], there.shape[2]).to(there.device)[None, :, :, None]
        over = (1,) if self.per_position else (1, 2)
        mean = (there * real).sum(over, keepdim=True) / real.sum(over, keepdim=True)
        if self.per_position and mean.shape[2] != now.shape[2]:
            raise ValueError(f"a reference set of {mean.shape[2]} positions for an input of {now.shape[2]}; means per "
                             "position need as many")
        return mean.expand_as(now)


@dataclass(frozen=True, eq=False)
class Pattern(Resample):
    """The attention pattern, after the softmax, of another input's run, put at a head, or at all heads of an attention.

    Args: within: swap rows and columns up to here only, as of a prompt that is continued (Vig et al. 2020): a number of
        positions, or one for each row.
    """

    within: int | Tensor | None = None

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        changed = Resample.value(self, now, there)
        return changed if self.within is None else torch.where(inside(self.within, now), changed, now)


def inside(within: int | Tensor, now: Tensor) -> Tensor:
    """Which rows and columns of patterns, (N, R, T, S), lie before `within`: bool, (1, R or 1, T, S)."""
    end = torch.as_tensor(within, device=now.device).reshape(1, -1, 1, 1)
    T, S = (torch.arange(size, device=now.device) for size in now.shape[2:])
    return (T[None, None, :, None] < end) & (S[None, None, None, :] < end)
