"""What the recipes for published tables in `demos/` share: their options, the methods, and an error as one line.

A recipe is `python demos/recipe_NAME.py --data DIR --model NAME --out DIR`. It goes on where it was stopped, and runs
under `accelerate launch` as `benchmark` does.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import RelpropError
from ..explain import explain
from ..method import METHODS
from ..result import Relevance, Table
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch
from .published import Published, here

BAD_INPUT = 2  # exit code


def parser(about: str, *, model: str, data: str, methods: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every recipe; a recipe adds its own.

    Args: about: the recipe's docstring. model: the default. data: what --data is. methods: compared by default, of
        which those are taken that there are.
    """
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in methods if name in METHODS]
    add = found.add_argument
    add("--data", required=True, metavar="PATH", help=data)
    add("--model", default=model, metavar="NAME", help="a folder, a hub id or timm/NAME (default: %(default)s)")
    add("--out", required=True, type=Path, metavar="DIR", help="where results go; a run that was stopped goes on there")
    add("--limit", type=int, metavar="N", help="at most so many inputs, drawn by the seed (default: all)")
    add("--methods", default=known, type=lambda text: chosen(text, known), metavar="A,B",
        help=f"instead of {','.join(known)}; +A,B: beside these")
    add("--batch-size", type=int, default=16, metavar="N", help="inputs at once (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    add("--device", default=_own_device(), metavar="NAME", help="cpu, cuda, cuda:1 (default: %(default)s)")
    return found


def chosen(text: str, default: Sequence[str]) -> list[str]:
    """Methods by what a user writes: names with commas, after a + beside the default ones.

    >>> chosen("a,b", ["c"]), chosen("+a,c", ["c"])
    (['a', 'b'], ['c', 'a'])
    """
    names = [name.strip() for name in text.removeprefix("+").split(",") if name.strip()]
    return list(dict.fromkeys([*default, *names] if text.startswith("+") else names))


def pairs(text: str) -> dict[str, int | str]:
    """Classes by name.

    >>> pairs("neg=0,pos=POSITIVE")
    {'neg': 0, 'pos': 'POSITIVE'}
    """
    found = [pair.partition("=")[::2] for pair in text.split(",")]
    if wrong := [name for name, value in found if not name or not value]:
        raise ValueError(f"{text!r} is not NAME=CLASS,NAME=CLASS (at {wrong[0]!r})")
    return {name: int(value) if value.isdecimal() else value for name, value in found}


def of_prediction(subject: Subject, batch: Batch, targets: Targets, *, method: str) -> Relevance:
    """The map of what the model predicts, whatever was asked for: Chefer et al. 2021's "predicted class"."""
    return explain(subject, batch, method=method, ledger=False)


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """An error of the user is one line, and exit code 2."""
    try:
        yield
    except (RelpropError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from error


def leads() -> bool:
    """Whether this is the first, or the only one, of the processes that share the work."""
    return os.environ.get("RANK", "0") == "0"


def concluded(paper: Published, measured: Mapping[str, Mapping[str, float | None]], folder: Path, *, of: Table) -> str:
    """Writes ours beside theirs into the folder, as `Published.save` does. Returns: the same, to print."""
    frame = paper.save(measured, folder, of=of)
    numbers = frame.to_string(float_format=lambda value: f"{value:#.4g}", na_rep="–")
    files = ", ".join(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir()))
    return (f"{paper.title}\n{numbers}\nhere: {here(of)}\npaper: {paper.reference}; {paper.source}\n"
            f"{folder}: {files}")


def _own_device() -> str | None:
    """The GPU of this process among several of one machine."""
    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own is not None and torch.cuda.is_available() else None
