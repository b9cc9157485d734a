"""Convolutions of one, two and three dimensions, under the rules of `linear`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .linear import Affine, image, run_affine
from .split import Split, difference


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _padding(padding: int | Sequence[int] | str, weight: Tensor, dilation: list[int]) -> list[int] | None:
    """Padding as numbers; None for "same" with an even kernel, which pads the two sides unequally."""
    if not isinstance(padding, str):
        return _each(padding, len(dilation))
    if padding == "valid":
        return [0] * len(dilation)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


def _adjoint(product: Callable[[Tensor], Tensor], input: Tensor, s: Tensor) -> Tensor:
    """The adjoint of the linear map `product` of tensors like `input`, applied to s.

    Out of sight of an interception, which may last into the backward pass and would take the product for the model's.
    """
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        x = torch.zeros_like(input).requires_grad_()
        return torch.autograd.grad(product(x), x, s)[0]


def conv(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Sequence[int] = 1,
         padding: int | Sequence[int] | str = 0, dilation: int | Sequence[int] = 1, groups: int = 1) -> Tensor:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`."""
    axes = weight.dim() - 2
    stride, dilation = _each(stride, axes), _each(dilation, axes)
    pad = _padding(padding, weight, dilation)

    def product(x: Tensor, W: Tensor) -> Tensor:
        return call.func(x, W, None, stride, padding, dilation, groups)

    def transpose(s: Tensor, W: Tensor) -> Tensor:
        if pad is None:
            return _adjoint(lambda x: product(x, W), input, s)
        return torch.ops.aten.convolution_backward(s, input, W, None, stride, pad, dilation, False, [0] * axes, groups,
                                                   [True, False, False])[0]

    per_channel = None if bias is None else bias.reshape(-1, *[1] * axes)
    affine = Affine(product, transpose, weight, per_channel)
    return run_affine(call, input, lambda x: call.func(x, weight, bias, stride, padding, dilation, groups), affine)


def conv_transpose(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None,
                   stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
                   output_padding: int | Sequence[int] = 0, groups: int = 1,
                   dilation: int | Sequence[int] = 1) -> Tensor:
    """`F.conv_transpose1d`, `F.conv_transpose2d`, `F.conv_transpose3d`."""
    options = (stride, padding, output_padding, groups, dilation)

    def product(x: Tensor, W: Tensor) -> Tensor:
        return call.func(x, W, None, *options)

    def transpose(s: Tensor, W: Tensor) -> Tensor:
        return _adjoint(lambda x: product(x, W), input, s)

    per_channel = None if bias is None else bias.reshape(-1, *[1] * (weight.dim() - 2))
    affine = Affine(product, transpose, weight, per_channel)
    return run_affine(call, input, lambda x: call.func(x, weight, bias, *options), affine)


def split_conv(call: Split, input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any,
               **more: Any) -> Tensor:
    """`F.conv1d`, `F.conv2d`, `F.conv_transpose2d` ..., forward, with the sources among the rows of the batch."""
    rel = call.rel(input)
    if rel is None or call.rel(weight) is not None or call.rel(bias) is not None:
        return difference(call, input, weight, bias, *options, **more)

    def product(x: Tensor) -> Tensor:
        if x.dim() < weight.dim() + 1:  # a picture without a batch
            return call.func(x, weight, None, *options, **more)
        return call.func(x.flatten(0, 1), weight, None, *options, **more).unflatten(0, x.shape[:2])

    return image(call, rel, product, None if bias is None else bias.reshape(-1, *[1] * (weight.dim() - 2)))
