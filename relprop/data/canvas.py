"""Canvases with several digits, of which one is asked for: every pixel of each digit is known."""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..zoo.digits import Canvases, Handwriting, canvases
from .example import Data, Example

BOX = slice(4, 24)  # of the 28 pixels a side of an MNIST image, where its digit is
INK = 1.5  # its strokes are thinner: with this gain `digits-vit` reads three digits of four, without it two of three


def digits(count: int = 500, *, seed: int = 0, digits: tuple[int, int] = (2, 3), clutter: float = 1.0) -> Data:
    """Canvases of two or three digits of the test handwriting, for `digits-vit`; as many as are asked for.

    Each canvas asks for one of its digits, drawn by the seed, whose ink is marked; the others' is in `others`.

    Args: count, seed, digits, clutter: of `relprop.zoo.digits.canvases`.
    Raises: as `canvases`.

    >>> one = digits(1, seed=3).examples[0]
    >>> one.input.shape, bool(one.marked.any()), len(one.others) in (1, 2)
    ((54, 54), True, True)
    """
    drawn = canvases(count, seed=seed, digits=digits, clutter=clutter)
    about = {"count": count, "seed": seed, "digits": list(digits), "clutter": clutter}
    return Data("digits", "image", _examples(drawn, seed), about)


def mnist(folder: str | Path, count: int = 500, *, seed: int = 0, digits: tuple[int, int] = (2, 3),
          clutter: float = 1.0) -> Data:
    """The same canvases with the handwriting of MNIST's test set, which `digits-vit` has not been trained on.

    Each digit, 20 x 20 pixels within its image, is averaged to the 8 x 8 of the canvases' own handwriting and inked
    (Y. LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 86(11), 1998).

    Args: folder: with `t10k.npz`, uint8 `images` (N, 28, 28) and `labels` (N,). The others as of `digits`.
    Raises: ValueError for a folder without it.
    """
    import numpy as np

    path = Path(folder) / "t10k.npz"
    if not path.is_file():
        raise ValueError(f"no {path}; MNIST's test set is expected there, with images and labels")
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    glyphs = F.adaptive_avg_pool2d(images[:, None, BOX, BOX].float() / 255, 8)[:, 0]  # (N, 8, 8)
    hand = Handwriting((INK * glyphs).clamp(max=1), labels)
    drawn = canvases(count, seed=seed, digits=digits, clutter=clutter, handwriting=hand)
    about = {"count": count, "seed": seed, "digits": list(digits), "clutter": clutter}
    return Data("mnist", "image", _examples(drawn, seed), about)


def _examples(drawn: Canvases, seed: int) -> list[Example]:
    asked = torch.rand(drawn.labels.shape, generator=torch.Generator().manual_seed(seed)).where(drawn.labels, -1.0)
    pictures = (drawn.images[:, 0] * 255).round().byte().numpy()  # (B, Y, X)
    return [_example(picture, masks, int(wanted), row) for row, (picture, masks, wanted) in
            enumerate(zip(pictures, drawn.masks, asked.argmax(1), strict=True))]


def _example(picture: object, masks: Tensor, wanted: int, row: int) -> Example:
    others = {str(digit): mask for digit, mask in enumerate(masks) if mask.any() and digit != wanted}
    return Example(input=picture, target=str(wanted), marked=masks[wanted], others=others)
