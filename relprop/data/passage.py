"""Running text, cut into passages of which a language model is asked for the next word."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .example import Data, Example, limited
from .lines import SUFFIXES, read

LENGTH = 100  # words of a passage
LEAST = 0.5  # of the words asked for; a shorter paragraph is left out


def passages(path: str | Path, count: int | None = 500, *, seed: int = 0, length: int = LENGTH) -> Data:
    """The beginnings of paragraphs; asked for is what the model says comes next.

    Args: path: a .txt with a paragraph a line, a .jsonl (or .jsonl.gz) with a "text" a line, such as a dump of
        Wikipedia, or a folder of these. count: how many, drawn by the seed; None: all. length: words that are kept of a
        paragraph; one of less than half as many is left out.
    Raises: ValueError for what is none of these, and where no paragraph is long enough.
    """
    if length < 1:
        raise ValueError(f"length is the words of a passage, at least 1, got {length}")
    found = [words[:length] for file in _files(Path(path)) for words in _paragraphs(file)
             if len(words) >= max(1, LEAST * length)]
    if not found:
        raise ValueError(f"no paragraph of {max(1, round(LEAST * length))} words or more in {path}")
    examples = limited(lambda words: Example(input=" ".join(words)), found, count, seed)
    return Data(Path(path).name, "text", examples, {"count": count, "seed": seed, "length": length})


def _files(path: Path) -> list[Path]:
    ends = (".txt", *SUFFIXES)
    found = sorted(file for file in path.rglob("*") if file.name.endswith(ends)) if path.is_dir() else [path]
    if not found or not found[0].is_file() or not found[0].name.endswith(ends):
        raise ValueError(f"no text in {path}; give a .txt with a paragraph a line, a .jsonl, or a folder of these")
    return found


def _paragraphs(file: Path) -> Iterator[list[str]]:
    """The words of each paragraph."""
    if file.suffix == ".txt":
        yield from (line.split() for line in file.read_text(encoding="utf-8").splitlines())
        return
    for number, line in enumerate(read(file), start=1):
        if not isinstance(line.get("text"), str):
            raise ValueError(f"{file.name}, line {number}: no 'text'")
        yield from (paragraph.split() for paragraph in line["text"].splitlines())
