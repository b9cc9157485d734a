"""Where the entries of a model's pixels come from in the pictures that they were made of.

Processors resize, crop, pad, cut into tiles, flatten patches and put them into another order, each in its own way. None
of these ways is known here: what a processor does with a place is found by giving it pictures whose grey levels say
where each pixel is. Entry e of what it makes of a ramp is, after its offset and gain are taken out,

    x_e = (P(ramp)_e - P(black)_e) / (P(white)_e - P(black)_e),

the mean place of the pixels that went into e, whatever weights they had, since all of this is affine in the levels.
Entries that black and white do not tell apart are padding. The distance to the next entry of the same line says how
wide an entry's own part of the picture is, and relevance is shared over that part by area.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENTS = (4, 8, 16, 32)
"""Ramps an axis: each goes from black to white in a part of it, so that 8 bits are 1,000 levels; more are used until
the entries of a picture that was enlarged can be told from their neighbours.
"""
_SHARP = 4.5  # roundings of a place, at least, between neighbours
_DIGITS = 50  # pictures that one set of grey levels tells apart
_ANCHORS, _REACH = 200, 4096  # entries from which neighbours are looked for, and how far
_FAR = (2, 4, 8)  # entries over which distances are measured, where that many lie in line
_MOST = 0.8  # of the entries that have any neighbour
_ROUNDED = 0.01  # of the entries, at most, whose levels say nothing
_AGREES = 0.5  # correlation, at least, of a picture with what its places say that it becomes

Process = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]
"""From pictures, uint8 (Y, X, 3) each, to the floating tensors that the model takes of them, by name."""


@dataclass(frozen=True, eq=False)
class Origin:
    """For each entry of the pixels, in their shape: `picture`, its number, -1 for padding; `y` and `x`, the middle of
    its part of the picture in pixels from the top left corner, and `height` and `width`, the size of that part.
    """

    picture: Tensor  # int64
    y: Tensor  # float32, as the others
    x: Tensor
    height: Tensor
    width: Tensor

    def take(self, index: Tensor) -> Origin:
        """The places of these items of the first axis."""
        return Origin(**{name: value[index.to(value.device)] for name, value in vars(self).items()})

    def spread(self, values: Tensor, number: int, size: tuple[int, int]) -> Tensor:
        """Values of the entries, shape of the pixels, as a map over one picture, (Y, X) float64: each is shared over
        its part of the picture by area, so that sums are kept.
        """
        own = self.picture == number
        y, height = _edges(self.y[own], self.height[own], size[0])
        x, width = _edges(self.x[own], self.width[own], size[1])
        density = values.to(own.device)[own].double() / (height[1] * width[1])
        drawn = torch.zeros((size[0] + 2) * (size[1] + 2), dtype=torch.float64)
        for at_y, share_y in _steps(*y, size[0]):
            for at_x, share_x in _steps(*x, size[1]):
                drawn.index_add_(0, at_y * (size[1] + 2) + at_x, density * share_y * share_x)
        drawn = drawn.view(size[0] + 2, size[1] + 2).cumsum(0).cumsum(1)[:size[0], :size[1]]
        return drawn.where(drawn.abs() > 1e-12 * density.abs().sum(), 0)  # what running sums leave of what has ended


def identity(shape: Sequence[int]) -> Origin:
    """Of pixels (B, C, Y, X) that are pictures as they are, one a row."""
    B, _, Y, X = shape
    place = lambda size, dim: (torch.arange(size) + 0.5).view([-1 if at == dim else 1 for at in range(4)]).expand(shape)
    one = torch.ones(()).expand(shape)
    return Origin(torch.arange(B).view(-1, 1, 1, 1).expand(shape), place(Y, 2), place(X, 3), one, one)


def probe(process: Process, pictures: Sequence[Tensor]) -> dict[str, Origin]:
    """Where the entries of each tensor of `process(pictures)` come from. Cost: about a dozen calls of `process`, more
    where it makes pictures larger.

    Args: pictures: uint8 (Y, X, 3) each, of any sizes.
    Returns: by the name of the tensor; those that black and white pictures do not tell apart are left out.
    Raises: ValueError if there is none, or if entries cannot have come from places in the pictures, or come from places
        that depend on what is in the pictures (a processor that cuts off margins).
    """
    sizes = [tuple(picture.shape[:2]) for picture in pictures]
    run = lambda levels: {name: value.detach().float().cpu()
                          for name, value in process([_grey(level) for level in levels]).items()}
    flat = lambda level: run([torch.full(size, float(level)) for size in sizes])
    black, white = flat(0), flat(255)
    coded = [run(_digits(sizes, place)) for place in _places(len(sizes))]
    seen = run([_luminance(picture) for picture in pictures])
    found: dict[str, Origin] = {}
    for many in SEGMENTS:
        ramps = [[run([_ramp(size, axis, part, many) for size in sizes]) for part in range(many)] for axis in (0, 1)]
        for name, low in black.items():
            gain = white[name] - low if white[name].shape == low.shape else torch.zeros(())
            inside = gain.abs() > 0.25 * gain.abs().max()
            if not bool(inside.any()) or not bool(gain.isfinite().all()):
                continue
            share = lambda one: ((one[name] - low) / gain).where(inside, 0)  # noqa: B023 called in this round
            number = _numbers([share(one) for one in coded], len(sizes)).where(inside, -1)
            found[name] = _placed(number, [[share(one) for one in parts] for parts in ramps], sizes)
            _check(found[name], share(seen), pictures)
        if all(_sharp(one, sizes, many) for one in found.values()):
            break
    if not found:
        raise ValueError("the processor makes the same of a black picture as of a white one, so that no place in it is "
                         "known; give the pixels as they are, a tensor (B, C, Y, X)")
    return found


def _placed(number: Tensor, ramps: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, int]]) -> Origin:
    """Places from what became of the ramps: each is clamped outside of its own part of the axis, so that their sum is
    the place.
    """
    high, wide = (torch.tensor([float(size[axis]) for size in sizes]) for axis in (0, 1))
    own = number.clamp(min=0)
    many = len(ramps[0])
    y, x = (sum(parts) / many * size[own] for parts, size in zip(ramps, (high, wide)))
    return Origin(number, y.float(), x.float(), *_extents(number, y, x, (high / many / 255, wide / many / 255),
                                                          (high, wide)))


def _sharp(found: Origin, sizes: Sequence[tuple[int, int]], many: int) -> bool:
    """Whether the entries of each picture lie further apart than so many ramps can be wrong by."""
    return all(float(extent[own].median()) > _SHARP * size[axis] / many / 255
               for i, size in enumerate(sizes) if bool((own := found.picture == i).any())
               for axis, extent in enumerate((found.height, found.width)))


def sampled(origin: Origin, pictures: Sequence[Tensor]) -> Tensor:
    """What the places say that pictures (Y, X), floating, become: their mean over each entry's part; 0 in padding."""
    values = torch.zeros(origin.picture.shape, dtype=torch.float64)
    for number, picture in enumerate(pictures):
        own = origin.picture == number
        sums = torch.nn.functional.pad(picture.double(), (1, 0, 1, 0)).cumsum(0).cumsum(1)  # (Y + 1, X + 1)
        (top, high), (left, wide) = (_edges(middle[own], extent[own], size)[0] for middle, extent, size in (
            (origin.y, origin.height, picture.shape[0]), (origin.x, origin.width, picture.shape[1])))
        whole = sum(sign * _between(sums, top + down * high, left + right * wide) for sign, down, right in (
            (1, 0, 0), (1, 1, 1), (-1, 0, 1), (-1, 1, 0)))
        values[own] = whole / (high * wide)
    return values


def _grey(levels: Tensor) -> Tensor:
    return levels.round().clamp(0, 255).to(torch.uint8)[..., None].expand(*levels.shape, 3).contiguous()


def _luminance(picture: Tensor) -> Tensor:
    return picture.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def _ramp(size: tuple[int, int], axis: int, part: int, many: int) -> Tensor:
    """A picture (Y, X) from black to white along an axis, all within one of its `many` parts."""
    place = (torch.arange(size[axis], dtype=torch.float64) + 0.5) / size[axis]
    levels = 255 * (place * many - part).clamp(0, 1)
    return (levels[:, None] if axis == 0 else levels[None]).expand(size)


def _places(count: int) -> list[int]:
    """The places of the digits that number so many pictures, as many different ones as there are levels for."""
    places, base = [1], min(count, _DIGITS)
    while places[-1] * base < count:
        places.append(places[-1] * base)
    return places


def _digits(sizes: Sequence[tuple[int, int]], place: int) -> list[Tensor]:
    """Pictures in plain grey that say one digit of their number."""
    base = min(len(sizes), _DIGITS)
    return [torch.full(size, 255.0 * ((i // place) % base + 1) / base) for i, size in enumerate(sizes)]


def _numbers(coded: Sequence[Tensor], count: int) -> Tensor:
    """Which picture each entry is of, from what became of its digits."""
    base = min(count, _DIGITS)
    number = sum(((level * base).round().long() - 1) * place for level, place in zip(coded, _places(count)))
    wrong = ((number < 0) | (number >= count)).logical_and(coded[0] != 0)
    if float(wrong.sum()) > _ROUNDED * float((coded[0] != 0).sum()):
        raise ValueError("the processor mixes the pictures of a batch, or changes grey levels by more than an offset "
                         "and a gain, so that their places are not known; give the pixels as a tensor (B, C, Y, X)")
    return number.clamp(0, count - 1)  # where padding is mixed in, the levels of an entry may be rounded too much


def _extents(number: Tensor, y: Tensor, x: Tensor, rough: tuple[Tensor, Tensor], sizes: tuple[Tensor, Tensor]
             ) -> tuple[Tensor, Tensor]:
    """Height and width of each entry's part of its picture: from its place to that of its neighbours.

    Args: rough: half a level along each axis of each picture, which processors round to, twice.
    """
    found = torch.zeros(2, *number.shape)
    for i in range(len(sizes[0])):
        own = number == i
        if bool(own.any()):
            places, fine = (y[own], x[own]), [float(one[i]) for one in rough]
            for along, across in ((0, 1), (1, 0)):
                found[along][own] = _steps_along(places[along], places[across], fine[along], fine[across],
                                                 float(sizes[along][i])).float()
    return found[0], found[1]


def _steps_along(along: Tensor, across: Tensor, rough: float, beside: float, size: float) -> Tensor:
    """Distance of each entry of a picture to its neighbour along one axis; of one without any, the usual distance.

    Neighbours are as many entries apart as the most of those entries have one that are looked at.

    Args: along, across: places on this axis and on the other one, (N,). rough, beside: how far they may be off. size:
        how long the axis is.
    """
    count = len(along)
    step = lambda i, j: (along[j] - along[i]).where((across[i] - across[j]).abs() <= 2 * beside, 0)
    anchors = torch.linspace(0, count - 1, min(_ANCHORS, count)).long()
    lags = torch.arange(1, min(_REACH, count - 1) + 1)
    ahead = (anchors[:, None] + lags).clamp(max=count - 1)
    on = step(anchors[:, None].expand_as(ahead), ahead)
    far = on.abs() > 2 * rough
    first = far.int().argmax(1)[far.any(1)] if len(lags) else lags
    if not len(first):  # a single line
        return torch.full_like(along, size)
    # of channels that come last the next place is one, two or three entries on, and three from all of them
    many = {place: int(far[:, place].sum()) for place in first.unique().tolist()}
    lag = min(place for place, count in many.items() if count >= _MOST * max(many.values()))
    mirrored, lag = float(on[:, lag].sign().sum()) < 0, int(lags[lag])
    onward = (lambda i, j: -step(i, j)) if mirrored else step
    found, usual = torch.zeros_like(along), size
    for several in (1, *_FAR):  # over several entries what is rounded counts less
        steps = _neighbours(onward, count, lag * several) / several
        known = steps > rough / several
        if several == 1:
            usual = float(steps[known].median()) if bool(known.any()) else size
        same = (steps < 2 * found) & (steps > found / 2) if several > 1 else steps < 4 * usual
        found = torch.where(known & same, steps, found)
    return torch.where(found > 0, found, usual)


def _neighbours(step: Callable[[Tensor, Tensor], Tensor], count: int, lag: int) -> Tensor:
    """Distance of each entry to the one `lag` entries on, or else back; zero where neither is a neighbour."""
    forward, backward = torch.zeros(2, max(count, lag))
    here = torch.arange(max(0, count - lag))
    forward[:len(here)] = step(here, here + lag)
    backward[lag:lag + len(here)] = forward[:len(here)]
    return torch.where(forward > 0, forward, backward)[:count]


def _edges(middle: Tensor, extent: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Start and length of each part within the axis, twice: to be unpacked as edges and as an extent."""
    low = (middle.double() - extent.double() / 2).clamp(0, size - 1e-3)
    high = (middle.double() + extent.double() / 2).clamp(1e-3, size)
    high = torch.maximum(high, low + 1e-3)
    return (low, high - low), (low, high - low)


def _steps(low: Tensor, length: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Places and heights of the steps whose running sum is each part's share of every pixel, times its length."""
    found = []
    for edge, sign in ((low, 1.0), (low + length, -1.0)):
        at = edge.floor().clamp(max=size).long()
        beyond = edge - at
        found += [(at, sign * (1 - beyond)), (at + 1, sign * beyond)]
    return found


def _between(sums: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """An integral image (Y + 1, X + 1) at places between its entries."""
    top, left = y.floor().long().clamp(max=sums.shape[0] - 2), x.floor().long().clamp(max=sums.shape[1] - 2)
    down, right = y - top, x - left
    return (sums[top, left] * (1 - down) * (1 - right) + sums[top + 1, left] * down * (1 - right)
            + sums[top, left + 1] * (1 - down) * right + sums[top + 1, left + 1] * down * right)


def _check(found: Origin, seen: Tensor, pictures: Sequence[Tensor]) -> None:
    """Raises: ValueError if pictures do not become what the places say."""
    expected = sampled(found, [_luminance(picture) for picture in pictures])
    for number, _ in enumerate(pictures):
        own = found.picture == number
        both = torch.stack([seen[own], expected[own]])
        if both.shape[1] < 2 or bool((both.std(1) < 1e-2 * torch.tensor([1.0, 255.0])).any()):
            continue  # nothing in the picture to compare
        agreement = float(torch.corrcoef(both)[0, 1])
        if agreement < _AGREES:
            raise ValueError(f"the processor does not treat picture {number} as it treats others of its size (their "
                             f"agreement is {agreement:.2f}): it cuts or moves by what is in it, so that no map over "
                             "the picture can be made; give the pixels that it makes, as tensors by name")


__all__ = ["Origin", "identity", "probe", "sampled"]
