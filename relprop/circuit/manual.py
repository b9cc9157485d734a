"""Circuits that people found by hand, to be compared with: of GPT-2 small, and of the 4-layer model of docstrings.

References: Wang et al. 2023 (Interpretability in the wild: a circuit for indirect object identification in GPT-2
small), with the edges of Conmy et al. 2023 (Towards automated circuit discovery); Hanna et al. 2023 (How does GPT-2
compute greater-than?), with the parts and edges of Conmy et al. 2023 and, for heads alone, the seven of Hsu et al.
2024; Heimersheim and Janiak 2023 (A circuit for Python docstrings in a 4-layer attention-only transformer), with the
heads of Hsu et al. 2024, the positions of Miller et al. 2024 and the edges of Conmy et al. 2023.

They are no ground truth: each was found with an ablation, and positions, of its own.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..address import Address
from ..result import Circuit
from ..result.circuit import Edge

Parts = Mapping[str, str]
"""Places of a class, one behind the other: "9.9" is head 9 of layer 9, "m3" the MLP of layer 3."""

_IOI: Parts = {
    "previous token": "2.2 4.11", "duplicate token": "0.1 0.10 3.0", "induction": "5.5 5.8 5.9 6.9",
    "s2 inhibition": "7.3 7.9 8.6 8.10", "name mover": "9.9 10.0 9.6",
    "backup name mover": "10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9", "negative name mover": "10.7 11.10",
}  # fmt: skip
_IOI_AT = {"previous token": "S1_next", "duplicate token": "S2", "induction": "S2"}  # the others at the end
_MOVERS = ("name mover", "backup name mover", "negative name mover")
_IOI_LINKS = (("input", "previous token", "qkv"), ("input", "duplicate token", "qkv"), ("input", "s2 inhibition", "q"),
              ("previous token", "induction", "kv"), ("induction", "s2 inhibition", "kv"),
              ("duplicate token", "s2 inhibition", "kv"), *(("input", one, "kv") for one in _MOVERS),
              *(("s2 inhibition", one, "q") for one in _MOVERS), *((one, "output", "") for one in _MOVERS))
_GREATER: Parts = {"early": "0.3 0.5", "first": "0.1", "early MLPs": "m0 m1 m2 m3",
                   "middle": "5.5 6.1 6.9 7.10 8.11 9.1", "late MLPs": "m8 m9 m10 m11"}
_GREATER_HEADS = "9.1 8.11 8.8 7.10 6.9 5.5 5.1"
_GREATER_LINKS = (*(("input", one, "qkv") for one in ("early", "first", "early MLPs")), ("first", "early MLPs", ""),
                  ("first", "middle", "qkv"), ("early", "middle", "qkv"), ("early MLPs", "middle", "qkv"),
                  ("middle", "late MLPs", ""), ("middle", "output", ""), ("late MLPs", "output", ""))
_DOCSTRING: Parts = {one: one for one in "0.5 1.2 1.4 2.0 3.0 3.6".split()}
_DOCSTRING_HEADS = "0.2 0.4 0.5 1.2 1.4 2.0 3.0 3.6"
_DOCSTRING_AT = {"1.4": "comma_B", "2.0": "C_def", "3.0": "param_3", "3.6": "param_3", "0.5": "B_def C_def B_doc",
                 "1.2": "A_doc B_doc", "0.2": "B_doc", "0.4": "param_3"}
_DOCSTRING_LINKS = (
    ("0.5", "1.4", "v"), ("input", "0.5", "v"), ("input", "2.0", "qk"), ("0.5", "2.0", "qk"), ("1.4", "2.0", "v"),
    ("input", "1.4", "v"), ("input", "1.2", "qk"), ("0.5", "1.2", "qk"),
    *(link for mover in ("3.0", "3.6") for link in (
        (mover, "output", ""), ("1.4", mover, "q"), ("input", mover, "v"), ("0.5", mover, "v"), ("2.0", mover, "k"),
        ("1.2", mover, "k"))))  # fmt: skip

_KNOWN: dict[tuple[str, str], Sequence[str] | tuple[Parts, tuple]] = {
    ("ioi", "heads"): " ".join(_IOI.values()).split(),
    ("ioi", "heads at positions"): [f"{one}@{_IOI_AT.get(kind, 'end')}" for kind, parts in _IOI.items()
                                    for one in parts.split()],
    ("ioi", "edges"): (_IOI, _IOI_LINKS),
    ("greater-than", "heads"): _GREATER_HEADS.split(),
    ("greater-than", "heads and mlps"): " ".join(_GREATER.values()).split(),
    ("greater-than", "edges"): (_GREATER, _GREATER_LINKS),
    ("docstring", "heads"): _DOCSTRING_HEADS.split(),
    ("docstring", "heads at positions"): [f"{head}@{at}" for head, places in _DOCSTRING_AT.items()
                                          for at in places.split()],
    ("docstring", "edges"): (_DOCSTRING, _DOCSTRING_LINKS),
}  # fmt: skip


def manual(name: str, *, level: str = "heads") -> Circuit:
    """The circuit that was found by hand for "ioi", "greater-than" or "docstring", without scores.

    Positions have the names of `relprop.data`: "S1_next", "S2", "end"; of docstrings those of auto-circuit's file,
    "A_doc", "comma_B", "param_3" (the end).

    Args: level: "heads", "heads at positions", "heads and mlps" (of greater-than) or "edges".
    Raises: ValueError for another name, or a level that it is not known at.

    >>> len(manual("ioi")), "L9.attn.H9@end" in manual("ioi", level="heads at positions")
    (26, True)
    >>> ("L5.attn.H5", "L7.attn.H3.k") in manual("ioi", level="edges")
    True
    """
    if (name, level) not in _KNOWN:
        raise ValueError(f"no circuit by hand of {name!r} at the level {level!r}; there are "
                         f"{', '.join(f'{one} ({at})' for one, at in _KNOWN)}")
    known = _KNOWN[name, level]
    items = _edges(*known) if level == "edges" else [_address(one) for one in known]
    return Circuit.of(items, level=level, method="manual", about={"task": name})


def _address(part: str, inner: str | None = None) -> str:
    """The text of an address: "9.6@end" as "L9.attn.H6@end"."""
    place, _, position = part.partition("@")
    if place.startswith("m"):
        found = Address("mlp", int(place[1:]))
    else:
        layer, head = map(int, place.split("."))
        found = Address("attn", layer, "H", head, inner=inner)
    return f"{found}@{position}" if position else str(found)


def _edges(parts: Parts, links: Sequence[tuple[str, str, str]]) -> list[Edge]:
    """Every edge between two classes that are linked, from earlier layers to later ones."""
    found = []
    for source, destination, inputs in links:
        for u in parts.get(source, "").split() or [None]:
            for v in parts.get(destination, "").split() or [None]:
                if u is not None and v is not None and not _before(u, v):
                    continue
                start = "embed" if u is None else _address(u)
                ends = ["logits"] if v is None else [_address(v)] if v.startswith("m") else \
                    [_address(v, inner) for inner in inputs]
                found += [(start, end) for end in ends]
    return found


def _before(u: str, v: str) -> bool:
    """Whether a part's output is there before another one reads: a layer's heads come before its MLP."""
    when = lambda part: (int(part[1:]), 1) if part.startswith("m") else (int(part.split(".")[0]), 0)
    return when(u) < when(v)
