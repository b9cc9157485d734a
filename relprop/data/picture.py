"""A folder of the user's pictures, each with a mask of what should matter."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .example import Data, Example, limited
from .lines import read

MANIFEST = "annotations.jsonl"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def pictures(folder: str | Path, count: int | None = None, *, seed: int = 0) -> Data:
    """Pictures NAME.jpg (or another suffix), each with a mask NAME_mask.png of its size, where what matters is not 0.

    With a file `annotations.jsonl` in the folder, its lines say which: {"image": file, "mask": file, "target": label,
    "value": grey level that is marked, "group": name}, of which the last three may be left out.

    Args: count: how many, drawn by the seed; None: all.
    Raises: ValueError for a folder without a picture that has a mask, and for a mask of another size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    lines = list(read(folder / MANIFEST)) if (folder / MANIFEST).is_file() else _paired(folder)
    if not lines:
        raise ValueError(f"no picture with a mask in {folder}; a mask of NAME.jpg is NAME_mask.png")
    examples = limited(lambda line: _example(folder, line), lines, count, seed)
    return Data(folder.name, "image", examples, {"count": count, "seed": seed})


def _paired(folder: Path) -> list[dict]:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    masks = {path.stem.removesuffix("_mask"): path for path in pictures if path.stem.endswith("_mask")}
    return [{"image": path.name, "mask": masks[path.stem].name} for path in pictures if path.stem in masks]


def _example(folder: Path, line: dict) -> Example:
    if missing := [name for name in ("image", "mask") if name not in line]:
        raise ValueError(f"{MANIFEST} has a line without {' and '.join(missing)}: {line}")
    image = folder / line["image"]
    return Example(input=str(image), target=line.get("target"), group=line.get("group"),
                   marked=_mask(folder / line["mask"], image, line.get("value")))


def _mask(path: Path, image: Path, value: int | None) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as mask, Image.open(image) as picture:
        if mask.size != picture.size:
            wide, tall = picture.size
            raise ValueError(f"{path.name} is {mask.size[1]} x {mask.size[0]} pixels and {image.name} {tall} x {wide}; "
                             "a mask has the size of its picture")
        levels = np.array(mask.convert("L") if mask.mode not in ("L", "P", "1", "I") else mask)
    return torch.from_numpy(levels != 0 if value is None else levels == value)
