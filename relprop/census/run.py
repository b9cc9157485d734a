"""Architectures examined in processes of their own, each within its time."""
from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from typing import Any

from ..result.census import Entry, Failure
from . import auto, timm
from .architecture import Architecture
from .examination import examine

SECONDS = 120


@cache
def architectures() -> dict[str, Architecture]:
    """All that is asked about by its key, in the order of the libraries' own tables."""
    return {one.key: one for one in (*auto.architectures(), *timm.architectures())}


def entries(keys: Sequence[str], *, processes: int, seconds: int = SECONDS) -> Iterator[Entry]:
    """The entries of the architectures with these keys, as they come. One that takes its process down, or more than
    its time, is told so in its entry.
    """
    left = list(keys)
    while left:
        with _pool(processes) as pool:
            running = {pool.submit(_entry, key, seconds): key for key in left}
            try:
                for done in as_completed(running):
                    entry = done.result()
                    left.remove(running[done])
                    yield entry
                continue
            except BrokenProcessPool:
                pass
        for key in left[:processes]:  # one of those that were being run: each by itself
            left.remove(key)
            yield _alone(key, seconds)


def _alone(key: str, seconds: int) -> Entry:
    with _pool(1) as pool:
        try:
            return pool.submit(_entry, key, seconds).result()
        except BrokenProcessPool:
            entry = Entry(*key.split("/", 3))
            entry.failures["builds"] = Failure("BrokenProcessPool", "its process died: out of memory, or a crash in C")
            return entry


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet)


def _entry(key: str, seconds: int) -> Entry:
    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return examine(architectures()[key])
    finally:
        signal.alarm(0)


def _quiet() -> None:
    """A worker computes in one thread, asks no hub, and says nothing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import logging

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
