"""The architectures of timm: which of its names build the same tiny model, and how that is made.

An entry point of timm hands a class and its arguments to `build_model_with_cfg`. Here it hands them to us: sizes among
the arguments are made small by their names, and timm's own function builds what is left. Names whose small arguments
are the same are one architecture.
"""
from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from . import size
from .architecture import Architecture, Inputs

CONVOLUTIONAL = (
    "convmixer convnext cspnet cspnext densenet dla dpn efficientnet fasternet ghostnet hardcorenas hgnet hrnet "
    "inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 nasnet nfnet pnasnet rdnet regnet repghost "
    "repvit res2net resnest resnet resnetv2 rexnet selecsls senet sknet starnet tresnet vgg vovnet xception "
    "xception_aligned")
"""timm's modules of networks whose positions meet in convolutions only: left out. A new module is in."""
MIXED = {"byobnet": "'self_attn'", "byoanet": "'self_attn'", "mobilenetv3": "'m[hq]a'"}
"""Modules of both kinds, and what a network that attends has among its blocks."""
LINEAGES = r"siglip", r"dino(v\d)?", r"^(test_)?(?P<word>[a-z]+(\d+(?=_))?)"
"""What a name's architecture is listed as: by the training that gave it its form, else by its first word."""
BACKBONES = ("ConvStem", "MbConvStages", "ResNetV2")
"""Classes that an entry point itself calls, for the stem of a hybrid."""
RESNETS = re.compile(r"resnet\d+\w?")
"""Functions that do so for it."""


@dataclass(frozen=True)
class Recipe:
    """What an entry point would build: a class with its arguments, all sizes small."""

    built: Callable[..., nn.Module]
    arguments: Mapping[str, Any]

    @property
    def form(self) -> str:
        """Equal for recipes that build the same kinds of parts in the same places."""
        return f"{self.built.__qualname__} {size.form(self.arguments)}"


class _Caught(Exception):
    """Leaves an entry point with what it would build."""

    def __init__(self, built: Callable[..., nn.Module], arguments: dict[str, Any]) -> None:
        super().__init__(built)
        self.built, self.arguments = built, arguments


@cache
def architectures() -> tuple[Architecture, ...]:
    """Each architecture of timm once, under the first of its names; one that takes patches as well, twice."""
    found = []
    for names in groups():
        name, of = names[0], ("timm", "image-classification", _lineage(names[0]))
        found.append(Architecture(*of, name, partial(_build, name), partial(inputs, name), names))
        if "patch_coord" in inspect.signature(recipe(name).built.forward).parameters:
            found.append(Architecture(*of, f"{name} of patches", partial(_build, name), patches, names[:1]))
    return tuple(found)


@cache
def groups() -> tuple[tuple[str, ...], ...]:
    """The names of timm's networks that attend, those of one architecture and lineage together."""
    import timm

    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(timm.list_models(), key=lambda name: name.startswith("test_")):  # they are others' namesakes
        module = _module(name)
        if module in CONVOLUTIONAL.split():
            continue
        with torch.device("meta"):  # an entry point may build a stem
            form = recipe(name).form
        if re.search(MIXED.get(module, ""), form):
            found.setdefault((_lineage(name), form), []).append(name)
    return tuple(map(tuple, found.values()))


def recipe(name: str) -> Recipe:
    """What timm would build under a name, made small."""
    import timm

    try:
        _reading(sys.modules[timm.model_entrypoint(name).__module__])[name](pretrained=False)
    except _Caught as caught:
        return Recipe(caught.built, size.shrunk(caught.built, caught.arguments))
    raise ValueError(f"the entry point of {name!r} builds nothing through timm's build_model_with_cfg")


def inputs(name: str, model: nn.Module) -> Inputs:
    """Two pictures of the size that the model under a name was built for, by the name of its argument."""
    generator = torch.Generator().manual_seed(1)
    made = recipe(name)
    side = size.side(made.built, made.arguments)
    first = next(iter(inspect.signature(model.forward).parameters))
    channels = model.pretrained_cfg["input_size"][0]
    return {first: torch.randn(2, channels, side, side, generator=generator)}


def patches(model: nn.Module) -> Inputs:
    """Two pictures in patches, of 6 x 6 and of 3 x 9, which leaves places empty, as timm's collator hands them on."""
    grids, generator = ((6, 6), (3, 9)), torch.Generator().manual_seed(1)
    places = [torch.cartesian_prod(*map(torch.arange, grid)) for grid in grids]
    coord = nn.utils.rnn.pad_sequence(places, batch_first=True)  # (B, T, 2)
    valid = torch.arange(coord.shape[1]) < torch.tensor([[len(one)] for one in places])  # (B, T)
    reader = next(part for part in model.modules() if isinstance(part, nn.Linear))
    numbers = torch.rand(*coord.shape[:2], reader.in_features, generator=generator)
    return {"x": numbers * valid[..., None], "patch_coord": coord, "patch_valid": valid}


def _build(name: str) -> nn.Module:
    from timm.models import build_model_with_cfg

    made = recipe(name)
    return build_model_with_cfg(made.built, name, False, **made.arguments)


def _module(name: str) -> str:
    import timm

    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def _lineage(name: str) -> str:
    found = next(filter(None, (re.search(pattern, name) for pattern in LINEAGES)))
    return found.groupdict().get("word") or found[0]


@cache
def _reading(module: ModuleType) -> dict[str, Any]:
    """The functions of a module of timm as they are, but that what they would build is caught: they read their globals
    from here, and the module is left alone.
    """
    space = dict(vars(module))
    for name, function in vars(module).items():
        if isinstance(function, FunctionType) and function.__globals__ is vars(module):
            space[name] = FunctionType(function.__code__, space, name, function.__defaults__, function.__closure__)
            space[name].__kwdefaults__ = function.__kwdefaults__
    for name in set(BACKBONES) & set(space):
        space[name] = partial(_small_backbone, space[name])
    for name in filter(RESNETS.fullmatch, space):
        space[name] = partial(space[name], channels=(8, 8, 8, 8), layers=(1, 1, 1, 1))
    space["build_model_with_cfg"] = _catch
    return space


def _catch(built: Callable[..., nn.Module], variant: str, pretrained: bool = False, **arguments: Any) -> None:
    raise _Caught(built, arguments)


def _small_backbone(built: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    return built(**size.shrunk(built, arguments))
