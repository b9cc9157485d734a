"""What the outcome changes by per unit of the values at the taps of a model, and what those change by."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import rows
from ..anatomy import Anatomy
from ..composite import Composite
from ..errors import Undefined
from ..intervene import Places, Resample, Site, canonical, split
from ..relevance import propagate
from ..tokens import Batch
from ..trace import Tap
from ..trace.interception import Tapped
from ..trace.intervention import PATTERN, captured, edited
from ..trace.layout import Layout, guess, learn, vectors
from .norms import NO_STATIONS, Passage, Station, Stations, first_order
from .place import Place, places

CHUNK = 4096
"""Positions whose changes at a norm are computed at once."""


@dataclass(frozen=True, eq=False)
class Query:
    """A run that an outcome needs, on the base and on the counterfactual.

    Args: base, counterfactual: inputs of as many rows; without a counterfactual every value goes to zero. answer: what
        is read of an output of these `rows` (R,) of the input, (R, ...).
        align: position in the counterfactual for each one of the base, (T,) or (B, T), -1 for none: the value there
            stays. Needed where they differ in length.
        prompt: which tokens of the base are the prompt's, bool (B, T): positions count over them.
        there: what is read of an output on the counterfactual, where that is not `answer`.
    """

    base: Batch
    counterfactual: Batch | None
    answer: Callable[[Any, Tensor], Tensor]
    align: Tensor | None = None
    prompt: Tensor | None = None
    there: Callable[[Any, Tensor], Tensor] | None = None

    def take(self, index: Tensor) -> Query:
        """The query of these rows."""
        by_row = lambda t: t if t is None or t.dim() < 2 else t.expand(self.base.rows, -1)[index]
        read = lambda answer: answer and (lambda output, rows: answer(output, index[rows]))
        return Query(self.base.take(index), self.counterfactual and self.counterfactual.take(index),
                     read(self.answer), by_row(self.align), by_row(self.prompt), read(self.there))


Slopes = list[dict[Tap, Tensor]]
"""By query and tap, what the outcome changes by per unit of the values there; (R, P, C)."""


class Run:
    """The estimates of some rows as they are made: values of both runs at the taps, (R, P, C), by query."""

    def __init__(self, model: nn.Module, known: Anatomy, queries: list[Query],
                 outcome: Callable[[Sequence[Tensor]], Tensor], wanted: list[str | Site], *, positions: Places,
                 moved: bool = False) -> None:
        self.model, self.known, self.queries, self.outcome = model, known, queries, outcome
        self.rows = queries[0].base.rows
        self.open = [one for site in map(Site.parse, wanted) for one in places(known, site)]
        self.taps = list(dict.fromkeys(place.tap for place in self.open))
        self.positions, self.moved, self.stations = positions, moved, NO_STATIONS
        self.layouts: list[dict[Tap, Layout | None]] = [{} for _ in queries]
        self.shapes: list[dict[Tap, torch.Size]] = [{} for _ in queries]
        self.now: list[dict[Tap, Tensor]] = [{} for _ in queries]
        self.norms: list[dict[Station, Passage]] = [{} for _ in queries]
        self.before: list[Tensor] = []
        self.there, self.after = self._others()

    @property
    def places(self) -> tuple[Place, ...]:
        """With the number of mediators of each, which widths of vectors tell."""
        return tuple(replace(place, count=self.now[0][place.tap].shape[-1]) if place.count < 0 else place
                     for place in self.open)

    def outcomes(self) -> tuple[Tensor, Tensor]:
        """The outcome of the base and of the counterfactual, (R,)."""
        with torch.no_grad():
            before = self.outcome(self.before).cpu()
            return before, torch.full_like(before, torch.nan) if self.after is None else self.outcome(self.after).cpu()

    # -- what the outcome changes by per unit --------------------------------------------------------------------

    def gradients(self) -> Slopes:
        """The gradient on the base."""
        found = [self._probed(which, {}, self.taps) for which in range(len(self.queries))]
        self.before = [answer.detach() for answer, *_ in found]
        for which, (_, now, _) in enumerate(found):
            self._keep(which, now)
        return self._back(found)

    def relevances(self, composite: Composite, stations: Stations = NO_STATIONS) -> Slopes:
        """Relevance per unit on the base, to first order; what passes the stations is kept for `scored`."""
        self.stations = stations
        weights, composite = self._weights(), first_order(composite)
        return [self._relevance(which, weight, composite) for which, weight in enumerate(weights)]

    def integrated(self, points: Tensor, weights: Tensor) -> Slopes:
        """The mean gradient on the way from the base to the counterfactual: of the inputs, where they are `moved`, or
        of the values at one tap after the other.
        """
        self._base()
        each = [self.taps] if self.moved else [[tap] for tap in self.taps]
        total: Slopes = [{} for _ in self.queries]
        for point, weight in zip(points.tolist(), weights.tolist()):
            for taps in each:
                moved = [self._moved(which, point, taps) for which in range(len(self.queries))]
                slopes = self._back([self._probed(which, shift, taps, inputs)
                                     for which, (shift, inputs) in enumerate(moved)])
                for sums, found in zip(total, slopes):
                    sums.update({tap: sums.get(tap, 0) + weight * slope for tap, slope in found.items()})
        return total

    # -- runs ----------------------------------------------------------------------------------------------------

    def _call(self, batch: Batch, taps: Sequence[Tap]) -> tuple[Any, dict[Tap, Tensor]]:
        with torch.no_grad():
            return captured(self.model, taps, lambda: self.model(*batch.args, **batch.kwargs))

    def _others(self) -> tuple[list[dict[Tap, Tensor]], list[Tensor] | None]:
        """The values at the taps on the counterfactuals, as the model has them, and the answers there."""
        if any(query.counterfactual is None for query in self.queries):
            return [{} for _ in self.queries], None
        found = [self._call(query.counterfactual, self._all_taps) for query in self.queries]
        index = torch.arange(self.rows)
        answers = [(query.there or query.answer)(output, index) for query, (output, _) in zip(self.queries, found)]
        return [{tap: canonical(tap, self._layout(query.counterfactual, tap, values), values[tap])
                 for tap in self._all_taps} for query, (_, values) in zip(self.queries, found)], answers

    @property
    def _all_taps(self) -> list[Tap]:
        """With the word embeddings, where they are what is moved."""
        embed = [self.known.embed] if self.moved and self.known.embed is not None else []
        return list(dict.fromkeys([*self.taps, *embed]))

    def _base(self) -> None:
        """The answers on the base, and the values at all taps."""
        for which, query in enumerate(self.queries):
            output, values = self._call(query.base, self._all_taps)
            self.before.append(query.answer(output, torch.arange(self.rows)))
            self._keep(which, values)

    def _keep(self, which: int, values: Mapping[Tap, Tensor]) -> None:
        for tap, value in values.items():
            self.shapes[which][tap] = value.shape
            self.layouts[which][tap] = self._layout(self.queries[which].base, tap, values)
            self.now[which][tap] = canonical(tap, self.layouts[which][tap], value)

    def _layout(self, batch: Batch, tap: Tap, values: Mapping[Tap, Tensor]) -> Layout | None:
        if tap.side == PATTERN:
            return None
        found = guess(values[tap].shape, batch.rows)
        if found is None:  # a pass with one row more tells
            more = self._call(batch.take([*range(batch.rows), 0]), [tap])[1]
            found = learn(values[tap].shape, batch.rows, more[tap].shape, batch.rows + 1)
        return found

    def _probed(self, which: int, shift: Mapping[Tap, Tensor], taps: Sequence[Tap], inputs: Batch | None = None
                ) -> tuple[Tensor, dict[Tap, Tensor], dict[Tap, Tensor]]:
        """A forward pass whose values at taps are moved by a `shift`: the answer, the values, and zeros added to them
        that have their gradient.
        """
        query, now, probes = self.queries[which], {}, {}

        def change(tap: Tap, value: Tensor) -> Tensor:
            value = value + shift[tap].to(value) if tap in shift else value
            if tap in taps:
                now[tap], probes[tap] = value.detach(), torch.zeros_like(value, requires_grad=True)
                value = value + probes[tap]
            return value

        batch = inputs or query.base
        with edited(self.model, {tap: partial(change, tap) for tap in {*taps, *shift}}):
            output = self.model(*batch.args, **batch.kwargs)
        missing = next((tap for tap in taps if tap not in probes), None)
        if missing is not None:
            raise ValueError(f"the forward pass never came to {missing}")
        return query.answer(output, torch.arange(self.rows)), now, probes

    def _back(self, found: list[tuple[Tensor, dict[Tap, Tensor], dict[Tap, Tensor]]]) -> Slopes:
        """The gradient of the outcome at all probes, zeros where it is not reached."""
        y = self.outcome([answer for answer, *_ in found])
        flat = [probe for *_, probes in found for probe in probes.values()]
        if not y.requires_grad:
            raise Undefined("the outcome does not depend on any of these mediators")
        slopes = iter(torch.autograd.grad(y.sum(), flat, allow_unused=True))
        return [{tap: self._canonical(which, tap, probe, next(slopes)) for tap, probe in probes.items()}
                for which, (*_, probes) in enumerate(found)]

    def _canonical(self, which: int, tap: Tap, value: Tensor, slope: Tensor | None) -> Tensor:
        return canonical(tap, self.layouts[which][tap], torch.zeros_like(value) if slope is None else slope.detach())

    def _weights(self) -> list[Tensor | None]:
        """What the outcome changes by per unit of each answer on the base; None: the answer is the outcome."""
        if len(self.queries) == 1:
            return [None]
        for query in self.queries:
            output = self._call(query.base, [])[0]
            self.before.append(query.answer(output, torch.arange(self.rows)))
        leaves = [answer.detach().requires_grad_() for answer in self.before]
        return list(torch.autograd.grad(self.outcome(leaves).sum(), leaves))

    def _relevance(self, which: int, weight: Tensor | None, composite: Composite) -> dict[Tap, Tensor]:
        query = self.queries[which]
        value = _Weighed(query, torch.arange(self.rows), weight, self.outcome)
        ends = {end for station in self.stations.found for end in (station.input, station.output)}
        run = propagate(self.model, query.base.args, query.base.kwargs, value, composite, ledger=False,
                        taps={str(i): tap for i, tap in enumerate(self.taps)} | {str(end): end for end in ends})
        missing = next((tap for i, tap in enumerate(self.taps) if str(i) not in run.inside), None)
        if missing is not None:
            raise ValueError(f"under {composite.name} nothing passes {missing}: the model never comes there, does not "
                             "depend on the input there, or the rules hold it; take method='attribution'")
        if weight is None:
            self.before.append(value.answer)
        found = {tap: run.inside[str(i)] for i, tap in enumerate(self.taps)}
        self.norms[which] = dict(self._at_norms(query, run.inside))
        values = {tap: self._read(tap, one.value) for tap, one in found.items()}
        self._keep(which, values)
        return {tap: self._canonical(which, tap, values[tap], None if one.per_unit is None else
                                     self._read(tap, one.per_unit)) for tap, one in found.items()}

    def _read(self, tap: Tap, t: Tensor) -> Tensor:
        """A tapped tensor as edits have it: a pattern by rows and heads, vectors last."""
        if tap.side == PATTERN:
            return t.unflatten(0, (self.rows, -1)) if t.dim() == 3 else t
        return vectors(t, tap.axes)

    def _at_norms(self, query: Query, inside: Mapping[str, Tapped]) -> Iterator[tuple[Station, Passage]]:
        """What passes each station that the outcome depends on, (R, P, ...)."""
        for station in self.stations.found:
            read, made = (inside.get(str(tap)) for tap in (station.input, station.output))
            if read is None or made is None or made.per_unit is None:
                continue
            layout = self._layout(query.base, station.input, {station.input: read.value})
            found = (canonical(station.input, layout, one) for one in (read.value, made.per_unit))
            yield station, Passage.of(station.norm, *(one.float() if one.dtype.itemsize < 4 else one for one in found))

    # -- effects -------------------------------------------------------------------------------------------------

    def _change(self, which: int, tap: Tap) -> Tensor:
        """Of the values at a tap, from the base to the counterfactual, (R, P, C)."""
        now = self.now[which][tap]
        if self.after is None:
            return -now
        other = Resample(None, self.queries[which].align).value(now[None], self.there[which][tap][None])
        return other[0] - now

    def _moved(self, which: int, point: float, taps: list[Tap]) -> tuple[dict[Tap, Tensor], Batch | None]:
        """Shifts of the values at taps, or of the inputs: of word embeddings, or floating inputs as they are."""
        query = self.queries[which]
        if self.moved:
            here = rows.leaf(query.base)[1]
            if here.is_floating_point():
                there = 0 * here if self.after is None else rows.leaf(query.counterfactual)[1]
                return {}, rows.put(query.base, here + point * (there - here))
            if self.known.embed is None:
                raise ValueError("integrated gradients along the inputs need word embeddings or floating inputs, and "
                                 "this model shows neither; take along='mediators'")
            taps = [self.known.embed]
        return {tap: self._as_the_model_has_it(which, tap, point * self._change(which, tap)) for tap in taps}, None

    def _as_the_model_has_it(self, which: int, tap: Tap, change: Tensor) -> Tensor:
        """The way back from (R, P, C)."""
        layout, shape = self.layouts[which][tap], list(self.shapes[which][tap])
        if tap.side == PATTERN:
            return change.unflatten(-1, (shape[1], -1)).transpose(1, 2)  # (B, H, T, S)
        if layout is None:
            return change[0]
        return change.reshape(shape.pop(layout.axis), *shape).movedim(0, layout.axis)

    def scored(self, slopes: Slopes, prompt_only: bool) -> Tensor:
        """The effect of each mediator, (R, M): sums over the queries, the positions and the entries of a unit."""
        sums: dict[tuple, Tensor] = {}
        found = []
        for place in self.places:
            key = (place.tap, place.site.address.position, place.units)
            if key not in sums:
                sums[key] = sum(self._summed(which, *key, prompt_only, slopes[which][place.tap])
                                for which in range(len(self.queries)))
            units = sums[key]  # (R, U)
            found.append(units if place.index is None else units[:, place.index:place.index + 1])
        return torch.cat(found, 1).cpu()

    def _summed(self, which: int, tap: Tap, position: int | str | None, units: int | None, prompt_only: bool,
                slope: Tensor) -> Tensor:
        """Change times slope and what the change does at norms, summed over the positions that count: (R, U)."""
        change = self._change(which, tap).to(slope)
        change, slope = (one.float() if one.dtype.itemsize < 4 else one for one in (change, slope))
        if position is not None or prompt_only:
            change = self._chosen(which, tap, position, prompt_only, change)
        first = split((change * slope).unflatten(0, (self.rows, -1)).sum((1, 2)), units).sum(-1)
        return first + self._beyond(which, tap, change, units)

    def _chosen(self, which: int, tap: Tap, position: int | str | None, prompt_only: bool, change: Tensor) -> Tensor:
        """The change at the positions that count, zero elsewhere."""
        if len(change) != self.rows:
            raise ValueError(f"positions cannot be told apart at {tap.path}: {len(change)} windows of {self.rows} rows")
        prompt = self._prompt(which, change.shape[1])
        chosen = prompt if position is None else self.positions.at(position, prompt)
        change = torch.where(chosen.to(change.device)[:, :, None], change, 0)
        if prompt_only and tap.side == PATTERN:
            heads = self.shapes[which][tap][1]
            change = torch.where(prompt.to(change.device)[:, None].repeat(1, 1, heads), change, 0)
        return change

    def _beyond(self, which: int, tap: Tap, change: Tensor, units: int | None) -> Tensor | float:
        """What a change does beyond first order at the norms that read it position by position, (R, U)."""
        passing = [self.norms[which][one] for one in self.stations.of(tap) if one in self.norms[which]]
        passing = [one for one in passing if one.per_unit.shape[:2] == change.shape[:2] and len(change) == self.rows]
        if not passing:
            return 0.0
        passage, weight = Passage.joined(passing), self.stations.weights[tap]
        live = (change.any(-1) & passage.per_unit.any(-1)).nonzero(as_tuple=True)
        total: Tensor | float = 0.0
        for where in zip(*(one.split(CHUNK) for one in live)):
            found = passage.at(where).beyond(change[where].to(passage.along), weight, units)  # (M, U)
            total = total + found.new_zeros(self.rows, found.shape[1]).index_add_(0, where[0], found)
        return total

    def _prompt(self, which: int, length: int) -> Tensor:
        prompt = self.queries[which].prompt
        return self.queries[which].base.real(length) if prompt is None or prompt.shape[1] != length else prompt


class _Weighed:
    """From an output to what is propagated: the outcome, or a query's answer times its weight in it; (R,)."""

    def __init__(self, query: Query, index: Tensor, weight: Tensor | None,
                 outcome: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.query, self.index, self.weight, self.outcome = query, index, weight, outcome
        self.answer: Tensor | None = None

    def __call__(self, output: Any) -> Tensor:
        answer = self.query.answer(output, self.index)
        self.answer = answer.detach()
        if self.weight is None:
            return self.outcome([answer])
        return (self.weight * answer).flatten(1).sum(1) if answer.dim() > 1 else self.weight * answer

    def row(self, row: int, rows: int) -> _Weighed:
        """The same for one row alone."""
        weight = None if self.weight is None else self.weight[row:row + 1]
        return _Weighed(self.query, self.index[row:row + 1], weight, self.outcome)
