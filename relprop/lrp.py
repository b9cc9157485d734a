"""Maps by layer-wise relevance propagation: a composite as a method."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import latents, rows, way
from . import positions as placing
from .asked import Asked
from .composite import Composite
from .relevance import Propagation, propagate
from .result import Relevance
from .subject import Subject
from .target import Targets
from .tokens import Batch, ImageUnits


def by_composite(rules: Composite, subject: Subject, batch: Batch, targets: Targets, *, spread_bias: bool = False,
                 ledger: bool = True, layers: bool = False, at: tuple[str, ...] = (), positions: str | None = None,
                 unruled: str = "error") -> Relevance:
    """A map by relevance propagation; arguments as of `relprop.explain`, addresses without positions."""
    value = Asked(targets, batch)
    inside = latents.places(subject, batch, at) if at or layers else None
    crossed = {f"L{i}": layer.path for i, layer in enumerate(inside.anatomy.layers) if not layer.nth} if layers else {}
    boxed = rules.boxed(subject.mean, subject.std)
    starts = None if rules.points == (1.0,) else way.neutral(subject, batch)
    rules = replace(rules, points=(1.0,)) if starts is None else rules
    run = propagate if starts is None else partial(way.propagate_along, starts=starts)
    found = run(subject.model, batch.args, batch.kwargs, value, boxed, ledger=ledger, layers=tuple(crossed.values()),
                taps=None if inside is None else inside.named, unruled=unruled, spread_bias=spread_bias,
                positions=positions is not None)
    books, runs = found.ledger, 1 if starts is None else len(rules.points)
    before = int(starts is not None and 1.0 not in rules.points) + (inside is not None)
    if books is not None and books.layers:
        reached = {name: books.layers[path] for name, path in crossed.items() if path in books.layers}
        books = replace(books, layers=reached)
    relevance = _map(found, batch)
    of_positions, books, why = placing.shown(found, batch, books)
    if positions == placing.ADDED and of_positions is not None:
        relevance, books = placing.added(relevance, of_positions, books)
    about = {} if positions is None else {"positions": why or positions}
    return Relevance(
        map=relevance, value=found.value.float().cpu(), target=value.names, method=rules.name,
        conservation=rules.conservation, units=batch.units, ledger=books if ledger else None,
        forwards=runs + before, backwards=runs,
        inputs={name: r.float().cpu() for name, r in found.relevance.items()},
        latents={} if inside is None else inside.read(found, rules.name), positions=of_positions,
        provenance=_provenance(subject, rules, spread_bias) | about)


def _provenance(subject: Subject, rules: Composite, spread_bias: bool) -> dict[str, Any]:
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"model": subject.name, "rules": rules.describe(), "dtype": str(subject.dtype).removeprefix("torch."),
            "spread_bias": spread_bias, "versions": versions}


def _map(found: Propagation, batch: Batch) -> Tensor:
    """Relevance of the batch's units: summed over embedding features or colour channels, float32."""
    name = str(rows.leaf(batch)[0])
    whole = [r for key, r in found.relevance.items() if key == name or key.startswith(f"{name}#")]
    if not whole:
        raise ValueError(f"no relevance reached {name!r}; it reached {', '.join(found.relevance)}")
    if whole[0].dim() == 2:
        return whole[0].float().cpu()
    over = 1 if isinstance(batch.units, ImageUnits) or whole[0].dim() == 4 else -1
    return sum(r.sum(over) for r in whole).float().cpu()
