"""Activations and softmax: constructor and forward of torch's."""
from __future__ import annotations

import torch

from .ruled import Leaf, stands_for


@stands_for(torch.nn.ReLU)
class ReLU(Leaf, torch.nn.ReLU):
    """`torch.nn.ReLU` under the composite's rule for "activation"."""


@stands_for(torch.nn.ReLU6)
class ReLU6(Leaf, torch.nn.ReLU6):
    """`torch.nn.ReLU6` under the composite's rule for "activation"."""


@stands_for(torch.nn.LeakyReLU)
class LeakyReLU(Leaf, torch.nn.LeakyReLU):
    """`torch.nn.LeakyReLU` under the composite's rule for "activation"."""


@stands_for(torch.nn.ELU)
class ELU(Leaf, torch.nn.ELU):
    """`torch.nn.ELU` under the composite's rule for "activation"."""


@stands_for(torch.nn.SELU)
class SELU(Leaf, torch.nn.SELU):
    """`torch.nn.SELU` under the composite's rule for "activation"."""


@stands_for(torch.nn.CELU)
class CELU(Leaf, torch.nn.CELU):
    """`torch.nn.CELU` under the composite's rule for "activation"."""


@stands_for(torch.nn.GELU)
class GELU(Leaf, torch.nn.GELU):
    """`torch.nn.GELU` under the composite's rule for "activation"."""


@stands_for(torch.nn.SiLU)
class SiLU(Leaf, torch.nn.SiLU):
    """`torch.nn.SiLU` under the composite's rule for "activation"."""


@stands_for(torch.nn.Mish)
class Mish(Leaf, torch.nn.Mish):
    """`torch.nn.Mish` under the composite's rule for "activation"."""


@stands_for(torch.nn.Hardswish)
class Hardswish(Leaf, torch.nn.Hardswish):
    """`torch.nn.Hardswish` under the composite's rule for "activation"."""


@stands_for(torch.nn.Tanh)
class Tanh(Leaf, torch.nn.Tanh):
    """`torch.nn.Tanh` under the composite's rule for "activation"."""


@stands_for(torch.nn.Hardtanh)
class Hardtanh(Leaf, torch.nn.Hardtanh):
    """`torch.nn.Hardtanh` under the composite's rule for "activation"."""


@stands_for(torch.nn.Tanhshrink)
class Tanhshrink(Leaf, torch.nn.Tanhshrink):
    """`torch.nn.Tanhshrink` under the composite's rule for "activation"."""


@stands_for(torch.nn.Softsign)
class Softsign(Leaf, torch.nn.Softsign):
    """`torch.nn.Softsign` under the composite's rule for "activation"."""


@stands_for(torch.nn.Sigmoid)
class Sigmoid(Leaf, torch.nn.Sigmoid):
    """`torch.nn.Sigmoid` under the composite's rule for "activation"."""


@stands_for(torch.nn.Hardsigmoid)
class Hardsigmoid(Leaf, torch.nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid` under the composite's rule for "activation"."""


@stands_for(torch.nn.LogSigmoid)
class LogSigmoid(Leaf, torch.nn.LogSigmoid):
    """`torch.nn.LogSigmoid` under the composite's rule for "activation"."""


@stands_for(torch.nn.Softplus)
class Softplus(Leaf, torch.nn.Softplus):
    """`torch.nn.Softplus` under the composite's rule for "activation"."""


@stands_for(torch.nn.Softshrink)
class Softshrink(Leaf, torch.nn.Softshrink):
    """`torch.nn.Softshrink` under the composite's rule for "activation"."""


@stands_for(torch.nn.Hardshrink)
class Hardshrink(Leaf, torch.nn.Hardshrink):
    """`torch.nn.Hardshrink` under the composite's rule for "activation"."""


@stands_for(torch.nn.Threshold)
class Threshold(Leaf, torch.nn.Threshold):
    """`torch.nn.Threshold` under the composite's rule for "activation"."""


@stands_for(torch.nn.Softmax)
class Softmax(Leaf, torch.nn.Softmax):
    """`torch.nn.Softmax` under the composite's rule for "softmax"."""


@stands_for(torch.nn.LogSoftmax)
class LogSoftmax(Leaf, torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax` under the composite's rule for "softmax"."""


@stands_for(torch.nn.Softmin)
class Softmin(Leaf, torch.nn.Softmin):
    """`torch.nn.Softmin` under the composite's rule for "softmax"."""
