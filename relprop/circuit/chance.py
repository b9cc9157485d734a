"""Scores by chance: what a method has to beat."""
from __future__ import annotations

import torch

from ..result import Circuit
from ..result.circuit import Item
from .task import Prepared


def random(prepared: Prepared, *, level: str, ablation: str, seed: int = 0) -> Circuit:
    """Every node with a score from a standard normal distribution, by the seed; of "edges", every edge of the model.

    >>> from relprop.circuit.chance import drawn
    >>> drawn(["L0.attn.H0", "L0.attn.H1"]) == drawn(["L0.attn.H0", "L0.attn.H1"])
    True
    """
    return Circuit.of(drawn(list(prepared.nodes(level)), seed=seed), level=level, method="random")


def drawn(items: list[Item], *, seed: int = 0) -> dict[Item, float]:
    """A score for each item."""
    generator = torch.Generator().manual_seed(seed)
    return dict(zip(items, torch.randn(len(items), generator=generator, dtype=torch.float64).tolist()))
