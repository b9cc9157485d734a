"""How a model cuts pictures into patches, seen by watching it begin.

What a config says of patches need not be what a model does with a picture: it may pad it, let patches overlap, or cut
what a stack of convolutions has made of it. So a forward pass is begun, and given up where tokens are first read: the
convolution before has made one for each place of its output.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .still import settled

Cut = tuple[tuple[int, int], tuple[int, int]]
"""Pixels from one patch to the next, (Py, Px), and the number of patches, (Gy, Gx)."""
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Cut | None]] = WeakKeyDictionary()


class _Begun(Exception):
    """Tokens are read: nothing more is to be seen."""


@dataclass
class _Watch:
    """The convolutions that a forward pass has come through."""

    seen: list[tuple[nn.Conv2d, Tensor, Tensor]] = field(default_factory=list)

    def convolved(self, module: nn.Conv2d, args: tuple, output: Tensor) -> None:
        self.seen.append((module, args[0], output))

    def read(self, module: nn.Module, args: tuple) -> None:
        """Ends the pass where a linear map or a norm reads what the last convolution made, channels last."""
        x = next((one for one in args if isinstance(one, Tensor)), None)
        if x is not None and self.seen and x.dim() in (3, 4) and x.shape[-1] == self.seen[-1][2].shape[1]:
            raise _Begun


def cut(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], size: tuple[int, int]) -> Cut | None:
    """How the model cuts pictures of this size, (Y, X), given one; None where no convolution makes the tokens, or none
    whose places are a grid over the picture, or where the model does not take it. Cost: up to the first tokens, once
    for each size.
    """
    known = _KNOWN.setdefault(model, {})
    if size not in known:
        try:
            known[size] = _found(_watched(model, args, kwargs), size)
        except Exception:  # whatever the model raises, it raises again where it is run
            return None
    return known[size]


def _watched(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> _Watch:
    watch = _Watch()
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(watch.convolved))
        elif not module._modules and isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() < 3:
            handles.append(module.register_forward_pre_hook(watch.read))
    try:
        with settled(model), torch.no_grad():
            model(*args, **kwargs)
        watch.seen.clear()  # no tokens were read
    except _Begun:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return watch


def _found(watch: _Watch, size: tuple[int, int]) -> Cut | None:
    if not watch.seen or watch.seen[-1][2].dim() != 4:
        return None
    last, given, made = watch.seen[-1]
    grid = tuple(made.shape[2:])
    if len(made) > 1:  # of parts of the picture
        return None
    if len(watch.seen) == 1 and all(padded >= side for padded, side in zip(given.shape[2:], size)):
        return tuple(last.stride), grid
    # of a stack, which may be padded and cut, only what fits both sides
    steps = {side // count if side % count == 0 else 0 for side, count in zip(size, grid)}
    return ((min(steps),) * 2, grid) if len(steps) == 1 and min(steps) else None


__all__ = ["Cut", "cut"]
