"""The public face: `explain` one way, `compare` several, `open` what was saved.

    >>> from relprop.explain import explain
    >>> r = explain("reviews-bert", "A wonderful film.", target="POSITIVE")
    >>> bool((r.ledger.error < 1e-4).all())
    True
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import composite, fit, latents, memory, view
from .address import Address, Spans, of_rows
from .check import ablation
from .composite import Composite
from .errors import RelpropError, Undefined
from .folding import folded
from .load import load
from .method import METHODS, Method, bound, called, check_pictures, compared, modality_of
from .posed import apart, posed
from .positions import NONE
from .positions import check as check_positions
from .result import Circuit, Curve, Faithfulness, Relevance, archive, read
from .result.joint import joined
from .still import settled
from .subject import Subject
from .target import Targets
from .tokens import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

@dataclass
class _Live:
    """What a result needs to be asked further: the model it came from. Not saved, not compared."""

    subject: Subject
    batch: Batch
    targets: Targets
    again: Callable[..., Method]  # the method, given other options
    curve: Curve | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Relevance):
    """A `Relevance` that can be drawn, saved, checked by ablation and asked for the relevance inside the model."""

    _live: _Live | None = field(default=None, repr=False)

    def check(self, *, steps: int = 10, randoms: int = 20, seed: int = 0, batch_size: int = 32,
              baseline: str | int | None = None, by: str | None = None, show_progress: bool = False) -> Curve:
        """Whether the map is better than chance: the target while units are removed in the map's order.

        See `relprop.check.ablation` for the arguments, what is removed and the cost. The result also goes with the map
        when it is shown or saved.

        Raises: ValueError for a result opened from a file, and for a map that has nothing to rank.
        """
        live = self._alive("checked")
        batch = live.batch
        if batch.pictures is not None and not self.pictures:  # the method has mapped the text alone
            batch = replace(batch, pictures=batch.pictures.unseen)
        live.curve = ablation(live.subject, batch, live.targets, self.ranked, steps=steps, randoms=randoms,
                              seed=seed, batch_size=batch_size, baseline=baseline, by=by, show_progress=show_progress)
        return live.curve

    def at(self, address: str, *, spans: Spans | None = None) -> Tensor | dict[str, Tensor]:
        """Relevance at a place inside the model: L3, L3.in, L3.attn.H2, L3.mlp.N17@-1, L3.attn.H2.pattern, or a pattern
        of places such as L3.attn.H*; see `relprop.address`.

        Of a method that passes through the layers: a composite, whose relevance there it is; a gradient, activation x
        gradient there; integrated gradients, the path integral there. One more run, unless `explain` was given the
        address.

        Args: spans: positions by name, {"profession": [3, 4]}, or for each row of the batch its own.
        Returns: relevance of positions (B, T), or their sum (B,) at the positions of the address; of an attention
            pattern (B, T, S), or (B, S) of the queries there. A pattern of places gives one such tensor for each.
        Raises: ValueError for what is no address, is not in the model, was not kept in a saved result, or is asked of a
            method that does not pass through the layers.
        """
        wanted = Address.parse(address)
        found = {name: t for name, t in self.latents.items() if wanted.matches(Address.parse(name))}
        if self._live is not None and address not in found:
            found = _latents(self._live, wanted, spans)
        if not found:
            kept = ", ".join(self.latents) or "no address"
            raise ValueError(f"{address} was not kept with this result, which holds {kept}; "
                             "give explain(..., at=[...]) what is to be saved")
        return found[address] if address in found else found

    def show(self, row: int | None = None, *, positions: bool = False) -> Figure:
        """The map, its ledger and its check as a matplotlib figure; `positions`: beside their map, on one scale.

        Raises: ValueError if positions are asked for and there are none.
        """
        if positions:
            return view.grid(self._beside_positions(), row)
        return view.figure(self, row, check=self._checked())

    def save(self, path: str | PathLike, *, row: int | None = None, positions: bool = False) -> Path:
        """Writes the result as its suffix says: png, svg, pdf, html, json or safetensors. `positions` as of `show`;
        files of numbers hold them in any case.

        Raises: ValueError for another suffix, or as of `show`; FileNotFoundError if the folder does not exist.
        """
        if positions and Path(path).suffix.lower() not in (".json", ".safetensors"):
            return view.save(self._beside_positions(), path, row=row)
        return view.save(self, path, row=row, check=self._checked())

    def to_dict(self, *, full: bool = True) -> dict:
        checked = self._checked()
        return Relevance.to_dict(self if checked is None else replace(self, curve=checked), full=full)

    def _repr_html_(self) -> str:
        return view.fragment(self, check=self._checked())

    def _beside_positions(self) -> list[Relevance]:
        if self.positions is None:
            raise ValueError(f"this result has no map of positions: {self.provenance.get('positions', NONE)}")
        named = [f"{name}, positions" for name in self.target]
        return [replace(self, curve=self._checked()),
                replace(self, map=self.positions, target=named, curve=None)]

    def _checked(self) -> Curve | None:
        return self.curve if self._live is None or self._live.curve is None else self._live.curve

    def _alive(self, what: str) -> _Live:
        if self._live is None:
            raise ValueError(f"a result opened from a file has no model to be {what} with; explain the input again")
        return self._live


@dataclass(frozen=True)
class Comparison:
    """Several explanations of the same inputs and targets, in the order of the methods, with their checks."""

    results: list[Explanation]

    def table(self) -> DataFrame:
        """One row a method: ablation area with its interval and p-value, conservation, ledger error, and cost."""
        from pandas import DataFrame

        return DataFrame([_line(result) for result in self.results]).set_index("method")

    def show(self, row: int | None = None) -> Figure:
        """All maps in one grid, with their ablation areas."""
        return view.grid(self._drawn(), row)

    def save(self, path: str | PathLike, *, row: int | None = None) -> Path:
        """Writes the grid or the numbers as the suffix says: png, svg, pdf, html, json or safetensors."""
        return view.save(self._drawn(), path, row=row)

    def to_dict(self) -> dict:
        """JSON-able, one entry a method."""
        return {result.method: result.to_dict(full=False) for result in self.results}

    def _drawn(self) -> list[Relevance]:
        return [replace(result, curve=result._checked()) for result in self.results]

    def _repr_html_(self) -> str:
        return view.fragment(self._drawn())


def _line(result: Explanation) -> dict[str, Any]:
    curve, books = result._checked(), result.ledger
    low, high = (None, None) if curve is None or curve.interval is None else curve.interval
    return {"method": result.method, "area": None if curve is None else float(curve.area.mean()), "low": low,
            "high": high, "p": None if curve is None else curve.p_value, "conservation": result.conservation,
            "ledger error": None if books is None else float(books.error.max()), "forwards": result.forwards,
            "backwards": result.backwards}


def explain(subject: str | Subject | nn.Module | tuple, inputs: object, target: object = None, *,
            method: str | Composite | None = None, spread_bias: bool = False, ledger: bool = True, layers: bool = False,
            at: str | Sequence[str] = (), spans: Spans | None = None, positions: str | None = None,
            unruled: str = "error", options: dict[str, Any] | None = None, batch_size: int | None = None,
            checkpoint: bool = False, show_progress: bool = False) -> Explanation:
    """A map of what made the model say what it said, with the books that show where every unit went.

    Args:
        subject: what `relprop.load` takes (a name, a folder, (model, processor) ...), a `Subject`, or any `nn.Module`.
        inputs: a text, an image, a list of them, or tensors; see `Subject.prepare`.
        target: None for the prediction, a class, label, token or `Target`, or a function from the model's output to one
            number a row; a list of them, one a row.
        method: a name of `METHODS`, or a `Composite` of your own; None: the default of models that take what this one
            takes, `composite.DEFAULTS`.
        spread_bias: redistribute what biases and other constants took, so that the map itself sums to the value.
        ledger: keep the books; they cost about a tenth. layers: and the relevance that crosses each layer's output.
        at: addresses whose relevance is kept with the result, "L3.attn.H*"; one, or a list of them. spans: positions by
            the names in them; see `Explanation.at`.
        positions: "apart" for relevance of positions also where these rotate queries and keys or bias the scores, as a
            map of its own in `positions`; "added" for one map of both; None: what position embeddings took anyway. See
            `relprop.positions`.
        unruled: "error", or "gradient" to let an op without a rule pass with its plain gradient, booked by name.
        options: of a method that is no composite, by name, such as {"n_steps": 64} or {"head_fusion": "max"}.
        batch_size: rows explained at once; None: all. checkpoint: of composites, run each layer again on the way back:
            the same map and books in the memory of one layer, for up to 1.5 times the time.
    Returns: an `Explanation`; its map is (B, T) for text, (B, Y, X) for images.
    Raises: ValueError or TypeError for inputs, targets, methods or addresses that cannot be; UnruledOp, LedgerError and
        IndependentOutput as of `relprop.relevance.propagate`.
    """
    _check_size(batch_size)
    ready = prepared(subject, inputs, target, method=method, spread_bias=spread_bias, ledger=ledger, layers=layers,
                     at=at, positions=positions, unruled=unruled, checkpoint=checkpoint, options=options,
                     show_progress=show_progress)
    batch, targets = ready.batch, ready.targets
    size = batch.rows if batch_size is None else batch_size
    starts = range(0, batch.rows, size)
    if show_progress and len(starts) > 1:
        from tqdm.auto import tqdm

        starts = tqdm(starts, desc=called(ready.method), unit="batch")
    parts = []
    for start in starts:
        which = torch.arange(start, min(start + size, batch.rows))
        part = batch if size >= batch.rows else batch.take(which)
        if not start:
            _warn_of_memory(ready, part, checkpoint)
        here = of_rows(spans, which.tolist())
        parts.append(_run(ready.run, ready.subject, part, targets.take(which.tolist()), ready.wanted, here))
    again = partial(bound, ready.method, ledger=False, positions=positions, unruled=unruled, checkpoint=checkpoint,
                    options=options or {})
    return _joined(parts, _Live(ready.subject, batch, targets, again))


@dataclass(frozen=True)
class Ready:
    """An explanation before it is made: `run(subject, batch, targets)` makes it, of any rows of the batch. `wanted`:
    the addresses whose relevance is kept.
    """

    run: Method
    subject: Subject
    batch: Batch
    targets: Targets
    method: str | Composite
    wanted: list[Address]

    def once(self, subject: Subject, batch: Batch, targets: Targets) -> Relevance:
        """One run, of rows that are several sequences as well."""
        return self.run(subject, *apart(subject, batch, targets))


def prepared(subject: str | Subject | nn.Module | tuple, inputs: object, target: object = None, *,
             method: str | Composite | None = None, at: str | Sequence[str] = (), positions: str | None = None,
             options: dict[str, Any] | None = None, show_progress: bool = False, **of_composite: Any) -> Ready:
    """What `explain` is asked for, checked and ready to run; arguments as there.

    Raises: as `explain`, for what is found before any run.
    """
    wanted = [Address.parse(one) for one in ((at,) if isinstance(at, str) else at)]  # a slip is found before any run
    check_positions(positions)
    if method is None:
        subject = _subject(subject)
        inputs = subject.prepare(inputs)
        method = composite.default(modality_of(subject, inputs))
    run = bound(method, at=latents.wholes(wanted), positions=positions, options=options or {},
                  show_progress=show_progress, **of_composite)
    subject = _subject(subject)
    batch = subject.prepare(inputs)
    check_pictures(method, subject, batch)
    batch, targets = posed(subject, batch, subject.targets(target, batch.rows))
    return Ready(run, subject, batch, targets, method, wanted)


def _warn_of_memory(ready: Ready, part: Batch, checkpoint: bool) -> None:
    """Warns where this part of the batch is large, and will take more memory than is free."""
    if not memory.worth(ready.subject, part):
        return
    found = memory.predicted(ready.once, ready.subject, part, ready.targets.take(range(part.rows)))
    if not found.fits:
        warnings.warn(memory.advice(found, several=part.rows > 1, checkpoint=checkpoint), stacklevel=3)


def compare(subject: str | Subject | nn.Module | tuple, inputs: object, target: object = None, *,
            methods: Sequence[str | Composite] | None = None, options: Mapping[str, dict[str, Any]] | None = None,
            check: bool = True, steps: int = 10, randoms: int = 20, baseline: str | int | None = None, seed: int = 0,
            batch_size: int | None = None, show_progress: bool = False) -> Comparison:
    """Several methods on the same inputs and the same targets, each checked by the same ablation.

    A map that has nothing to rank stays unchecked; its `provenance` says why.

    Args: as of `explain` and `Explanation.check`; without `check` the maps alone. methods: None for `compared`.
        options: of methods, by name, such as {"integrated-gradients": {"n_steps": 64}}.
    Raises: ValueError for no method or an unknown one, or options of one that is not there, before anything is run.
    """
    if methods is None:
        subject = _subject(subject)
        inputs = subject.prepare(inputs)
        methods = compared(modality_of(subject, inputs))
    if not methods or isinstance(methods, str):
        raise ValueError(f"methods is a list of names, got {methods!r}; the methods are {', '.join(METHODS)}")
    _check_size(batch_size)
    given = dict(options or {})
    if unknown := [name for name in given if name not in map(called, methods)]:
        raise ValueError(f"options of {unknown[0]!r}, which is not among the methods {', '.join(map(called, methods))}")
    for method in methods:
        bound(method, options=given.get(called(method)))
    subject = _subject(subject)
    batch = subject.prepare(inputs)
    batch, targets = posed(subject, batch, subject.targets(target, batch.rows))
    with torch.no_grad(), settled(subject.model):
        targets = targets.fixed(subject.forward(batch), batch)
    results = []
    for method in methods:
        found = explain(subject, batch, list(targets.targets), method=method, options=given.get(called(method)),
                        batch_size=batch_size, show_progress=show_progress)
        results.append(_ranked(found, steps=steps, randoms=randoms, seed=seed, batch_size=batch_size or 32,
                               baseline=baseline, show_progress=show_progress) if check else found)
    return Comparison(results)


def _ranked(found: Explanation, **how: Any) -> Explanation:
    """A map that has been checked, or that says why it was not: others that are compared with it have their checks."""
    try:
        found.check(**how)
    except Undefined as why:
        return replace(found, provenance=found.provenance | {"unchecked": str(why)})
    return found


def open(path: str | PathLike) -> Explanation | list[Explanation] | Circuit | Faithfulness:
    """A result that was saved as .json or .safetensors, without its model; of a comparison, the list of its results; or
    a circuit, or what is faithful of circuits.

    Raises: ValueError for a file that is not ours or of another version; FileNotFoundError if there is none.
    """
    kind = {one.kind: one for one in (Circuit, Faithfulness)}.get(archive.kind(path))
    if kind is not None:
        return kind.open(path)
    found = [_lifted(result) for result in read(path)]
    return found[0] if len(found) == 1 else found


def _run(run: Method, subject: Subject, batch: Batch, targets: Targets, wanted: Sequence[Address],
         spans: Spans | None) -> Relevance:
    """What `run` finds, its latents at the positions of the addresses; of rows that run as several sequences, put
    together.
    """
    flat, own = apart(subject, batch, targets)
    found = _checked(run, subject, flat, own)
    if wanted:
        found = replace(found, latents=latents.picked(found.latents, wanted, flat, spans))
    return found if batch.layout is None else folded(found, batch, targets)


def _checked(run: Method, subject: Subject, batch: Batch, targets: Targets) -> Relevance:
    """What `run` finds. Where weights are not finite, whatever came of it, the error says so."""
    try:
        found = run(subject, batch, targets)
    except (RelpropError, ValueError):
        subject.check_weights()
        raise
    except RuntimeError as cause:
        where = fit.devices(subject.model) if "same device" in str(cause) else ""
        if not where:
            raise
        raise ValueError(f"{subject.name} is in several places, {where}, and does not move what passes between them; "
                         "put all of it on one device, or load it with device_map=") from cause
    met = found.ledger is not None or found.backwards > 1  # by gradients, and would have made the map NaN
    if not met or not found.value.isfinite().all():
        subject.check_weights()
    if not found.value.isfinite().all():
        raise ValueError(f"the explained value is {found.value.tolist()}, though inputs and weights are finite; try a "
                         "wider dtype")
    return found


def _subject(what: str | Subject | nn.Module | tuple) -> Subject:
    return what if isinstance(what, Subject) else load(what)


def _check_size(batch_size: int | None) -> None:
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size must be at least 1 and whole, or None for all rows, got {batch_size!r}")


def _joined(parts: list[Relevance], live: _Live) -> Explanation:
    """The parts of a batch as one result."""
    whole = parts[0] if len(parts) == 1 else joined(parts, live.batch.units)
    return replace(_lifted(whole), _live=live)


def _lifted(result: Relevance) -> Explanation:
    if isinstance(result, Explanation):
        return result
    return Explanation(**{f.name: getattr(result, f.name) for f in fields(Relevance)})


def _latents(live: _Live, wanted: Address, spans: Spans | None) -> dict[str, Tensor]:
    """Relevance at addresses, by running the explanation once more."""
    return _run(live.again(at=(str(wanted.whole),)), live.subject, live.batch, live.targets, [wanted], spans).latents
