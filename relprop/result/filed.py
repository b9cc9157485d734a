"""A result that is written to a file and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from . import archive

if TYPE_CHECKING:
    from pandas import DataFrame


class Filed:
    """What results have in common that are files: a `tree` of plain data and tensors, which `from_tree` takes back, and
    lines of a table, `_lines`.

    `kind` tells files apart; `called` is the word for one in errors, `suffixes` what it is written to.
    """

    kind: ClassVar[str]
    called: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = (".json", ".safetensors", ".csv")

    def tree(self) -> dict:
        """Plain data and tensors."""
        raise NotImplementedError

    def _lines(self) -> DataFrame:
        """What .csv holds."""
        raise NotImplementedError

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """What has this tree. Raises: KeyError, TypeError, IndexError or AttributeError for what has none."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """JSON-able; `from_dict` is the way back. Raises: ValueError if there is NaN or inf anywhere."""
        return archive.plain(archive.sealed(self.kind, self.tree()))

    def to_json(self) -> str:
        """`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | PathLike) -> Path:
        """Writes everything as .json or .safetensors, or the table alone as .csv; other `suffixes` as the class says.

        Raises: ValueError for another suffix; FileNotFoundError if the folder does not exist.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in self.suffixes:
            raise ValueError(f"cannot write {self.called} to {path.name}; the suffix must be one of "
                             f"{', '.join(self.suffixes)}")
        self._write(path, suffix)
        return path

    def _write(self, path: Path, suffix: str) -> None:
        if suffix == ".json":
            path.write_text(self.to_json(), encoding="utf-8")
        elif suffix == ".safetensors":
            archive.write(archive.sealed(self.kind, self.tree()), path)
        else:
            self._lines().to_csv(path)

    @classmethod
    def open(cls, path: str | PathLike) -> Self:
        """What a .json or .safetensors file holds. Raises: ValueError for a file that holds another thing."""
        path = Path(path)
        if path.suffix.lower() == ".safetensors":
            return cls.from_dict(archive.load(path))
        return cls.from_dict(archive.from_json(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, data: Mapping) -> Self:
        """What `to_dict` wrote. Raises: ValueError for what is none."""
        archive.check(data, cls.kind)
        try:
            return cls.from_tree(data)
        except (KeyError, TypeError, IndexError, AttributeError) as cause:
            raise ValueError(f"what should be {cls.called} is damaged: {type(cause).__name__}: {cause}") from cause


__all__ = ["Filed"]
