"""Which positions of the last layer a target is read from, and what is read there as a map of tokens or pixels."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import rows, units
from ..errors import IndependentOutput
from ..pattern import Attended
from ..result import Relevance
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, ImageUnits, TextUnits


def readout(model: nn.Module, batch: Batch, targets: Targets, length: int) -> tuple[Tensor, Tensor, list[str]]:
    """Which positions of the last layer the target is read from, observed instead of looked up by the model's name.

    w_t = |dy/dh_t|_1 / sum_t' |dy/dh_t'|_1, with h the output of the last module that keeps all positions. One for the
    class token, or for the position that predicts; 1/T each where the model averages. Cost: one forward, and a
    backward that ends at h.

    Args: length: T, positions of the attention patterns.
    Returns: target (B,), weights (B, T), names of the targets.
    Raises: ValueError if no module keeps the positions; IndependentOutput if the target is read from none.
    """
    with torch.inference_mode(False), torch.enable_grad(), _tail(model, (batch.rows, length)) as kept:
        output = model(*batch.args, **batch.kwargs)
        value = targets.value(output, batch)
        if not kept:
            raise ValueError(f"no module of the model gives (B, {length}, D), so which positions are read is unknown")
        slope, = torch.autograd.grad(value.sum(), kept, allow_unused=True) if value.requires_grad else (None,)
    slope = value.new_zeros(batch.rows, length, 1) if slope is None else slope.to(value.dtype)
    return value.detach(), _normalised(slope.abs().sum(-1)), targets.names(output, batch)


@contextmanager
def _tail(model: nn.Module, shape: tuple[int, int]) -> Iterator[list[Tensor]]:
    """While inside, autograd reaches back to the last module that gives (B, T, D) of this shape, and no further.

    Gives a list that holds its output, a leaf, once the model has run.
    """
    kept: list[Tensor] = []

    def cut(module: nn.Module, args: tuple, output: object) -> Tensor | None:
        if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[:2] != shape:
            return None
        kept[:] = [output.detach().requires_grad_()]
        return kept[0].clone()  # not the leaf itself, which the model must not write to

    handles = [module.register_forward_hook(cut) for module in model.modules() if module is not model]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def read(subject: Subject, batch: Batch, targets: Targets, flow: Tensor, padding: Tensor | None,
         options: dict) -> Relevance:
    """The rows of `flow` (B, T, S) that the target is read from, as a map; zero at padding in any case."""
    value, weights, names = readout(subject.model, batch, targets, flow.shape[1])
    shares = torch.einsum("bt,bts->bs", weights.to(flow), flow)
    shares = shares if padding is None else shares.masked_fill(padding, 0)
    return mapped(subject, batch, shares, value=value, names=names, forwards=2, backwards=1, unit="share of attention",
                  **options)


def mapped(subject: Subject, batch: Batch, shares: Tensor, *, value: Tensor, names: list[str], method: str,
           forwards: int, backwards: int, unit: str, **options: object) -> Relevance:
    """Shares of positions (B, T), or of pixels, as a result whose provenance says by which options it was made."""
    shares = placed(shares, batch) if shares.dim() == 2 else shares
    return Relevance(map=shares.float().cpu(), value=value.cpu(), target=names, method=method,
                     conservation="not conservative", units=batch.units, ledger=None, forwards=forwards,
                     backwards=backwards, inputs={}, latents={},
                     provenance={"model": subject.name, "unit": unit, "method": method, **options})


def read_from(found: Attended, batch: Batch) -> Tensor:
    """Which query positions of the last pattern the target is read from, (B, T), as `readout` finds them, from the
    gradient that was taken in the same run.

    Raises: ValueError if no module returned the positions; IndependentOutput if the target is read from none.
    """
    last = found.patterns[-1]
    length = last.weights.shape[-2]
    if (last.queries, length) not in found.reads:
        raise ValueError(f"no module of the model gives (B, {length}, D), so which positions are read is unknown")
    return _normalised(found.reads[last.queries, length])


def _normalised(weights: Tensor) -> Tensor:
    """Weights of positions that sum to one, (B, T)."""
    total = weights.sum(-1, keepdim=True)  # (B, 1)
    if not (total > 0).all():
        row = int((total > 0).flatten().int().argmin())
        raise IndependentOutput(f"the target of row {row} is read from no position of the last layer")
    return weights / total


def padding_of(batch: Batch, patterns: list[Tensor]) -> Tensor | None:
    """True at padding, (B, T); None where there is none."""
    if not isinstance(batch.units, TextUnits) or not patterns:
        return None
    padding = torch.tensor(batch.units.padding, device=patterns[0].device)
    found = patterns[0].shape
    if padding.shape != (found[0], found[-1]):
        raise ValueError(f"patterns of shape {tuple(found)} do not fit a text of (B, T) = {tuple(padding.shape)}")
    return padding


def placed(shares: Tensor, batch: Batch) -> Tensor:
    """Shares of positions (B, T) as a map: as they are, or for pictures over pixels, (B, Y, X), without the prefix."""
    places = _places(batch, shares.shape[1])
    if places is None:
        return shares
    # class and register tokens come first
    return units.spread(shares[:, -int(places.max()) - 1:], places.expand(len(shares), -1, -1))


def own(batch: Batch, length: int) -> Tensor:
    """Whether each position holds a part of the input: a token that is no padding, a patch and no prefix token; bool
    (B, length).
    """
    places = _places(batch, length)
    if places is None:
        return batch.real(length)
    return (torch.arange(length) >= length - int(places.max()) - 1).expand(batch.rows, -1)


def _places(batch: Batch, length: int) -> Tensor | None:
    """Number of the patch of each pixel, (Y, X); None if the batch is no pictures.

    Raises: ValueError if there are more patches than positions.
    """
    pixels = rows.leaf(batch)[1]
    if isinstance(batch.units, TextUnits) or pixels.ndim != 4:
        return None
    size = tuple(pixels.shape[-2:])
    patch, grid = (batch.units.patch, batch.units.grid) if isinstance(batch.units, ImageUnits) else (None, None)
    if patch is None and grid is None:
        grid = units.grid(size, length)
        patch = (max(-(-side // count) for side, count in zip(size, grid, strict=True)),) * 2  # square, also where cut
    places = units.patches(size, patch=patch, grid=grid)
    count = int(places.max()) + 1
    if count > length:
        raise ValueError(f"{length} positions are fewer than the {count} patches of a picture of {size}")
    return places
