"""Relevance over one picture, at the picture's own size."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from . import archive
from .number import amount


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """The map of a picture that stands beside a text, or of one whose pixels the model does not see as they are.

    `map` is signed, float32 (Y, X), of the pixels of `image` as it was given, uint8 (Y, X, 3), in the unit of the
    text's map. `row` is the row of the batch that it is of. `lattice` is where the model's patches lie on it: top,
    left, height and width of the first, in pixels, and how many there are down and across.
    """

    row: int
    map: Tensor
    image: Tensor
    lattice: tuple[float, float, float, float, int, int]

    def __post_init__(self) -> None:
        if self.map.shape != self.image.shape[:2]:
            raise ValueError(f"a map of {tuple(self.map.shape)} does not fit a picture of {tuple(self.image.shape)}")

    def __repr__(self) -> str:
        (Y, X), (rows, columns) = self.map.shape, self.grid
        return f"Picture(row {self.row}, {Y} x {X} pixels, {rows} x {columns} patches, {amount(self.total)} in all)"

    @property
    def total(self) -> float:
        """The sum of the map."""
        return float(self.map.sum(dtype=torch.float64))

    @property
    def cells(self) -> Tensor:
        """Number of the patch of each pixel, row by row, -1 where the model sees none: (Y, X)."""
        top, left, height, width, rows, columns = self.lattice
        Y, X = self.map.shape
        down = ((torch.arange(Y) + 0.5 - top) / height).floor()[:, None]
        across = ((torch.arange(X) + 0.5 - left) / width).floor()[None]
        inside = (down >= 0) & (down < rows) & (across >= 0) & (across < columns)
        return torch.where(inside, down * columns + across, -1).long()

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.lattice[4], self.lattice[5]

    def patches(self) -> Tensor:
        """Relevance of each patch, the sum over its pixels, (Gy, Gx) float32."""
        rows, columns = self.grid
        sums, cells = torch.zeros(rows * columns + 1, dtype=torch.float64), self.cells.flatten()
        sums.index_add_(0, torch.where(cells < 0, rows * columns, cells), self.map.flatten().double())
        return sums[:-1].view(rows, columns).float()

    def tree(self) -> dict:
        """Plain data and tensors."""
        return {"row": self.row, "map": self.map, "image": self.image, "lattice": list(self.lattice)}

    def to_dict(self) -> dict:
        """JSON-able, the image as PNG in base64; `from_dict` is the way back."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.image.numpy()).save(buffer, format="png")
        return {**self.tree(), "image": base64.b64encode(buffer.getvalue()).decode("ascii")}

    @classmethod
    def from_dict(cls, data: Mapping) -> Self:
        """The picture that `tree` or `to_dict` gave, also after a round trip through a file."""
        image = data["image"]
        if isinstance(image, str):
            import numpy as np
            from PIL import Image

            image = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")))
        return cls(data["row"], archive.tensor(data, "map"), image, tuple(data["lattice"]))


__all__ = ["Picture"]
