"""What is asked of one architecture: does it build, run, come out explained with balanced books, and so on."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..anatomy import anatomy
from ..decompose import decompose
from ..errors import UnruledOp
from ..explain import explain
from ..intervene import Zero, intervened
from ..result.census import Entry, Failure
from ..still import settled
from .architecture import Architecture, Inputs, value

METHODS = ("attnlrp", "cp-lrp")
UNCHANGED = 1e-5
"""Largest change of the output that counts as none, relative to its largest entry."""
BALANCED = 1e-3


def examine(architecture: Architecture) -> Entry:
    """Everything that is asked of an architecture. Nothing is raised: what fails is in the entry with its reason."""
    entry = Entry(architecture.library, architecture.task, architecture.family, architecture.name,
                  stands=architecture.stands)
    model = _step(entry, "builds", architecture.model)
    if model is None:
        return entry
    entry.parameters = sum(p.numel() for p in model.parameters())
    inputs = _step(entry, "runs", lambda: _ran(model, architecture.inputs(model)))
    if inputs is None:
        return entry
    for method in METHODS:
        _step(entry, method, partial(_explained, entry, model, inputs, method))
    _step(entry, "anatomy", lambda: _known(entry, model, inputs))
    if entry.layers:
        _step(entry, "intervention", lambda: _intervened(model, inputs))
        _step(entry, "decompose", lambda: _decomposed(entry, model, inputs))
    _step(entry, "time", lambda: _timed(entry, model, inputs))
    return entry


def _step(entry: Entry, name: str, do: Callable[[], Any]) -> Any:
    """What `do` gives; None, and why in the entry, if it fails."""
    try:
        done = do()
    except Exception as error:
        entry.failures[name] = Failure.of(error)
        return None
    entry.passed.append(name)
    return done


def _ran(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs, if the model takes them by itself and gives finite numbers, by which a gradient passes."""
    with torch.no_grad(), settled(model):
        given = value(model(**inputs))
    if not given.isfinite().all():
        raise ValueError("the model's own output is NaN or infinite")
    return inputs


def _explained(entry: Entry, model: nn.Module, inputs: Inputs, method: str) -> None:
    seen: list[Any] = []

    def target(output: Any) -> Tensor:
        seen.append(output)
        return value(output)

    with torch.no_grad(), settled(model):
        plain = model(**inputs)
    try:
        found = explain(model, dict(inputs), target, method=method)
    except UnruledOp:
        entry.ruled = False
        raise
    entry.ruled = True
    change = _change(plain, seen[0])
    error = float(found.ledger.error.max())
    entry.change[method], entry.ledger[method] = change, error
    if not change <= UNCHANGED:
        raise ValueError(f"the output changed by {change:.1e} of its largest entry")
    if not error <= BALANCED:
        raise ValueError(f"{error:.1e} of the value is unaccounted for")


def _change(plain: Any, output: Any) -> float:
    """The largest change of any floating entry, relative to the largest entry of its tensor."""
    changes = [0.0]
    for a, b in zip(tree_leaves(plain), tree_leaves(output)):
        if isinstance(a, Tensor) and a.is_floating_point() and isinstance(b, Tensor) and a.numel():
            a, b = a.double(), b.detach().double()
            finite = a.isfinite()
            changes.append(float((a - b)[finite].abs().max() / a[finite].abs().max().clamp_min(1e-30))
                           if finite.any() else 0.0)
    return max(changes)


def _known(entry: Entry, model: nn.Module, inputs: Inputs) -> None:
    found = anatomy(model, (), dict(inputs))
    entry.layers, entry.heads = len(found.layers), max(layer.heads for layer in found.layers)
    silent = [address for address, reached in found.verify(model, (), dict(inputs)).items() if not reached]
    if silent:
        raise ValueError(f"nothing comes of an edit of {', '.join(silent)}")


def _intervened(model: nn.Module, inputs: Inputs) -> None:
    """One head set to zero, by its address, must change the output."""
    with torch.no_grad(), settled(model):
        plain = model(**inputs)
        with intervened(model, {"L0.attn.H0": Zero()}):
            changed = model(**inputs)
    if _change(plain, changed) == 0:
        raise ValueError("the output is the same without L0.attn.H0")


def _decomposed(entry: Entry, model: nn.Module, inputs: Inputs) -> None:
    found = decompose(model, dict(inputs), "L0.attn.H0", target=value)
    gap = (found.rel + found.irrel - found.total).abs().max() / found.total.abs().max()
    if not gap <= BALANCED:
        raise ValueError(f"the parts miss the total by {float(gap):.1e}")
    if not found.rel.abs().max() > 0:
        raise ValueError("L0.attn.H0 makes up nothing of the value")


def _timed(entry: Entry, model: nn.Module, inputs: Inputs, repeats: int = 3) -> None:
    """Time of a map with its ledger in plain forwards + backwards; of a tiny model, so mostly of Python."""
    runs = (lambda: _plain(model, inputs)), (lambda: explain(model, dict(inputs), value, method="attnlrp"))
    ratios = []
    for _ in range(repeats):
        spent = []
        for run in runs:
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
        ratios.append(spent[1] / spent[0])
    entry.time = statistics.median(ratios)


def _plain(model: nn.Module, inputs: Inputs) -> None:
    """The model's own forward, and backward to its parameters or floating inputs."""
    leaves = {name: one.clone().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
              for name, one in inputs.items()}
    found = value(model(**leaves))
    if found.requires_grad:
        found.sum().backward()
    model.zero_grad(set_to_none=True)
