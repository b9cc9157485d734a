"""The parts of a model, found by observing it run: the stream, mixers and their heads, MLPs and neurons.

No list of names: layers are the modules of a stack that each hold an attention or, in a model without, add to a stream;
heads are how the attention splits its values, or another mixer what its output projection reads; the output projection
is the first linear map after it, neurons are what the layer's last linear map reads, and the stream between attention
and MLP is what the layer adds its MLP to. In a layer without attention the part that mixes positions is in its place.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..address import ALL, INPUTS, Address
from ..still import settled
from ..trace import Tap, surveyed
from ..trace.intervention import Change, edited
from .adapter import around
from .flow import Flow
from .layer import Cross, Layer, Reading
from .probe import mixing, same, silent
from .stack import stacks


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
            yield address, self.layers[-1].tap("output")
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
        lacks = self._lacks(address, number)
        if lacks is not None:
            if many and any(self._lacks(address, other) is None for other in range(len(self.layers))):
                return None  # L*.cross: an encoder's layers have none
            raise ValueError(f"{address}: layer {number} ({layer.path}) {lacks}")
        owner = layer.cross if address.part == "cross" else layer
        if address.inner is not None:
            return owner.pattern, owner.heads
        if address.part in ("layer", "in"):
            return layer.tap("output" if address.part == "layer" else "input"), 0
        if address.part == "mid":
            return layer.mid, 0
        tap, whole, units = (layer.mlp, None, layer.neurons) if address.part == "mlp" else (
            owner.attention, owner.whole, owner.heads)
        if address.unit is None:
            return whole or _output(tap), units
        return tap, units

    def _lacks(self, address: Address, number: int) -> str | None:
        """What a layer lacks for an address, None if it has the place."""
        layer, part = self.layers[number], address.part
        if part in layer.silent:
            return "gives what it makes there to nothing that the output is made of"
        if part in ("layer", "in"):
            return None
        if part == "mid":
            return None if layer.mid is not None else (
                "has no stream between its attention and its MLP: they run beside each other, or it has only one of "
                "the two")
        if part == "cross" and layer.cross is None:
            return "has no attention to an encoder"
        owner = layer.cross if part == "cross" else layer
        if (layer.mlp if part == "mlp" else owner.attention or address.inner and owner.pattern) is None:
            return f"has no {part} that could be told apart"
        if address.inner is not None and owner.pattern is None:
            return "has no attention pattern that is one head's: it mixes positions in another way, or with several"
        if address.unit == "N" and not layer.neurons:
            return (f"has no neurons that every token passes: its experts see some of them each; give L{number}.mlp, "
                    "what they add together")
        if address.unit == "H" and not owner.heads:
            return f"has a mixer that is not made of heads; give L{number}.{part}"
        return None

    def _units(self, address: Address, tap: Tap, count: int) -> Iterator[tuple[Address, Tap]]:
        if address.unit is None:
            yield address, tap
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
        for number in range(len(self.layers)):
            places = [Address(part, number) for part in ("in", "layer", "mid", "attn", "cross", "mlp")]
            places += [Address(part, number, unit, 0) for part, unit in (("attn", "H"), ("cross", "H"), ("mlp", "N"))]
            places += [Address(part, number, "H", 0, inner="pattern") for part in ("attn", "cross")]
            yield from (place for one in places if self._lacks(one, number) is None for place in self.resolve(one))

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



def _output(tap: Tap) -> Tap:
    """What a linear map gives, of the tap of what it reads."""
    return tap if tap.kind is None else replace(tap, side="output", axes=tap.axes if tap.kind == "conv" else (-1,))


def _changes(model: nn.Module, args: tuple, kwargs: dict, tap: Tap, change: Change, plain: object) -> bool:
    with edited(model, {tap: change}) as editor:
        output = model(*args, **kwargs)
    return bool(editor.fired[tap]) and not same(plain, output)


def anatomy(model: nn.Module, args: tuple, kwargs: dict) -> Anatomy:
    """The anatomy of `model`, from a forward pass on the first row of this input, in which heads cannot be taken for
    rows. Cost: a forward of one row; two more if there are layers without attention, and more if there are places that
    seem to reach no output.

    Raises: ValueError if no stack of layers is found.
    """
    args, kwargs = _first_row(args, kwargs)
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    with torch.no_grad(), settled(model):
        with surveyed(model, inputs) as survey:
            model(*args, **kwargs)
        flow = Flow(survey)
        found = stacks(model, flow, lambda run: _complete(Reading(flow, run)))
        if not found:
            raise ValueError("no stack of layers was found: no nn.ModuleList or nn.Sequential whose modules hold an "
                             "attention each, or add to the stream that they read; addresses need one")
        paths = {path for stack in found for path in stack}
        read = [Reading(flow, run) for run in survey.runs if run.path in paths]  # in the order in which they run
        if not read:
            raise ValueError(f"the modules of the stack that was found, {found[0][0]} ..., are never called: the model "
                             "runs their `forward` by itself, past the hooks that addresses need")
        plain = [one for one in read if not one.mixers()]
        answers = mixing(model, args, kwargs, [ask for one in plain for ask in one.questions()]) if plain else {}
        layers = [one.without(answers) if one in plain else one.layer() for one in read]
        known = Anatomy(tuple(layers), next(iter(survey.embeddings), None))
        return around(model, _heard(known, flow, lambda taps: silent(model, args, kwargs, taps)))


def _complete(reading: Reading) -> bool:
    return bool(reading.mixers()) and reading.layer().mlp is not None


def _heard(known: Anatomy, flow: Flow, is_silent: Callable[[list[Tap]], bool]) -> Anatomy:
    """The anatomy, with what nothing in the output comes of left out. What the graph says is tried, since there may be
    ways that it does not know.
    """
    live, doubtful = flow.live(), []
    for number in range(len(known.layers)):
        for part in ("in", "layer", "mid", "attn", "cross", "mlp"):
            address = Address(part, number)
            tap = None if known._lacks(address, number) is not None else next(known.resolve(address))[1]
            if tap is not None and (made := flow.at(tap)) is not None and made not in live:
                doubtful.append((number, part, tap))
    if doubtful and not is_silent([tap for *_, tap in doubtful]):
        doubtful = [one for one in doubtful if is_silent([one[2]])]
    left = {number: frozenset(part for other, part, _ in doubtful if other == number) for number, *_ in doubtful}
    return replace(known, layers=tuple(replace(layer, silent=left.get(number, frozenset()))
                                       for number, layer in enumerate(known.layers)))


def _first_row(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    rows = next((a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), 1)
    cut = lambda a: a[:1] if isinstance(a, Tensor) and a.dim() and len(a) == rows else a
    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


__all__ = ["Anatomy", "Cross", "Layer", "anatomy"]
