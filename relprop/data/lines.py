"""A file of texts, one JSON object a line, with what should matter in each."""
from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .example import Data, Example, chosen, joined, limited, within
from .pair import Pair, Pairs

SUFFIXES = (".jsonl", ".jsonl.gz")


def texts(path: str | Path, count: int | None = None, *, seed: int = 0) -> Data:
    """Texts of the user's own, with spans that should matter or a label on every word.

    A line is {"text": ..., "spans": [[start, end], ...], "target": ...} with spans in characters, or {"words": [...],
    "spans": [[start, end], ...], "labels": [...], "target": ...} with spans in words and a number for each word, signed
    for the target. Spans, labels and target may be left out; "group" names rows that are not independent. A word of a
    text (what stands between spaces) is marked if a span touches it.

    Args: path: .jsonl or .jsonl.gz. count: how many, drawn by the seed; None: all.
    Raises: ValueError for a line that is none of these, with its number.
    """
    numbered = list(enumerate(read(path), start=1))
    examples = limited(lambda line: _example(*line, Path(path)), numbered, count, seed)
    return Data(Path(path).name, "text", examples, {"count": count, "seed": seed})


def counterparts(path: str | Path, count: int | None = None, *, seed: int = 0) -> Pairs:
    """Pairs of texts of the user's own.

    A line is {"base": ..., "counterfactual": ..., "continuations": [...], "spans": {"name": [[start, end], ...]},
    "counterfactual_spans": {...}, "group": ...} with spans in characters; what is behind the two texts may be left out,
    and the spans of the counterfactual where they are those of the base. The rest of a line are facts of the pair.

    Args: path: .jsonl or .jsonl.gz. count: how many, drawn by the seed; None: all.
    Raises: ValueError for a line that is none of these, with its number.
    """
    numbered = chosen(list(enumerate(read(path), start=1)), count, seed)
    pairs = [_reported(_pair, *line, Path(path)) for line in numbered]
    return Pairs(Path(path).name, "text", pairs, {"count": count, "seed": seed})


def read(path: str | Path) -> Iterator[dict]:
    """The objects of a file, one a line.

    Raises: ValueError for a line that is no JSON object, with its number; FileNotFoundError if there is no file.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as cause:
                raise ValueError(f"{Path(path).name}, line {number}: no JSON ({cause})") from cause
            if not isinstance(value, dict):
                raise ValueError(f"{Path(path).name}, line {number}: a {type(value).__name__}, expected an object")
            yield value


def found(folder: str | Path, *stems: str) -> Path:
    """A file given, or the first of these in a folder.

    Raises: ValueError if there is none.
    """
    folder = Path(folder)
    if folder.is_file():
        return folder
    for stem in stems:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise ValueError(f"no {' or '.join(f'{stem}.jsonl' for stem in stems)} (or .jsonl.gz) in {folder}")


def _example(number: int, line: dict, path: Path) -> Example:
    return _reported(_parsed, number, line, path)


def _reported(make: Callable[[dict], Any], number: int, line: dict, path: Path) -> Any:
    """What is made of a line; an error says which one it was."""
    try:
        return make(line)
    except (ValueError, TypeError, KeyError) as cause:
        what = f"no {cause.args[0]!r}" if isinstance(cause, KeyError) else str(cause)
        raise ValueError(f"{path.name}, line {number}: {what}") from cause


def _parsed(line: dict) -> Example:
    spans = line.get("spans")
    if "words" in line:
        text, words = joined(line["words"])
        marked = None if spans is None else within(spans, len(words))
    else:
        text = line["text"]
        words = tuple(match.span() for match in re.finditer(r"\S+", text))
        marked = None if spans is None else _touched(words, spans, len(text))
    labels = None if line.get("labels") is None else torch.tensor(line["labels"], dtype=torch.float64)
    return Example(input=text, target=line.get("target"), words=words, marked=marked, labels=labels,
                   group=line.get("group"))


def _pair(line: dict) -> Pair:
    known = ("base", "counterfactual", "continuations", "spans", "counterfactual_spans", "group")
    if not (isinstance(line["base"], str) and isinstance(line["counterfactual"], str)):
        raise TypeError("base and counterfactual are texts")
    ranges = lambda spans: {name: tuple((start, end) for start, end in span) for name, span in spans.items()}
    spans = ranges(line.get("spans", {}))
    other = ranges(line["counterfactual_spans"]) if "counterfactual_spans" in line else spans
    facts = {name: value for name, value in line.items() if name not in known}
    return Pair(line["base"], line["counterfactual"], tuple(line.get("continuations", ())), spans, other, facts,
                line.get("group"))


def _touched(words: tuple[tuple[int, int], ...], spans: list[list[int]], length: int) -> torch.Tensor:
    for start, end in spans:
        if not 0 <= start < end <= length:
            raise ValueError(f"span [{start}, {end}) of a text of {length} characters")
    return torch.tensor([any(start < end2 and start2 < end for start2, end2 in spans) for start, end in words])
