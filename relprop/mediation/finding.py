"""Effects and subsets that can be drawn: what is given back, and what is opened from a file."""
from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from .. import view
from ..result import effects as result
from ..result import subset
from ..view.save import checked as place
from ..view.save import drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf", ".html", ".json", ".safetensors", ".csv")


class Effects(result.Effects):
    """`relprop.result.Effects` with pictures; they are drawn from the numbers alone, without the model."""

    def show(self) -> Figure:
        """The strongest mediators and maps of all as a matplotlib figure; see `relprop.view.mediation`."""
        return view.mediation(self)

    def save(self, path: str | PathLike) -> Path:
        """Writes the effects as the suffix says: .png, .svg or .pdf, a figure; .html, a page that needs nothing else;
        .json or .safetensors, all numbers, for `Effects.open`; .csv, the table.

        Raises: ValueError for another suffix; FileNotFoundError if the folder does not exist.
        """
        return drawn(self, checked(path), page=view.account, data=super().save)


class Subset(subset.Subset):
    """`relprop.result.Subset` with its curve, drawn from the numbers alone."""

    def show(self) -> Figure:
        """How the effect grows with the number of mediators; see `relprop.view.sparsity`."""
        return view.sparsity(self)

    def save(self, path: str | PathLike) -> Path:
        """Writes the subset as the suffix says; see `Effects.save`."""
        return drawn(self, checked(path), page=view.selection, data=super().save)


class Subsets(subset.Subsets):
    """`relprop.result.Subsets` with a curve for each."""

    of = Subset

    def show(self) -> Figure:
        """How the effects grow with the numbers of mediators; see `relprop.view.sparsity`."""
        return view.sparsity(self)

    def save(self, path: str | PathLike) -> Path:
        """Writes the subsets as the suffix says; see `Effects.save`."""
        return drawn(self, checked(path), page=view.selection, data=super().save)


def checked(path: str | PathLike) -> Path:
    """The path, if effects can be saved there; raises as `relprop.view.save.checked`."""
    return place(path, SUFFIXES, refused="cannot write effects to {name}; they are written to {suffixes}")


__all__ = ["SUFFIXES", "Effects", "Subset", "Subsets", "checked"]
