"""What a finite change of a mediator does at the norms that read what it writes.

A change of one mediator is small beside the outcome, not beside the stream: at a norm, the change d that it writes into
the stream at one position may be as large as what is there, and the norm's scale changes with it. All other ops are
left at first order. The rule is `ops.norm.finite`; here is what it is given: the norms of a model, found by what they
do, and the inner products of d with what a norm reads and with its relevance per unit, for all mediators of a tap at
once. The norms that read the same writes, from the next one to the last, are taken together, as one norm of their
summed relevance: their inner products with d are then two for each mediator however deep the model is, and measured
the ranks are as good (see `relprop.approximation`).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..composite import Composite, Rules
from ..numerics import tolerance
from ..ops import norm
from ..trace import Tap
from ..trace.stream import Reading, readings

STEP = 1e-2
"""Of a probe that tells a norm's eps, beside one of size 1."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm y = (x - mean x) s w + b, s = (mean of squares + eps)^(-1/2) over the last axis, without the mean where
    nothing is centred; `weight` (D,).
    """

    weight: Tensor
    eps: float
    centre: bool

    def centred(self, x: Tensor) -> Tensor:
        """x without its mean over the last axis, where the norm takes that out."""
        return x - x.mean(-1, keepdim=True) if self.centre else x

    def scale(self, x: Tensor) -> Tensor:
        """s of a centred x, (..., 1)."""
        return (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    @staticmethod
    @torch.no_grad()
    def of(module: nn.Module, read: Tensor, made: Tensor) -> Norm | None:
        """What a module is, told by three probes and checked on what it `made` of what it `read`; None if no norm."""
        probe = _probe(read.shape[-1])
        probes = torch.stack([0 * probe, probe, STEP * probe, probe + 1]).to(read)
        try:
            constant, one, small, moved = module(probes if read.dim() < 3 else probes[None]).reshape(4, -1).double()
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return None  # it wants another shape, and is no norm of the last axis
        made_of_one = one - constant
        share = float((small - constant) @ made_of_one / (made_of_one @ made_of_one).clamp_min(1e-300))
        if not 2 * STEP < share < 1 + STEP:  # a linear map makes STEP of it
            return None
        eps = max(0.0, STEP**2 * (1 - share**2) / (share**2 - STEP**2))
        found = Norm(made_of_one / probe.to(made_of_one) * (1 + eps)**0.5, eps, bool(torch.allclose(
            moved, one, rtol=1e-3, atol=1e-3 * float(made_of_one.abs().max()))))
        x = found.centred(read.double())
        again = x * found.scale(x) * found.weight + constant
        size = float(made.abs().max())
        coarse = 10 * max(tolerance(read.dtype), tolerance(torch.float32))  # models compute norms in float32
        same = bool(((again - made.double()).abs() <= coarse * size).all()) and size > 0
        return replace(found, weight=found.weight.to(read)) if same else None


def _probe(width: int) -> Tensor:
    """Entries of many sizes, none zero, of mean 0 and mean square 1."""
    probe = torch.linspace(1, 2, width, dtype=torch.float64)
    probe[::2] *= -1
    probe = probe - probe.mean()
    return probe / probe.square().mean().sqrt()


@dataclass(frozen=True, eq=False)
class Station:
    """A norm in a model that reads what these taps write."""

    norm: Norm
    path: str
    nth: int
    taps: frozenset[Tap]

    @property
    def input(self) -> Tap:
        """What the norm reads."""
        return Tap(self.path, None, "input", self.nth)

    @property
    def output(self) -> Tap:
        """What it makes."""
        return Tap(self.path, None, "output", self.nth)


@dataclass(frozen=True, eq=False)
class Stations:
    """The norms of a model whose finite changes count, in order, and how each tap writes: by a matrix (C, D), or None
    for the value itself.
    """

    found: tuple[Station, ...] = ()
    weights: dict[Tap, Tensor | None] | None = None

    def of(self, tap: Tap) -> list[Station]:
        """Those that read what a tap writes."""
        return [station for station in self.found if tap in station.taps]


NO_STATIONS = Stations()


def stations(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], taps: Sequence[Tap],
             composite: Composite) -> Stations:
    """The norms of a model that the composite has `norm.finite` for. Cost: a forward of this input, if there are any.
    """
    if first_order(composite) == composite:
        return NO_STATIONS
    modules = dict(model.named_modules())
    wanted = lambda path: composite.rule("norm", path, type(modules[path])) is norm.finite
    found, weights = readings(model, args, kwargs, taps)
    known: dict[str, Norm | None] = {}
    for one in found:
        if one.path not in known:
            known[one.path] = _norm(modules[one.path], one) if wanted(one.path) else None
    return Stations(tuple(Station(known[one.path], one.path, one.nth, one.writes)
                          for one in found if known[one.path] is not None), weights)


def _norm(module: nn.Module, one: Reading) -> Norm | None:
    return Norm.of(module, one.read, one.made) if one.read.is_floating_point() else None


def first_order(composite: Composite) -> Composite:
    """The composite with the gradient for the norms that change finitely: what its backward pass follows."""
    def plain(rules: Rules) -> Rules:
        if callable(rules):
            return norm.gradient if rules is norm.finite else rules
        return {kind: plain(rule) for kind, rule in rules.items()}

    return replace(composite, rules=plain(composite.rules),
                   modules={kind: plain(rules) for kind, rules in composite.modules.items()},
                   paths={path: plain(rules) for path, rules in composite.paths.items()})


@dataclass(frozen=True, eq=False)
class Passage:
    """What passes a norm at each position, or several as one: `relevance` R = sum_i x_i u_i, (..., 1), relevance
    `per_unit` u, (..., D), and of the norm's scale s, (..., 1), what a change d makes of it: `along` s^2 x / D,
    (..., D), and `scale` s^2 / D, (..., 1). Of several, relevance is their sum, and s and x are their mean by |u|.
    """

    relevance: Tensor
    per_unit: Tensor
    along: Tensor
    scale: Tensor
    centre: bool

    @staticmethod
    def of(one: Norm, read: Tensor, per_unit: Tensor) -> Passage:
        """Of one norm. Args: read: what it reads, (..., D). per_unit: relevance per unit of what it makes, (..., D)."""
        x = one.centred(read)
        s = one.scale(x)
        u = norm.held(per_unit, one.weight.to(x), s, centre=one.centre, dims=(-1,))
        square = s.square() / x.shape[-1]
        return Passage((x * u).sum(-1, keepdim=True), u, x * square, square, one.centre)

    @staticmethod
    def joined(many: Sequence[Passage]) -> Passage:
        """Of several norms as one."""
        if len(many) == 1:
            return many[0]
        sizes = torch.stack([one.per_unit.norm(dim=-1, keepdim=True) for one in many])  # (S, ..., 1)
        share = sizes / sizes.sum(0).clamp_min(torch.finfo(sizes.dtype).tiny)
        mean = lambda name: sum(part * getattr(one, name) for part, one in zip(share, many))
        total = lambda name: sum(getattr(one, name) for one in many)
        return Passage(total("relevance"), total("per_unit"), mean("along"), mean("scale"), many[0].centre)

    def at(self, where: tuple[Tensor, ...]) -> Passage:
        """At some positions."""
        return Passage(*(one[where] for one in (self.relevance, self.per_unit, self.along, self.scale)), self.centre)

    def beyond(self, change: Tensor, weight: Tensor | None, units: int | None) -> Tensor:
        """What the finite change of each unit does beyond first order, (M, U) at M positions.

        Args: change: of the values at the tap, (M, C). weight: (C, D) by which they are written; None: as they are.
            units: of how many equal parts the C entries are; None: each is one.
        """
        by_unit = lambda entries: entries if units is None else entries.unflatten(-1, (units, -1)).sum(-1)
        along, passed = self.along, self.per_unit
        if weight is not None:
            along, passed = (torch.cat([along, passed]) @ weight.to(change).T).chunk(2)  # (M, C)
        along, passed = by_unit(change * along), by_unit(change * passed)  # (M, U)
        size = self._size(change, weight, units) * self.scale
        more = norm.rescaled(along, size)  # of `norm.finite` less passed - along R, with less rounding
        return more * passed + (more + along) * self.relevance

    def _size(self, change: Tensor, weight: Tensor | None, units: int | None) -> Tensor:
        """|d|^2 of what each unit writes, without its mean where the norms take that out, (M, U)."""
        if weight is None:
            each = change[..., None] if units is None else change.unflatten(-1, (units, -1))
            mean = each.sum(-1).square() / change.shape[-1] if self.centre else 0.0
            return each.square().sum(-1) - mean
        weight = weight.to(change)
        weight = weight - weight.mean(-1, keepdim=True) if self.centre else weight
        if units is None:
            return change.square() * weight.square().sum(-1)
        by_unit = weight.unflatten(0, (units, -1))  # (U, K, D)
        each = change.unflatten(-1, (units, -1))  # (M, U, K)
        return torch.einsum("muk,ukl,mul->mu", each, by_unit @ by_unit.mT, each)


__all__ = ["NO_STATIONS", "Norm", "Passage", "Station", "Stations", "first_order", "stations"]
