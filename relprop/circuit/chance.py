"""Scores by chance: what a method has to beat."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ..result import Circuit
from ..result.circuit import Item
from .graph import graph
from .task import Prepared


def random(prepared: Prepared, *, level: str | Sequence[str] = "heads", ablation: str = "resample", seed: int = 0
           ) -> Circuit:
    """Every node with a score from a standard normal distribution, by the seed; of "edges", every edge of the model.

    >>> from relprop.circuit.chance import drawn
    >>> drawn(["L0.attn.H0", "L0.attn.H1"]) == drawn(["L0.attn.H0", "L0.attn.H1"])
    True
    """
    items = list(graph(prepared.subject, prepared.clean).pairs()) if level == "edges" else list(prepared.nodes(level))
    return Circuit.of(drawn(items, seed=seed), level=level if isinstance(level, str) else "nodes", method="random")


def drawn(items: list[Item], *, seed: int = 0) -> dict[Item, float]:
    """A score for each item."""
    generator = torch.Generator().manual_seed(seed)
    return dict(zip(items, torch.randn(len(items), generator=generator, dtype=torch.float64).tolist()))
