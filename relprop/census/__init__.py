"""Which architectures of the installed libraries are explained: a tiny instance of each is built, run and asked.

    from relprop.census import census
    found = census("text-generation/(llama|mamba)")
    print(found.summary())

What is asked is in `relprop.result.census.QUESTIONS`. The architectures are those of the installed versions: a new
release's are asked about as soon as it is installed.
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path

from .. import search, shard
from ..result.census import Census, Entry
from .run import SECONDS, architectures, entries

__all__ = ["Census", "architectures", "census", "keys", "versions"]

PACKAGES = ("relprop", "torch", "transformers", "timm")
SHIPPED = Path(__file__).with_name("record.json")
"""The verdicts of the census of this version, as of `Census.verdicts`: what `relprop models` prints."""
LINES = "entries.jsonl"


def census(only: str | Sequence[str] = "", *, every: int = 1, processes: int | None = None, seconds: int = SECONDS,
           out: str | PathLike | None = None, show_progress: bool = False) -> Census:
    """Builds a tiny random instance of every architecture of transformers' auto classes and of timm's families of
    transformers, and asks of each whether it is explained; about a second each, in processes of their own.

    Args: only: regular expressions for the keys, "library/task/family/class"; those in which one is found, "" for all.
        every: of these every so-manieth, for a sample. processes: how many at once; None: one a core, 4 at most.
        seconds: that one may take. out: a folder to which entries are written as they come; a census that was stopped
        goes on there.
    Returns: a `Census`; what fails is in it with its reason.
    Raises: ValueError if nothing matches, or `out` holds a census of other versions.
    """
    asked = keys(only)[::every]
    folder = None if out is None else Path(out)
    known = {} if folder is None else _written(folder, seconds)
    left = [key for key in asked if key not in known]
    running = entries(left, processes=processes or min(4, os.cpu_count() or 1), seconds=seconds)
    if show_progress:
        from tqdm.auto import tqdm

        running = tqdm(running, total=len(asked), initial=len(asked) - len(left), desc="census", unit="architecture")
    for entry in running:
        known[entry.key] = entry
        if folder is not None:
            with (folder / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry.to_dict(), allow_nan=False) + "\n")
    return Census(tuple(known[key] for key in asked), versions())


def keys(only: str | Sequence[str] = "") -> list[str]:
    """The keys of all architectures that one of the regular expressions is found in.

    Raises: ValueError if there is none.
    """
    return search.found(architectures(), only, what="architecture")


def versions() -> dict[str, str]:
    """The versions that a census is of."""
    return {name: version(name) for name in PACKAGES}


def _written(folder: Path, seconds: int) -> dict[str, Entry]:
    """The entries in a folder of a census that was stopped, which is made ready for more."""
    shard.settle(folder, {"versions": versions(), "seconds": seconds}, what="census")
    path = folder / LINES
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[:text.rfind("\n") + 1]  # without the line that was being written when the run was stopped
    path.write_text(whole, encoding="utf-8")
    return {one.key: one for one in (Entry.from_dict(json.loads(line)) for line in whole.splitlines())}
