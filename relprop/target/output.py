"""What is read of a model's output: logits, and what models without any give instead."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STARTS, ENDS, ALIKE = "start_logits", "end_logits", "logits_per_image"


def field(output: object, name: str) -> Tensor | None:
    """A tensor of the output by its name; None if there is none of it."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) and found.dim() else None


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
        raise TypeError(f"no logits in an output of type {type(output).__name__}{has}; {instead(output)}")
    return wide(found if found.dim() > 1 else found[:, None])


def named(output: object, name: str, what: str) -> Tensor:
    """A field of the output in at least float32. Raises: TypeError that says `what` there is none of."""
    found = field(output, name)
    if found is None:
        has = f" (it has {', '.join(output)})" if isinstance(output, Mapping) else ""
        raise TypeError(f"no {what} in an output of type {type(output).__name__}{has}; {instead(output)}")
    return wide(found)


def instead(output: object) -> str:
    """What to give as a target of such an output."""
    if field(output, STARTS) is not None:
        return "give Span(), Start() or End(), which read the start and end of an answer"
    if field(output, ALIKE) is not None:
        return "give Similarity(), which reads how alike text and image are"
    if field(output, "last_hidden_state") is not None:
        return "give Similarity() for pairs of texts, or target=a function of the output that returns one number a row"
    return "give target=a function of the output that returns one number a row"


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x
