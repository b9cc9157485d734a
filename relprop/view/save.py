"""Results as files, by suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..result import Curve, Relevance, write
from .figure import figure
from .grid import grid
from .page import page

SUFFIXES = (".png", ".svg", ".pdf", ".html", ".json", ".safetensors")
_DATA = (".json", ".safetensors")
_FIGURES = (".png", ".svg", ".pdf")


def save(
    relevance: Relevance | Sequence[Relevance],
    path: str | PathLike,
    *,
    row: int | None = None,
    check: Curve | None = None,
) -> Path:
    """Writes a result, or several of the same inputs side by side, as the suffix says.

    .png, .svg, .pdf: a figure. .html: a page that needs nothing else. .json, .safetensors: all the numbers, for
    `relprop.open`.

    Args: row: one row of the batch; None: all. check: the ablation check to go with it, instead of `relevance.curve`.
    Returns: the path.
    Raises: ValueError for an unknown suffix; FileNotFoundError if the folder does not exist.
    """
    path = checked(path)
    suffix = path.suffix.lower()
    several = not isinstance(relevance, Relevance)
    results = list(relevance) if several else [relevance if check is None else _with(relevance, check)]
    if suffix in _DATA:
        write(results if row is None else [result.row(row) for result in results], path)
    elif suffix == ".html":
        path.write_text(page(results if several else results[0], row), encoding="utf-8", errors="xmlcharrefreplace")
    else:
        drawn = grid(results, row) if several else figure(results[0], row)
        drawn.savefig(path, format=suffix[1:])
    return path


def checked(path: str | PathLike, suffixes: Sequence[str] = SUFFIXES, *,
            refused: str = "cannot save as {name!r}: the suffix must be one of {suffixes}") -> Path:
    """The path, if a result can be saved there.

    Args: suffixes: of files that can be written. refused: what is said of another.
    Raises: ValueError for an unknown suffix; FileNotFoundError if the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(refused.format(name=path.name, suffixes=", ".join(suffixes)))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save {path.name}: there is no folder {path.parent}")
    return path


def drawn(found: Any, path: Path, *, page: Callable[[Any], str], data: Callable[[Path], Path]) -> Path:
    """Writes what has a figure, `found.show()`, a `page` and `data`, as the suffix says.

    Args: path: as `checked` gives it. data: writes all suffixes but those of figures and pages.
    """
    suffix = path.suffix.lower()
    if suffix == ".html":
        path.write_text(page(found), encoding="utf-8", errors="xmlcharrefreplace")
    elif suffix in _FIGURES:
        found.show().savefig(path, format=suffix[1:])
    else:
        data(path)
    return path


def _with(relevance: Relevance, check: Curve) -> Relevance:
    """The result with this check, as a plain `Relevance` whatever it was."""
    names = Relevance.__dataclass_fields__
    return replace(Relevance(**{name: getattr(relevance, name) for name in names}), curve=check)
