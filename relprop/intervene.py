"""Interventions: what is put in the place of a value inside a model while it runs, and where.

    >>> import torch, transformers
    >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> plain = model(ids).logits
    >>> with intervened(model, {"L0.attn.H1": Zero(), "L1.mlp@-1": Resample({"input_ids": torch.tensor([[1, 2, 4]])})}):
    ...     changed = model(ids).logits
    >>> bool((plain == changed).all()), bool((plain == model(ids).logits).all())
    (False, True)

A *site* is an address, or one coordinate of the vector there: "L5.attn.H3", "L5.mlp[17]@-1". References: Vig et al.
2020 (Causal mediation analysis for interpreting neural NLP); Meng et al. 2022 (Locating and editing factual
associations in GPT) for noise.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import family, rows
from .address import ALL, Address, Spans, located
from .anatomy import Anatomy, anatomy
from .errors import RelpropError
from .tokens import Batch
from .trace import Tap
from .trace.intervention import PATTERN, Change, Editor, Heads, captured, edited
from .trace.layout import Layout, guess, learn

_SITE = re.compile(r"(?P<place>[^\[\]@]*)(?:\[(?P<coordinate>\d+|\*)\])?(?P<position>@.*)?")


@dataclass(frozen=True)
class Site:
    """A place in a model, or a pattern of places: an address, with `coordinate` one entry of the vector there; `ALL`
    with `coordinates`: each.
    """

    address: Address
    coordinate: int | None = None
    coordinates: bool = False

    @staticmethod
    def parse(text: str | Site | Address) -> Site:
        """The site that `text` means.

        >>> str(Site.parse("L5.mlp[17]@-1")), str(Site.parse("L*.attn.H*.pattern"))
        ('L5.mlp[17]@-1', 'L*.attn.H*.pattern')

        Raises: ValueError for a text that is none.
        """
        if isinstance(text, (Site, Address)):
            return text if isinstance(text, Site) else Site(text)
        found = _SITE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{text!r} is no site; write an address such as L5.attn.H3@-1, or L5.mlp[17] for one "
                             "coordinate of the vector there")
        site = Site(Address.parse(found["place"] + (found["position"] or "")))
        if found["coordinate"] is None:
            return site
        if site.address.unit or site.address.inner:
            raise ValueError(f"{text!r}: a coordinate is of a whole part; write L5[17], L5.attn[17], L5.mlp[17]")
        coordinate = ALL if found["coordinate"] == "*" else int(found["coordinate"])
        return replace(site, coordinate=coordinate, coordinates=True)

    def __str__(self) -> str:
        place, at, position = str(self.address).partition("@")
        coordinate = f"[{'*' if self.coordinate is ALL else self.coordinate}]" if self.coordinates else ""
        return f"{place}{coordinate}{at}{position}"


@dataclass(frozen=True)
class Spot:
    """What is reached for a site: the tap, of whose vectors it is part `unit` of `units` equal ones; `units` None: each
    entry is one. Of an attention pattern each head is a spot.
    """

    site: Site
    tap: Tap
    unit: int = 0
    units: int | None = 1


# -- what is put there -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Intervention:
    """What is put at a site. `value` makes it of what is there `now`, (N, R, P, W): N sites alike, R rows, P positions
    (of queries, where it is an attention pattern), W entries; and of what is `there` in the run of `source`.
    """

    source: Any = field(default=None, kw_only=True)

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """Zeros."""

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        return torch.zeros_like(now)


@dataclass(frozen=True, eq=False)
class Given(Intervention):
    """A value of the user's, (P, W) or any shape that spreads to (rows, positions, entries) of the site."""

    given: Tensor | float

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        value = torch.as_tensor(self.given, dtype=now.dtype, device=now.device)
        try:
            return value.expand_as(now)
        except RuntimeError as cause:
            raise ValueError(f"a given value of shape {tuple(value.shape)} for a site of {tuple(now.shape[1:])} "
                             "(rows, positions, entries)") from cause


@dataclass(frozen=True, eq=False)
class Noise(Intervention):
    """Gaussian noise of this standard deviation added to what is there (Meng et al. 2022, at `embed`).

    What is drawn for a row depends on the seed and the row's own value, so a batch draws what its rows would alone.
    """

    std: float
    seed: int = 0

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        drawn = [torch.randn(one.shape, generator=rows.generator(self.seed, one), dtype=torch.float64)
                 for one in now.flatten(0, 1)]
        return now + self.std * torch.stack(drawn).view(now.shape).to(now)


@dataclass(frozen=True, eq=False)
class Resample(Intervention):
    """The value in the run of another input, of as many rows or one, at the same position.

    Args: inputs: as the model takes them: tensors by name, a tuple of arguments, a tensor, or a prepared batch.
        align: position in that run for each position of this one, (P,) or (rows, P); -1 leaves a position as it is.
            Needed where the inputs differ in length.
    """

    inputs: Any
    align: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.inputs)

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        if self.align is None:
            if there.shape[2:] != now.shape[2:] or there.shape[1] not in (1, now.shape[1]):
                raise ValueError(f"the other input has {tuple(there.shape[1:3])} (rows, positions) where this one has "
                                 f"{tuple(now.shape[1:3])}; make them equal, or give align=")
            return there.expand_as(now)
        at = torch.as_tensor(self.align, device=now.device).expand(now.shape[1], -1)  # (R, P)
        if at.shape[1] != now.shape[2] or int(at.max()) >= there.shape[2]:
            raise ValueError(f"align of {at.shape[1]} positions up to {int(at.max())}, for an input of {now.shape[2]} "
                             f"and another of {there.shape[2]}")
        if there.shape[3] != now.shape[3]:
            raise ValueError("attention patterns of inputs of different length cannot be aligned")
        row = torch.arange(now.shape[1], device=now.device)[:, None].clamp_max(there.shape[1] - 1)
        return torch.where((at >= 0)[None, :, :, None], there[:, row, at.clamp_min(0)], now)


@dataclass(frozen=True, eq=False)
class Hold(Resample):
    """The value in the run of the base input, whatever the input of this run: for direct effects.

    Without inputs, the value that this run's own input gives without any intervention: whatever is done elsewhere does
    not pass through here.
    """

    inputs: Any = None


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """The mean over the rows and positions of a reference set, padding left out; with `per_position`, over rows only.

    Args: inputs: of the reference set, as of `Resample`.
    """

    inputs: Any
    per_position: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.inputs)

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        real = _real(_call(self.inputs)[1], there.shape[1], there.shape[2]).to(there.device)[None, :, :, None]
        over = (1,) if self.per_position else (1, 2)
        mean = (there * real).sum(over, keepdim=True) / real.sum(over, keepdim=True)
        if self.per_position and mean.shape[2] != now.shape[2]:
            raise ValueError(f"a reference set of {mean.shape[2]} positions for an input of {now.shape[2]}; means per "
                             "position need as many")
        return mean.expand_as(now)


@dataclass(frozen=True, eq=False)
class Pattern(Resample):
    """The attention pattern, after the softmax, of another input's run, put at a head, or at all heads of an attention.

    Args: within: swap rows and columns up to here only, as of a prompt that is continued (Vig et al. 2020): a number of
        positions, or one for each row.
    """

    within: int | Tensor | None = None

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:
        changed = Resample.value(self, now, there)
        return changed if self.within is None else torch.where(inside(self.within, now), changed, now)


def inside(within: int | Tensor, now: Tensor) -> Tensor:
    """Which rows and columns of patterns, (N, R, T, S), lie before `within`: bool, (1, R or 1, T, S)."""
    end = torch.as_tensor(within, device=now.device).reshape(1, -1, 1, 1)
    T, S = (torch.arange(size, device=now.device) for size in now.shape[2:])
    return (T[None, None, :, None] < end) & (S[None, None, None, :] < end)


# -- where -----------------------------------------------------------------------------------------------------------


def parts(model: nn.Module, args: tuple, kwargs: dict) -> Anatomy:
    """The anatomy of `model` by the first row of this input, in which heads cannot be taken for rows."""
    return anatomy(model, *_picked(args, kwargs, [0]))


def spots(known: Anatomy, site: Site, widths: Mapping[Tap, int] | None = None) -> list[Spot]:
    """Every spot that a site means.

    Args: widths: of the vectors at taps, for sites of all coordinates.
    Raises: ValueError for a place that the model does not have.
    """
    return [spot for address, tap in known.resolve(site.address)
            for spot in _spots(known, replace(site, address=address), tap, widths or {})]


def _spots(known: Anatomy, site: Site, tap: Tap, widths: Mapping[Tap, int]) -> Iterator[Spot]:
    address = site.address
    if site.coordinates:
        for index in range(widths.get(tap, 0)) if site.coordinate is ALL else [site.coordinate]:
            yield Spot(replace(site, coordinate=index), tap, index, None)
    elif tap.side == PATTERN:
        heads = known.units(address)
        for head in range(heads) if address.unit is None else [address.index]:
            yield Spot(site, tap, head, heads)
    elif address.unit == "H":
        yield Spot(site, tap, address.index, known.units(address))
    else:
        yield Spot(site, tap, address.index, None) if address.unit else Spot(site, tap)


@dataclass(frozen=True, eq=False)
class Group:
    """Spots of one tap that are changed alike: N of them, each in its `copy` of the batch, and what `change` makes of
    their values, (N, R, P, W).
    """

    copy: Tensor
    unit: Tensor
    units: int | None
    change: Callable[[Tensor], Tensor]


def changed(tap: Tap, layout: Layout | None, copies: int, groups: list[Group]) -> Change | Heads:
    """The change of a tapped tensor that these groups make, one after the other."""
    if tap.side == PATTERN:
        return _patterns(copies, groups)

    def change(x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        whole = y[None, None] if layout is None else layout.view(y, copies)
        for group in groups:
            units = split(whole, group.units)
            now = units[group.copy, :, :, group.unit]
            units[group.copy, :, :, group.unit] = group.change(now).to(now)
        return y

    return change


def split(whole: Tensor, units: int | None) -> Tensor:
    """(..., C) as (..., U, W): C entries as U units of W each, `units` None being C units."""
    units = whole.shape[-1] if units is None else units
    if whole.shape[-1] % units:
        raise ValueError(f"{whole.shape[-1]} entries cannot be {units} heads")
    return whole.unflatten(-1, (units, -1))


def _patterns(copies: int, groups: list[Group]) -> Heads:
    sizes = [len(group.copy) for group in groups]

    def change(now: Tensor) -> Tensor:
        return torch.cat([group.change(part) for group, part in zip(groups, now.split(sizes))])

    return Heads(copies, torch.cat([group.copy for group in groups]), torch.cat([group.unit for group in groups]),
                 change)


def canonical(tap: Tap, layout: Layout | None, value: Tensor) -> Tensor:
    """A captured tensor as (R, P, C): rows, positions, entries; a pattern, (B, H, T, S), as (B, T, H S)."""
    if tap.side == PATTERN:
        return value.transpose(1, 2).flatten(2)
    return value[None] if layout is None else layout.view(value)[0]


@dataclass(frozen=True, eq=False)
class Places:
    """What the positions of addresses are counted by: names of spans, and of pictures the number of tokens before the
    patches; see `relprop.address.located`.
    """

    spans: Spans | None = None
    prefix: int | None = None

    def at(self, position: int | str, real: Tensor) -> Tensor:
        """Which positions an address means, bool (R, P); it counts over the `real` ones, (R, P), that are no padding.

        Raises: ValueError for a position that a row does not have.
        """
        found = torch.zeros_like(real)
        for row, own in enumerate(real):
            places = own.nonzero().flatten()
            chosen = located(position, len(places), row=row, prefix=self.prefix, spans=self.spans)
            found[row, places[chosen]] = True
        return found

    @staticmethod
    def of(model: nn.Module, spans: Spans | None = None) -> Places:
        """Of this model, with these names."""
        facts = family.facts(model)
        return Places(spans, facts.prefix_tokens if facts.modality == "image" else None)


# -- the context manager ---------------------------------------------------------------------------------------------


@contextmanager
def intervened(model: nn.Module, interventions: Mapping[str | Site | Address, Intervention], *,
               known: Anatomy | None = None, spans: Spans | None = None) -> Iterator[dict[str, int]]:
    """A `with` block in which the values at sites of `model` are replaced, in every forward pass.

    Sites are found by observing the first pass of the block, with its own input. The model is as before when the block
    ends, also after an exception.

    Args: interventions: by site, or pattern of sites, "L*.attn.H*"; several act together, in the order in which the
        model comes to them. known: the model's anatomy, where it is there already. spans: positions by name, for
            sites such as "L5@profession".
    Yields: how often each one was done, by site; filled as the model runs.
    Raises: ValueError for a text that is no site, a place that the model does not have, a position that a row does not
        have, or a value that does not fit; RelpropError at the end of the block if one was never done.
    """
    wanted = {Site.parse(site): one for site, one in interventions.items()}
    for site, one in wanted.items():
        if not isinstance(one, Intervention):
            raise TypeError(f"{site}: expected an intervention such as Zero() or Resample(inputs), not "
                            f"{type(one).__name__}")
    session = _Session(model, {_sited(site, one): one for site, one in wanted.items()}, known, Places.of(model, spans))
    done = {str(site): 0 for site in session.wanted}
    with edited(model, {}, begin=session.begin) as editor:
        try:
            yield done
        finally:
            for site, taps in session.taps.items():
                done[str(site)] = min(editor.fired.get(tap, 0) for tap in taps)
    never = [site for site, count in done.items() if not count]
    if never:
        raise RelpropError(f"nothing was done at {', '.join(never)}: the model never ran, or never came there")


def _sited(site: Site, one: Intervention) -> Site:
    return replace(site, address=replace(site.address, inner="pattern")) if isinstance(one, Pattern) else site


class _Session:
    """What an `intervened` block knows: the parts of the model, and the values of the runs that it refers to."""

    def __init__(self, model: nn.Module, wanted: dict[Site, Intervention], known: Anatomy | None, places: Places
                 ) -> None:
        self.model, self.wanted, self.known, self.places = model, wanted, known, places
        self.spots: dict[Site, list[Spot]] | None = None
        self.taps: dict[Site, list[Tap]] = {}
        self.values: dict[int, dict[Tap, Tensor]] = {}

    def begin(self, editor: Editor, args: Any, kwargs: Any) -> None:
        """Before a forward pass with these arguments: installs its changes."""
        if self.spots is None:
            found = self.known or parts(self.model, args, kwargs)
            self.spots = {site: resolved(self.model, found, site, args, kwargs) for site in self.wanted}
            self.taps = {site: list(dict.fromkeys(spot.tap for spot in spots)) for site, spots in self.spots.items()}
        shapes = _Shapes(self.model, args, kwargs, list({tap for taps in self.taps.values() for tap in taps}))
        groups: dict[Tap, list[Group]] = {}
        for site, spots in self.spots.items():
            there = self._reference(self.wanted[site], args, kwargs)
            for tap in self.taps[site]:
                chosen = [spot for spot in spots if spot.tap == tap]
                groups.setdefault(tap, []).append(self._group(site, chosen, there.get(tap), shapes))
        editor.install({tap: changed(tap, shapes.layout(tap), 1, found) for tap, found in groups.items()})

    def _reference(self, one: Intervention, args: Any, kwargs: Any) -> dict[Tap, Tensor]:
        """The values at all taps in the run that an intervention refers to, (R, P, C) each."""
        own = isinstance(one, Hold) and one.source is None
        if one.source is None and not own:
            return {}
        if own or id(one.source) not in self.values:
            args, kwargs = (args, kwargs) if own else _call(one.source)
            values = _values(self.model, args, kwargs, list({tap for taps in self.taps.values() for tap in taps}))
            if own:
                return values
            self.values[id(one.source)] = values
        return self.values[id(one.source)]

    def _group(self, site: Site, spots: list[Spot], there: Tensor | None, shapes: _Shapes) -> Group:
        one, units = self.wanted[site], spots[0].units
        unit = torch.tensor([spot.unit for spot in spots])
        other = None if there is None else split(there, units)[:, :, unit].movedim(2, 0)  # (N, R, P, W)

        def change(now: Tensor) -> Tensor:
            value = one.value(now, other if other is None else other.to(now))
            if site.address.position is None:
                return value
            chosen = self.places.at(site.address.position, shapes.real(now.shape[1], now.shape[2], site))
            return torch.where(chosen.to(now.device)[None, :, :, None], value, now)

        return Group(torch.zeros_like(unit), unit, units, change)


def resolved(model: nn.Module, known: Anatomy, site: Site, args: Any, kwargs: Any) -> list[Spot]:
    """Every spot that a site means. For all coordinates, whose number that tells, one more forward pass is made."""
    if not site.coordinates or site.coordinate is not None:
        return spots(known, site)
    taps = [tap for _, tap in known.resolve(site.address)]
    with torch.no_grad():
        _, values = captured(model, taps, lambda: model(*args, **kwargs))
    return spots(known, site, {tap: value.shape[-1] for tap, value in values.items()})


def reference(model: nn.Module, one: Intervention, taps: list[Tap]) -> dict[Tap, Tensor]:
    """The values at taps in the run that an intervention refers to, (R, P, C) each; none if it refers to none."""
    if one.source is None:
        return {}
    args, kwargs = _call(one.source)
    return _values(model, args, kwargs, taps)


def _values(model: nn.Module, args: Any, kwargs: Any, taps: list[Tap]) -> dict[Tap, Tensor]:
    with torch.no_grad():
        _, found = captured(model, taps, lambda: model(*args, **kwargs))
    shapes = _Shapes(model, args, kwargs, taps, found)
    return {tap: canonical(tap, shapes.layout(tap), value) for tap, value in found.items()}


class _Shapes:
    """Layouts of the tapped tensors of one forward pass, found when they are asked for."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, taps: list[Tap],
                 values: Mapping[Tap, Tensor] | None = None) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.taps = [tap for tap in taps if tap.side != PATTERN]
        self.rows = _rows(args, kwargs)
        self.values = values
        self.layouts: dict[Tap, Layout | None] = {}

    def layout(self, tap: Tap) -> Layout | None:
        if tap.side == PATTERN:
            return None
        if tap not in self.layouts:
            if self.values is None:
                self.values = self._run(range(self.rows))
            shapes = {one: self.values[one].shape for one in self.taps}
            guessed = {one: guess(shape, self.rows) for one, shape in shapes.items()}
            if any(found is None for found in guessed.values()):  # a pass with one row more tells
                more = self._run([*range(self.rows), 0])
                guessed = {one: learn(shape, self.rows, more[one].shape, self.rows + 1) for one, shape in
                           shapes.items()}
            self.layouts = guessed
        return self.layouts[tap]

    def real(self, count: int, length: int, site: Site) -> Tensor:
        """Which of the positions at a site are not padding, (rows, length)."""
        if count != self.rows:
            raise ValueError(f"{site}: positions cannot be told apart there, {count} windows of {self.rows} rows")
        return _real(self.kwargs, count, length)

    def _run(self, chosen: Any) -> dict[Tap, Tensor]:
        args, kwargs = _picked(self.args, self.kwargs, list(chosen))
        with torch.no_grad():
            return captured(self.model, self.taps, lambda: self.model(*args, **kwargs))[1]


def _rows(args: Any, kwargs: Mapping[str, Any]) -> int:
    return next((a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), 1)


def _picked(args: Any, kwargs: Mapping[str, Any], chosen: list[int]) -> tuple[tuple, dict]:
    """The arguments for these of the rows."""
    index, rows = torch.tensor(chosen), _rows(args, kwargs)
    pick = lambda a: a[index.to(a.device)] if isinstance(a, Tensor) and a.dim() and len(a) == rows else a
    return tuple(map(pick, args)), {name: pick(value) for name, value in kwargs.items()}


def _real(kwargs: Mapping[str, Any], count: int, length: int) -> Tensor:
    """Which positions are no padding, as the attention mask of this shape says, bool (count, length)."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.shape == (count, length):
            return mask.bool().cpu()
    return torch.ones(count, length, dtype=torch.bool)


def _call(inputs: Any) -> tuple[tuple, dict]:
    """Inputs as arguments of the model."""
    if isinstance(inputs, Batch):
        return inputs.args, inputs.kwargs
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise TypeError(f"inputs of an intervention are tensors by name, a tuple, a tensor or a prepared batch, not "
                    f"{type(inputs).__name__}")


__all__ = ["ALL", "Given", "Hold", "Intervention", "Mean", "Noise", "Pattern", "Places", "Resample", "Site", "Spot",
           "Zero", "intervened", "parts", "reference", "resolved", "spots"]
