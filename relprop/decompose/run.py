"""Decompositions of one batch: many sources in chunks, each a forward pass with a shadow."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..address import Spans
from ..anatomy import Anatomy
from ..division import Division
from ..errors import RelpropError
from ..intervene import Intervention, Zero, parts
from ..intervene.change import values_at
from ..intervene.inputs import arguments
from ..ops import softmax
from ..result.decomposition import Part
from ..still import settled
from ..trace import Tap
from ..trace.shadow import Mark, Shadow, shadowed
from .place import Place, Placing
from .source import Source

ENTRIES, LEAST, MOST = 1 << 24, 64, 256
"""Of the widest value of a layer so many entries are carried at once, but at least so many rows (sources x rows of the
batch), and at most so many."""


@dataclass(frozen=True, eq=False)
class Found:
    """Relevant parts, (S, B), of a value of the output, (B,); None if none was asked for. And parts at places by name.
    """

    rel: Tensor | None
    total: Tensor | None
    at: dict[str, Part]


@dataclass
class Run:
    """One batch of a model, ready to be decomposed.

    Args: ablation: what is irrelevant at a source is what this would put there: nothing (zero), a mean, another run's
        value. chunk: sources x rows carried at once; None: as there is room for, see `ENTRIES`.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    division: Division
    ablation: Intervention = field(default_factory=Zero)
    spans: Spans | None = None
    unruled: str = "error"
    chunk: int | None = None
    known: Anatomy | None = None
    forwards: int = 0

    def __post_init__(self) -> None:
        with settled(self.model):
            self.known = self.known or parts(self.model, self.args, self.kwargs)
        self.placing = Placing(self.model, self.args, self.kwargs, self.known, self.spans)
        self.there: dict[Tap, Tensor] = {}  # what the run that the ablation refers to has, (R, P, C)

    def of(self, sources: Sequence[Source], value: Callable[[Any], Tensor] | None = None,
           looks: Mapping[str, Place] | None = None, *, finish: Callable[[Tensor], Tensor] | None = None) -> Found:
        """What of a value of the output, (B,) or any shape, and of the vectors at places, is relevant by each source.

        Without a value the model is left once the last place has been looked at. `finish`: what is kept of the relevant
        parts of the value, (S, ...), of some sources at a time.
        """
        looks = dict(looks or {})
        with settled(self.model), torch.no_grad():
            self.prepare(sources, looks)
            order = sorted(range(len(sources)), key=lambda i: self.depth(sources[i]))
            done = lambda chunk: chunk if finish is None else replace(chunk, rel=finish(chunk.rel))
            chunks = [done(self._chunk([sources[i] for i in part], value, looks))
                      for part in self._parts(sources, order)]
        return _joined(chunks, order, looks, self.division.whole)

    def prepare(self, sources: Sequence[Source], looks: Mapping[str, Place]) -> None:
        """What is found out once: how tensors lie, and what the run that the ablation refers to has there."""
        taps = list(dict.fromkeys([place.tap for source in sources for place in source.places]
                                  + [place.tap for place in looks.values()]))
        self.placing.learn(taps)
        wanted = [tap for source in sources for tap in source.taps if tap not in self.there]
        if self.ablation.source is not None and wanted:
            args, kwargs = arguments(self.ablation.source)
            self.there |= values_at(self.model, args, kwargs, list(dict.fromkeys(wanted)))

    def depth(self, source: Source) -> tuple:
        """Sources that are set at the same taps go together, so that what reaches what is the same for all of them."""
        layers = sorted(self._order(tap) for tap in source.taps)
        first = min((int(place.where.int().argmax(1).min()) for place in source.places if place.where is not None),
                    default=0)
        return layers, first

    def _order(self, tap: Tap) -> tuple[int, str]:
        for number, layer in enumerate(self.known.layers):
            if tap.path == layer.path or tap.path.startswith(f"{layer.path}."):
                return number, repr(tap)
        return -1, repr(tap)

    def _parts(self, sources: Sequence[Source], order: list[int]) -> list[list[int]]:
        size = 1 if not self.division.whole else max(1, self.room // self.placing.rows)
        found: list[list[int]] = []
        for i in order:
            if found and len(found[-1]) < size and sources[found[-1][0]].taps == sources[i].taps:
                found[-1].append(i)
            else:
                found.append([i])
        return found

    @property
    def room(self) -> int:
        """Sources x rows that are carried at once."""
        if self.chunk is not None:
            return self.chunk
        inside = [self.model.get_submodule(layer.path) for layer in self.known.layers]
        widest = max((max(p.shape) for layer in inside for p in layer.parameters() if p.dim() == 2), default=1)
        return min(MOST, max(LEAST, ENTRIES // (widest * self.placing.length)))

    def _chunk(self, sources: list[Source], value: Callable[[Any], Tensor] | None, looks: dict[str, Place]) -> Found:
        found: dict[str, Part] = {}
        shadow = Shadow(self.division, len(sources), self._marks(sources), self._reads(looks, found),
                        layers=[layer.path for layer in self.known.layers], unruled=self.unruled,
                        whole=value is not None)
        rel = total = None
        with ExitStack() as stack:
            stack.enter_context(shadowed(self.model, shadow))
            output = self.model(*self.args, **self.kwargs)
            if value is not None:
                shadow.rule("softmax", softmax.pattern_difference)  # of a target there is no pattern to hold
                total = value(output)
                rel = shadow.part(total)
        self.forwards += 1
        missed = [tap for tap, count in shadow.fired.items() if not count and tap in shadow.marks]
        if missed and value is not None:  # else the model was left before
            raise RelpropError(f"the forward pass never came to {missed[0]}, where a source was to be set")
        if total is not None and rel is None:
            rel = total.new_zeros(len(sources), *total.shape)
        at = {name: _filled(part, len(sources)) for name, part in found.items()}
        return Found(rel, total, at)

    def _marks(self, sources: list[Source]) -> dict[Tap, Mark]:
        chosen: dict[Tap, list[tuple[int, Place]]] = {}
        for number, source in enumerate(sources):
            for place in source.places:
                chosen.setdefault(place.tap, []).append((number, place))
        marks = {tap: self.placing.mark(tap, places, len(sources), self.ablation, self.there.get(tap))
                 for tap, places in chosen.items()}
        streams = all(tap.kind is None for tap in marks)
        if not self.division.whole and not streams:  # parts of layers: what is lost is lost from the first layer on
            first = next(self.placing.places("L*.in"))[1].tap
            marks.setdefault(first, lambda x, rel: x.new_zeros(len(sources), *x.shape))
        return marks

    def _reads(self, looks: dict[str, Place], found: dict[str, Part]) -> dict[Tap, Any]:
        by_tap: dict[Tap, dict[str, Place]] = {}
        for name, place in looks.items():
            by_tap.setdefault(place.tap, {})[name] = place
        return {tap: self.placing.look(wanted, found) for tap, wanted in by_tap.items()}


def _filled(part: Part, sources: int) -> Part:
    """A part that no source reached is zero for all of them."""
    return part if len(part.rel) else Part(part.total.new_zeros(sources, *part.total.shape), part.total)


def _joined(chunks: list[Found], order: list[int], looks: Mapping[str, Place], whole: bool) -> Found:
    """The chunks as one. Where rules do not sum, each source has a total of its own at a place, (S, B, P, W)."""
    back = torch.tensor(order).argsort()
    first = chunks[0]
    rel = None if first.rel is None else torch.cat([chunk.rel for chunk in chunks])[back]
    totals = lambda name: first.at[name].total if whole else torch.stack([one.at[name].total for one in chunks])[back]
    at = {name: Part(torch.cat([chunk.at[name].rel for chunk in chunks])[back], totals(name))
          for name in looks if name in first.at}
    missing = [name for name in looks if name not in first.at]
    if missing:
        raise RelpropError(f"the forward pass never came to {missing[0]}")
    return Found(rel, first.total, at)
