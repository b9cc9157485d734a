"""What the commands are given: inputs, models, targets, and whether somebody looks on."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .option import BUNDLED

if TYPE_CHECKING:
    from ..subject import Subject

FILE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".txt"}  # no text ends in these


def loaded(input: str, model: str | None, device: str | None, dtype: str | None, pair: str | None = None,
           ) -> tuple[Subject, list[Any]]:
    """The subject and its inputs; the inputs are read first, since a slip there is found sooner."""
    inputs, kind = read(input)
    if pair is not None:
        inputs = _paired(inputs, kind, pair)
    subject = subject_of(BUNDLED[kind] if model is None else model, device, dtype)
    if subject.modality != kind:
        takes = f"{subject.modality}s" if subject.modality in BUNDLED else "neither images nor texts"
        given = "an image" if kind == "image" else "a text"
        raise ValueError(f"{subject.name} takes {takes}, and the input is {given}")
    return subject, inputs


def subject_of(model: str, device: str | None = None, dtype: str | None = None) -> Subject:
    """The model by name; with a progress bar only if it may be downloaded and a person looks."""
    if not watched() or "/" not in model or os.path.isdir(model):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
    from ..load import load

    return load(model, device=device, dtype=dtype)


def read(input: str) -> tuple[list[Any], str]:
    """What INPUT means, and "image" or "text": an image file, a file of texts, "-" for stdin, or else the text itself.

    Raises: FileNotFoundError for what is named like a file and is none; ValueError if it is empty or of neither kind.

    >>> read("A fine film.")
    (['A fine film.'], 'text')
    """
    if input == "-":
        return _texts(sys.stdin.read(), "stdin"), "text"
    if os.path.isdir(input):
        raise ValueError(f"{input} is a folder; name a file in it")
    if os.path.isfile(input):
        return _file(Path(input))
    if Path(input).suffix.lower() in FILE_SUFFIXES and not any(map(str.isspace, input)):
        raise FileNotFoundError(f"no file {input}")
    return _texts(input.replace("\n", " "), "the text"), "text"


def _file(path: Path) -> tuple[list[Any], str]:
    """An image, or the lines of a text file; told apart by what is in it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return [image], "image"
    except UnidentifiedImageError:
        pass
    except PermissionError:
        raise
    except Exception as cause:  # what Pillow's decoders raise: OSError, SyntaxError, EOFError ...
        raise ValueError(f"{path} is an image that cannot be read ({type(cause).__name__}: {cause})") from cause
    try:
        return _texts(path.read_text(encoding="utf-8"), str(path)), "text"
    except UnicodeDecodeError as cause:
        raise ValueError(f"{path} is neither an image nor a text in UTF-8") from cause


def _texts(text: str, origin: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{origin} is empty; there is nothing to explain")
    return lines


def by_row(inputs: list[Any], targets: list[str] | None, subject: Subject) -> tuple[list[Any], Any]:
    """Inputs and targets of the same number of rows; several targets of one input explain it once for each."""
    if not targets:
        return inputs, None
    named = [target_of(text, subject) for text in targets]
    if len(named) == 1:
        return inputs, named[0]
    return (inputs * len(named) if len(inputs) == 1 else inputs), named


def target_of(text: str, subject: Subject) -> Any:
    """A label or token as it is; a number that is no label is a class index; KIND:WHAT and A - B as of `spoken`."""
    if text in (subject.labels or ()):
        return text
    if text.lstrip("-").isdecimal():
        return int(text)
    from .spoken import spoken

    return spoken(text)


def _paired(inputs: list[Any], kind: str, pair: str) -> list[Any]:
    """Each text with the second one of its pair: the same for all, or one a line of a file."""
    others, other = read(pair)
    if (kind, other) != ("text", "text"):
        raise ValueError("a pair is of two texts")
    if len(others) not in (1, len(inputs)):
        raise ValueError(f"{len(others)} second texts for {len(inputs)} texts; give one, or one for each")
    return list(zip(inputs, others if len(others) > 1 else others * len(inputs)))


def listed(names: list[str] | None) -> list[str] | None:
    """Names that were given once for each, or with commas.

    >>> listed(["a,b", "c"])
    ['a', 'b', 'c']
    """
    return None if names is None else [name.strip() for each in names for name in each.split(",") if name.strip()]


def saved_later(output: Path, name: str, suffixes: Sequence[str], checked: Callable[[Path], Path]
                ) -> list[Path]:
    """The files that will be written: `output`, or of a folder `name` with each suffix; raises what that would, before
    anything has been computed.
    """
    if output.suffix and not output.is_dir():
        return [checked(output)]
    output.mkdir(parents=True, exist_ok=True)
    return [output / f"{name}.{suffix}" for suffix in suffixes]


def own_device() -> str | None:
    """The GPU of this process among several of one machine."""
    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own is not None and torch.cuda.is_available() else None


def watched() -> bool:
    """Whether a person sees the progress bar."""
    return sys.stderr.isatty()
