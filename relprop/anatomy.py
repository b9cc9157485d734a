"""The parts of a model, found by observing one forward pass: the stream, attentions and their heads, MLPs and neurons.

No list of names: layers are the modules of a stack that each hold an attention, heads are how the attention splits its
values, the output projection is the first linear map after it, neurons are what the layer's last linear map reads, and
the stream between attention and MLP is what the layer adds its MLP to.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .address import ALL, INPUTS, Address
from .still import settled
from .trace import Seen, Survey, Tap, surveyed
from .trace.intervention import PATTERN, Change, edited
from .trace.survey import Sum


@dataclass(frozen=True)
class Cross:
    """A second attention of a layer, to the encoder: its heads, and the taps of its output and its pattern."""

    heads: int
    attention: Tap | None
    pattern: Tap


@dataclass(frozen=True)
class Layer:
    """One layer: its module's path, how many heads its attention has (those of the queries), and the taps of its parts.

    `attention` and `mlp` are of what the output projection and the last linear map read, heads and neurons side by
    side; where experts share the tokens among them, `mlp` is of what they add together, and there are no `neurons`.
    `mid` is None where there is no stream between the two, as where they run beside each other. `nth`: the how-manieth
    run of the module it is, where layers share one (ALBERT).
    """

    path: str
    heads: int
    attention: Tap | None
    neurons: int
    mlp: Tap | None
    pattern: Tap | None = None
    mid: Tap | None = None
    cross: Cross | None = None
    nth: int = 0


@dataclass(frozen=True)
class Anatomy:
    """The layers of a model, in the order in which they run, an encoder's before its decoder's; and its embedding."""

    layers: tuple[Layer, ...]
    embed: Tap | None = None

    def resolve(self, address: Address) -> Iterator[tuple[Address, Tap]]:
        """Each place that an address or pattern means, without `*`, and the tap that shows its relevance.

        Raises: ValueError for a layer, head or neuron that is not there, or a place that the model does not have.
        """
        if address.part == "embed":
            if self.embed is None:
                raise ValueError("embed: no lookup of word embeddings or embedding of patches was seen; give L0.in")
            yield address, self.embed
            return
        if address.part == "logits":
            yield address, Tap(self.layers[-1].path, None, "output", self.layers[-1].nth)
            return
        if address.inner in INPUTS:
            raise ValueError(f"{address} is an end of edges, of which relprop.circuit tells; what it reads is the "
                             f"stream as it enters the layer, {Address('in', address.layer)}")
        numbers = self._numbers(address)
        for number in numbers:
            found = self._tap(replace(address, layer=number), len(numbers) > 1)
            if found is not None:
                yield from self._units(replace(address, layer=number), *found)

    def _numbers(self, address: Address) -> range | list[int]:
        if address.layer is ALL:
            return range(len(self.layers))
        if not 0 <= address.layer < len(self.layers):
            raise ValueError(f"no layer {address.layer}; the model has layers 0 to {len(self.layers) - 1}")
        return [address.layer]

    def _tap(self, address: Address, many: bool) -> tuple[Tap, int] | None:
        """Where the whole part is, and of how many units it is made; None if one of many layers has no such part."""
        number, layer = address.layer, self.layers[address.layer]
        if address.part in ("layer", "in"):
            return Tap(layer.path, None, "output" if address.part == "layer" else "input", layer.nth), 0
        if address.part == "cross" and layer.cross is None:
            if many and any(other.cross for other in self.layers):
                return None  # L*.cross: an encoder's layers have none
            raise ValueError(f"{address}: layer {number} ({layer.path}) has no attention to an encoder")
        owner = layer.cross if address.part == "cross" else layer
        if address.inner is not None:
            return owner.pattern, owner.heads
        tap, units = {"mid": (layer.mid, 0), "mlp": (layer.mlp, layer.neurons)}.get(
            address.part, (owner.attention, owner.heads))
        if tap is None and address.part == "mid":
            raise ValueError(f"{address}: layer {number} ({layer.path}) has no stream between its attention and its "
                             "MLP: they run beside each other, or it has only one of the two")
        if tap is None:
            raise ValueError(f"layer {number} ({layer.path}) has no {address.part} that could be told apart")
        if address.unit == "N" and not units:
            raise ValueError(f"{address}: layer {number} ({layer.path}) has no neurons that every token passes: its "
                             f"experts see some of them each; give L{number}.mlp, what they add together")
        return tap, units

    def _units(self, address: Address, tap: Tap, count: int) -> Iterator[tuple[Address, Tap]]:
        if address.unit is None:
            whole = tap if address.inner or tap.kind is None else replace(tap, side="output")
            yield address, whole
            return
        for index in range(count) if address.index is ALL else [address.index]:
            if not 0 <= index < count:
                name = "heads" if address.unit == "H" else "neurons"
                raise ValueError(f"no {address.unit}{index} in layer {address.layer}, which has {count} {name}")
            yield replace(address, index=index), tap

    def units(self, address: Address) -> int:
        """How many heads or neurons the part has that an address of one is of."""
        layer = self.layers[address.layer]
        if address.part == "cross":
            return layer.cross.heads
        return layer.neurons if address.part == "mlp" else layer.heads

    def verify(self, model: nn.Module, args: tuple, kwargs: dict) -> dict[str, bool]:
        """Whether an edit of each part reaches the output, by address: each part and pattern of each layer set to zero,
        and one head or neuron of a part moved. The model is given back as it came. Cost: a forward of the first row
        for each, about 8 a layer.
        """
        args, kwargs = _first_row(args, kwargs)
        with torch.no_grad(), settled(model):
            plain = model(*args, **kwargs)
            return {str(address): _changes(model, args, kwargs, tap, self._moved(address), plain)
                    for address, tap in self._every()}

    def _every(self) -> Iterator[tuple[Address, Tap]]:
        if self.embed is not None:
            yield Address("embed"), self.embed
        for number, layer in enumerate(self.layers):
            cross = layer.cross and layer.cross.attention
            units = {"attn": layer.attention and "H", "cross": cross and "H", "mlp": layer.neurons and "N"}
            found = [Address(part, number) for part in ("in", "layer", "mid") if part != "mid" or layer.mid]
            found += [Address("mlp", number)] if layer.mlp and not layer.neurons else []
            found += [Address(part, number, unit, index) for part, letter in units.items() if letter
                      for unit, index in ((None, None), (letter, 0))]
            found += [Address(part, number, "H", 0, inner="pattern") for part, owner in
                      (("attn", layer), ("cross", layer.cross)) if owner is not None and owner.pattern is not None]
            yield from (place for address in found for place in self.resolve(address))

    def _moved(self, address: Address) -> Change:
        """Moves what an address means of a tapped tensor, (..., C) or a pattern (B, H, T, S), away from its value."""
        if address.unit is None:
            return torch.zeros_like
        count = self.units(address)

        def change(x: Tensor) -> Tensor:
            y = x.clone()
            if address.inner is not None:
                y[:, address.index] = 0
            else:
                y.unflatten(-1, (count, -1))[..., address.index, :] += 1  # a neuron may be at zero
            return y

        return change


def _changes(model: nn.Module, args: tuple, kwargs: dict, tap: Tap, change: Change, plain: Any) -> bool:
    with edited(model, {tap: change}) as editor:
        output = model(*args, **kwargs)
    if not editor.fired[tap]:
        return False
    pairs = zip(tree_leaves(plain), tree_leaves(output), strict=True)
    return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs)


def anatomy(model: nn.Module, args: tuple, kwargs: dict) -> Anatomy:
    """The anatomy of `model`, from one forward pass on the first row of this input, in which heads cannot be taken for
    rows. Cost: a forward of one row.

    Raises: ValueError if no stack of modules with an attention in each is found.
    """
    args, kwargs = _first_row(args, kwargs)
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    with torch.no_grad(), settled(model), surveyed(model, inputs) as survey:
        model(*args, **kwargs)
    stacks = _stacks(model, survey)
    if not stacks:
        raise ValueError("no stack of layers was found: no nn.ModuleList or nn.Sequential whose modules hold an "
                         "attention each; addresses need one")
    paths = {path for stack in stacks for path in stack}
    runs = [read for read in survey.reads if read.path in paths]  # in the order in which they run
    layers = [_layer(read.path, survey, read.nth) for read in runs]
    return Anatomy(tuple(layer for layer in layers if layer is not None), next(iter(survey.embeddings), None))


def _first_row(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    rows = next((a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), 1)
    cut = lambda a: a[:1] if isinstance(a, Tensor) and a.dim() and len(a) == rows else a
    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def _inside(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _stacks(model: nn.Module, survey: Survey) -> list[list[str]]:
    """The innermost lists of modules that hold an attention each. A list whose modules have no MLP beside it is of the
    parts of one layer (T5), if that is in a list as well.
    """
    attended = [event.path for event in survey.seen if event.kind == "attention"]
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            paths = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
            holding = [path for path in paths if any(_inside(where, path) for where in attended)]
            found += [(name, holding)] if holding else []

    def within(name: str, other: str, paths: list[str]) -> bool:
        return other != name and any(_inside(name, path) for path in paths)

    whole = [(name, paths) for name, paths in found if not any(within(name, *other) for other in found)
             or any(layer is not None and layer.mlp for layer in (_layer(path, survey) for path in paths))]
    return [paths for name, paths in whole if not any(within(other, name, paths) for other, _ in whole)]


def _layer(path: str, survey: Survey, nth: int = 0) -> Layer | None:
    """The nth run of a module as a layer; None if there is no attention in it."""
    starts = [read.order for read in survey.reads if read.path == path] + [len(survey.seen)]
    if nth >= len(starts) - 1:
        return None
    events = [event for event in survey.seen[starts[nth]:starts[nth + 1]] if _inside(event.path, path)]
    attentions = [event for event in events if event.kind == "attention"]
    if not attentions:
        return None
    own, cross = attentions[0], attentions[1] if len(attentions) > 1 else None
    linears = [event for event in events if event.kind in ("linear", "matmul")]
    projection = _projection(own, linears, cross)
    of_cross = None if cross is None else _projection(cross, linears, None)
    taken = {event.order for event in (projection, of_cross) if event is not None}
    rest = [event for event in linears if event.order not in taken]
    down = rest[-1] if rest and rest[-1].order > attentions[-1].order else None
    second = None if cross is None else Cross(cross.output[-3], _tap(of_cross), _pattern(cross, survey))
    mlp, neurons = _tap(down), 0 if down is None else down.inputs[0][-1]
    added = None if down is None else next((one for one in survey.sums if one.order > down.order), None)
    if down is not None and projection is not None and _shared(down, projection, linears):
        added = next((one for one in reversed(survey.sums) if attentions[-1].order < one.order <= starts[nth + 1]
                      and _inside(survey.made[one.number].path, path)), None)
        mlp, neurons = None if added is None else survey.made.get(max(added.terms)), 0
    mid = None if down is None or added is None else _mid(path, attentions[-1], down, added, survey)
    return Layer(path, own.output[-3], _tap(projection), neurons, mlp, _pattern(own, survey), mid, second, nth)


def _shared(down: Seen, projection: Seen, linears: list[Seen]) -> bool:
    """Whether the last linear map is one of experts that see some tokens each, or says who sees which: what it makes is
    not as much as the attention's output, or it was called over and over in one place.
    """
    calls = sum(event.path == down.path and event.kind == down.kind for event in linears)
    return down.output.numel() != projection.output.numel() or calls > 2


def _projection(attention: Seen, linears: list[Seen], before: Seen | None) -> Seen | None:
    """The first linear map after the attention, and before another one, that reads its heads side by side."""
    width = attention.output[-3] * attention.output[-1]
    return next((event for event in linears if event.order > attention.order and event.inputs[0][-1] == width
                 and (before is None or event.order < before.order)), None)


def _mid(path: str, attention: Seen, down: Seen, added: Sum, survey: Survey) -> Tap | None:
    """What the layer adds its MLP to, if the MLP has seen the attention; tapped where it is made, so that the MLP and
    what it is added to both read what is put there.
    """
    number = 1 + [event.order for event in survey.seen if event.kind == "attention"].index(attention.order)
    if survey.depths[down.order] < number:
        return None
    made = survey.made.get(min(added.terms))
    return made if made is not None and _inside(made.path, path) else None


def _pattern(event: Seen, survey: Survey) -> Tap:
    before = [one for one in survey.seen if one.kind == "attention" and one.path == event.path]
    return Tap(event.path, "attention", PATTERN, before.index(event))


def _tap(event: Seen | None) -> Tap | None:
    return None if event is None else Tap(event.path, event.kind, "input", event.nth)
