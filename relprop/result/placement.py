"""Where the nodes of a circuit stand in its graph: layers beneath each other, heads or positions side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..address import Address
from .circuit import Circuit

_PARTS = {"in": 0, "attn": 1, "cross": 2, "mid": 3, "mlp": 4, "layer": 5}
MOST = 1500
"""Nodes, at most, that are placed besides those of the circuit."""


@dataclass(frozen=True)
class Placement:
    """A place for each node: across from 0 to 1, and the number of its row, from the input, 0, up to the logits.

    `rows` are the names of the rows, `columns` those of positions from left to right, () where nodes are of all. `size`
    is the room of a node as a share of the width.
    """

    nodes: dict[str, tuple[float, int]]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    size: float


def placed(circuit: Circuit) -> Placement:
    """The places of the circuit's nodes, and of all that it was chosen from where these are not too many."""
    own = set(circuit.members)
    names = list(dict.fromkeys(_nodes(circuit)))
    if len(names) > MOST:
        names = [name for name in names if name in own]
    parsed = {name: Address.parse(name) for name in names}
    rows = sorted({_row(one) for one in parsed.values()})
    columns = _ordered([str(one.position) for one in parsed.values() if one.position is not None])
    cells: dict[tuple, list[str]] = {}
    for name, one in parsed.items():
        column = columns.index(str(one.position)) if one.position is not None else None
        cells.setdefault((_row(one), column), []).append(name)
    width = 1 / max(1, len(columns))
    nodes, most = {}, max(map(len, cells.values()), default=1)
    for (row, column), members in cells.items():
        left, wide = (0.0, 1.0) if column is None else (width * column, width)
        for slot, name in enumerate(sorted(members, key=lambda name: parsed[name].index or 0)):
            nodes[name] = (left + wide * (slot + 0.5) / len(members), rows.index(row))
    return Placement(nodes, tuple(_named(row) for row in rows), tuple(f"@{one}" for one in columns), width / most)


def label(node: str) -> str:
    """A node in a word that fits into it.

    >>> label("L5.attn.H3@-1"), label("L2.mlp"), label("L2.mlp.N17"), label("embed")
    ('H3', 'MLP', 'N17', '')
    """
    one = Address.parse(node)
    if one.unit is None:  # the row says the rest
        return {"mlp": "MLP", "attn": "attn"}.get(one.part, "")
    return f"{one.unit}{one.index}"


def _nodes(circuit: Circuit) -> Iterable[str]:
    if not circuit.edges:
        return circuit.nodes
    end = circuit.ending()
    return (node for u, v in circuit.edges for node in (u, end(v)))


def _row(one: Address) -> tuple[float, int]:
    if one.layer is None:
        return (-1, 0) if one.part == "embed" else (math.inf, 0)
    return (one.layer, _PARTS[one.part])


def _named(row: tuple[float, int]) -> str:
    layer, part = row
    if not 0 <= layer < math.inf:
        return "input" if layer < 0 else "logits"
    name = {number: name for name, number in _PARTS.items()}[part]
    return f"L{layer}" + ("" if name == "layer" else f" {name}")


def _ordered(positions: list[str]) -> list[str]:
    """Positions by number, those from the end last, and names behind them, in the order in which they come."""
    def key(one: str) -> tuple[int, int]:
        number = int(one) if one.lstrip("-").isdecimal() else None
        return (2, 0) if number is None else (int(number < 0), number)

    return sorted(dict.fromkeys(positions), key=key)


__all__ = ["MOST", "Placement", "label", "placed"]
