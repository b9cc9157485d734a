"""Layers with adapters, such as LoRA's: what they read goes to the layer inside and to what was added to it."""
from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import nn

from ..family import adapted
from ..trace import Tap

Part = TypeVar("Part")


def around(model: nn.Module, part: Part) -> Part:
    """Any value that holds taps, with those inside of an adapted module put around it: an edit of what the layer inside
    reads or gives would leave what the adapter adds as it was.
    """
    wholes = {path for path, module in model.named_modules() if adapted(module)}
    return _around(wholes, part) if wholes else part


def _around(wholes: set[str], part: Any) -> Any:
    if isinstance(part, Tap):
        steps = part.path.split(".")
        outer = next((path for count in range(1, len(steps)) if (path := ".".join(steps[:count])) in wholes), None)
        return part if outer is None else replace(part, path=outer, kind=None)
    if isinstance(part, tuple):
        return tuple(_around(wholes, one) for one in part)
    if not hasattr(part, "__dataclass_fields__"):
        return part
    return replace(part, **{field.name: _around(wholes, getattr(part, field.name)) for field in fields(part)})
