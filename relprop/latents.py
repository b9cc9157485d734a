"""Relevance inside a model: at addresses, for every method that passes through the layers.

A method that is no composite takes part by a keyword `at`, a tuple of addresses without positions, which it answers
with `latents` in its result, by the address's text: (B, T), or of patterns (B, T, S). Positions are picked here.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor

from .address import Address, Spans, located
from .anatomy import Anatomy, anatomy
from .asked import Asked
from .relevance import Propagation, propagate
from .subject import Subject
from .target import Targets
from .tokens import Batch, ImageUnits, TextUnits
from .trace import Tap
from .trace.layout import vectors


@dataclass(frozen=True, eq=False)
class Places:
    """Places inside a model whose relevance is wanted, and the taps that show it."""

    batch: Batch
    anatomy: Anatomy
    taps: dict[Address, Tap]

    @property
    def named(self) -> dict[str, Tap]:
        """The taps by the text of their address, as `propagate` takes them."""
        return {str(place): tap for place, tap in self.taps.items()}

    def read(self, found: Propagation, rules: str) -> dict[str, Tensor]:
        """Relevance of each place at all positions, (B, T); of a pattern (B, T, S), of all heads (B, H, T, S); of
        windows (B, W, T) and so on.

        Raises: ValueError for a place through which no relevance passes under these rules.
        """
        return {str(place): self._read(place, tap, found, rules) for place, tap in self.taps.items()}

    def _read(self, place: Address, tap: Tap, found: Propagation, rules: str) -> Tensor:
        inside = found.inside.get(str(place))
        if inside is None:
            why = ("its rules hold attention patterns constant, so that all relevance goes to the values" if place.inner
                   else "the explained input does not reach it, or the model never came to it")
            raise ValueError(f"{place} has no relevance under {rules}: {why}")
        whole = inside.value * inside.per_unit if inside.per_unit is not None else torch.zeros_like(inside.value)
        return self.of(place, tap, whole).float().cpu()

    def of(self, place: Address, tap: Tap, whole: Tensor) -> Tensor:
        """Relevance of one place from that of the tensor at its tap."""
        if place.inner is not None:
            whole = whole if whole.dim() == 4 and len(whole) == self.batch.rows else whole.unflatten(
                0, (self.batch.rows, -1))  # (B H, T, S), or (B W, H, T, S) of windows
            return whole if place.unit is None else whole.select(-3, place.index)
        whole = vectors(whole, tap.axes)
        if place.unit == "H":
            whole = whole.unflatten(-1, (self.anatomy.units(place), -1))[..., place.index, :]
        elif place.unit == "N":
            whole = whole[..., place.index, None]
        return by_row(whole, self.batch.rows).sum(-1)


def places(subject: Subject, batch: Batch, at: Iterable[str | Address]) -> Places:
    """Every place that these addresses mean, at all positions. Cost: a forward of one row.

    Raises: ValueError for what is no address, or not in the model.
    """
    # of pictures one after the other, only the batch knows which are of the row that is watched
    seen = batch if batch.pictures is None else batch.take([0])
    parts = anatomy(subject.model, seen.args, seen.kwargs)
    wanted = [one if isinstance(one, Address) else Address.parse(one) for one in at]
    return Places(batch, parts, {place: tap for one in wanted for place, tap in parts.resolve(one.whole)})


def by_gradient(subject: Subject, batch: Batch, targets: Targets, at: Sequence[str]) -> dict[str, Tensor]:
    """Activation x gradient of the target, summed over features, at addresses: as `Places.read`. No address, no cost;
    else a forward and a backward of the batch and a forward of one row.
    """
    if not at:
        return {}
    wanted = places(subject, batch, at)
    found = propagate(subject.model, batch.args, batch.kwargs, Asked(targets, batch), "gradient", ledger=False,
                      taps=wanted.named)
    return wanted.read(found, "the gradient")


def answers(method: Callable[..., object]) -> bool:
    """Whether a method passes through the layers, so that it answers for addresses: it takes `at`."""
    return "at" in signature(method).parameters


def wholes(wanted: Iterable[Address]) -> tuple[str, ...]:
    """What a method is asked for: these addresses without their positions, each once."""
    return tuple(dict.fromkeys(str(address.whole) for address in wanted))


def picked(latents: dict[str, Tensor], wanted: Iterable[Address], batch: Batch, spans: Spans | None,
           ) -> dict[str, Tensor]:
    """Latents at the positions that each address asks for, by its text with them.

    Args: latents: at all positions, as of `Places.read`. spans: positions by name.
    Raises: ValueError for positions that a row does not have.
    """
    found = {}
    for address in wanted:
        for name, whole in latents.items():
            place = Address.parse(name)
            if address.whole.matches(place):
                key = name if address.position is None else f"{name}@{address.position}"
                found[key] = whole if address.position is None else _positioned(whole, address, place, batch, spans)
    return found


def _positioned(whole: Tensor, address: Address, place: Address, batch: Batch, spans: Spans | None) -> Tensor:
    """The sum over some positions of each row, (B,); of a pattern, over queries, (B, S)."""
    dim = -1 if place.inner is None else -2
    length = whole.shape[dim]
    if whole.dim() > (2 if place.inner is None else 4 if place.unit is None else 3):
        raise ValueError(f"{address}: this model attends in windows, whose positions are not those of the input")
    before = prefix(batch, length)
    rows = []
    for row, real in enumerate(own(batch, length)):
        places = real.nonzero().flatten()
        try:
            chosen = located(address.position, len(places), row=row, prefix=before, spans=spans,
                             classed=_classed(batch, row, before))
        except ValueError as cause:
            raise ValueError(f"{address.whole}{cause}") from cause
        rows.append(whole[row].index_select(dim, places[chosen]).sum(dim))
    return torch.stack(rows)


def own(batch: Batch, length: int) -> Tensor:
    """Which positions of a tensor of this length are a row's own and no padding, (B, length)."""
    if isinstance(batch.units, TextUnits):
        real = ~torch.tensor(batch.units.padding)
        decoder = batch.kwargs.get("decoder_input_ids")
        if real.shape[1] == length and (decoder is None or decoder.shape[1] != length):
            return real  # of an encoder, whatever its decoder reads
    return batch.real(length)


def prefix(batch: Batch, length: int) -> int | None:
    """How many of these positions stand before the patches of a picture; None for what is no picture of patches."""
    if not isinstance(batch.units, ImageUnits) or batch.units.grid is None:
        return None
    patches = batch.units.grid[0] * batch.units.grid[1]
    return length - patches if length >= patches else None


def _classed(batch: Batch, row: int, prefix: int | None) -> bool:
    if isinstance(batch.units, TextUnits):
        real = [special for special, padding in zip(batch.units.special[row], batch.units.padding[row], strict=True)
                if not padding]
        return real[0]
    return bool(prefix)


def by_row(x: Tensor, rows: int) -> Tensor:
    """A tensor inside the model as (B, T, C), wherever it has its rows; of windows, (B, W, T, C)."""
    if x.dim() == 3 and x.shape[1] == rows and x.shape[0] != rows:
        return x.transpose(0, 1)
    if x.dim() == 3 and x.shape[0] != rows:
        return x.unflatten(0, (rows, -1))
    return x.reshape(rows, -1, x.shape[-1])
