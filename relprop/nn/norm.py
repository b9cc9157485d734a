"""Norms: constructor, state dict and forward of torch's."""
from __future__ import annotations

import torch

from .ruled import Leaf, stands_for


@stands_for(torch.nn.LayerNorm)
class LayerNorm(Leaf, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` under the composite's rule for "norm"."""


@stands_for(torch.nn.RMSNorm)
class RMSNorm(Leaf, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` under the composite's rule for "norm"."""


@stands_for(torch.nn.GroupNorm)
class GroupNorm(Leaf, torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` under the composite's rule for "norm"."""


@stands_for(torch.nn.BatchNorm1d)
class BatchNorm1d(Leaf, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, in eval mode a map of constant slope, under the composite's rule for "norm"."""


@stands_for(torch.nn.BatchNorm2d)
class BatchNorm2d(Leaf, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, in eval mode a map of constant slope, under the composite's rule for "norm"."""


@stands_for(torch.nn.BatchNorm3d)
class BatchNorm3d(Leaf, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, in eval mode a map of constant slope, under the composite's rule for "norm"."""
