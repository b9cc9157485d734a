"""Canvases with two or three handwritten digits among clutter, for the bundled model `digits-vit`.

The digits are the 1,797 of scikit-learn's `load_digits` (8 x 8 pixels, 17 grey levels), a part of E. Alpaydin and
C. Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC BY 4.0.
Every pixel of a digit is known, so a canvas comes with the ground truth that an explanation of its label should find.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 54  # side of a canvas, in pixels
CLASSES = 10
SPLITS = ("train", "test")
TEST_INSTANCES = 360  # of 1,797; drawn once by SPLIT_SEED and never trained on
SPLIT_SEED = 1998
SIDE = (16.0, 20.0)  # of the 8 x 8 image when drawn, in pixels; smaller ones are hard to read for people too
REACH = 0.54  # radius kept free around a digit, as a part of its side: corners reach further, but seldom hold ink
FRAGMENTS, STROKES = 3, 3  # per canvas, at most
ROUNDS = 2000  # of drawing positions anew before giving up
INK = 0.3  # from here on a pixel of a digit (1 is full ink) belongs to its mask


@dataclass(frozen=True, eq=False)
class Handwriting:
    """Digits to draw with: `glyphs` in [0, 1], (N, 8, 8), and which digit each is, (N,), every one of 0 to 9."""

    glyphs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.glyphs.shape != (len(self.labels), 8, 8) or set(self.labels.tolist()) != set(range(CLASSES)):
            raise ValueError(f"handwriting is glyphs (N, 8, 8) with a label each, of 0 to {CLASSES - 1}, not "
                             f"{tuple(self.glyphs.shape)} with {sorted(set(self.labels.tolist()))}")

    @cached_property
    def members(self) -> list[Tensor]:
        """For each digit, its rows."""
        return [(self.labels == label).nonzero().flatten() for label in range(CLASSES)]


@dataclass(frozen=True)
class Canvases:
    """What `canvases` draws; B canvases of Y x X pixels.

    Args: images: grey levels in [0, 1], 0 is black, float32, (B, 1, Y, X).
        labels: which digits are there, bool, (B, 10).
        masks: the pixels with ink of each digit, bool, (B, 10, Y, X); all False where the digit is not on the canvas.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor


def canvases(
    count: int,
    *,
    seed: int = 0,
    split: str = "test",
    digits: tuple[int, int] = (2, 3),
    size: int = SIZE,
    clutter: float = 1.0,
    handwriting: Handwriting | None = None,
) -> Canvases:
    """Canvases with distinct, non-overlapping handwritten digits and clutter; the same for the same arguments.

    Clutter (strokes, fragments of digits, a shaded ground, noise) never covers a digit's ink.

    Args: count: B. seed: of everything drawn. split: "train" or "test", whose handwriting is drawn.
        digits: the least and the largest number of digits on a canvas. size: Y = X, in pixels.
        clutter: brightness of all that is not a digit, 0 for none. handwriting: to draw with instead of the split's.
    Returns: `Canvases` with B rows.
    Raises: ValueError for a negative count, an unknown split, a number of digits that is not in 0..10 or does not fit,
        or clutter outside [0, 1].

    >>> drawn = canvases(4, seed=1)
    >>> drawn.images.shape, bool((drawn.masks.any((2, 3)) == drawn.labels).all())
    (torch.Size([4, 1, 54, 54]), True)
    """
    _check(count, split, digits, size, clutter)
    hand = _handwriting(split) if handwriting is None else handwriting
    return _draw(count, torch.Generator().manual_seed(seed), hand, digits, size, clutter)


def _check(count: int, split: str, digits: tuple[int, int], size: int, clutter: float) -> None:
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    least, most = digits
    if not 0 <= least <= most <= CLASSES:
        raise ValueError(f"digits must be (least, most) with 0 <= least <= most <= {CLASSES}, got {digits}")
    if size < SIDE[1] or most * math.pi * (REACH * SIDE[0]) ** 2 > size * size:
        raise ValueError(f"{most} digits do not fit on {size} x {size} pixels; ask for fewer digits or a larger size")
    if not 0 <= clutter <= 1:
        raise ValueError(f"clutter must be in [0, 1], got {clutter}")


@dataclass(frozen=True)
class _Sketch:
    """What is drawn on canvases, before it is put together: for each of N places a digit (B, N), whether it is
    `present`, its centre, side, `ink` (B, N, Y, X) and strength; `things` and `ground`, (B, 1, Y, X), are the clutter.
    """

    order: Tensor
    present: Tensor
    centres: Tensor
    sides: Tensor
    ink: Tensor
    strength: Tensor
    things: Tensor
    ground: Tensor

    @property
    def free(self) -> Tensor:
        """Where clutter may be, from 0 to 1: not on ink, nor on a rim of two pixels around it."""
        return 1 - F.max_pool2d(self.ink.sum(1, keepdim=True).clamp(max=1), 5, stride=1, padding=2)

    def finished(self, clutter: float, free: Tensor) -> Canvases:
        count, _, size, _ = self.ink.shape
        masks = torch.zeros(count, CLASSES, size, size, dtype=torch.bool)
        own = (self.ink > INK) & (self.ink == self.ink.amax(1, keepdim=True))  # one at the rim goes to the darker ink
        masks.scatter_(1, self.order[..., None, None].expand_as(self.ink), own)
        labels = torch.zeros(count, CLASSES, dtype=torch.bool).scatter_(1, self.order, self.present)
        digits_ink = (self.ink * self.strength).sum(1, keepdim=True)  # (B, 1, Y, X)
        return Canvases((digits_ink + clutter * (free * self.things + self.ground)).clamp(0, 1), labels, masks)


def _draw(
    count: int, rng: torch.Generator, hand: Handwriting, digits: tuple[int, int], size: int, clutter: float
) -> Canvases:
    """`canvases` after its checks."""
    sketch = _sketch(count, rng, hand, digits, size)
    return sketch.finished(clutter, sketch.free)


def _sketch(count: int, rng: torch.Generator, hand: Handwriting, digits: tuple[int, int], size: int) -> _Sketch:
    least, most = digits
    per_canvas = torch.randint(least, most + 1, (count,), generator=rng)
    most = max(most, 1)  # one place, left empty, keeps the shapes when no digit is asked for
    order = torch.rand(count, CLASSES, generator=rng).argsort(1)[:, :most]  # distinct classes, (B, most)
    present = torch.arange(most) < per_canvas[:, None]  # (B, most)
    centres, sides = _places(present, rng, size)
    ink = _render(_instances(order.flatten(), hand, rng), centres.reshape(-1, 2), sides.flatten(), rng, size)
    ink = ink.reshape(count, most, size, size) * present[..., None, None]
    strength = _uniform((count, most, 1, 1), 0.7, 1.0, rng)
    things = torch.maximum(_fragments(count, hand, rng, size), _strokes(count, rng, size))
    ground = _shade(count, rng, size) + 0.04 * torch.randn(count, 1, size, size, generator=rng)
    return _Sketch(order, present, centres, sides, ink, strength, things, ground)


def swaps(
    count: int, *, seed: int = 0, split: str = "test", digits: tuple[int, int] = (2, 3), size: int = SIZE,
    clutter: float = 1.0, handwriting: Handwriting | None = None,
) -> tuple[Canvases, Canvases, Tensor, Tensor]:
    """The canvases that `canvases` draws, and the same ones with one digit each swapped for one that is not there.

    The other digit has the place and the size of the one that goes; all else is the same, but that clutter is kept off
    its ink.

    Args: as of `canvases`.
    Returns: canvases before and after, which digit goes (B,) and which comes (B,).
    Raises: ValueError as of `canvases`, and if a canvas may be without a digit, or have all of them.

    >>> before, after, gone, come = swaps(3, seed=1)
    >>> bool(before.labels[range(3), gone].all()), bool(before.labels[range(3), come].any())
    (True, False)
    """
    if not 1 <= digits[0] <= digits[1] < CLASSES:
        raise ValueError(f"a digit is swapped for another on canvases of 1 to {CLASSES - 1} digits, not of {digits}")
    _check(count, split, digits, size, clutter)
    rng, hand = torch.Generator().manual_seed(seed), _handwriting(split) if handwriting is None else handwriting
    sketch = _sketch(count, rng, hand, digits, size)
    before, row = sketch.finished(clutter, sketch.free), torch.arange(count)
    place = torch.rand(sketch.present.shape, generator=rng).where(sketch.present, -1.0).argmax(1)  # (B,)
    come = torch.rand(before.labels.shape, generator=rng).where(~before.labels, -1.0).argmax(1)
    ink, order = sketch.ink.clone(), sketch.order.clone()
    ink[row, place] = _render(_instances(come, hand, rng), sketch.centres[row, place], sketch.sides[row, place], rng,
                              size)
    order[row, place] = come
    other = replace(sketch, ink=ink, order=order)
    return before, other.finished(clutter, sketch.free.minimum(other.free)), sketch.order[row, place], come


def _places(present: Tensor, rng: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Centres (B, N, 2) and sides (B, N) of digits whose free circles do not meet; drawn anew until they do not."""
    count, most = present.shape
    centres, sides = torch.zeros(count, most, 2), torch.zeros(count, most)
    open_rows = torch.arange(count)
    both = (present[:, :, None] & present[:, None, :]).triu(1)  # pairs that must stay apart
    for _ in range(ROUNDS):
        if not len(open_rows):
            return centres, sides
        side = _uniform((len(open_rows), most), *SIDE, rng)
        room = size - 2 * REACH * side  # what is left for the centre
        centre = REACH * side[..., None] + room[..., None] * torch.rand(len(open_rows), most, 2, generator=rng)
        centres[open_rows], sides[open_rows] = centre, side
        near = torch.cdist(centre, centre) < REACH * (side[:, :, None] + side[:, None, :])
        open_rows = open_rows[(near & both[open_rows]).any((1, 2))]
    if len(open_rows):
        raise ValueError(f"{most} digits do not fit on {size} x {size} pixels; ask for fewer digits or a larger size")
    return centres, sides


def _render(glyphs: Tensor, centres: Tensor, sides: Tensor, rng: torch.Generator, size: int) -> Tensor:
    """Each glyph (N, 8, 8) smoothly enlarged, turned, slanted and put in its place, (N, Y, X) in [0, 1]."""
    turn, slant = _uniform((len(glyphs),), -0.26, 0.26, rng), _uniform((len(glyphs),), -0.2, 0.2, rng)
    smooth = F.interpolate(glyphs[:, None], scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    axis = torch.arange(size) + 0.5
    y = (axis - centres[:, :1])[:, :, None] * (2 / sides)[:, None, None]  # (N, Y, 1), from -1 to 1 over the glyph
    x = (axis - centres[:, 1:])[:, None, :] * (2 / sides)[:, None, None]  # (N, 1, X)
    cos, sin, slant = turn.cos()[:, None, None], turn.sin()[:, None, None], slant[:, None, None]
    back_y, back_x = cos * y - sin * x, sin * y + cos * x
    grid = torch.stack([back_x + slant * back_y, back_y], dim=-1)
    return F.grid_sample(smooth, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def _fragments(count: int, hand: Handwriting, rng: torch.Generator, size: int) -> Tensor:
    """Pieces of 3 x 3 or 4 x 4 of the 64 pixels of a digit, too small to be read, (B, 1, Y, X)."""
    total = count * FRAGMENTS
    glyphs = _instances(torch.randint(CLASSES, (total,), generator=rng), hand, rng)
    corner, extent = torch.randint(0, 5, (total, 2), generator=rng), torch.randint(3, 5, (total, 1), generator=rng)
    inside = (torch.arange(8) >= corner[..., None]) & (torch.arange(8) < (corner + extent)[..., None])  # (N, 2, 8)
    piece = glyphs * (inside[:, 0, :, None] & inside[:, 1, None, :])
    strength = _uniform((total, 1, 1), 0.3, 0.9, rng) * (torch.rand(total, 1, 1, generator=rng) < 0.6)
    ink = _render(piece, _uniform((total, 2), 0, size, rng), _uniform((total,), *SIDE, rng), rng, size) * strength
    return ink.reshape(count, FRAGMENTS, size, size).amax(1, keepdim=True)


def _strokes(count: int, rng: torch.Generator, size: int) -> Tensor:
    """Short thin curves (quadratic Bézier), (B, 1, Y, X)."""
    shape = (count, STROKES, 1, 1)
    start, axis = _uniform((2, *shape), 0, size, rng), torch.arange(size) + 0.5
    bend, end = (start + _uniform((2, *shape), -reach, reach, rng) for reach in (6, 10))
    nearest = torch.full((count, STROKES, size, size), math.inf)
    for t in torch.linspace(0, 1, 12):
        y, x = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        nearest = torch.minimum(nearest, (axis[:, None] - y) ** 2 + (axis - x) ** 2)
    strength = _uniform(shape, 0.3, 0.8, rng) * (torch.rand(shape, generator=rng) < 0.6)
    return (strength * torch.exp(-nearest)).amax(1, keepdim=True)


def _shade(count: int, rng: torch.Generator, size: int) -> Tensor:
    """A smooth ground of at most 0.15, (B, 1, Y, X)."""
    coarse = 0.15 * torch.rand(count, 1, 3, 3, generator=rng)
    return F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)


def _instances(classes: Tensor, hand: Handwriting, rng: torch.Generator) -> Tensor:
    """A handwritten digit for each class, (N, 8, 8) in [0, 1]."""
    sizes = torch.tensor([len(m) for m in hand.members])[classes]
    pick = (torch.rand(len(classes), generator=rng) * sizes).long().clamp(max=sizes - 1)
    table = torch.nn.utils.rnn.pad_sequence(hand.members, batch_first=True)
    return hand.glyphs[table[classes, pick]]


@lru_cache
def _handwriting(split: str) -> Handwriting:
    """The digits of the split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = order[:TEST_INSTANCES] if split == "test" else order[TEST_INSTANCES:]
    return Handwriting(torch.from_numpy(data.images).float()[rows] / 16, torch.from_numpy(data.target)[rows])


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)
