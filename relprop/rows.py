"""A batch as rows: the tensor that is explained, another tensor put in its place, and chance a row."""
from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from .tokens import Batch

NAMED = ("input_ids", "pixel_values")  # what transformers calls them


def leaf(batch: Batch) -> tuple[int | str, Tensor]:
    """What a map of this batch is a map of: the token ids, the pixels, or the first tensor of a plain module's inputs.

    Returns: its place (a position in `args` or a name in `kwargs`) and the tensor, (B, ...); of rows that run as
        several sequences the ids of their units, (B, U).
    Raises: ValueError if the batch holds no tensor.
    """
    if batch.layout is not None:
        return "input_ids", batch.layout.gathered(batch.kwargs["input_ids"], len(batch.units.tokens[0]))
    for name in NAMED:
        if name in batch.kwargs:
            return name, batch.kwargs[name]
    for place, value in [*enumerate(batch.args), *batch.kwargs.items()]:
        if isinstance(value, Tensor):
            return place, value
    raise ValueError("the batch holds no tensor, so there is nothing to explain")


def put(batch: Batch, value: Tensor) -> Batch:
    """The batch with `value` instead of its `leaf`."""
    place, _ = leaf(batch)
    if batch.layout is not None:
        value = batch.layout.spread(value, batch.kwargs[place])
    if isinstance(place, str):
        return replace(batch, kwargs={**batch.kwargs, place: value})
    return replace(batch, args=(*batch.args[:place], value, *batch.args[place + 1:]))


def generator(seed: int, content: Tensor) -> torch.Generator:
    """Chance that depends on the seed and a row's own content only, so that a batch draws what the loop over its rows
    draws.

    Args: content: of one row, without padding, any shape.
    """
    read = content.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return torch.Generator().manual_seed(zlib.crc32(read, seed))
