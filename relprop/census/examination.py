"""What is asked of one architecture: does it build, run, come out explained with balanced books, and so on."""
from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import division
from ..anatomy import Anatomy, anatomy
from ..decompose import decompose
from ..division import Division
from ..errors import UnruledOp
from ..explain import explain
from ..intervene import Intervention, Zero, intervened
from ..ops import mul, norm, share
from ..result.census import Entry, Failure
from ..still import settled
from ..subject import Subject
from .architecture import Architecture, Inputs, value

METHODS = ("attnlrp", "cp-lrp")
UNCHANGED = 1e-5
"""Largest change of the output that counts as none, relative to its largest entry."""
BALANCED = 1e-3
LOST = 1e-2
"""How far a part may be from what the value loses with it, relative to that."""
LITTLE = (1e-3, 1e-2, 1e-1)
"""Which share of a part is taken, to see what the value loses: so little that experts and other choices stay as they
are, but more where that is next to rounding.
"""
ABLATED = division.get("difference").but("ablation", share=share.aside, rules={"norm": norm.by_difference,
                                                                               "mul": mul.by_difference})
"""Every op split by what its output loses with the relevant part."""


@dataclass(frozen=True, eq=False)
class Less(Intervention):
    """A little less than there is: so little that experts, top k and other choices stay as they are."""

    share: float

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        return now * (1 - self.share)



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
    whole = _whole(model, inputs)
    observed: list[Anatomy] = []  # which the other questions need, whether it is verified or not

    def known() -> None:
        observed.append(_observed(entry, model, whole))
        _verified(observed[0], model, whole)

    _step(entry, "anatomy", known)
    if observed:
        _step(entry, "intervention", lambda: _intervened(model, whole, observed[0]))
        _step(entry, "decompose", lambda: _decomposed(model, whole, observed[0]))
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
        if any(isinstance(one, Tensor) and one.grad_fn is not None for one in tree_leaves(output)):
            seen.append(output)  # of the pass itself: what is read of it once more has no history
        return value(output)

    try:
        found = explain(model, dict(inputs), target, method=method)
    except UnruledOp:
        entry.ruled = False
        raise
    entry.ruled = True
    change = max(_change(plain, output) for plain, output in zip(_plainly(model, inputs, seen), seen))
    error = float(found.ledger.error.max())
    entry.change[method], entry.ledger[method] = change, error
    if not change <= UNCHANGED:
        raise ValueError(f"the output changed by {change:.1e} of its largest entry")
    if not error <= BALANCED:
        raise ValueError(f"{error:.1e} of the value is unaccounted for")


def _plainly(model: nn.Module, inputs: Inputs, seen: Sequence[Any]) -> Iterator[Any]:
    """What the model gives by itself where `seen` was seen: for the batch or, where the rows were explained one by one,
    for each row alone; where a row took several passes, as often.
    """
    with torch.no_grad(), settled(model):
        plain = model(**inputs)
        rows = len(value(plain))
        if len(value(seen[0])) == rows:
            yield plain
            return
        batch = Subject.from_module(model).prepare(dict(inputs))
        for turn in range(len(seen)):
            yield model(**batch.take(torch.tensor([turn * rows // len(seen)])).kwargs)


def _whole(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs; where patches of several pictures lie one after the other, which no tensor tells apart by row, those
    of the first row.
    """
    try:
        batch = Subject.from_module(model).prepare(dict(inputs))
    except (TypeError, ValueError):
        return inputs
    packed = batch.pictures is not None and batch.pictures.packing
    return batch.take(torch.tensor([0])).kwargs if packed else inputs


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


def _observed(entry: Entry, model: nn.Module, inputs: Inputs) -> Anatomy:
    found = anatomy(model, (), dict(inputs))
    entry.layers, entry.heads = len(found.layers), max(layer.heads for layer in found.layers)
    return found


def _verified(found: Anatomy, model: nn.Module, inputs: Inputs) -> None:
    """Raises ValueError unless an edit of each place reaches the output, and the anatomy has every attention seen."""
    lost = [str(number) for number, layer in enumerate(found.layers)
            if layer.pattern is not None and not layer.attention]
    if lost:
        raise ValueError(f"the attention of layer {', '.join(lost)} has no output projection that could be told apart")
    silent = [address for address, reached in found.verify(model, (), dict(inputs)).items() if not reached]
    if silent:
        raise ValueError(f"nothing comes of an edit of {', '.join(silent)}")


def _chosen(known: Anatomy) -> list[str]:
    """A head, or a mixer that has none, of the first, the middle and the last layer that has one."""
    places = [f"L{number}.attn.H0" if layer.heads else f"L{number}.attn" for number, layer in enumerate(known.layers)
              if layer.attention is not None and "attn" not in layer.silent]
    if not places:
        raise ValueError("no layer has a part that mixes positions and could be told apart")
    return list(dict.fromkeys((places[0], places[len(places) // 2], places[-1])))


def _intervened(model: nn.Module, inputs: Inputs, known: Anatomy) -> None:
    """Heads set to zero, each by its address, must change the output."""
    with torch.no_grad(), settled(model):
        plain = model(**inputs)
        for place in _chosen(known):
            with intervened(model, {place: Zero()}):
                changed = model(**inputs)
            if _change(plain, changed) == 0:
                raise ValueError(f"the output is the same without {place}")


def _decomposed(model: nn.Module, inputs: Inputs, known: Anatomy) -> None:
    """What heads make up of the value, by the published rules: finite parts of the model's own value, that are not
    zero. And with every op split by what its output loses, what a little of a head makes up must be what the value
    loses with it: the sum of the parts by itself cannot fail.
    """
    places = _chosen(known)
    _parts(model, inputs, places, "cdt", Zero())
    model, inputs = _precise(model, inputs)
    for place in places:
        _lost(model, inputs, place)


def _lost(model: nn.Module, inputs: Inputs, place: str) -> None:
    """Raises ValueError if a little of a place makes up something else of the value than the value loses with it.

    More is taken where what is lost is next to rounding: norms and the like may be in float32.
    """
    for little in LITTLE:
        one = Less(little)
        plain, parts = _parts(model, inputs, [place], ABLATED, one)
        with torch.no_grad(), settled(model), intervened(model, {place: one}):
            loss = plain - value(model(**inputs))
        rounding = 32 * torch.finfo(torch.float32).eps * plain.abs().max()
        if loss.abs().max() > rounding / LOST:
            break
    gap = ((parts[0] - loss).abs().max() - rounding) / loss.abs().max().clamp_min(1e-30)
    if not gap <= LOST:
        raise ValueError(f"by difference, {little:.0e} of {place} makes up {parts[0].tolist()} of the value, but "
                         f"without it the value loses {loss.tolist()}")


def _parts(model: nn.Module, inputs: Inputs, places: list[str], rules: str | Division, one: Intervention,
           ) -> tuple[Tensor, Tensor]:
    """The model's own value, and what each place makes up of it."""
    with torch.no_grad(), settled(model):
        plain = value(model(**inputs))
    found = decompose(model, dict(inputs), places, target=value, rules=rules, ablation=one)
    gap = (found.total - plain).abs().max() / plain.abs().max()
    if not gap <= UNCHANGED:
        raise ValueError(f"the total misses the model's own value by {float(gap):.1e}")
    nothing = [place for place, rel in zip(places, found.rel) if not rel.abs().max() > 0]
    if nothing:
        raise ValueError(f"{', '.join(nothing)} makes up nothing of the value")
    return plain, found.rel


def _precise(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """The model in float64, where it computes in it."""
    try:
        double = copy.deepcopy(model).double()
        if hasattr(double, "set_experts_implementation"):
            double.set_experts_implementation("eager")  # fused products of experts are for float32 and less
        fed = {name: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one
               for name, one in inputs.items()}
        with torch.no_grad(), settled(double):
            if value(double(**fed)).dtype == torch.float64:
                return double, fed
    except (RuntimeError, TypeError, ValueError):
        pass
    return model, inputs


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
