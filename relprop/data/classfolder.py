"""A folder with one subfolder a class, of pictures (as ImageNet is usually kept) or of texts (as the IMDB reviews are).

References: O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 115, 2015; A. Maas et al.,
"Learning Word Vectors for Sentiment Analysis", ACL 2011.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from .example import Data, Example, Lazy, chosen
from .picture import SUFFIXES

IMAGENET = re.compile(r"n\d{8}")  # how ImageNet names its classes, after WordNet


def imagefolder(folder: str | Path, count: int | None = None, *, seed: int = 0,
                classes: Mapping[str, int | str] | str | Path | None = None) -> Data:
    """Pictures in one subfolder a class; asked for is the class.

    Args: folder: CLASS/NAME.jpg (or another suffix). count: how many, drawn by the seed; None: all. classes: the class
        index or label of each subfolder's name: a mapping, or a file with one (see `listed`). Without it, names such as
        n01440764 are ImageNet's 1000 classes in their usual order, a whole number is the index itself, and any other
        name is a label of the model.
    Raises: ValueError for a folder without such pictures, and for a subfolder that `classes` does not name.
    """
    files = _files(Path(folder), SUFFIXES, "pictures")
    number = _numbers({path.parent.name for path in files}, classes)
    examples = Lazy(lambda path: Example(input=str(path), target=number[path.parent.name]), chosen(files, count, seed))
    return Data(Path(folder).name, "image", examples, {"count": count, "seed": seed})


def textfolder(folder: str | Path, count: int | None = None, *, seed: int = 0, length: int | None = None,
               classes: Mapping[str, int | str] | str | Path | None = None) -> Data:
    """Texts in one subfolder a class; asked for is the class. Tags such as <br /> become spaces.

    Args: folder: CLASS/NAME.txt. count, seed, classes: as of `imagefolder`. length: words that are kept of each text;
        None: all.
    Raises: as of `imagefolder`.
    """
    files = _files(Path(folder), (".txt",), "texts")
    number = _numbers({path.parent.name for path in files}, classes)
    examples = [Example(input=_text(path, length), target=number[path.parent.name])
                for path in chosen(files, count, seed)]
    return Data(Path(folder).name, "text", examples, {"count": count, "seed": seed, "length": length})


def listed(path: str | Path) -> dict[str, int]:
    """Class index of each name in a file: a text with one name a line, in the order of the classes; or JSON, {name:
    index} or, as Keras has ImageNet's, {index: [name, label]}.

    Raises: ValueError for what is none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; it should list the names of the classes")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        names = [line.split()[0] for line in text.splitlines() if line.strip()]
        return {name: index for index, name in enumerate(names)}
    try:
        found = json.loads(text)
        if all(isinstance(value, list) for value in found.values()):
            return {value[0]: int(index) for index, value in found.items()}
        return {name: int(index) for name, index in found.items()}
    except (ValueError, TypeError, AttributeError, IndexError) as cause:
        raise ValueError(f"{path.name} is neither {{name: index}} nor {{index: [name, label]}}") from cause


def _files(folder: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    found = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        loose = sum(path.suffix.lower() in suffixes for path in folder.iterdir())
        hint = f"; its {loose} {what} go into one subfolder a class" if loose else ""
        raise ValueError(f"no {what} in subfolders of {folder}, one a class{hint}")
    return found


def _numbers(names: set[str], classes: Mapping[str, int | str] | str | Path | None) -> dict[str, int | str]:
    """Class index or label of each subfolder."""
    known = listed(classes) if isinstance(classes, str | Path) else classes
    if known is None and all(IMAGENET.fullmatch(name) for name in names):
        known = _imagenet()
    if known is None:
        return {name: int(name) if name.isdecimal() else name for name in names}
    if unknown := sorted(names - set(known)):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"no class is known for the subfolder {unknown[0]!r}{more}; give classes, the index of each")
    return {name: known[name] for name in names}


def _imagenet() -> dict[str, int]:
    from timm.data import ImageNetInfo

    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _text(path: Path, length: int | None) -> str:
    words = re.sub(r"<[^>]*>", " ", path.read_text(encoding="utf-8")).split()
    if not words:
        raise ValueError(f"{path} is empty")
    return " ".join(words[:length])
