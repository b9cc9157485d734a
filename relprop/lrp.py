"""Maps by layer-wise relevance propagation: a composite as a method."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import latents, rows, sight, way
from . import positions as placing
from .asked import Asked
from .composite import Composite
from .relevance import Propagation, propagate
from .result import Ledger, Picture, Relevance
from .subject import Subject
from .target import Targets
from .tokens import Batch, ImageUnits, TextUnits

DECODER = "decoder_input_ids"
PADDING = "padding of pictures"  # what the ledger calls it


def by_composite(rules: Composite, subject: Subject, batch: Batch, targets: Targets, *, spread_bias: bool = False,
                 ledger: bool = True, layers: bool = False, at: tuple[str, ...] = (), positions: str | None = None,
                 unruled: str = "error", checkpoint: bool = False) -> Relevance:
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
                positions=positions is not None, checkpoint=checkpoint)
    books, runs = found.ledger, 1 if starts is None else len(rules.points)
    before = int(starts is not None and 1.0 not in rules.points) + (inside is not None)
    if books is not None and books.layers:
        reached = {name: books.layers[path] for name, path in crossed.items() if path in books.layers}
        books = replace(books, layers=reached)
    pictures, books = beside(found.relevance, batch, books)
    pictured = bool(pictures) and isinstance(batch.units, ImageUnits)
    relevance = torch.stack([one.map for one in pictures]) if pictured else _map(found, batch)
    of_positions, books, why = placing.shown(found, batch, books)
    if positions == placing.ADDED and of_positions is not None:
        relevance, books = placing.added(relevance, of_positions, books)
    about = {} if positions is None else {"positions": why or positions}
    books = decoder_apart(found.relevance, batch, books)
    return Relevance(
        map=relevance, value=found.value.float().cpu(), target=value.names, method=rules.name,
        conservation=rules.conservation, units=batch.units, ledger=books if ledger else None,
        forwards=runs + before, backwards=runs,
        inputs={name: r.float().cpu() for name, r in found.relevance.items()},
        latents={} if inside is None else inside.read(found, rules.name), positions=of_positions, pictures=pictures,
        provenance=_provenance(subject, rules, spread_bias) | about)


def _provenance(subject: Subject, rules: Composite, spread_bias: bool) -> dict[str, Any]:
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"model": subject.name, "rules": rules.describe(), "dtype": str(subject.dtype).removeprefix("torch."),
            "spread_bias": spread_bias, "versions": versions}


def decoder_apart(relevance: Mapping[str, Tensor], batch: Batch, books: Ledger | None) -> Ledger | None:
    """The ledger with what the text and the tokens that a decoder has begun with have apart: the map is of the text."""
    begun = [r for name, r in relevance.items() if name.split("#")[0] == DECODER]
    if books is None or not begun or books.parts is not None or rows.leaf(batch)[0] == DECODER:
        return books
    own = sum(r.flatten(1).sum(1, dtype=torch.float64).cpu() for r in begun)
    return replace(books, parts={"text": books.input - own, "decoder": own})


def beside(relevance: Mapping[str, Tensor], batch: Batch, books: Ledger | None
           ) -> tuple[tuple[Picture, ...], Ledger | None]:
    """The maps over a batch's pictures, and the ledger with what the text and the pictures have apart; what padding of
    the pictures has is no input's.

    Args: relevance: of the model's inputs, by name, in their full shape.
    """
    found, padding = sight.maps(relevance, batch)
    if books is None or not found:
        return found, books
    whole = books.input - padding
    absorbed = {**books.absorbed, PADDING: padding} if bool(padding.any()) else books.absorbed
    image = torch.zeros_like(whole).index_add_(0, torch.tensor(batch.pictures.rows, dtype=torch.long),
                                               torch.tensor([one.total for one in found], dtype=whole.dtype))
    parts = {"text": whole - image, "image": image} if isinstance(batch.units, TextUnits) else None
    return found, replace(books, input=whole, absorbed=dict(sorted(absorbed.items())), parts=parts)


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
