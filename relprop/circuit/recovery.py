"""How well scores tell a known circuit from the rest: ROC AUC and average precision, over nodes or over edges.

References: Conmy et al. 2023 (Towards automated circuit discovery) and Hsu et al. 2024 (CD-T) for the ROC AUC against
circuits found by hand; the area is that of all thresholds, ties counting half.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..address import Address
from ..result import Circuit
from ..result.circuit import Item, said


@dataclass(frozen=True)
class Recovery:
    """ROC AUC and average precision (its chance is `positives` / `items`), and of how many items."""

    auc: float
    average_precision: float
    positives: int
    items: int


def recovery(found: Circuit, known: Circuit, *, absolute: bool = True, positions: str = "max") -> Recovery:
    """How the scores of a circuit rank the items of a known one.

    Of a known circuit of nodes, edges are taken together by the node that they leave, whose score is the sum of them;
    nodes at positions by their place where the known circuit has no positions.

    Args: known: what it keeps is right, all else wrong. absolute: rank by the size of scores; else as of
            `Circuit.ranking`. positions: how scores at positions are taken together, "max" (of size) or "sum".
    Raises: ValueError for an item of the known circuit that has no score, or one that is empty or everything.

    >>> found = Circuit.of({"L0.attn.H0": -2.0, "L0.attn.H1": 0.1, "L1.attn.H0": 1.5}, level="heads")
    >>> recovery(found, Circuit.of(["L0.attn.H0"], level="heads"))
    Recovery(auc=1.0, average_precision=1.0, positives=1, items=3)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    found.ranking()  # every score is known
    scores = _alike(found, known, positions)
    right = set(known)
    missing = next((item for item in right if item not in scores), None)
    if missing is not None:
        raise ValueError(f"{said(missing)} is in the known circuit, and {found.method} has no score for it at the "
                         f"level {found.level}; take a level that has it, or a known circuit of {found.level}")
    labels = [item in right for item in scores]
    if all(labels) or not any(labels):
        raise ValueError(f"the known circuit is {'all' if all(labels) else 'none'} of {len(labels)} items, so that no "
                         "ranking finds it better than another; take a larger level, or another circuit")
    way = -1 if found.total is None or found.total < 0 else 1
    ranks = [abs(score) if absolute else way * score for score in scores.values()]
    return Recovery(float(roc_auc_score(labels, ranks)), float(average_precision_score(labels, ranks)), sum(labels),
                    len(labels))


def _alike(found: Circuit, known: Circuit, positions: str) -> Mapping[Item, float]:
    """The scores by items such as the known circuit has."""
    if found.edges and known.edges:
        return found.edges
    if known.edges:
        raise ValueError(f"the known circuit is of edges, and {found.method} scored nodes; take level='edges'")
    if found.edges:
        named = {Address.parse(node).part for node in known.nodes}
        nodes: dict[Item, float] = {}
        for (u, _), score in found.edges.items():
            source = Address.parse(u)
            if source.inner is None and (source.part in named or source.part != "embed"):
                nodes[u] = nodes.get(u, 0.0) + score
        found = Circuit.of(nodes, level="nodes", method=found.method)
    placed = any("@" in node for node in known.nodes)
    return found.nodes if placed or not any("@" in node for node in found.nodes) else found.whole(positions).nodes


__all__ = ["Recovery", "recovery"]
