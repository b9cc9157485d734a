"""Relevance averaged over the way from a text that says nothing to the one explained.

At the input itself a model may be so sure that each word by itself changes little (Sundararajan et al. 2017, section
2.1: saturation); half-way from a text of mask tokens it is not. Where integrated gradients need tens of places on the
way, since they add up plain gradients, the rules of a composite are steady enough that the middle and the end do.

Reference: M. Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import rows, units
from .composite import Composite
from .relevance import Propagation, propagate, spread
from .result import Ledger
from .run import Value
from .still import settled
from .subject import Subject
from .tokens import Batch, TextUnits
from .trace import Way
from .trace.interception import Tapped

WAY = "way"  # what the ledger calls what the value at the places on the way lacks


def neutral(subject: Subject, batch: Batch) -> dict[str, Callable[[Tensor], Tensor]] | None:
    """From token ids to a mask token for each word piece, special tokens and padding as they are, under the name of the
    ids.

    None where there is no such thing: for what is no text, and for models that were not trained with a mask token.
    """
    name, ids = rows.leaf(batch)
    token = getattr(subject.tokenizer, "mask_token_id", None)
    if token is None or not isinstance(batch.units, TextUnits) or ids.is_floating_point():
        return None
    kept = ids[(units.groups(batch) < 0).to(ids.device)].unique()
    return {str(name): lambda ids: torch.where(torch.isin(ids, kept), ids, token)}


def propagate_along(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Value,
                    composite: Composite, starts: Mapping[str, Callable[[Tensor], Tensor]], *, ledger: bool = True,
                    spread_bias: bool = False, **options: Any) -> Propagation:
    """Relevance of the way from a start to the input, mean over the composite's `points` on it.

    R_{t,d} = 1/K sum_k (x - x')_{t,d} g_{t,d}(x' + a_k (x - x')), g the relevance per unit by the composite's rules, x
    the word embeddings and x' those of the start. With the plain gradient and many points it is integrated gradients.
    The ledger is the mean of those of the points, and "way" is what their values lack of the value explained; what
    a point's own embeddings hold besides the way is "reference". Cost: a forward and a backward for each point, and one
    forward if the input itself is none of them.

    Args: starts: from token ids to those that say nothing, by name, as of `neutral`. The rest as of `propagate`.
    Raises: as of `relevance.propagate`.
    """
    points, options["ledger"] = sorted(composite.points, reverse=True), ledger or spread_bias
    end = _end(model, args, kwargs, value) if points[0] < 1 else None
    found = [propagate(model, args, kwargs, value, composite, way=Way(starts, at), **options) for at in points]
    output, whole = end or (found[0].output, found[0].value)
    relevance, tapped = _mean([one.relevance for one in found]), _mean([one.tapped for one in found])
    books, flow = _books([one.ledger for one in found], whole), _middle([one.flow for one in found])
    mean = Propagation(output, whole, relevance, tapped, books, flow, _inside(found),
                       _mean([one.positions for one in found]))
    return spread(mean) if spread_bias else mean


def _end(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Value) -> tuple[Any, Tensor]:
    """Output and value of the input itself, which must be read first, since it fixes what is asked for."""
    with torch.no_grad(), settled(model):
        output = model(*args, **kwargs)
        return output, value(output).detach()


def _middle(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else sum(tensors) / len(tensors)


def _mean(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each entry that all have."""
    return {name: _middle([one[name] for one in found]) for name in found[0] if all(name in one for one in found)}


def _books(ledgers: Sequence[Ledger | None], value: Tensor) -> Ledger | None:
    if ledgers[0] is None:
        return None
    value = value.to("cpu", torch.float64)
    named = dict.fromkeys(name for ledger in ledgers for name in ledger.absorbed)
    absorbed = {name: _middle([ledger.absorbed.get(name, torch.zeros_like(value)) for ledger in ledgers])
                for name in named}
    absorbed[WAY] = value - _middle([ledger.value for ledger in ledgers])
    layers = _mean([ledger.layers for ledger in ledgers]) if ledgers[0].layers else None
    return Ledger(value, _middle([ledger.input for ledger in ledgers]), absorbed, layers)


def _inside(found: Sequence[Propagation]) -> dict[str, Tapped]:
    """Tensors inside, as their mean relevance; None per unit where no point gives any."""
    kept = {}
    for name, first in found[0].inside.items():
        parts = [one.inside[name].value * one.inside[name].per_unit for one in found
                 if name in one.inside and one.inside[name].per_unit is not None]
        mean = None if len(parts) < len(found) else _middle(parts)
        kept[name] = first if mean is None else replace(first, value=mean, per_unit=torch.ones_like(mean))
    return kept
