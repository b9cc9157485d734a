"""Inputs of a model as its arguments, and their rows."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..tokens import Batch


def rows_of(args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many rows a model is given."""
    return next((a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), 1)


def picked(args: Any, kwargs: Mapping[str, Any], chosen: list[int]) -> tuple[tuple, dict]:
    """The arguments for these of the rows."""
    index, rows = torch.tensor(chosen), rows_of(args, kwargs)
    pick = lambda a: a[index.to(a.device)] if isinstance(a, Tensor) and a.dim() and len(a) == rows else a
    return tuple(map(pick, args)), {name: pick(value) for name, value in kwargs.items()}


def real_of(kwargs: Mapping[str, Any], count: int, length: int) -> Tensor:
    """Which positions are no padding, as the attention mask of this shape says, bool (count, length)."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.shape == (count, length):
            return mask.bool().cpu()
    return torch.ones(count, length, dtype=torch.bool)


def arguments(inputs: Any) -> tuple[tuple, dict]:
    """Inputs as arguments of the model."""
    if isinstance(inputs, Batch):
        return inputs.args, inputs.kwargs
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise TypeError(f"inputs of an intervention are tensors by name, a tuple, a tensor or a prepared batch, not "
                    f"{type(inputs).__name__}")
