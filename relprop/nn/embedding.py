"""Embedding lookup: where relevance arrives in a text model."""
from __future__ import annotations

import torch
from torch import Tensor

from ..composite import Composite
from .ruled import Ruled


class Embedding(Ruled, torch.nn.Embedding):
    """`torch.nn.Embedding` whose rows are the explained input: relevance is `e.embedded * e.embedded.grad`.

    `embedded` holds the rows of the last forward in eval mode, (B, T, D). Build the position and type embeddings with
    `explained=False`: they are constants, which absorb.
    """

    embedded: Tensor | None = None

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None,
                 max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
                 sparse: bool = False, _weight: Tensor | None = None, _freeze: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, explained: bool = True,
                 composite: str | Composite = "attnlrp") -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
                         _weight, _freeze, device, dtype, composite=composite)
        self.explained = explained

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        if self._aside():
            return rows
        if not self.explained:
            return rows.detach()
        self.embedded = rows.detach().requires_grad_()
        return self.embedded.clone()  # a model may update its embeddings in place; a leaf may not be
