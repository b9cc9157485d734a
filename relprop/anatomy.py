"""The parts of a model, found by observing one forward pass: layers, heads, MLP neurons, and where to tap them.

No list of names: layers are the modules of a stack that each hold an attention, heads are how the attention splits its
values, the output projection is the first linear map after it, and neurons are what the layer's last linear map reads.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .address import ALL, Address
from .trace import Seen, Tap, observed


@dataclass(frozen=True)
class Layer:
    """One layer: its module's path, how many heads its attention has, and the taps of its parts."""

    path: str
    heads: int
    attention: Tap | None
    neurons: int
    mlp: Tap | None


@dataclass(frozen=True)
class Anatomy:
    """The layers of a model, in the order in which they run."""

    layers: tuple[Layer, ...]

    def resolve(self, address: Address) -> Iterator[tuple[Address, Tap]]:
        """Each place that a pattern means, without `*`, and the tap that shows its relevance.

        Raises: ValueError for a layer, head or neuron that is not there.
        """
        for number in self._numbers(address):
            layer = self.layers[number]
            if address.part == "layer":
                yield Address("layer", number, position=address.position), Tap(layer.path)
                continue
            tap, count = (layer.attention, layer.heads) if address.part == "attn" else (layer.mlp, layer.neurons)
            if tap is None:
                raise ValueError(f"layer {number} ({layer.path}) has no {address.part} that could be told apart")
            if address.unit is None:
                output = Tap(tap.path, tap.kind, "output", tap.nth)
                yield Address(address.part, number, position=address.position), output
                continue
            for index in range(count) if address.index is ALL else [address.index]:
                if not 0 <= index < count:
                    name = "heads" if address.unit == "H" else "neurons"
                    raise ValueError(f"no {address.unit}{index} in layer {number}, which has {count} {name}")
                yield Address(address.part, number, address.unit, index, address.position), tap

    def _numbers(self, address: Address) -> range | list[int]:
        if address.layer is ALL:
            return range(len(self.layers))
        if not 0 <= address.layer < len(self.layers):
            raise ValueError(f"no layer {address.layer}; the model has layers 0 to {len(self.layers) - 1}")
        return [address.layer]


def anatomy(model: nn.Module, args: tuple, kwargs: dict) -> Anatomy:
    """The anatomy of `model`, from one forward pass on this input. Cost: one forward.

    Raises: ValueError if no stack of modules with an attention in each is found.
    """
    with torch.no_grad(), observed(model) as seen:
        model(*args, **kwargs)
    attended = [event for event in seen if event.kind == "attention"]
    stacks = _stacks(model, [event.path for event in attended])
    if not stacks:
        raise ValueError("no stack of layers was found: no nn.ModuleList or nn.Sequential whose modules hold an "
                         "attention each; addresses need one")
    layers = [_layer(path, [event for event in seen if _inside(event.path, path)])
              for stack in stacks for path in stack]
    return Anatomy(tuple(layer for layer in layers if layer is not None))


def _inside(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _stacks(model: nn.Module, attended: list[str]) -> list[list[str]]:
    """The innermost lists of modules that hold an attention each, in the order in which they run."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        paths = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        holding = [path for path in paths if any(_inside(where, path) for where in attended)]
        if holding:
            found.append((name, holding))
    inner = [(name, paths) for name, paths in found
             if not any(other != name and any(_inside(other, path) for path in paths) for other, _ in found)]
    first = {name: min(i for i, where in enumerate(attended) if _inside(where, paths[0])) for name, paths in inner}
    return [paths for name, paths in sorted(inner, key=lambda item: first[item[0]])]


def _layer(path: str, events: list[Seen]) -> Layer | None:
    attention = next((event for event in events if event.kind == "attention"), None)
    if attention is None:
        return None
    heads, width = attention.output[-3], attention.output[-3] * attention.output[-1]
    linears = [event for event in events if event.kind == "linear"]
    after = [event for event in linears if event.order > attention.order]
    projection = next((event for event in after if event.inputs[0][-1] == width), None)
    rest = [event for event in linears if projection is None or event.order != projection.order]
    down = rest[-1] if rest and rest[-1].order > attention.order else None
    return Layer(path, heads, _tap(projection), 0 if down is None else down.inputs[0][-1], _tap(down))


def _tap(event: Seen | None) -> Tap | None:
    return None if event is None else Tap(event.path, event.kind, "input", event.nth)
