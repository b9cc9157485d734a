"""Relevance of positions: what the model made of where a token or patch stands, as a map beside that of what it is.

An input is taken for pairs of a token and its position (Bakish et al. 2025, section 3), and each way to encode a
position gives it its part:

- *Added* to the embeddings, learned or sinusoidal: R_p = p R / (x + p) at the sum (their eq. 5). No token loses by it,
  the ledger has it in any case.
- *Relative biases*, ALiBi among them: the bias b of a score s + b has b R / (s + b), put at the key. (The paper leaves
  these out.) Relative embeddings that queries and keys are multiplied by (DeBERTa) are factors, and have nothing.
- *Rotations* of queries and keys (RoPE): half of what reaches a rotated query or key is its position's, R_p = R(q')/2 +
  R(k')/2 over heads and layers, and the other half goes on to q and k (their eq. 10). Without that a rotation keeps
  nothing, so this changes the map of the tokens; it is done where positions are asked for.

Conserved: map + positions + what others took by the ledger = value. Departures from the paper: its sum over layers
keeps the positive parts alone (their eq. 11), here all signs count, so that the books balance; and what goes on to q
and k is exact where theirs has a stabilizer. A composite that holds attention patterns constant (CP-LRP) passes nothing
to scores, queries and keys, so that only added positions have relevance there. Angles written as complex numbers are
not seen as rotations.

Reference: Y. Bakish, I. Zimerman, H. Chefer, L. Wolf, "Revisiting LRP: Positional Attribution as the Missing Ingredient
for Transformer Explainability", 2025.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import rows, units
from .numerics import tolerance
from .ops.journal import POSITIONS
from .relevance import Propagation
from .result import Ledger
from .tokens import Batch, ImageUnits

OTHER = "other positions"
"""What the ledger calls positions that the map has no place for: of class tokens, or of a decoder's own text."""
APART, ADDED = "apart", "added"
CHOICES = (APART, ADDED)

NONE = ("no position embedding, relative bias or rotation took relevance; under a composite that holds attention "
        "patterns, only what is added to the embeddings can")
FOLDED = "positions of windows, or of several sequences, cannot be told apart"


def check(positions: str | None) -> None:
    """Raises: ValueError for an unknown choice."""
    if positions is not None and positions not in CHOICES:
        raise ValueError(f"positions are {' or '.join(map(repr, CHOICES))}, or None, got {positions!r}")


def shown(found: Propagation, batch: Batch, books: Ledger | None) -> tuple[Tensor | None, Ledger | None, str]:
    """The map of positions, (B, T) or (B, Y, X) with each patch's divided evenly over its pixels, whose rows sum to the
    ledger's entry; the ledger, with positions that are not in the map apart; and why there is no map.
    """
    if books is None or POSITIONS not in books.absorbed:
        return None, books, NONE
    mapped, entry = _mapped(found, batch), books.absorbed[POSITIONS]
    whole = sum(t.sum(1) for t in found.positions.values())
    size = sum(t.abs().sum(1) for t in found.positions.values())
    if mapped is None or not bool(((whole - entry).abs() <= tolerance(torch.float32) * size).all()):
        return None, books, FOLDED
    other = whole - mapped.flatten(1).sum(1)
    if not bool((other.abs() > tolerance(torch.float64) * size).any()):
        return mapped.float(), books, ""
    absorbed = {**books.absorbed, POSITIONS: entry - other, OTHER: other}
    return mapped.float(), replace(books, absorbed=dict(sorted(absorbed.items()))), ""


def added(map: Tensor, positions: Tensor, books: Ledger) -> tuple[Tensor, Ledger]:
    """The map of tokens and their positions together, and its ledger, in which positions take nothing."""
    rest = {name: entry for name, entry in books.absorbed.items() if name != POSITIONS}
    taken = books.absorbed[POSITIONS]
    parts = books.parts and {name: part + taken if name == "text" else part for name, part in books.parts.items()}
    return map + positions, replace(books, input=books.input + taken, absorbed=rest, parts=parts)


def _mapped(found: Propagation, batch: Batch) -> Tensor | None:
    """What is known of the positions as a map, float64; None where it is not known which they are."""
    place, leaf = rows.leaf(batch)
    if batch.pictures is not None and isinstance(batch.units, ImageUnits):
        return None
    if leaf.dim() != 4:
        other = batch.kwargs.get("decoder_input_ids") if place == "input_ids" else None
        same = other is not None and other.shape[1] == leaf.shape[1]
        return None if same else found.positions.get(leaf.shape[1])
    if not found.positions:
        return None
    known = batch.units if isinstance(batch.units, ImageUnits) else None
    size, patch = tuple(leaf.shape[-2:]), known and known.patch
    grid = known.grid if known is not None and known.grid else units.grid(size, min(found.positions))
    count = grid[0] * grid[1]
    whole = [t[:, -count:] for length, t in found.positions.items() if length >= count]  # class tokens come first
    if not whole:
        return None
    places = units.patches(size, patch=patch, grid=grid)
    return units.spread(sum(whole), places.expand(len(leaf), -1, -1))
