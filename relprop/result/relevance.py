"""Relevance of each unit of the input, with the books of the run and all that is needed to read and draw it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Undefined
from ..tokens import ImageUnits, TextUnits, Units, units
from . import archive
from .curve import Curve
from .ledger import Ledger
from .number import amount
from .picture import Picture

READABLE = (".json", ".safetensors")
_KIND, _SEVERAL = "relevance", "comparison"


@dataclass(frozen=True, eq=False, repr=False)
class Relevance:
    """A map of relevance, one row an input, and where it came from. Compare with `equals`.

    `map` is signed, float32, in the unit of the target unless `unit` says otherwise: of tokens (B, T), of pixels (B, Y,
    X), or of the entries of a plain tensor. `inputs` is the relevance of each leaf in its full shape, `latents` that of
    addresses inside. Where a text has pictures beside it, `pictures` are their maps, in the same unit.

    Raises: Undefined for NaN or inf in the map, ValueError for rows that do not agree.
    """

    map: Tensor  # (B, T) or (B, Y, X)
    value: Tensor  # (B,), the number explained
    target: list[str]  # its name, one a row
    method: str
    conservation: str
    units: Units
    ledger: Ledger | None = None
    forwards: int = 0
    backwards: int = 0
    inputs: dict[str, Tensor] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    curve: Curve | None = None  # the ablation check, once it was made
    positions: Tensor | None = None  # of where the units stand, shape of `map`; in the map already if that says "added"
    pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        bad = int((~self.map.isfinite()).sum())
        if bad:
            raise Undefined(
                f"{bad} of {self.map.numel()} entries of the map by {self.method} are NaN or inf; are the weights and "
                "the input finite? float16 overflows: try float32"
            )
        counts = {"map": len(self.map), "value": len(self.value), "target": len(self.target), "units": self.units.rows}
        counts |= {} if self.ledger is None else {"ledger": len(self.ledger.value)}
        counts |= {} if self.positions is None else {"positions": len(self.positions)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"rows must agree, got {', '.join(f'{name}: {count}' for name, count in counts.items())}")

    @property
    def rows(self) -> int:
        """Number of inputs."""
        return len(self.map)

    @property
    def unit(self) -> str:
        """What the map is measured in, as the method put it; empty for the plain unit of the target."""
        return self.provenance.get("unit", "")

    @property
    def image(self) -> Tensor:
        """Relevance over the picture of each row, (B, Y, X), of pixels of the picture as it was given.

        Raises: ValueError if there is no picture, or not one of one size in each row; `pictures` has them one by one.
        """
        if isinstance(self.units, ImageUnits):
            return self.map
        of = [picture.row for picture in self.pictures]
        sizes = sorted({tuple(picture.map.shape) for picture in self.pictures})
        if not of:
            raise ValueError(f"there is no picture: this is a map of {_noun(self.units)}")
        if of != list(range(self.rows)) or len(sizes) > 1:
            sides = " and ".join(f"{Y} x {X}" for Y, X in sizes)
            raise ValueError(f"{len(of)} pictures of {sides} pixels in {self.rows} rows are no one tensor; "
                             "each is in .pictures, with its .row and .map")
        return torch.stack([picture.map for picture in self.pictures])

    @property
    def maps(self) -> dict[str, Tensor]:
        """The maps by kind: "text" (B, T), "image" (B, Y, X), or "tensor". Raises: ValueError as of `image`."""
        return {self._kind: self.map} | ({"image": self.image} if self.pictures else {})

    @property
    def ranked(self) -> Tensor:
        """The map as the ablation check ranks it: itself, or, where pictures stand beside a text, (B, T + P), the
        patches of a row's pictures behind its tokens.
        """
        if not self.pictures or self._kind != "text":
            return self.map
        own = [[one.patches().flatten() for one in self.pictures if one.row == row] for row in range(self.rows)]
        flat = [torch.cat(parts) if parts else self.map.new_zeros(0) for parts in own]
        patches = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
        return torch.cat([self.map, patches], 1)

    @property
    def totals(self) -> dict[str, Tensor]:
        """What each kind of input has in all, (B,) float64 each: "text" and "image" where pictures stand beside a text.
        """
        found = {self._kind: self.map.flatten(1).sum(1, dtype=torch.float64)}
        if self.pictures and self._kind == "text":
            found["image"] = torch.zeros(self.rows, dtype=torch.float64)
            for picture in self.pictures:
                found["image"][picture.row] += picture.total
        return found

    def words(self, row: int | None = None) -> list:
        """Each word with its relevance, the sum over its tokens; two equal words stay two.

        With the `specials`, words sum to the map.

        Returns: list of (word, relevance) of this row, or one such list a row.
        Raises: ValueError if the input is no text.
        """
        text = self._text("words")
        if row is None:
            return [self.words(each) for each in range(self.rows)]
        row = self._index(row)
        sums = torch.zeros(len(text.words[row]), dtype=torch.float64)
        inside = torch.tensor([index is not None for index in text.word_ids[row]], dtype=torch.bool)
        index = torch.tensor([index for index in text.word_ids[row] if index is not None], dtype=torch.long)
        sums.index_add_(0, index, self.map[row][inside].double())
        return list(zip(text.words[row], sums.tolist(), strict=True))

    def specials(self, row: int | None = None) -> list:
        """Each token that belongs to no word (special tokens and padding) with its relevance; those of an answer are in
        `answered`.

        Returns: list of (token, relevance) of this row, or one such list a row.
        Raises: ValueError if the input is no text.
        """
        text = self._text("specials")
        if row is None:
            return [self.specials(each) for each in range(self.rows)]
        row = self._index(row)
        said = text.answers[row] if text.answers is not None else [False] * len(text.tokens[row])
        tokens = zip(text.tokens[row], text.word_ids[row], said, self.map[row].tolist(), strict=True)
        return [(token, relevance) for token, index, own, relevance in tokens if index is None and not own]

    def answered(self, row: int | None = None) -> list:
        """Each token of the explained answer with its relevance: what tokens that come after it read from it.

        The last one has none. Of two answers that were contrasted, those of the second stand behind those of the first;
        those of a decoder are in `inputs["decoder_input_ids"]`.

        Returns: list of (token, relevance) of this row, or one such list a row.
        Raises: ValueError if the input is no text.
        """
        text = self._text("answers")
        if row is None:
            return [self.answered(each) for each in range(self.rows)]
        row = self._index(row)
        if text.answers is None:
            return []
        tokens = zip(text.tokens[row], text.answers[row], self.map[row].tolist(), strict=True)
        return [(token, relevance) for token, own, relevance in tokens if own]

    def shares(self, row: int | None = None) -> dict[str, float] | list[dict[str, float]]:
        """Which share of all |relevance| of the tokens lies where: on "words", on "special tokens" and padding, on the
        "answer" that was explained if there is one; and of the words' share that of the "first token", where the text
        starts with no special one.

        Models park attention on the first token, special or not, and on separators, whatever these say (Xiao et al.
        2024, attention sinks), so that relevance there tells little of the text.

        Returns: shares by name, of this row, or one such dict a row; all zero for a map of zeros.
        Raises: ValueError if the input is no text.
        """
        text = self._text("shares")
        if row is None:
            return [self.shares(each) for each in range(self.rows)]
        row = self._index(row)
        size = self.map[row].double().abs()
        size = size / size.sum().clamp_min(torch.finfo(torch.float64).tiny)
        word = torch.tensor([index is not None for index in text.word_ids[row]])
        said = torch.zeros_like(word) if text.answers is None else torch.tensor(text.answers[row])
        found = {"words": word, "special tokens": ~word & ~said} | ({"answer": said} if said.any() else {})
        first = next((t for t, gone in enumerate(text.padding[row]) if not gone), None)
        if first is not None and word[first]:
            found["first token"] = torch.arange(len(word)) == first
        return {name: float(size[where].sum()) for name, where in found.items()}

    def patches(self) -> Tensor:
        """Relevance of each patch, the sum over its pixels, (B, Gy, Gx). Pixels past the last patch count to none.

        Raises: ValueError if the input is no image, or its patches are unknown or overlap; for pictures beside a text,
            if they are not one a row, of one grid (each has its own `patches`).
        """
        if self.pictures:
            grids = sorted({picture.grid for picture in self.pictures})
            if [picture.row for picture in self.pictures] != list(range(self.rows)) or len(grids) > 1:
                raise ValueError(f"{len(self.pictures)} pictures with patches {grids} in {self.rows} rows are no one "
                                 "tensor; each of .pictures has .patches()")
            return torch.stack([picture.patches() for picture in self.pictures])
        if not isinstance(self.units, ImageUnits):
            raise ValueError(
                f"patches are of images, and this is a map of {_noun(self.units)}; use {_instead(self.units)}"
            )
        if self.units.patch is None or self.units.grid is None:
            raise ValueError("this model cuts no patches that are known; use .map, (B, Y, X)")
        (rows, columns), (height, width), (Y, X) = self.units.grid, self.units.patch, self.map.shape[1:]
        if rows * height > Y or columns * width > X:
            raise ValueError(
                f"{rows} x {columns} patches of {height} x {width} overlap in {Y} x {X} pixels; use .map, (B, Y, X)"
            )
        whole = self.map[:, : rows * height, : columns * width]
        return (
            whole.unflatten(2, (columns, width)).unflatten(1, (rows, height)).sum((2, 4), dtype=torch.float64).float()
        )

    def top(self, k: int = 5, row: int | None = None) -> list:
        """The k most relevant units, largest first: words, or places (row, column) of patches, pixels or entries.

        Returns: list of (unit, relevance) of this row, or one such list a row.
        """
        if row is None:
            return [self.top(k, each) for each in range(self.rows)]
        row = self._index(row)
        if isinstance(self.units, TextUnits):
            return sorted(self.words(row), key=lambda pair: -pair[1])[:k]
        cut = isinstance(self.units, ImageUnits) and self.units.patch is not None
        values = (self.patches() if cut else self.map)[row]
        found = values.flatten().topk(min(k, values.numel()))
        places = zip(*(axis.tolist() for axis in torch.unravel_index(found.indices, values.shape)), strict=True)
        return list(zip(places, found.values.tolist(), strict=True))

    def row(self, row: int) -> Relevance:
        """The result of one row; forwards and backwards stay those of the whole run."""
        row = self._index(row)
        # patches and tiles of all rows, one after the other, have no rows that are known here
        cut = lambda tensors: {name: t[row : row + 1] for name, t in tensors.items() if len(t) == self.rows}
        tensors = cut({"map": self.map, "value": self.value})
        books, check = (part and part.row(row) for part in (self.ledger, self.curve))
        return Relevance(
            **tensors,
            target=[self.target[row]],
            method=self.method,
            conservation=self.conservation,
            units=self.units.take([row]),
            ledger=books,
            forwards=self.forwards,
            backwards=self.backwards,
            inputs=cut(self.inputs),
            latents=cut(self.latents),
            provenance=self.provenance,
            curve=check,
            positions=None if self.positions is None else self.positions[row : row + 1],
            pictures=tuple(replace(picture, row=0) for picture in self.pictures if picture.row == row),
        )

    def equals(self, other: Relevance) -> bool:
        """Whether all of both is equal: numbers bit for bit, units, ledger, check and provenance."""
        return archive.same(self.tree(), other.tree())

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.map.shape))
        books = "no ledger" if self.ledger is None else f"ledger error {amount(self.ledger.error.max().item(), 2)}"
        names = ", ".join(
            f"{name!r} = {amount(value)}" for name, value in zip(self.target[:3], self.value.tolist(), strict=False)
        )
        return (
            f"{type(self).__name__}({names}{', ...' if self.rows > 3 else ''}, by {self.method}, map {shape}, {books})"
        )

    def tree(self) -> dict:
        """Plain data and tensors."""
        described = self.units.to_dict()
        if isinstance(self.units, ImageUnits):
            described["images"] = self.units.images
        books, check = (part and part.tree() for part in (self.ledger, self.curve))
        names = (
            "map",
            "value",
            "target",
            "method",
            "conservation",
            "forwards",
            "backwards",
            "inputs",
            "latents",
            "provenance",
            "positions",
        )
        return {**{name: getattr(self, name) for name in names}, "units": described, "ledger": books, "curve": check,
                "pictures": [picture.tree() for picture in self.pictures]}

    def to_dict(self, *, full: bool = True) -> dict:
        """JSON-able, images as PNG in base64; `from_dict` is the way back.

        Args: full: with `inputs` and `latents`, which may be large.
        Raises: ValueError if there is NaN or inf anywhere.
        """
        lean = {} if full else {"inputs": {}, "latents": {}}
        drawn = {"units": self.units.to_dict(), "pictures": [picture.to_dict() for picture in self.pictures]}
        return archive.plain(archive.sealed(_KIND, {**self.tree(), **drawn, **lean}))

    def to_json(self, *, full: bool = True) -> str:
        """`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(full=full), allow_nan=False)

    @staticmethod
    def from_dict(data: Mapping) -> Relevance:
        """The result that `to_dict` wrote.

        Raises: ValueError for what is not such a result, or is of an unknown version.
        """
        archive.check(data, _KIND)
        try:
            plain = {
                name: data[name] for name in ("target", "method", "conservation", "forwards", "backwards", "provenance")
            }
            tensors = {name: archive.tensor(data, name) for name in ("map", "value")}
            leaves = {name: archive.tensors(data[name]) for name in ("inputs", "latents")}
            books = data["ledger"] and Ledger.from_dict(data["ledger"])
            check = data["curve"] and Curve.from_dict(data["curve"])
            tensors["positions"] = None if data.get("positions") is None else archive.tensor(data, "positions")
            pictures = tuple(map(Picture.from_dict, data.get("pictures", ())))
            return Relevance(**plain, **tensors, **leaves, units=_units(data["units"]), ledger=books, curve=check,
                             pictures=pictures)
        except (KeyError, TypeError, AttributeError) as cause:
            raise ValueError(f"this result of relprop is damaged: {type(cause).__name__}: {cause}") from cause

    @staticmethod
    def from_json(text: str) -> Relevance:
        """The result that `to_json` wrote.

        Raises: ValueError for what is not such a result, or is of an unknown version.
        """
        return Relevance.from_dict(archive.from_json(text))

    @property
    def _kind(self) -> str:
        return {"TextUnits": "text", "ImageUnits": "image"}.get(type(self.units).__name__, "tensor")

    def _index(self, row: int) -> int:
        if not -self.rows <= row < self.rows:
            raise IndexError(f"no row {row}; there are {self.rows}")
        return row % self.rows

    def _text(self, what: str) -> TextUnits:
        if not isinstance(self.units, TextUnits):
            raise ValueError(
                f"{what} are of text, and this is a map of {_noun(self.units)}; use {_instead(self.units)}"
            )
        return self.units


def write(results: Sequence[Relevance], path: str | PathLike) -> None:
    """Writes results to a .json or .safetensors file: one as itself, several together.

    Raises: ValueError for another suffix, or none to write.
    """
    path, results = Path(path), list(results)
    if path.suffix.lower() not in READABLE or not results:
        raise ValueError(
            f"cannot write {len(results)} results to {path.name}; results are written to {' and '.join(READABLE)}"
        )
    trees = [result.tree() for result in results]
    if path.suffix.lower() == ".safetensors":
        archive.write(
            archive.sealed(_KIND, trees[0]) if len(trees) == 1 else archive.sealed(_SEVERAL, {"results": trees}), path
        )
    else:
        plain = [result.to_dict() for result in results]
        tree = plain[0] if len(plain) == 1 else archive.sealed(_SEVERAL, {"results": plain})
        path.write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")


def read(path: str | PathLike) -> list[Relevance]:
    """The results in a .json or .safetensors file, one or several, without the model they came from.

    Raises: ValueError for another suffix, and for a file that does not hold results or is of an unknown version.
    """
    path = Path(path)
    if path.suffix.lower() not in READABLE:
        raise ValueError(
            f"cannot read {path.name}; results are read from {' and '.join(READABLE)} "
            "(figures and pages hold no numbers)"
        )
    try:
        tree = (
            archive.load(path)
            if path.suffix.lower() == ".safetensors"
            else archive.from_json(path.read_text(encoding="utf-8"))
        )
        if not archive.holds(tree, _SEVERAL):
            return [Relevance.from_dict(tree)]
        return [Relevance.from_dict(archive.sealed(_KIND, each)) for each in tree["results"]]
    except ValueError as cause:  # UnicodeDecodeError among them
        raise ValueError(f"{path}: {cause}") from cause


def _units(data: Mapping) -> Units:
    if isinstance(data.get("images"), Tensor):  # from safetensors
        size, patch, grid = (data[name] and tuple(data[name]) for name in ("size", "patch", "grid"))
        return ImageUnits(size, patch, grid, data["images"])
    return units(data)


def _noun(found: Units) -> str:
    return {"TextUnits": "text", "ImageUnits": "images"}.get(type(found).__name__, "plain tensors")


def _instead(found: Units) -> str:
    return {"TextUnits": ".words()", "ImageUnits": ".patches() or .map"}.get(type(found).__name__, ".map")
