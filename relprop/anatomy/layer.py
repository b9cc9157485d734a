"""The parts of one layer: its mixer and the heads of it, its MLP and the neurons of it, the stream between the two."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..trace import Seen, Tap
from ..trace.intervention import PATTERN
from ..trace.survey import Called, Run, Survey
from .flow import Branch, Flow
from .probe import Answer, Question
from .stack import inside


@dataclass(frozen=True)
class Cross:
    """A second attention of a layer, such as a decoder's to the encoder: its heads, and the taps of its output, as of
    `Layer`, and of its pattern.
    """

    heads: int
    attention: Tap | None
    pattern: Tap | None
    whole: Tap | None = None


@dataclass(frozen=True)
class Layer:
    """One layer: its module's path, how many heads its attention has (those of the queries), and the taps of its parts.

    `attention` and `mlp` are of what the output projection and the last linear map read, heads and neurons side by
    side; where there is no such map, as where experts share the tokens among them, of what is added to the stream, and
    `heads` or `neurons` are 0. `whole` is of what the attention adds, where that is not what the projection gives (as
    of one in two steps). In a layer without attention `attention` is of what mixes positions in its place, and
    there is no `pattern`. `mid` is None where there is no stream between the two, as where they run beside each other.
    `nth`: the how-manieth run of the module it is, where layers share one (ALBERT). `axes`: along which the vectors of
    its stream lie. `silent`: parts of which nothing in the output comes.
    """

    path: str
    heads: int = 0
    attention: Tap | None = None
    neurons: int = 0
    mlp: Tap | None = None
    pattern: Tap | None = None
    mid: Tap | None = None
    cross: Cross | None = None
    nth: int = 0
    axes: tuple[int, ...] = (-1,)
    silent: frozenset[str] = frozenset()
    whole: Tap | None = None

    def tap(self, side: str) -> Tap:
        """Of its stream, before it ("input") or after it ("output")."""
        return Tap(self.path, None, side, self.nth, self.axes)


@dataclass(frozen=True)
class Mixer:
    """Attentions that one linear map reads: their events, and that of the map."""

    events: tuple[Seen, ...]
    projection: Seen | None
    heads: int


@dataclass
class Reading:
    """One run of a module, read as a layer."""

    flow: Flow
    run: Run

    @property
    def survey(self) -> Survey:
        return self.flow.survey

    @cached_property
    def events(self) -> list[Seen]:
        return self.survey.seen[self.run.before:self.run.after]

    @cached_property
    def maps(self) -> list[Seen]:
        """Its linear maps."""
        return [event for event in self.events if event.kind != "attention"]

    @cached_property
    def branches(self) -> list[Branch]:
        return self.flow.branches(self.run)

    @cached_property
    def stream(self) -> frozenset[int]:
        """The stream that it reads, and each sum that it makes of it."""
        return frozenset({self.run.read, *(branch.sum.output for branch in self.branches)})

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """Along which axes the vectors of the stream lie: as what reads it first takes them."""
        seen, order = {self.run.read: tuple(range(len(self.run.shape)))}, len(self.run.shape)
        for call in self.survey.calls[self.run.start:self.run.end]:
            axes = seen.get(call.inputs[0]) if call.inputs else None
            if axes is None or order < 3:
                continue
            if call.name in ("batch_norm", "group_norm", "instance_norm") or call.kind == "conv":
                return (axes[1],) if axes[1] != order - 1 else (-1,)
            if call.kind == "linear" or call.name in ("layer_norm", "rms_norm"):
                return (axes[-1],) if axes[-1] != order - 1 else (-1,)
            if call.order:
                seen[call.output] = tuple(axes[place] for place in call.order)
            elif call.kind in ("move", "mul", "add", "norm") and call.shape == call.shapes[0]:
                seen[call.output] = axes
        return (-1,)

    # -- attention -----------------------------------------------------------------------------------------------

    def layer(self) -> Layer:
        """What it has as a layer with attention: the parts that its calls tell."""
        mixers = self.mixers()
        own, cross = mixers[0], mixers[1] if len(mixers) > 1 else None
        second = None if cross is None else Cross(cross.heads, self._heads(cross), self._pattern(cross),
                                                  self._whole(cross))
        found = Layer(self.run.path, own.heads, self._heads(own), pattern=self._pattern(own), cross=second,
                      nth=self.run.nth, axes=self.axes, whole=self._whole(own))
        down = self._down(mixers)
        if down is None:
            return found
        mlp, neurons, sum_ = self._tap(down), self._width(down), self._after(down)
        if own.projection is not None and self._shared(down, own.projection):
            sum_ = self._last_sum(mixers)
            mlp, neurons = None if sum_ is None else self.survey.made.get(max(sum_.inputs)), 0
        mid = None if sum_ is None else self._mid(mixers, down, sum_)
        return replace(found, mlp=mlp, neurons=neurons, mid=mid)

    def mixers(self) -> list[Mixer]:
        """Its attentions, those together that one linear map reads; none that only feeds another."""
        found: dict[int, list[Seen]] = {}
        attentions = [event for event in self.events if event.kind == "attention"]
        feeding = {call.event for event in attentions if len(attentions) > 1
                   for number in self.flow.events[event.order].inputs
                   for call in self.flow.sources(number, self.stream, ("matmul",))[0]}
        for event in attentions:
            if event.order not in feeding:
                projection = self._projection(event)
                found.setdefault(-1 - event.order if projection is None else projection.order, []).append(event)
        return [self._mixer(tuple(events), None if order < 0 else self.survey.seen[order])
                for order, events in sorted(found.items(), key=lambda one: one[1][0].order)]

    def _projection(self, attention: Seen) -> Seen | None:
        """The linear map that reads what the attention gives, of all positions, not yet added to the stream; None if
        several share the positions among them.
        """
        made = self.flow.events[attention.order]
        found = [event for event in self.maps if event.order > attention.order and made in self._read(event)[0]]
        if not found:  # of attention in two products, such as q (softmax(k) v)
            found = [event for event in self.maps if event.order > attention.order
                     and made in self.flow.sources(self._operand(event), self.stream, ("matmul",))[0]]
        if not found or sum((event.path, event.kind) == (found[0].path, found[0].kind) for event in found) > 1:
            return None
        alike = self._rows(found[0]) in self._positions(attention) or made not in self._read(found[0])[0]
        before = self.flow.back(self._operand(found[0]), {made.output, *self.stream})
        pooled = any(call.kind == "pool" for call in before)
        return found[0] if alike or pooled else None

    def _rows(self, event: Seen) -> int:
        return event.inputs[0].numel() // self._width(event)

    def _positions(self, attention: Seen) -> set[int]:
        """How many vectors a linear map may read that reads all positions of an attention: as many as there are of the
        stream, or as it gives, whose entries may be on either of its last axes.
        """
        count, heads = attention.output.numel(), _heads(attention)
        width = math.prod(self.run.shape[axis] for axis in self.axes)
        return {self.run.shape.numel() // width, *(count // (heads * size) for size in attention.output[-2:])}

    def _operand(self, event: Seen) -> int:
        return self.flow.events[event.order].inputs[0]

    def _read(self, event: Seen) -> tuple[list[Called], dict[int, int]]:
        """What the operand of a linear map was made by."""
        return self.flow.sources(self._operand(event), self.stream)

    def _mixer(self, events: tuple[Seen, ...], projection: Seen | None) -> Mixer:
        heads, width = _heads(events[0]), events[0].output[-1]
        if projection is None:
            return Mixer(events, None, heads)
        axes, shape = self.survey.axes[projection.order], projection.inputs[0]
        last, count = shape[axes[-1]], self._width(projection)
        widths = self._read(projection)[1]
        together = widths.get(last)
        if len(events) == 1 and count % heads == 0 and (heads * width == count or together == count // heads
                                                        or (len(axes) > 1 and width == last)):
            return Mixer(events, projection, heads)
        if together is None and len(axes) == 1:
            return Mixer(events, projection, 0 if len(events) > 1 or heads > 1 else 1)
        return Mixer(events, projection, count // (together or last))

    def _heads(self, mixer: Mixer) -> Tap | None:
        """What the projection reads; where there is none, what a fused attention gives."""
        event = mixer.events[0]
        if mixer.projection is not None or len(mixer.events) > 1 or len(event.inputs) < 3 or len(event.output) != 4:
            return self._tap(mixer.projection)
        return replace(self.flow.events[event.order].place, axes=(1, 3))

    def _whole(self, mixer: Mixer) -> Tap | None:
        """What the attention adds to the stream, where its projection gives something else first."""
        made = self.flow.events[(mixer.projection or mixer.events[0]).order]
        made_of = lambda one: self.flow.depends(one.term, [made.output], self.run.start)
        branch = next(filter(made_of, self.branches), None)
        if branch is None:
            return None
        steps = [call for call in self.flow.back(branch.term, self.stream, self.run.start) if call is not made
                 and call.event in self.survey.axes and made.output in self._made_of(call)]
        return self.given(branch) if steps or mixer.projection is None else None

    def _made_of(self, call: Called) -> set[int]:
        return {one for back in self.flow.back(call.output, self.stream, self.run.start) for one in back.inputs}

    def _width(self, event: Seen) -> int:
        """How many entries the vectors have that a linear map reads."""
        return math.prod(event.inputs[0][axis] for axis in self.survey.axes[event.order])

    def _tap(self, event: Seen | None) -> Tap | None:
        return None if event is None else Tap(event.path, event.kind, "input", event.nth, self.survey.axes[event.order])

    def _pattern(self, mixer: Mixer) -> Tap | None:
        """The pattern of heads that are those of the mixer."""
        event = mixer.events[0]
        if len(mixer.events) > 1 or _heads(event) != mixer.heads or len(event.output) > 4:
            return None
        if mixer.projection is not None and self.flow.events[event.order] not in self._read(mixer.projection)[0]:
            return None
        before = [one for one in self.survey.seen if one.kind == "attention" and one.path == event.path]
        return Tap(event.path, "attention", PATTERN, before.index(event))

    # -- the MLP of a layer with attention -----------------------------------------------------------------------

    def _down(self, mixers: list[Mixer]) -> Seen | None:
        """The last linear map that is none of an attention's, before or behind it."""
        projections = [mixer.projection for mixer in mixers if mixer.projection is not None]
        ends = [self.flow.events[event.order] for event in projections]
        made = [self.flow.events[event.order] for mixer in mixers for event in mixer.events]
        calls = {call.output for call in made}
        before = {call.output for end in (*ends, *made)
                  for call in self.flow.back(end.output, self.stream, self.run.start)}
        for event in reversed(self.maps):
            call = self.flow.events[event.order]
            apart = call.output not in before and not self._behind(call, calls | {end.output for end in ends})
            if apart and any(self._makes(one) for one in self._upstream(event)):  # else it is of the skip connection
                return event
        last = max(event.order for mixer in mixers for event in mixer.events)
        taken = {event.order for event in projections}
        rest = [event for event in self.maps if event.order not in taken
                and any(map(self._makes, self._upstream(event))) and self.flow.events[event.order].output not in before]
        added = any(self.flow.depends(branch.term, calls, self.run.start) for branch in self.branches)
        return rest[-1] if not added and rest and rest[-1].order > last else None  # no sum tells what is behind which

    def _behind(self, call: Called, made: set[int]) -> bool:
        """Whether a call is made of what the attention gives, before that is added to the stream."""
        return any(not made.isdisjoint(one.inputs) for one in self.flow.back(call.output, self.stream, self.run.start))

    def _shared(self, down: Seen, projection: Seen) -> bool:
        """Whether the last linear map is one of experts that see some tokens each, or says who sees which: what it
        makes is not as much as the attention's output, or it was called over and over in one place.
        """
        calls = sum(event.path == down.path and event.kind == down.kind for event in self.maps)
        return down.output.numel() != projection.output.numel() or calls > 2

    def _sums(self) -> list[Called]:
        return [call for call in self.survey.calls if call.kind == "add" and [*call.shapes] == [call.shape] * 2]

    def _after(self, down: Seen) -> Called | None:
        place = self.flow.maker[self.flow.events[down.order].output]
        return next((one for one in self._sums() if self.flow.maker[one.output] > place), None)

    def _last_sum(self, mixers: list[Mixer]) -> Called | None:
        last = self.flow.maker[self.flow.events[mixers[-1].events[-1].order].output]
        return next((one for one in reversed(self._sums()) if last < self.flow.maker[one.output] < self.run.end
                     and inside(self.survey.made[one.output].path, self.run.path)), None)

    def _mid(self, mixers: list[Mixer], down: Seen, added: Called) -> Tap | None:
        """What the layer adds its MLP to, if the MLP has seen the attention; tapped where it is made, so that the MLP
        and what it is added to both read what is put there.
        """
        attention = self.flow.events[mixers[-1].events[-1].order].output
        if not self.flow.depends(self.flow.events[down.order].inputs[0], [attention], self.run.start):
            return None
        made = self.survey.made.get(min(added.inputs))
        return replace(made, axes=self.axes) if made is not None and inside(made.path, self.run.path) else None

    # -- a layer without attention -------------------------------------------------------------------------------

    def questions(self) -> list[Question]:
        """What is to be found out of a layer without attention: which of its branches mix positions."""
        found = []
        for branch in self.branches:
            read = self.read(branch)
            given = self.given(branch)
            if read is not None and given is not None:
                found.append(Question(read, given, tuple(self._tap(event) for event in self.of(branch))))
        return found

    def read(self, branch: Branch) -> Tap | None:
        """The stream before a branch, where it is made."""
        if branch is self.branches[0]:
            return Tap(self.run.path, None, "input", self.run.nth, self.axes)
        before = self.branches[self.branches.index(branch) - 1].sum
        return replace(self.survey.made[before.output], axes=self.axes)

    def given(self, branch: Branch) -> Tap | None:
        """What a branch gives, where it is made."""
        made = self.survey.made.get(branch.term)
        if made is None:
            made = self.survey.calls[self.flow.maker[branch.term]].place
            made = made if made.kind not in (None, "", "move") else None
        return None if made is None else replace(made, axes=self.axes)

    def of(self, branch: Branch) -> list[Seen]:
        """The linear maps of a branch."""
        calls = self.flow.back(branch.term, self.stream, self.run.start)
        return sorted((self.survey.seen[call.event] for call in calls if call.event is not None
                       and call.event in self.survey.axes), key=lambda event: event.order)

    def without(self, answers: Mapping[Question, Answer]) -> Layer:
        """What it has as a layer without attention: the first branch that mixes positions is in the attention's place,
        the last other one is its MLP.
        """
        found = Layer(self.run.path, nth=self.run.nth, axes=self.axes)
        for branch in self.branches:
            given = self.given(branch)
            if given is None:
                continue
            answer = next((answers[one] for one in answers if one.given == given), None)
            mixes = self._moves(branch) if answer is None else answer is not False
            last = None if isinstance(answer, Tap) else self._last(branch)
            tap = given if last is None else self._tap(last)
            if mixes and found.attention is None and found.mlp is None:
                mid = self.survey.made[branch.sum.output] if branch is not self.branches[-1] else None
                found = replace(found, attention=tap, heads=0 if last is None else self._split(last),
                                mid=None if mid is None else replace(mid, axes=self.axes))
            else:
                found = replace(found, mlp=tap, neurons=0 if last is None else self._width(last))
        return found

    def _moves(self, branch: Branch) -> bool:
        """Whether a branch has calls that may mix positions, where there is one position alone."""
        calls = self.flow.back(branch.term, self.stream, self.run.start)
        return any(call.kind in ("conv", "pool", "matmul", "") and call.event not in self.survey.axes for call in calls)

    def _last(self, branch: Branch) -> Seen | None:
        """The one linear map that makes what a branch gives; of several, as beside a gate, the one behind another."""
        sources, _ = self.flow.sources(branch.term, self.stream)
        ends = [self.survey.seen[call.event] for call in sources if call.event in self.survey.axes]
        behind = [event for event in ends if any(map(self._makes, self._upstream(event)))]
        ends = ends if len(ends) == 1 else behind
        if len(ends) != 1 or len(sources) > 1 and not behind:
            return None
        return None if ends[0].output.numel() != self.run.shape.numel() else ends[0]

    def _upstream(self, event: Seen) -> list[Called]:
        return list(self.flow.back(self.flow.events[event.order].inputs[0], self.stream, self.run.start))

    def _makes(self, call: Called) -> bool:
        return call.event is not None or call.kind in ("conv", "matmul", "linear")

    def _split(self, event: Seen) -> int:
        """How many heads lie side by side in what a linear map reads; 0: none were laid together."""
        axes, widths = self.survey.axes[event.order], self._read(event)[1]
        last, count = event.inputs[0][axes[-1]], self._width(event)
        width = widths.get(last)
        return count // width if width is not None else count // last if len(axes) > 1 else 0


def _heads(event: Seen) -> int:
    """How many patterns an attention has of a row."""
    return event.inputs[0][-3] if len(event.inputs[0]) == 4 else event.output[-3]


__all__ = ["Cross", "Layer", "Reading"]
