"""Results of several sequences a row put together: the map of each unit is the sum over the sequences that it is in."""
from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .result import Ledger, Picture, Relevance
from .target import Similarity, Targets
from .tokens import Batch


def folded(found: Relevance, batch: Batch, targets: Targets) -> Relevance:
    """The result of a batch whose rows run as several sequences, from that of the sequences, B S rows.

    Values, maps and ledgers are sums, as the map of a difference is the difference of the maps; methods that are not
    linear in the target, such as the size of a gradient, add up too. Leaves and addresses inside keep the sequences
    apart, (B, S, ...).
    """
    layout, width = batch.layout, len(batch.units.tokens[0])
    compared = all(isinstance(target, Similarity) for target in targets.targets)
    names = [target.name(targets.vocabulary) for target in targets.targets]
    packed = {} if batch.pictures is None else batch.pictures.packing  # patches and tiles of all sequences
    split = lambda tensors: {name: t if name in packed else t.unflatten(0, (batch.rows, layout.count))
                             for name, t in tensors.items()}
    positions = None if found.positions is None else layout.folded(found.positions, width)
    return replace(found, map=layout.folded(found.map, width), value=_summed(found.value, batch), target=names,
                   units=batch.units, ledger=None if found.ledger is None else _ledger(found.ledger, batch, compared),
                   forwards=found.forwards + compared,  # the pass that made what each text is compared with
                   inputs=split(found.inputs), latents=split(found.latents), positions=positions,
                   pictures=_pictures(found.pictures, layout.count))


def _ledger(books: Ledger, batch: Batch, compared: bool) -> Ledger:
    """The books of the rows; of texts that are compared, with what each has of the input."""
    each = lambda amounts: amounts and {name: _summed(amount, batch) for name, amount in amounts.items()}
    return replace(books, value=_summed(books.value, batch), input=_summed(books.input, batch),
                   absorbed=each(books.absorbed), layers=each(books.layers),
                   parts=_sides(books.input, batch) if compared else each(books.parts))


def _sides(amount: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What the first and the second text of each row have."""
    return dict(zip(("first text", "second text"), amount.unflatten(0, (batch.rows, 2)).unbind(1), strict=True))


def _pictures(found: tuple[Picture, ...], count: int) -> tuple[Picture, ...]:
    """The pictures of each row, which all of its sequences have, with the sums of their maps."""
    rows = sorted({one.row // count for one in found})
    own = [[[one for one in found if one.row == row * count + at] for at in range(count)] for row in rows]
    return tuple(replace(same[0], row=row, map=sum(one.map for one in same))
                 for row, sequences in zip(rows, own) for same in zip(*sequences))


def _summed(amount: Tensor, batch: Batch) -> Tensor:
    """The sum over the sequences of each row."""
    return amount.unflatten(0, (batch.rows, batch.layout.count)).sum(1)
