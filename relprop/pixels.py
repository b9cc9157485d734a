"""From pictures to the numbers a model takes, and back to what it saw."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# 8 bits, so that it is clear how to convert them
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class Reordered(ValueError):
    """An image processor makes patches or tiles of a picture, and not pixels (C, Y, X)."""


@dataclass(frozen=True)
class Pixels:
    """A model's own preparation of pictures: x = (p - mean) / std with p in 0 to 1, after `transform` has resized.

    `transform` makes the normalised tensor (C, Y, X) of a picture in mode RGB, or L for one channel; None where it is
    not known, so that only tensors can be given. `size` is the (Y, X) a model is bound to, None if it takes any.
    """

    channels: int = 3
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    transform: Callable[[Image], Tensor] | None = None

    def read(self, pictures: Sequence[object]) -> Tensor:
        """Pictures (paths, PIL images, arrays (Y, X), (Y, X, 3) or (Y, X, 4)) as normalised pixels (B, C, Y, X).

        Raises: ValueError for a picture that cannot be read or whose channels are not clear, `Reordered` if they become
            patches or tiles; TypeError for no picture.
        """
        if self.transform is None:
            raise ValueError("how this model prepares pictures is not known, as no image processor came with it; "
                             "give one to load(..., processor), or give normalised pixels as a tensor (B, C, Y, X)")
        return torch.stack([self.transform(self._converted(picture(one))) for one in pictures])

    def check(self, pixels: Tensor) -> Tensor:
        """Normalised pixels as they came, a batch axis added if there is none.

        Raises: TypeError for pixels that are not floating, ValueError for another number of channels or another size.
        """
        if not pixels.is_floating_point():
            raise TypeError(f"a tensor is taken as normalised pixels, so it is floating, not {pixels.dtype}; "
                            "give pictures of 0 to 255 as a numpy array (Y, X, 3) or as a PIL image")
        pixels = pixels[None] if pixels.dim() == 3 else pixels
        Y, X = self.size or ("Y", "X")
        fits = pixels.dim() == 4 and pixels.shape[1] == self.channels and self.size in (None, tuple(pixels.shape[2:]))
        if not fits:
            raise ValueError(f"pixels of shape {tuple(pixels.shape)}, expected (B, {self.channels}, {Y}, {X}); "
                             "give a PIL image or a path, which are resized and normalised for the model")
        return pixels

    def shown(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, Y, X) before normalisation, as images uint8 (B, Y, X, 3).

        Without a known mean, each image is stretched from its least to its largest value.
        """
        pixels = pixels.detach().float().cpu()
        if self.mean is None:
            low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
            pixels = (pixels - low) / (high - low).clamp_min(1e-12)
        else:
            mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
            pixels = pixels * std + mean
        if pixels.shape[1] != 3:
            pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _converted(self, image: Image) -> Image:
        if self.channels not in (1, 3):
            raise ValueError(f"the model takes {self.channels} channels, a picture has 1 or 3; give a tensor of pixels")
        return image.convert("L" if self.channels == 1 else "RGB")


def plain(channels: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """The usual preparation: the shorter side resized, the centre cut out, normalised."""
    mean, std = (tuple(map(float, values)) for values in (mean, std))
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise ValueError(f"mean and std must have {channels} entries, std positive, not {list(mean)} and {list(std)}")

    def transform(image: Image) -> Tensor:
        import numpy as np
        from PIL import Image, ImageOps

        if image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], method=Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image, dtype="float32") / 255).reshape(*size, channels).permute(2, 0, 1)
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    return Pixels(channels, size, mean, std, transform)


def squeezed(pixels: Pixels) -> Pixels:
    """The same preparation, but that a picture is resized whole to the model's size, whatever its shape, and not cut.

    Raises: ValueError for a model that is bound to no size, or whose mean and standard deviation are not known.
    """
    if pixels.size is None or pixels.mean is None:
        raise ValueError("pictures are resized whole for models that are bound to one size and whose mean and standard "
                         "deviation are known; prepare the pixels and give them as a tensor")
    size, mean, std = pixels.size, torch.tensor(pixels.mean), torch.tensor(pixels.std)

    def transform(image: Image) -> Tensor:
        import numpy as np
        from PIL import Image

        image = image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)
        levels = torch.from_numpy(np.array(image, dtype="float32") / 255).reshape(*size, pixels.channels)
        return ((levels - mean) / std).permute(2, 0, 1)

    return replace(pixels, transform=transform)


def from_processor(processor: object, channels: int, size: tuple[int, int] | None) -> Pixels:
    """The preparation of a transformers image processor.

    Raises: ValueError if it normalises another number of channels than the model takes.
    """
    known = {name: getattr(processor, name, None) for name in ("do_rescale", "rescale_factor", "do_normalize")}
    unit = 255 * known["rescale_factor"] if known["do_rescale"] else 255  # what white is before normalisation
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if not known["do_normalize"] or mean is None:
        mean, std = [0.0] * channels, [1.0] * channels
    if len(mean) != channels:
        many = f"the image processor normalises {len(mean)} channels, the model takes {channels}"
        raise ValueError(f"{many}; give the one that belongs to it")

    def transform(image: Image) -> Tensor:
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        if pixels.dim() != 4 or len(pixels) != 1:
            raise Reordered(f"the image processor makes {tuple(pixels.shape)} of one picture, expected (1, C, Y, X); "
                            "prepare the pixels and give them as a tensor")
        return pixels[0]

    mean, std = (tuple(float(value) / unit for value in values) for values in (mean, std))
    return Pixels(channels, size, mean, std, transform)


def from_timm(config: dict, channels: int, size: tuple[int, int] | None) -> Pixels:
    """The preparation that timm evaluates with; `config` is what `timm.data.resolve_model_data_config` gives."""
    from timm.data import create_transform

    mean, std = (tuple(config[name]) for name in ("mean", "std"))
    if len(mean) != channels:  # a model made with other channels than its weights': timm averages too
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    input_size = (channels, *(size or config["input_size"][1:]))
    transform = create_transform(**{**config, "mean": mean, "std": std, "input_size": input_size}, is_training=False)
    return Pixels(channels, size, mean, std, transform)


def picture(value: object) -> Image:
    """A picture from a path, a PIL image, or a numpy array: (Y, X), (Y, X, 1), (Y, X, 3) or (Y, X, 4), uint8 or 0 to 1.

    Raises: ValueError for a file that is no picture, or an array or mode whose channels or range are not clear.
    """
    from PIL import Image, ImageOps

    if isinstance(value, (str, Path)):
        if not Path(value).is_file():
            raise ValueError(f"no picture at {str(value)!r}; "
                             "an image model takes a path, a PIL image, an array or a tensor")
        path = str(value)
        try:
            value = Image.open(path)
            value.load()
        except Exception as cause:  # Pillow raises what its decoders do: OSError, SyntaxError, EOFError ...
            raise ValueError(f"{path!r} is no picture that Pillow reads ({type(cause).__name__}: {cause})") from cause
    if isinstance(value, Image.Image):
        if value.mode not in PLAIN_MODES:
            raise ValueError(f"a picture of mode {value.mode!r} has more than 8 bits; which values are black and white "
                             "is open, so convert it to 'L' or 'RGB'")
        return ImageOps.exif_transpose(value)
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        return _from_array(value)
    raise TypeError(f"an image model takes a path, a PIL image, a numpy array or a tensor, not {type(value).__name__}")


def _from_array(array: object) -> Image:
    import numpy as np
    from PIL import Image

    plane = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if not (plane.ndim == 2 or plane.ndim == 3 and plane.shape[2] in (3, 4)) or not plane.size:
        raise ValueError(f"an array of shape {array.shape} is no picture; "
                         "expected (Y, X), (Y, X, 1), (Y, X, 3) or (Y, X, 4)")
    if np.issubdtype(plane.dtype, np.floating):
        if not np.isfinite(plane).all():
            raise ValueError("the picture has NaN or infinite values; replace them")
        if plane.min() < 0 or plane.max() > 1:
            found = f"{plane.min():.3g} to {plane.max():.3g}"
            raise ValueError(f"a floating picture has values in 0 to 1, this one {found}; "
                             "rescale it, or give normalised pixels as a tensor (B, C, Y, X)")
        plane = (plane * 255).round().astype(np.uint8)
    if plane.dtype != np.uint8:
        raise ValueError(f"a picture of {plane.dtype} is not clear; expected uint8, or floating in 0 to 1")
    return Image.fromarray(np.ascontiguousarray(plane))
