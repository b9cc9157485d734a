"""Linear layers and convolutions: constructor, state dict and forward of torch's."""
from __future__ import annotations

import torch

from .ruled import Leaf, stands_for


@stands_for(torch.nn.Linear)
class Linear(Leaf, torch.nn.Linear):
    """`torch.nn.Linear` under the composite's rule for "linear"."""


@stands_for(torch.nn.Conv1d)
class Conv1d(Leaf, torch.nn.Conv1d):
    """`torch.nn.Conv1d` under the composite's rule for "conv"."""


@stands_for(torch.nn.Conv2d)
class Conv2d(Leaf, torch.nn.Conv2d):
    """`torch.nn.Conv2d` under the composite's rule for "conv"."""


@stands_for(torch.nn.Conv3d)
class Conv3d(Leaf, torch.nn.Conv3d):
    """`torch.nn.Conv3d` under the composite's rule for "conv"."""


@stands_for(torch.nn.ConvTranspose1d)
class ConvTranspose1d(Leaf, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` under the composite's rule for "conv"."""


@stands_for(torch.nn.ConvTranspose2d)
class ConvTranspose2d(Leaf, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` under the composite's rule for "conv"."""


@stands_for(torch.nn.ConvTranspose3d)
class ConvTranspose3d(Leaf, torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` under the composite's rule for "conv"."""
