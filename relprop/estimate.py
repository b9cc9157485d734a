"""What an explanation will take of memory, before it is made.

    >>> from relprop.estimate import estimate
    >>> found = estimate("reviews-bert", "A wonderful film.")
    >>> found.total == found.weights + found.kept + found.working
    True
"""
from __future__ import annotations

from typing import Any

from torch import nn

from .composite import Composite
from .explain import prepared
from .memory import Estimate, predicted
from .subject import Subject


def estimate(subject: str | Subject | nn.Module | tuple, inputs: object, target: object = None, *,
             method: str | Composite | None = None, batch_size: int | None = None, **options: Any) -> Estimate:
    """Peak memory of `relprop.explain` with these arguments, as PyTorch's allocator will count it.

    From runs on a few of the tokens, and on one and two of the rows: see `relprop.memory.predicted`. The libraries
    themselves, about half a GiB, are not in it.

    Args: as of `explain`. batch_size: rows explained at once; those of the first pass are estimated.
    Raises: as `explain`.
    """
    ready = prepared(subject, inputs, target, method=method, **options)
    batch, targets = ready.batch, ready.targets
    if batch_size is not None and batch_size < batch.rows:
        batch, targets = batch.take(range(batch_size)), targets.take(range(batch_size))
    return predicted(ready.once, ready.subject, batch, targets)
