"""Pictures and videos as models of transformers read them, by the names of their arguments.

Where names leave open how pictures are laid out (with an axis for several of them, or one for tiles), each layout is
given in turn, and the first that the model takes counts.
"""
from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Generator, Tensor

from . import config
from .description import Description

Named = dict[str, Tensor]
GRID = config.SIDE // config.PATCH
FRAMES = 4


class Painter:
    """Random pictures for a model: `accepted` are the names of its arguments, `about` is its config."""

    def __init__(self, accepted: Set[str], about: Description, rows: int, generator: Generator) -> None:
        self.accepted, self.rows, self.generator = accepted, rows, generator
        self.about = about
        self.channels = about.number("num_channels", "in_channels", "in_chans", default=3)
        self.side = about.number("image_size", "img_size", "resolution", default=2 * config.SIDE)
        self.patch = about.number("patch_size", default=config.PATCH)
        self.depth = about.number("temporal_patch_size", "patch_temporal", default=1)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def layouts(self) -> Iterator[Named]:
        """Pictures in each layout that the names allow, the likeliest first; none if the model reads none."""
        if "flattened_patches" in self.accepted:
            yield from self.flattened()
        elif "pixel_values" in self.accepted:
            yield from (self.gridded() if self.grid() else self.plain())
        elif "pixel_values_videos" in self.accepted:
            yield from self.videos("pixel_values_videos")

    def grid(self) -> Named:
        """How many patches each picture has, in the form that the names ask for."""
        rows = self.rows
        made = {"image_grid_thw": [1, GRID, GRID], "image_grid_hw": [GRID, GRID], "spatial_shapes": [GRID, GRID],
                "target_sizes": [GRID, GRID]}
        return {name: torch.tensor([sides] * rows) for name, sides in made.items() if name in self.accepted}

    def gridded(self) -> Iterator[Named]:
        """Patches with their grid: of all pictures in a row, or of each picture by itself."""
        grid, P, C, rows = self.grid(), self.patch, self.channels, self.rows
        merge = self.about.number("spatial_merge_size", default=1)
        if "image_merge_sizes" in self.accepted:
            grid["image_merge_sizes"] = torch.full((rows,), merge)
        each, size = GRID * GRID, C * P * P
        many = rows * each
        if "pixel_attention_mask" in self.accepted:
            grid["pixel_attention_mask"] = torch.ones(rows, each, dtype=torch.long)
        shapes = [(many, size * self.depth), (many, C, P, P), (many, size), (many, self.depth, C, P, P),
                  (1, many, C, P, P), (many, merge * P, merge * P, C), (rows, C, GRID * P, GRID * P)]
        if "spatial_shapes" in grid:
            shapes.insert(0, (rows, each, size))
        if "target_sizes" in grid:  # of one row, since all patches lie in one strip
            yield {"pixel_values": self.noise(1, C, P, P * each), "target_sizes": grid["target_sizes"][:1]}
        for shape in shapes:
            yield {"pixel_values": self.noise(*shape), **grid}

    def flattened(self) -> Iterator[Named]:
        """Patches with the row and the column of each in front."""
        places = torch.cartesian_prod(torch.arange(1., GRID + 1), torch.arange(1., GRID + 1))
        pixels = self.noise(self.rows, GRID * GRID, self.channels * self.patch ** 2)
        found = {"flattened_patches": torch.cat([places.expand(self.rows, -1, -1), pixels], -1)}
        for name in {"width", "height"} & set(self.accepted):
            found[name] = torch.full((self.rows, 1), GRID)
        yield found

    def plain(self) -> Iterator[Named]:
        """Whole pictures: one a row, several a row, tiles, frames of a video; or patches whose places are told."""
        rows, C, P = self.rows, self.channels, self.patch
        if "image_position_ids" in self.accepted:
            places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).expand(rows, -1, -1)
            for side in (P, P * self.about.number("pooling_kernel_size", default=1)):
                yield {"pixel_values": self.noise(rows, GRID ** 2, C * side ** 2), "image_position_ids": places.clone()}
        if "image_token_pooling" in self.accepted:
            yield self.pooled()
        tiles = self.about.number("max_num_tiles", default=3)
        frames = self.about.number("num_frames", "frames_per_clip", default=FRAMES)
        for side in dict.fromkeys((self.side, 2 * config.SIDE, 4 * config.SIDE)):
            for shape in ((rows,), (rows, 1), (rows, frames), (rows, tiles), (rows, 1, tiles)):
                for beside in self.beside(shape, side):
                    yield {"pixel_values": self.noise(*shape, C, side, side), **beside}
        yield {"pixel_values": self.noise(rows, GRID ** 2, C * P * P)}
        yield {"pixel_values": self.noise(rows * 4, self.depth, P, P, C)}

    def pooled(self) -> Named:
        """Patches of one picture, and which of them become one token: four each."""
        made = {"pixel_values": self.noise(1, GRID ** 2, self.channels * self.patch ** 2),
                "image_token_pooling": torch.arange(GRID ** 2).reshape(-1, 4),
                "image_grids": torch.tensor([[GRID // 2, GRID // 2, 0, 0]]),
                "image_num_crops": torch.ones(1, dtype=torch.long)}
        return {name: value for name, value in made.items() if name in self.accepted}

    def beside(self, shape: tuple[int, ...], side: int) -> Iterator[Named]:
        """What goes with whole pictures: how large they were, what tiles they were cut into, which pixels or tiles
        count. What may be left out is left out last.
        """
        rows, last = self.rows, shape[-1]
        made = {
            "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(rows, 1, last, dtype=torch.long),
            "high_res_pixel_values": self.noise(*shape, self.channels, self.fine(), self.fine()),
            "qformer_input_ids": torch.randint(5, 60, (rows, FRAMES), generator=self.generator),
        }
        needed = {name: value for name, value in made.items() if name in self.accepted}
        sizes = {"image_sizes": torch.full((rows, 2), side)}
        masks = {"pixel_attention_mask": torch.ones(*shape, side, side, dtype=torch.long)}
        of_tiles = {"pixel_attention_mask": torch.ones(shape, dtype=torch.bool)}
        for optional in (sizes, masks, of_tiles):
            if set(optional) <= self.accepted:
                yield needed | optional
        yield needed

    def fine(self) -> int:
        """The side of a picture that is read a second time in more detail."""
        part = getattr(self.about.whole, "high_res_vision_config", None)
        return getattr(part, "image_size", self.side)

    def videos(self, name: str) -> Iterator[Named]:
        frames = self.about.number("num_frames", "frames_per_clip", default=FRAMES)
        yield {name: self.noise(self.rows, frames, self.channels, self.side, self.side)}
