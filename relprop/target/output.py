"""What is read of a model's output: its logits."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def logits(output: object) -> Tensor:
    """The logits in a model's output: `output.logits`, `output["logits"]`, the tensor itself, or the first of a tuple.

    Returns: logits, (B, C) or (B, T, V), in at least float32. One number a row, (B,), becomes (B, 1).
    Raises: TypeError if there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or not found.dim():
        has = f" (it has {', '.join(output)})" if isinstance(output, Mapping) else ""
        raise TypeError(f"no logits in an output of type {type(output).__name__}{has}; "
                        "give target=a function of the output that returns one number a row")
    return wide(found if found.dim() > 1 else found[:, None])


def wide(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x
