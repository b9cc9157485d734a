"""Where the pictures of a batch are in what a processor made of them: pictures beside texts, or alone, and those of
tensors that were prepared before.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import torch
from torch import Tensor

from .origin import Origin, identity, probe
from .pictures import Cut, Pictures, lattices
from .prompt import Maker, Prompt, maker, pil, sign_ids
from .result import Picture
from .tokens import Batch, TextUnits


def pictures(prompts: Sequence[Prompt], processor: object, tensors: Mapping[str, object], cut: Cut) -> Pictures | None:
    """The pictures of the prompts, and where the entries of the model's tensors come from in them; None without any.

    Args: tensors: what `process` made of the prompts. cut: as of `family.cut`.
    Raises: ValueError as of `origin.probe`.
    """
    images = [image for prompt in prompts for image in prompt.images]
    if not images:
        return None
    rows = [row for row, prompt in enumerate(prompts) for _ in prompt.images]
    make = maker(prompts, processor)
    found = {name: one for name, one in probe(make, images).items() if name in tensors}
    return Pictures(images, rows, found, packing(tensors, found, rows, len(prompts)),
                    lattices(found, images, patch=cut[0], layers=cut[1],
                             counts=positions(tensors.get("input_ids"), processor, found, rows)), make)


def of_images(images: Sequence[Tensor], processor: object, cut: Cut) -> tuple[dict[str, Tensor], Pictures]:
    """The model's tensors of pictures alone, uint8 (Y, X, 3), one a row, by an image processor, and where they come
    from.
    """
    whole = lambda images: dict(processor(images=[pil(image) for image in images], return_tensors="pt"))
    floating = lambda images: {name: value for name, value in whole(images).items() if value.is_floating_point()}
    tensors, found, rows = whole(images), probe(floating, images), list(range(len(images)))
    return tensors, Pictures(list(images), rows, found, packing(tensors, found, rows, len(rows)),
                             lattices(found, images, patch=cut[0], layers=cut[1], counts=[None] * len(rows)), floating)


def seen(name: str, tensors: Mapping[str, Tensor], images: Tensor, processor: object, cut: Cut) -> Pictures:
    """The pictures of pixels (B, C, Y, X) that were prepared before, as the model sees them: `images`, (B, Y, X, 3)."""
    pixels = tensors[name]
    found, rows = {name: identity(pixels.shape)}, list(range(len(pixels)))
    counts = positions(tensors["input_ids"], processor, found, rows)
    laid = lattices(found, images, patch=cut[0], layers=pixels.shape[1], counts=counts)
    return Pictures(list(images), rows, found, lattices=laid)


def prepared(tensors: Mapping[str, Tensor], processor: object, cut: Cut, signs: Sequence[int] = ()) -> Pictures | None:
    """The pictures of tensors that a processor made before, as far as these say how large they were; None where they do
    not, and the pixels lie in rows.

    The processor is given plain pictures of these sizes; where it makes tensors of the same shapes of them, it is known
    where the entries come from, and the pictures are put together from the pixels. Else all that can be known is which
    row each patch or tile is of, by the tokens `signs` that hold their places in the texts.
    Raises: ValueError for the pixels of several rows, one after the other, of which no more is known.
    """
    count = len(tensors["input_ids"])
    maker = getattr(processor, "image_processor", processor)
    sizes = _sizes(tensors, cut)
    if sizes and maker is not None:
        blank = [torch.zeros(*size, 3, dtype=torch.uint8) for size in sizes]
        rows = _owners(tensors, processor, len(sizes))
        make = lambda images: {name: value for name, value in maker(images=[pil(image) for image in images],
                                                                    return_tensors="pt").items()
                               if name in tensors and value.is_floating_point()}
        made = _or_none(make, blank)
        if made and all(value.shape == tensors[name].shape for name, value in made.items()):
            found = {name: one for name, one in probe(make, blank).items() if name in tensors}
            images = drawn(make, found, {name: tensors[name] for name in found}, sizes)
            return Pictures(images, rows, found, packing(tensors, found, rows, count),
                            lattices(found, images, patch=cut[0], layers=cut[1],
                                     counts=positions(tensors["input_ids"], processor, found, rows)), make)
    packed = [name for name, value in tensors.items()
              if isinstance(value, Tensor) and value.dim() and len(value) != count]
    held = torch.isin(tensors["input_ids"].cpu(), torch.tensor(list(signs) or [-1])).sum(1)
    owners = {name: torch.zeros(len(tensors[name]), dtype=torch.long) if count == 1 else _shared(name, tensors, held)
              for name in packed}
    unknown = next((name for name, rows in owners.items() if rows is None), None)
    if unknown is not None:
        raise ValueError(f"{unknown} has {len(tensors[unknown])} items for {count} rows, and which row each is of "
                         "is not known; give the texts and pictures themselves, or one row")
    return Pictures([], [], {}, owners) if packed else None


GRIDS = ("image_grid_thw", "video_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes")
"""What there is one of for each picture: how many patches it has, along each of its sides."""


def _shared(name: str, tensors: Mapping[str, Tensor], held: Tensor) -> Tensor | None:
    """The row of each item of a tensor that has them one after the other, (N,), by the number of places that each row's
    text holds for them; None where items and places do not end together.

    Models put what they make of pictures into the places in order, patches of equal size giving equally many.
    """
    value = tensors[name]
    sizes = value.prod(-1) if name in GRIDS else torch.ones(len(value))
    if not held.sum() or not sizes.sum():
        return None
    ends = sizes.cpu().double().cumsum(0) / sizes.sum().item()
    rows = held.double().cumsum(0) / held.sum()
    together = torch.isclose(ends[:, None], rows[held > 0]).any(0)
    return torch.searchsorted(rows, ends - 1e-9) if together.all() else None


def _or_none(make: Maker, images: Sequence[Tensor]) -> dict[str, Tensor] | None:
    """What a processor makes, None where it refuses: then it did not make what is there."""
    try:
        return dict(make(images))
    except (ValueError, TypeError, RuntimeError):
        return None


def _sizes(tensors: Mapping[str, Tensor], cut: Cut) -> list[tuple[int, int]]:
    """Sizes of the pictures, as tensors beside the pixels have them; none if they have none."""
    for name in ("image_grid_thw", "spatial_shapes"):  # in patches
        if name in tensors and cut[0] is not None:
            return [(int(one[-2]) * cut[0][0], int(one[-1]) * cut[0][1]) for one in tensors[name]]
    return [(int(Y), int(X)) for Y, X in tensors["image_sizes"]] if "image_sizes" in tensors else []


def _owners(tensors: Mapping[str, Tensor], processor: object, count: int) -> list[int]:
    """The row of each of `count` pictures: one each, all in one, or by the runs of tokens in their place."""
    ids = tensors["input_ids"]
    if len(ids) in (1, count):
        return [0] * count if len(ids) == 1 else list(range(count))
    held = torch.isin(ids, torch.tensor(sign_ids(processor) or [-1], dtype=ids.dtype))
    begins = held & ~torch.nn.functional.pad(held, (1, 0))[:, :-1]
    rows = begins.nonzero()[:, 0].tolist()
    if len(rows) != count:
        raise ValueError(f"which of {len(ids)} rows each of {count} pictures is of is not known; give the texts and "
                         "pictures themselves")
    return rows


def drawn(make: Maker, origins: Mapping[str, Origin], tensors: Mapping[str, Tensor],
          sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Pictures, uint8 (Y, X, 3), put together from the pixels that became of them."""
    plain = lambda level: [torch.tensor(level, dtype=torch.uint8).expand(*size, 3).contiguous() for size in sizes]
    black = make(plain((0, 0, 0)))
    gains = [make(plain(tuple(255 if c == channel else 0 for c in range(3)))) for channel in range(3)]
    images = []
    for number, size in enumerate(sizes):
        sums, weights = torch.zeros(2, 3, *size, dtype=torch.float64)
        for name, origin in origins.items():
            low, inside = black[name].double(), (origin.picture == number)
            for channel in range(3):
                gain = gains[channel][name].double() - low
                own = inside & (gain.abs() > 0.25 * gain.abs().max())
                level = ((tensors[name].double().cpu() - low) / gain).where(own, 0)
                area = (origin.height * origin.width).double().where(own, 0)
                sums[channel] += origin.spread(level * area, number, size)
                weights[channel] += origin.spread(area, number, size)
        levels = (sums / weights.clamp_min(1e-9)).where(weights > 1e-6, 0.5)
        images.append((levels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous())
    return images


def packing(tensors: Mapping[str, object], origins: Mapping[str, Origin], rows: Sequence[int], count: int
            ) -> dict[str, Tensor]:
    """Of tensors whose first axis is not the `count` rows of a batch, the row of each item: patches and tiles by where
    they come from, what there is one of for each of these by it, what there is one of for each picture by that.
    """
    by_picture = torch.tensor(rows)
    known = {}
    for origin in origins.values():
        numbers = origin.picture.flatten(1).amax(1)  # -1 where an item is all padding
        if len(numbers) != count or not _in_rows(numbers, by_picture):
            known[len(numbers)] = by_picture[numbers.clamp(min=0)]
    one_each = rows == list(range(count))
    if not one_each:
        known.setdefault(len(rows), by_picture)
    text = tensors["input_ids"].shape if isinstance(tensors.get("input_ids"), Tensor) else None
    return {name: known[len(value)] for name, value in tensors.items()
            if isinstance(value, Tensor) and value.dim() and len(value) in known
            and (text is None or tuple(value.shape[:2]) != tuple(text))}


def positions(ids: object, processor: object, origins: Mapping[str, Origin], rows: Sequence[int]) -> list[int | None]:
    """How many tokens of its row's text each picture has the place of; None where there are none."""
    if not isinstance(ids, Tensor) or not hasattr(processor, "tokenizer"):
        return [None] * len(rows)
    held = torch.isin(ids, torch.tensor(sign_ids(processor) or [-1], dtype=ids.dtype)).sum(1).tolist()
    sizes = [sum(int((origin.picture == number).sum()) for origin in origins.values()) for number in range(len(rows))]
    whole = {row: sum(size for size, of in zip(sizes, rows) if of == row) for row in rows}
    return [round(held[row] * size / whole[row]) or None for size, row in zip(sizes, rows)]


def _in_rows(numbers: Tensor, by_picture: Tensor) -> bool:
    """Whether the items of a first axis are rows: each that is not padding throughout is of its own row."""
    inside = numbers >= 0
    return bool((by_picture[numbers[inside]] == inside.nonzero().flatten()).all())


def maps(relevance: Mapping[str, Tensor], batch: Batch) -> tuple[tuple[Picture, ...], Tensor]:
    """The maps over a batch's pictures of the relevance of the model's inputs, by name, in their full shape; and what
    padding of the pictures has, (B,).
    """
    pictures = batch.pictures
    if pictures is None or not pictures.origins:
        return (), torch.zeros(batch.rows, dtype=torch.float64)
    found, padding = pictures.maps(relevance, batch.rows)
    return _pictured(pictures, found), padding


def parted(values: Tensor, batch: Batch) -> tuple[Tensor, tuple[Picture, ...]]:
    """A map of units as `units.groups` numbers them, (B, T + P) for text with pictures, as that of the text and those
    of the pictures, each patch's shared evenly over its pixels; other maps as they are.
    """
    pictures = batch.pictures
    if pictures is None or not pictures.origins:
        return values, ()
    if not isinstance(batch.units, TextUnits):
        return values, _pictured(pictures, list(values.double()))
    width, found = len(batch.units.tokens[0]), []
    for row, start, lattice, image in zip(pictures.rows, pictures.starts, pictures.lattices, pictures.images):
        cells = lattice.pixels(tuple(image.shape[:2]))
        patches = values[row, width + start:width + start + lattice.rows * lattice.columns].double()
        counts = torch.bincount(cells[cells >= 0], minlength=len(patches)).clamp(min=1)
        found.append((patches / counts)[cells.clamp(min=0)].where(cells >= 0, 0))
    return values[:, :width], _pictured(pictures, found)


def _pictured(pictures: Pictures, found: Sequence[Tensor]) -> tuple[Picture, ...]:
    return tuple(Picture(row, one.float(), image, astuple(lattice)) for row, one, image, lattice in zip(
        pictures.rows, found, pictures.images, pictures.lattices, strict=True))


__all__ = ["drawn", "maps", "of_images", "packing", "parted", "pictures", "positions", "prepared", "seen"]
