"""Mediators as people look at them: boards of layer by head or layer by position, neurons by layer, lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..address import Address

_COORDINATE = re.compile(r"\[(\d+)\]")
_PARTS = {"attn": "attention", "cross": "attention to the encoder", "mlp": "MLPs", "embed": "embedding",
          "in": "residual stream before layers", "mid": "residual stream between attention and MLP",
          "layer": "residual stream after layers", "logits": "residual stream before the logits"}
_INNER = {"pattern": "attention patterns", "q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class Arrangement:
    """Some of the mediators in a shape: of a "board" each has a row, its layer, and a column, the head or position; of
    a "cloud", of neurons, a row alone; in a "list" neither.

    `index` is that of each mediator among all, `row` and `column` its places in `rows` and `columns`, which are names.
    """

    title: str
    shape: str
    across: str
    index: tuple[int, ...]
    row: tuple[int, ...] = ()
    column: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def arranged(mediators: Sequence[str]) -> list[Arrangement]:
    """The mediators as boards, clouds and, of what has neither layer nor place, lists, in the order they come in.

    >>> [(one.title, one.rows, one.columns) for one in arranged(["L0.attn.H0", "L0.attn.H1", "L1.attn.H0"])]
    [('attention heads', ('L0', 'L1'), ('H0', 'H1'))]
    """
    groups: dict[tuple[str, str, str], list[tuple[int, str, str]]] = {}
    for index, name in enumerate(mediators):
        kind, row, column = _place(name)
        groups.setdefault(kind, []).append((index, row, column))
    return [_of_group(*kind, found) for kind, found in groups.items()]


def _place(name: str) -> tuple[tuple[str, str, str], str, str]:
    """(title, shape, what is across), row and column of a mediator."""
    coordinate = _COORDINATE.search(name)
    try:
        one = Address.parse(_COORDINATE.sub("", name))
    except ValueError:  # a name that the user gave
        return ("sets of mediators", "list", ""), "", name
    row = one.part if one.layer is None else f"L{one.layer}"
    at = "" if one.position is None else f" at @{one.position}"
    if coordinate or one.unit == "N":
        unit = "coordinates" if coordinate else "neurons"
        return (f"{unit} of {_PARTS[one.part]}{at}", "cloud", "effect"), row, name
    if one.unit == "H":
        what = f"{_INNER[one.inner]} of heads" if one.inner else "attention heads"
        side = " to the encoder" if one.part == "cross" else ""
        return (f"{what}{side}{at}", "board", "head"), row, f"H{one.index}"
    title = "attention patterns" if one.inner else _PARTS[one.part]
    return (title, "board", "position"), row, "" if one.position is None else f"@{one.position}"


def _of_group(title: str, shape: str, across: str, found: list[tuple[int, str, str]]) -> Arrangement:
    index, row, column = zip(*found)
    if shape == "list":
        return Arrangement(title, shape, across, index, columns=column)
    rows = tuple(sorted(set(row), key=_number))
    if shape == "cloud":
        return Arrangement(title, shape, across, index, tuple(map(rows.index, row)), rows=rows, columns=column)
    columns = tuple(sorted(set(column), key=_number)) if across == "head" else tuple(dict.fromkeys(column))
    return Arrangement(title, shape, across, index, tuple(map(rows.index, row)), tuple(map(columns.index, column)),
                       rows, columns)


def _number(name: str) -> int:
    return int(name[1:]) if name[1:].isdecimal() else -1


__all__ = ["Arrangement", "arranged"]
