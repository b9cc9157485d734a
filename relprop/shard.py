"""What was measured, in files that are whole or not there: a folder of shards, one for each part of the work
(of a benchmark: method) and chunk of rows.

A shard is JSON lines, one a row, written beside its place and moved there at once, so that a run that is killed leaves
whole shards and loses no more than those it was at. A row is counted once, since its shard has one name only.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

CONFIG, ROWS = "config.json", "rows"
SAMPLE = 4096  # entries of each parameter that the fingerprint of a model reads


def write(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    """The lines as a file that appears whole."""
    _appear(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read(path: Path) -> list[dict]:
    """The lines of a shard."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def place(folder: Path, number: int, method: str, start: int) -> Path:
    """File of a method's rows from `start` on. `number` keeps methods apart whose names look alike in a file system."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", method).strip("-") or "method"
    return folder / ROWS / f"{number:02d}-{slug}" / f"{start:06d}.jsonl"


def settle(folder: Path, config: Mapping[str, object], *, what: str) -> None:
    """The folder made ready for this configuration, which is written into it. `what` a folder of this kind holds.

    Raises: ValueError for a folder with another configuration, naming what differs, or with other things in it.
    """
    config = json.loads(json.dumps(config))  # as it will be read back
    path = folder / CONFIG
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        if changed := list(differences(held, config)):
            raise ValueError(f"{folder} holds a {what} of another configuration: {'; '.join(changed)}. "
                             "Choose another folder, or delete this one to start anew")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and holds no {what}; choose a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    _appear(path, json.dumps(config, indent=1) + "\n")


def differences(held: object, asked: object, path: str = "") -> Iterator[str]:
    """What differs between two configurations: `path: held there, asked here`.

    >>> list(differences({"seed": 0, "methods": ["a"]}, {"seed": 1, "methods": ["a"]}))
    ['seed: 0 there, 1 here']
    """
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        for name in dict.fromkeys([*held, *asked]):
            below = f"{path}.{name}" if path else str(name)
            yield from differences(held.get(name, "nothing"), asked.get(name, "nothing"), below)
    elif held != asked:
        yield f"{path}: {_short(held)} there, {_short(asked)} here"


def _short(value: object) -> str:
    text = value if value == "nothing" else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _appear(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and, spread evenly, entries of all parameters, to tell two models apart."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        last, count = max(len(flat) - 1, 0), min(SAMPLE, len(flat))
        sample = flat[torch.linspace(0, last, count, dtype=torch.float64).long()]  # float32 would round past the end
        digest.update(f"{name} {tuple(value.shape)}".encode() + sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
