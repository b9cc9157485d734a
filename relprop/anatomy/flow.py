"""What came from what in a forward pass: the graph of its calls, walked."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..trace import Tap
from ..trace.survey import SUMS, Called, Run, Survey

_MAKES = frozenset({"linear", "conv", "matmul", "attention", ""})
"""Kinds of calls whose output has other vectors than what they read; the others change vectors entry by entry."""
_CARRIES = frozenset({"move", "norm", "mul"})
"""Kinds that a stream passes through and is the stream still: laid out anew, normalized, scaled."""


@dataclass(frozen=True)
class Branch:
    """What a layer adds to its stream: the sum, the stream before it and the term that is added, by number."""

    sum: Called
    before: int
    term: int


@dataclass(frozen=True)
class Flow:
    """The calls of a survey, by what they made."""

    survey: Survey
    maker: dict[int, int] = field(default_factory=dict)
    events: dict[int, Called] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, call in enumerate(self.survey.calls):
            self.maker[call.output] = place
            if call.event is not None:
                self.events.setdefault(call.event, call)

    def back(self, number: int, stops: Iterable[int] = (), first: int = 0) -> Iterator[Called]:
        """The calls that a tensor was made by, the nearest first, none before call `first` and none beyond `stops`."""
        seen, waiting = set(stops), deque([number])
        while waiting:
            one = waiting.popleft()
            place = self.maker.get(one, -1)
            if one in seen or place < first:
                continue
            seen.add(one)
            yield self.survey.calls[place]
            waiting.extend(self.survey.calls[place].inputs)

    def sources(self, number: int, stops: Iterable[int] = (), through: Iterable[str] = (),
                ) -> tuple[list[Called], dict[int, int]]:
        """The calls that made the vectors of a tensor, before they were laid out, scaled, added and so on; and how wide
        an axis was, by the entries that it has been laid together to since then. `through`: kinds of calls that are
        looked behind, if they are no linear maps or attentions.
        """
        found, widths, seen, waiting = [], {}, set(stops), deque([number])
        while waiting:
            one = waiting.popleft()
            if one in seen or one not in self.maker:
                continue
            seen.add(one)
            call = self.survey.calls[self.maker[one]]
            for together, width in call.widths:
                widths.setdefault(together, width)
            if call.event is not None or (call.kind in _MAKES and call.kind not in through):
                found.append(call)
            else:
                waiting.extend(call.inputs)
        return found, widths

    def depends(self, number: int, upon: Iterable[int], first: int = 0) -> bool:
        """Whether a tensor was made of one of others."""
        upon = set(upon)
        return number in upon or any(not upon.isdisjoint(call.inputs) for call in self.back(number, first=first))

    def live(self) -> frozenset[int]:
        """The tensors that the model's output is made of, and does not only pick by."""
        found: set[int] = set()
        waiting = list(self.survey.outputs)
        while waiting:
            one = waiting.pop()
            if one not in found and one not in self.survey.discrete:
                found.add(one)
                if one in self.maker:
                    waiting.extend(self.survey.calls[self.maker[one]].inputs)
        return frozenset(found)

    def at(self, tap: Tap) -> int | None:
        """The tensor at a tap, or of what an op reads the one that it makes of it; None where that is not known."""
        survey = self.survey
        if tap.kind is None:
            run = next((run for run in survey.runs if (run.path, run.nth) == (tap.path, tap.nth)), None)
            return run and (run.read if tap.side == "input" else run.returned)
        if tap.side == "output":
            return next((call.output for call in survey.calls if call.place == tap), None)
        wanted = tap.kind, tap.path, tap.nth
        events = (event for event in survey.seen if (event.kind, event.path, event.nth) == wanted)
        return next((self.events[event.order].output for event in events if event.order in self.events), None)

    def branches(self, run: Run) -> list[Branch]:
        """What is added to the stream that a module reads, in order: sums of the stream, maybe normalized or scaled,
        and another tensor of its shape that was made of it.
        """
        stream, made, found = {run.read, *run.beside}, {run.read, *run.beside}, []
        for call in self.survey.calls[run.start:run.end]:
            reads = [one in made for one in call.inputs]
            if not any(reads):
                continue
            made.add(call.output)
            in_stream = [one in stream for one in call.inputs]
            if call.name in SUMS and [*call.shapes] == [call.shape] * 2:
                if sum(in_stream) == 1 and all(reads):
                    found.append(Branch(call, *sorted(call.inputs, key=lambda one: one not in stream)))
                if sum(in_stream) == 1:
                    stream.add(call.output)
            elif call.kind in _CARRIES and in_stream[0] and sum(reads) == 1:
                stream.add(call.output)
        return found
