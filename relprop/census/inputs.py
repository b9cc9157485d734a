"""What models of transformers read, by the names of their arguments: words, pictures, sounds."""
from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from . import config
from .architecture import Inputs


def inputs(task: str, model: nn.Module) -> Inputs:
    """Two rows of what a model of a task of transformers reads, by the names of its arguments."""
    rows, length = 2, 12
    generator = torch.Generator().manual_seed(1)
    accepted = inspect.signature(model.forward).parameters
    found: dict[str, Tensor] = {}
    if "input_ids" in accepted:
        found["input_ids"] = torch.randint(5, 60, (rows, length), generator=generator)
        if "attention_mask" in accepted:
            found["attention_mask"] = torch.ones_like(found["input_ids"])
    if "pixel_values" in accepted:
        found["pixel_values"] = torch.randn(rows, 3, config.SIDE, config.SIDE, generator=generator)
    if "decoder_input_ids" in accepted and "input_ids" in found:
        found["decoder_input_ids"] = torch.randint(5, 60, (rows, 5), generator=generator)
    if task == "video-classification":
        found["pixel_values"] = torch.randn(rows, 8, 3, config.SIDE, config.SIDE, generator=generator)
    return found
