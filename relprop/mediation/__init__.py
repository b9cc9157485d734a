"""Causal mediation: how much of the effect of an input on an outcome passes through a part of the model.

    >>> import relprop
    >>> found = relprop.effects("reviews-bert", "A wonderful film.", "A terrible film.", "POSITIVE", at="L*.attn.H*")
    >>> found.indirect.shape == (len(found.mediators), 1)
    True

Reference: Vig et al. 2020 (Causal mediation analysis for interpreting neural NLP: the case of gender bias); Pearl 2001
(Direct and indirect effects).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..address import Address, Spans
from ..errors import Undefined
from ..intervene import Intervention, Places, Site, Spot, parts, reference, resolved
from ..load import load
from ..result.effects import KINDS, SCALES, Effects
from ..still import settled
from ..subject import Subject
from ..tokens import Batch
from ..trace import Tap
from .experiment import Experiment, check_pair, experiment
from .outcome import KL, Difference, LogOdds, Outcome, Question, Ratio, Value
from .outcome import outcome as outcome_of
from .statistic import RESAMPLES, summary

PIECE = 8  # pairs that are run together; the copies of them fill a batch
Place = str | Site | Address
At = Place | Sequence[Place] | Mapping[str, Place | Sequence[Place]]


def effects(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object, outcome: object = None, *,
            at: At = "L*.attn.H*", kind: str | Sequence[str] = ("total", "indirect"), scale: str = "difference",
            fixed: Intervention | None = None, spans: Spans | None = None, prompt_only: bool = False,
            batch_size: int | None = None, resamples: int = RESAMPLES, seed: int = 0, show_progress: bool = False
            ) -> Effects:
    """Effects of changing the base into the counterfactual, in total and through each mediator: exact, by running the
    model with the mediator changed.

    Args:
        subject: what `relprop.load` takes, a `Subject`, or any `nn.Module`.
        base, counterfactual: inputs, one pair a row, of the same length; see `Subject.prepare`.
        outcome: a `Ratio`, `Difference` or `LogOdds` of two candidates, `KL`, any target (a logit, `Probability(...)`,
            `Contrast(...)`, a function of the output), or an `Outcome` of one's own. None: the base's prediction.
        at: mediators: sites or patterns of sites, "L*.attn.H*", "L*.mlp@-1", "L*.attn.H*.pattern", each place one; or
            a mapping of names to sites that are changed together, {"layer 3": "L3.attn.H*"}.
        kind: of "total", "direct", "indirect" and "controlled".
        scale: "difference", or "ratio", y / y(base) - 1, of Vig et al. 2020.
        fixed: for controlled effects, what the mediator is held at in both inputs, such as `Zero()`.
        spans: positions by name, for mediators such as "L*.mlp@profession"; see `relprop.address`.
        prompt_only: of outcomes that continue the prompt, mediators change at the prompt's positions alone (of
            patterns: rows and columns), as Vig et al. do with causal models.
        batch_size: rows run at once; None: by the length of the input. It is halved where memory runs out.
        resamples, seed: of the intervals and p-values.
    Returns: outcomes and effects of each mediator on each pair, and their summaries.
    Raises: ValueError for inputs, mediators or outcomes that cannot be; Undefined for an outcome that never changes,
        or that is zero in the base on the scale "ratio".
    """
    kinds = _checked(kind, scale, fixed, batch_size)
    subject = subject if isinstance(subject, Subject) else load(*subject) if isinstance(subject, tuple) \
        else Subject.from_module(subject) if isinstance(subject, nn.Module) else load(subject)
    base, counterfactual = subject.prepare(base), subject.prepare(counterfactual)
    check_pair(base, counterfactual)
    asked = outcome_of(outcome)
    with torch.no_grad(), settled(subject.model):
        mediators = mediators_of(subject, base, at)
        pairs = asked.pairs(subject, base, counterfactual)
        there = {} if fixed is None else reference(subject.model, fixed, _taps(mediators))
        pieces = torch.arange(base.rows).split(PIECE if batch_size is None else max(1, batch_size // 4))
        with _Progress(len(mediators) * len(pieces) * _sweeps(kinds, pairs), show_progress) as report:
            found = [_piece(subject, asked, [tuple(one.take(rows) for one in pair) for pair in pairs], mediators,
                            kinds, fixed, there, batch_size, prompt_only, _placed(subject, spans, rows), report)
                     for rows in pieces]
    joined = {name: torch.cat([one[name] for one in found], -1) for name in found[0]}
    return _result(subject, asked, tuple(mediators), joined, scale, resamples, seed,
                   {"model": subject.name, "prompt_only": prompt_only, "fixed": repr(fixed) if fixed else None})


def mediators_of(subject: Subject, batch: Batch, at: At) -> dict[str, list[Spot]]:
    """Each mediator by name: the places that are changed together. Cost: two or three forward passes of one row."""
    one = batch.take([0])
    known = parts(subject.model, one.args, one.kwargs)
    each = lambda site: resolved(subject.model, known, Site.parse(site), one.args, one.kwargs)
    if isinstance(at, Mapping):
        found = {name: [spot for site in _several(sites) for spot in each(site)] for name, sites in at.items()}
    else:
        found = {}
        for spot in (spot for site in _several(at) for spot in each(site)):
            found.setdefault(str(spot.site), []).append(spot)
    empty = [name for name, spots in found.items() if not spots]
    if empty or not found:
        raise ValueError(f"no place in the model for mediator {empty[0] if empty else at!r}")
    return found


def _several(sites: object) -> list[Any]:
    return [sites] if isinstance(sites, (str, Site, Address)) else list(sites)


def _checked(kind: str | Sequence[str], scale: str, fixed: Intervention | None, batch_size: int | None
             ) -> tuple[str, ...]:
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    unknown = [one for one in kinds if one not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds of effect are {', '.join(KINDS)}, not {', '.join(unknown) or 'none'}")
    if scale not in SCALES:
        raise ValueError(f"effects are on the scale {' or '.join(SCALES)}, not {scale!r}")
    if ("controlled" in kinds) != (fixed is not None):
        raise ValueError('controlled effects and fixed= go together; give kind=["controlled"], fixed=Zero()')
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    return kinds


def _taps(mediators: Mapping[str, list[Spot]]) -> list[Tap]:
    return list(dict.fromkeys(spot.tap for spots in mediators.values() for spot in spots))


def _sweeps(kinds: Sequence[str], pairs: Sequence[tuple[Question, Question]]) -> int:
    return len(pairs) * (("indirect" in kinds) + ("direct" in kinds) + 2 * ("controlled" in kinds))


def _placed(subject: Subject, spans: Spans | None, rows: Tensor) -> Places:
    """What positions are counted by in these rows."""
    each = {name: [span[row] for row in rows.tolist()] if _by_row(span) else span for name, span in
            (spans or {}).items()}
    return Places.of(subject.model, each)


def _by_row(span: Any) -> bool:
    return not isinstance(span, int) and bool(len(span)) and not isinstance(span[0], int)


def _piece(subject: Subject, outcome: Outcome, pairs: list[tuple[Question, Question]],
           mediators: Mapping[str, list[Spot]], kinds: Sequence[str], fixed: Intervention | None,
           there: dict[Tap, Tensor], batch_size: int | None, prompt_only: bool, places: Places,
           report: Callable[[int], None]) -> dict[str, Tensor]:
    """Outcomes of some of the pairs, by name."""
    many = list(mediators.values())
    one = experiment(subject, outcome, pairs, [spot for spots in many for spot in spots], natural=fixed is None,
                     both="direct" in kinds or fixed is not None, batch_size=batch_size, prompt_only=prompt_only,
                     places=places)
    found = {"base": one.base, "counterfactual": one.counterfactual}
    if "indirect" in kinds:
        found["indirect_outcome"] = one.indirect(many, report)
    if "direct" in kinds:
        found["direct_outcome"] = one.direct(many, report)
    if fixed is not None:
        found["controlled_outcome"] = one.controlled(many, fixed, there, report)
    return found


def _result(subject: Subject, outcome: Outcome, mediators: tuple[str, ...], found: dict[str, Tensor], scale: str,
            resamples: int, seed: int, about: dict) -> Effects:
    base = found["base"]
    rounding = 4 * torch.finfo(subject.dtype).eps * max(float(value.abs().max()) for value in found.values())
    if all(bool(((value - base).abs() <= rounding).all()) for value in found.values()):
        raise Undefined(f"the outcome is {float(base[0]):g} whatever is changed, so that no effect is defined")
    zero = (base.abs() <= rounding).nonzero().flatten().tolist()
    if scale == "ratio" and zero:
        raise Undefined(f"the outcome of base {zero[0]} is zero, so that a ratio to it is undefined; take "
                        'scale="difference"')
    names = ("indirect_outcome", "direct_outcome", "controlled_outcome")
    plain = Effects(mediators, base, found["counterfactual"], *(found.get(name) for name in names), scale,
                    outcome.name(subject), about=about)
    summaries = {kind: summary(plain.effect(kind), resamples=resamples, seed=seed) for kind in plain.kinds}
    return Effects(**{**vars(plain), "summaries": summaries})


class _Progress:
    """A bar over mediators, if it is wanted."""

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.shown, self.bar = total, shown, None

    def __enter__(self) -> Callable[[int], None]:
        if not self.shown:
            return lambda count: None
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, desc="mediators")
        return self.bar.update

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


__all__ = ["KL", "Difference", "Effects", "Experiment", "LogOdds", "Outcome", "Question", "Ratio", "Value",
           "effects", "experiment", "mediators_of"]
