"""How many entries are computed at a time where all at once would take too much memory.

Scaled down while a small input stands for a large one (`relprop.memory`), which then goes in as many pieces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

ENTRIES = 1 << 22
"""16 MiB in float32, where the logits of a language model, or the pattern of an attention, are hundreds."""

_SHARES: ContextVar[tuple[float, float]] = ContextVar("shares", default=(1.0, 1.0))


def entries(*, of_pairs: bool = False) -> int:
    """Entries at a time, of what has one for each position, or, `of_pairs`, one for each two of them."""
    return max(1, round(ENTRIES * _SHARES.get()[of_pairs]))


@contextmanager
def shrunk(positions: float, pairs: float) -> Iterator[None]:
    """A `with` block in which positions, and pairs of them, are that share of what they are for the whole input."""
    token = _SHARES.set((positions, pairs))
    try:
        yield
    finally:
        _SHARES.reset(token)
