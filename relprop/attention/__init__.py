"""Maps from attention patterns: what the heads looked at, alone, or weighed by gradients and relevance."""
from __future__ import annotations

from collections.abc import Callable

from ..result import Relevance
from .readout import readout
from .rollout import FUSIONS, attention_rollout, raw_attention, rollout

METHODS: dict[str, Callable[..., Relevance]] = {"rollout": attention_rollout, "raw-attention": raw_attention}

__all__ = ["FUSIONS", "METHODS", "attention_rollout", "raw_attention", "readout", "rollout"]
