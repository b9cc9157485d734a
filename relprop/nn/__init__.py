"""Drop-in modules: torch's and timm's, with their constructors, state dicts and outputs, that carry relevance back.

Each takes what the class of its name takes, and `composite`. In eval mode, in which they are built, relevance is
`x * x.grad` after a plain `.backward()`, and parameters get no gradient; in train mode they are the plain modules.

    >>> import torch
    >>> from relprop import nn
    >>> model = torch.nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.Linear(8, 1, bias=False))
    >>> x = torch.randn(1, 4, requires_grad=True)
    >>> value = model(x).sum()
    >>> value.backward()
    >>> torch.allclose((x * x.grad).sum(), value, atol=1e-5)
    True

Other parts of a model (a raw parameter, a plain `torch.nn.Linear`) keep their gradients and get theirs, which below a
drop-in is no gradient of the loss: freeze the model when it is explained. Rules that give relevance to entries that are
exactly zero (the z-box at black pixels) need `relprop.numerics.relevance_of(x, x.grad)` in place of the product.
`replace` makes drop-ins of all modules of a model that is there already, and gives them back.
"""

from .activation import (
    CELU,
    ELU,
    GELU,
    SELU,
    Hardshrink,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    LogSoftmax,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softmin,
    Softplus,
    Softshrink,
    Softsign,
    Tanh,
    Tanhshrink,
    Threshold,
)
from .affine import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear
from .attention import Attention, MultiheadAttention
from .embedding import Embedding
from .encoder import Block, EncoderBlock, TransformerDecoderLayer, TransformerEncoderLayer
from .norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm, LayerNorm, RMSNorm
from .operator import Add, MatMul, Mul
from .replacement import Replacement, replace
from .ruled import Ruled

__all__ = [
    "CELU", "ELU", "GELU", "SELU", "Add", "Attention", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Block",
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Embedding",
    "EncoderBlock", "GroupNorm", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LayerNorm", "LeakyReLU",
    "Linear", "LogSigmoid", "LogSoftmax", "MatMul", "Mish", "Mul", "MultiheadAttention", "RMSNorm", "ReLU", "ReLU6",
    "Replacement", "Ruled", "SiLU", "Sigmoid", "Softmax", "Softmin", "Softplus", "Softshrink", "Softsign", "Tanh",
    "Tanhshrink", "Threshold", "TransformerDecoderLayer", "TransformerEncoderLayer", "replace",
]
