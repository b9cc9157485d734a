"""Embedding lookup: where relevance arrives in a text model.

The words' embedding is the explained input, so the table has no rule to apply here; every other embedding (position,
token type) is a constant that absorbs where it is added.
"""

from typing import Any

from torch import Tensor

from .call import Call, plain


def embedding(call: Call, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding`, `F.embedding_bag` of a table that depends on the input: rows are moved."""
    return plain(call, input, weight, *args, **kwargs)
