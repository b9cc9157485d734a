"""What reports show of the first example: its tokens or its picture on both sides, and what its strongest heads attend
to.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..address import Address
from ..errors import RelpropError
from ..intervene import Site, parts, resolved
from ..tokens import Batch, ImageUnits, TextUnits
from ..trace.intervention import captured
from .task import Task, ready

HEADS = 3
"""Heads whose patterns are kept."""
LONGEST = 64
"""Tokens of a text, at most, whose patterns are kept."""
_HEAD = re.compile(r"(L\d+\.(?:attn|cross)\.H\d+)(?:\.pattern)?(?:@.*)?")


def scene(task: Task) -> dict[str, Any]:
    """The first example as plain data: of texts the "tokens" of the base and both sides as "pair", of pictures both
    sides as "pictures".
    """
    base, other = (batch.take(task.rows[:1]) for batch in (task.base, task.counterfactual))
    if isinstance(base.units, ImageUnits):
        return {"pictures": [base.units.to_dict(), other.units.to_dict()]}
    if not isinstance(base.units, TextUnits):
        return {}
    sides = [_tokens(one) for one in (base, other)]
    said = [one.units.texts[0] if one.units.texts else " ".join(tokens) for one, tokens in zip((base, other), sides)]
    return {"tokens": sides[0], "pair": said}


def patterns(task: Task, strongest: Sequence[str], *, most: int = HEADS) -> list[dict[str, Any]]:
    """What the strongest of these mediators that are heads of self-attention, at `most` so many, attend to in the first
    example, on both sides: the "head", its "tokens" and patterns, (T, T), as "base" and "counterfactual". None of
    pictures, of a text of more than `LONGEST` tokens, and of a model whose patterns cannot be seen. Cost: four forward
    passes of one row.
    """
    heads = list(dict.fromkeys(match[1] for match in map(_HEAD.fullmatch, strongest) if match))
    heads = [one for one in heads if Address.parse(one).part == "attn"][:most]
    sides = [batch.take(task.rows[:1]) for batch in (task.base, task.counterfactual)]
    if not heads or not isinstance(sides[0].units, TextUnits) or len(_tokens(sides[0])) > LONGEST:
        return []
    try:
        with ready(task.subject.model):
            found = [_attended(task, batch, heads) for batch in sides]
    except (RelpropError, ValueError):  # the anatomy knows no patterns here, or no call has been seen to make them
        return []
    if any(one.shape[-2:] != (len(_tokens(batch)),) * 2 for one, batch in zip(found, sides)):
        return []  # of a decoder, or of a model that adds positions
    return [{"head": head, "tokens": [_tokens(batch) for batch in sides], "base": one, "counterfactual": other}
            for head, one, other in zip(heads, *(side.tolist() for side in found))]


def _attended(task: Task, batch: Batch, heads: Sequence[str]) -> Tensor:
    """Patterns of the heads on the row's own tokens, (N, T, T), to four decimals."""
    model = task.subject.model
    known = parts(model, batch.args, batch.kwargs)
    spots = [resolved(model, known, Site.parse(f"{head}.pattern"), batch.args, batch.kwargs)[0] for head in heads]
    taps = list(dict.fromkeys(spot.tap for spot in spots))
    _, values = captured(model, taps, lambda: model(*batch.args, **batch.kwargs))
    own = ~torch.tensor(batch.units.padding[0])
    if any(values[tap].shape[-2:] != (len(own),) * 2 for tap in taps):
        raise ValueError("patterns of a decoder, or of a model that adds positions, are not of these tokens")
    return torch.stack([values[spot.tap][0, spot.unit].cpu().double()[own][:, own] for spot in spots]).round(decimals=4)


def _tokens(batch: Batch) -> list[str]:
    return [token for token, gone in zip(batch.units.tokens[0], batch.units.padding[0]) if not gone]


__all__ = ["HEADS", "LONGEST", "patterns", "scene"]
