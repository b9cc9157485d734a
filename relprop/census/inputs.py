"""What models of transformers read, by the names of their arguments: words, pictures, sounds."""
from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from . import config
from .architecture import Inputs
from .text import TEXTS, text


def inputs(task: str, model: nn.Module) -> Inputs:
    """Two rows of what a model of a task of transformers reads, by the names of its arguments."""
    rows = 2
    generator = torch.Generator().manual_seed(1)
    accepted = inspect.signature(model.forward).parameters
    found: dict[str, Tensor] = text(task, model, generator) if "input_ids" in accepted else {}
    if "pixel_values" in accepted and task not in TEXTS:
        found["pixel_values"] = torch.randn(rows, 3, config.SIDE, config.SIDE, generator=generator)
    if task == "video-classification":
        found["pixel_values"] = torch.randn(rows, 8, 3, config.SIDE, config.SIDE, generator=generator)
    return found
