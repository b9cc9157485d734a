"""Kernels that compute where no rule can follow, replaced by an exact equivalent while a model is explained.

A model of transformers names in its config how attention and experts are computed, and looks it up at every call. For
the length of a run the names of fused kernels give way to ways that the rules know; no registry is touched. Modules
whose own `forward` gave way to a kernel of the hub get it back, and what `torch.compile` has compiled runs as it was
written. Everything is as before at the end, also after an exception.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

_LOG = logging.getLogger("relprop")

_ATTENTION = "_attn_implementation"
_NAMES = {_ATTENTION: "attention", "_experts_implementation": "experts"}
"""What configs, and some modules, name kernels in; configs keep it in an attribute that ends with `_internal`."""
_FUSED = {_ATTENTION: ("flash_attention", "flex_attention", "paged|"), "_experts_implementation": ("deepgemm", "sonic")}
"""How names begin of ways that rules cannot follow; so are kernels of the hub, "owner/name"."""
_EXACT = ("attn_logit_softcapping", "logit_softcapping")
"""Facts of a config that the fused attention of torch leaves out in silence, and the way written in steps does not."""
_LAYER = "kernel_layer_name"
"""What a class has whose forward may give way to a kernel of the hub."""
_told: WeakSet[nn.Module] = WeakSet()


@contextmanager
def replaced(model: nn.Module) -> Iterator[None]:
    """A `with` block in which the model runs without kernels that rules cannot follow, nor compiled code."""
    modules = list(model.modules())
    before: list[tuple[Any, str, Any]] = []
    names: list[str] = []
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for owner, attribute, kind, name in _named(modules):
                way = _way(modules, owner, kind)
                before.append((owner, attribute, name))
                _put(owner, attribute, way)
                names.append(f"{_NAMES[kind]} {name!r} by {way!r}")
            for module in modules:
                if hasattr(type(module), _LAYER) and "forward" in vars(module):
                    before.append((module, "forward", vars(module).pop("forward")))
                    names.append(f"the kernel of {type(module).__name__} by its own forward")
            if names and model not in _told:
                _told.add(model)
                _LOG.warning("while it is explained, %s computes %s", type(model).__name__,
                             ", ".join(dict.fromkeys(names)))
            yield
        finally:
            for owner, attribute, value in reversed(before):
                _put(owner, attribute, value)


def _put(owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute on its owner alone: a config's property would pass it on to the configs inside."""
    vars(owner)[attribute] = value


def _named(modules: list[nn.Module]) -> Iterator[tuple[Any, str, str, str]]:
    """Where a fused kernel is named: the config or module, its attribute, the kind, and the name. Each once."""
    owners = {id(owner): owner for module in modules for owner in (getattr(module, "config", None), module)
              if owner is not None}
    for owner in list(owners.values()):
        held = getattr(owner, "__dict__", {})
        for kind in _NAMES:
            for attribute in (kind, kind[1:], f"{kind}_internal"):
                value = held.get(attribute)
                if isinstance(value, str) and _fused(kind, value):
                    yield owner, attribute, kind, value


def _fused(kind: str, name: str) -> bool:
    return name.startswith(_FUSED[kind]) or "/" in name


def _way(modules: list[nn.Module], owner: Any, kind: str) -> str:
    """What computes the same: torch's fused attention where the owner's models support it and it leaves nothing out."""
    config = getattr(owner, "config", None) if isinstance(owner, nn.Module) else owner
    if kind != _ATTENTION or any(getattr(config, fact, None) for fact in _EXACT):
        return "eager"
    supports = [getattr(module, "_supports_sdpa", None) for module in modules
                if getattr(module, "config", None) is config]
    known = [one for one in supports if one is not None]
    return "sdpa" if known and all(known) else "eager"
