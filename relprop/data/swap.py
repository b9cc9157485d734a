"""Pictures in pairs: the same canvas with one digit swapped for another, taken out, or blurred."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..zoo.digits import swaps
from .pair import Pair, Pairs

CHANGES = ("swap", "mask", "blur")
RIM = 7  # pixels a side of the square by which a digit's mask is widened, its faint rim with it
SIGMA = 3.0  # of the blur, in pixels


def swapped(count: int = 100, *, seed: int = 0, change: str = "swap", digits: tuple[int, int] = (2, 3),
            clutter: float = 1.0) -> Pairs:
    """Canvases for `digits-vit` in which one digit is another one in the same place ("swap"), has the grey of what is
    around it ("mask"), or is blurred ("blur"). The same seed asks for the same digits of the same canvases.

    The continuations are labels: of a swap the digit that comes and the one that goes, else the one that goes. The span
    "digit" is its ink, in the base, and on both sides the ink of both digits is "place".

    Args: count, seed, digits, clutter: of `relprop.zoo.digits.canvases`.
    Raises: ValueError for an unknown change, and as of `relprop.zoo.digits.swaps`.

    >>> one = swapped(1, seed=1).pairs[0]
    >>> one.base.shape, one.continuations == (one.facts["to"], one.facts["digit"])
    ((54, 54), True)
    """
    if change not in CHANGES:
        raise ValueError(f"a change is {', '.join(CHANGES)}, not {change!r}")
    before, after, gone, come = swaps(count, seed=seed, digits=digits, clutter=clutter)
    row = torch.arange(count)
    old, new = before.masks[row, gone], after.masks[row, come]  # (B, Y, X)
    changed = {"swap": lambda: after.images, "mask": lambda: _masked(before.images, old),
               "blur": lambda: _blurred(before.images, old)}[change]()
    pairs = [_pair(*one, change) for one in zip(_levels(before.images), _levels(changed), old, new, gone.tolist(),
                                                come.tolist())]
    return Pairs(f"digits {change}", "image", pairs, {"count": count, "seed": seed, "change": change,
                                                      "digits": list(digits), "clutter": clutter})


def _pair(base: object, counterfactual: object, old: Tensor, new: Tensor, gone: int, come: int, change: str) -> Pair:
    swap = change == "swap"
    place = old | new if swap else old
    facts = {"digit": str(gone), **({"to": str(come)} if swap else {}), "change": change}
    return Pair(base, counterfactual, (str(come), str(gone)) if swap else (str(gone),), {"digit": old, "place": place},
                {"digit": new if swap else old, "place": place}, facts)


def _levels(images: Tensor) -> object:
    return (images[:, 0] * 255).round().byte().numpy()


def _widened(mask: Tensor) -> Tensor:
    """(B, Y, X) as (B, 1, Y, X), wider by half of `RIM` on each side."""
    return F.max_pool2d(mask[:, None].float(), RIM, stride=1, padding=RIM // 2) > 0


def _masked(images: Tensor, mask: Tensor) -> Tensor:
    """The digits' places at the median grey of a ring around them."""
    inside = _widened(mask)
    ring = _widened(inside[:, 0]) & ~inside
    grey = torch.stack([image[around].median() for image, around in zip(images, ring)])
    return torch.where(inside, grey[:, None, None, None], images)


def _blurred(images: Tensor, mask: Tensor) -> Tensor:
    """The digits' places after a Gaussian blur of the canvas."""
    reach = int(3 * SIGMA)
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0) ** 2 / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
    return torch.where(_widened(mask), blurred, images)
