"""Inputs that say nothing: the token, colour or blur that stands where a unit is taken out.

There is no input without content. Each choice here is one the model may have met: its own mask token, the colour most
of the picture has, the picture without detail. Reports name the choice, since areas of different choices do not
compare.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = ("mask", "unk", "pad", "eos")  # tried in this order
PICTURES = ("median", "mean", "zero", "blur")  # the first is the default
BLUR = 8  # a blur's standard deviation is this part of the picture's shorter side


def token(tokenizer: object, choice: str | int | None = None) -> tuple[int, str]:
    """Id and name of the token that stands for "no word".

    Args: tokenizer: of transformers. choice: one of `TOKENS`, a token id, or None for the first of `TOKENS` that there
        is: a mask token was trained to mean "some word", the others are the nearest thing a language model has.
    Raises: ValueError for an unknown choice and for a tokenizer without that token.
    """
    if isinstance(choice, int) and not isinstance(choice, bool):
        return choice, f"token {choice}"
    if choice is not None and choice not in TOKENS:
        raise ValueError(f"no baseline {choice!r} for text; there are {', '.join(TOKENS)}, delete, and any token id")
    for kind in TOKENS if choice is None else (choice,):
        found = getattr(tokenizer, f"{kind}_token_id", None)
        if found is not None:
            return int(found), f"{kind} token"
    owner = "without a tokenizer there is" if tokenizer is None else f"{type(tokenizer).__name__} has"
    raise ValueError(f"{owner} no {choice or ' / '.join(TOKENS)} token; give the id of a token as the baseline")


def picture(pixels: Tensor, choice: str | None = None) -> tuple[Tensor, str]:
    """What stands where a part of each picture is taken out, and its name.

    Args: pixels: as the model sees them, (B, C, Y, X). choice: one of `PICTURES` or None for "median": each picture's
        own median colour. It is the ground of a drawing, where the mean would be a grey that occurs nowhere, and near
        the mean on photographs, where a blur would leave the large shapes in place. "zero" is the mean colour of the
        training images, for a model that normalises; "blur" a Gaussian of an eighth of the shorter side.
    Returns: (B, C, 1, 1) or, for "blur", (B, C, Y, X).
    Raises: ValueError for an unknown choice.
    """
    choice = PICTURES[0] if choice is None else choice
    if choice not in PICTURES:
        raise ValueError(f"no baseline {choice!r} for images; there are {', '.join(PICTURES)}")
    flat = pixels.flatten(2)  # (B, C, Y X)
    if choice == "median":
        return flat.median(-1).values[..., None, None], "median colour"
    if choice == "mean":
        return flat.mean(-1)[..., None, None], "mean colour"
    if choice == "zero":
        return torch.zeros_like(pixels[:, :, :1, :1]), "zero (mean colour of training)"
    return _blurred(pixels), "blurred picture"


def _blurred(pixels: Tensor) -> Tensor:
    """The pictures under a Gaussian, (B, C, Y, X); beyond the edge the picture is mirrored."""
    sigma = min(pixels.shape[-2:]) / BLUR
    reach = min(round(3 * sigma), min(pixels.shape[-2:]) - 1)  # a mirror is no longer than the picture
    x = torch.arange(-reach, reach + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-x**2 / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    single = F.pad(pixels.flatten(0, 1)[:, None], (reach,) * 4, mode="reflect")  # (B C, 1, Y + 2 reach, X + 2 reach)
    return F.conv2d(F.conv2d(single, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).view_as(pixels)
