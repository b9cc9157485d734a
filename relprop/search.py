"""Names found by regular expressions."""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def found(names: Iterable[str], patterns: str | Sequence[str], *, what: str) -> list[str]:
    """The names in which one of the patterns is found, in any case. `what` they are names of.

    >>> found(["llama/Llama", "gpt2/GPT2"], "LLAMA", what="architecture")
    ['llama/Llama']

    Raises: ValueError if there is none, or for what is no regular expression.
    """
    names, patterns = list(names), [patterns] if isinstance(patterns, str) else list(patterns)
    try:
        kept = [name for name in names if any(re.search(one, name, re.IGNORECASE) for one in patterns)]
    except re.error as cause:
        raise ValueError(f"{', '.join(patterns)!r} is no regular expression: {cause}") from cause
    if not kept:
        raise ValueError(f"no {what} matches {', '.join(patterns)}; they are such as {names[0]}")
    return kept
