"""A census run in several processes, each architecture within its time."""
from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from ..result.census import Entry, Failure
from . import auto
from .architecture import Architecture
from .examination import examine

SECONDS = 120


def architectures() -> list[Architecture]:
    """All that is asked about, in the order of the libraries' own tables."""
    return [*auto.architectures()]


def entries(keys: Sequence[str], *, processes: int, seconds: int = SECONDS) -> Iterator[Entry]:
    """The entries of the architectures with these keys, as they come. One that takes its process down, or more than
    its time, is told so in its entry.
    """
    left = list(keys)
    while left:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet) as pool:
            running = {pool.submit(_entry, key, seconds): key for key in left}
            try:
                for done in as_completed(running):
                    entry = done.result()
                    left.remove(running[done])
                    yield entry
            except BrokenProcessPool:
                yield _alone(left.pop(0), seconds)  # whichever it was: one after the other by itself


def _alone(key: str, seconds: int) -> Entry:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        try:
            return pool.submit(_entry, key, seconds).result()
        except BrokenProcessPool as error:
            entry = Entry(*key.split("/", 3))
            entry.failures["builds"] = Failure(type(error).__name__, "the process died")
            return entry


def _entry(key: str, seconds: int) -> Entry:
    architecture = next(one for one in architectures() if one.key == key)

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return examine(architecture)
    finally:
        signal.alarm(0)


def _quiet() -> None:
    """A worker computes in one thread and says nothing."""
    import logging

    import torch
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
