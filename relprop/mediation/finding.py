"""Effects that can be drawn: what `relprop.effects` gives back, and what is opened from a file."""
from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from .. import view
from ..result import effects as result
from ..tokens import Batch, TextUnits
from ..view.save import checked as place

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
        path = checked(path)
        suffix = path.suffix.lower()
        if suffix == ".html":
            path.write_text(view.account(self), encoding="utf-8", errors="xmlcharrefreplace")
        elif suffix in (".png", ".svg", ".pdf"):
            self.show().savefig(path, format=suffix[1:])
        else:
            super().save(path)
        return path


def checked(path: str | PathLike) -> Path:
    """The path, if effects can be saved there; raises as `relprop.view.save.checked`."""
    return place(path, SUFFIXES, refused="cannot write effects to {name}; they are written to {suffixes}")


def pictured(base: Batch, counterfactual: Batch) -> dict[str, list[str]]:
    """The first example of texts, for pictures: the tokens of its base, and both sides as "pair"."""
    if not isinstance(base.units, TextUnits):
        return {}
    sides = [[token for token, gone in zip(one.units.tokens[0], one.units.padding[0]) if not gone]
             for one in (base, counterfactual)]
    said = [one.units.texts[0] if one.units.texts else " ".join(tokens)
            for one, tokens in zip((base, counterfactual), sides)]
    return {"tokens": sides[0], "pair": said}


__all__ = ["SUFFIXES", "Effects", "checked", "pictured"]
