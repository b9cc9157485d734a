"""Normalisation: LayerNorm, RMSNorm, GroupNorm, BatchNorm, and the scales that a model computes by hand.

With the scale held constant (Ali et al. 2022, "LN-rule"; Achtibat et al. 2024, section 3.3) a norm is linear: the mean
subtraction and the weight pass relevance as any linear map, and only the bias absorbs. A model that writes its norm
with pow, mean and rsqrt is covered by the same rule: the root is the scale, and it is held.

References: Ali et al. 2022 (XAI for transformers: better explanations through conservative propagation),
Chefer et al. 2021 (Transformer interpretability beyond attention visualization), Shrikumar et al. 2016 (Not just a
black box).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..numerics import stabilize
from .call import Call, Unary, dependent
from .journal import BIAS, NORM


def held(g: Tensor, weight: Tensor | None, scale: Tensor, *, centre: bool, dims: Sequence[int]) -> Tensor:
    """Relevance per unit of x where y = (x - mean x) scale w + b and `scale` is a constant (Ali et al. 2022, eq. 8).

    R_i = x_i sum_j (delta_ij - 1 / n) w_j scale R_j / y_j, that is
    g_x = scale (g w - mean(g w)), without the mean where nothing is centred. Conserves up to the bias.

    Args: g: per unit of y. weight: broadcasts to y, or None. scale: 1 / std or 1 / rms, broadcasts to y. dims: the
        normalised dimensions.
    """
    if weight is None:
        g = g - g.mean(tuple(dims), keepdim=True) if centre else g
        return g * scale
    g = g * weight
    if centre:
        g.sub_(g.mean(tuple(dims), keepdim=True))
    return g.mul_(scale)


def identity(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Relevance passes entry by entry: R_x = R_y (Chefer et al. 2021, section 3.1, for every unary op).

    Strictly conservative except where x is exactly zero. Unlike `held` it ignores that the mean mixes the features.
    """
    return (y * g).div_(stabilize(x))


def gradient(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Marker: the plain gradient, R_i = x_i sum_j (dy_j / dx_i) R_j / y_j, whose part through the scale cancels most of
    x's relevance (gradient x input, Shrikumar et al. 2016; Ali et al. 2022, section 3.2). Not conservative.
    """
    raise NotImplementedError("the machine runs this rule as the plain gradient")


class Held(Function):
    """LayerNorm with the standard deviation held, fused: less work than the backward of the real one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None,
                eps: float) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(rstd, weight)
        ctx.axes = len(shape)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        scale, weight = ctx.saved_tensors
        return held(g, weight, scale, centre=True, dims=range(-ctx.axes, 0)), None, None, None, None


class HeldScale(Function):
    """y = run(x) = (x - mean x) scale w + b for a scale that the caller has computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any, weight: Tensor | None, scale: Tensor, centre: bool,
                dims: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.centre, ctx.dims = centre, dims
        return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        return held(g, weight, scale, centre=ctx.centre, dims=ctx.dims), None, None, None, None, None


def unary(call: Call, x: Tensor, run: Any, bias: Tensor | None) -> Tensor:
    """A norm under any rule but `held`."""
    if call.rule is gradient:
        return call.booked(NORM, [x], run)
    return Unary.apply(x, run, call.rule, call.journal, NORM)


def layer_norm(call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:
    """`F.layer_norm`."""
    if call.rule is not held:
        return unary(call, input, lambda x: call.func(x, normalized_shape, weight, bias, eps), bias)
    y = Held.apply(input, list(normalized_shape), weight, bias, eps)
    if bias is not None:
        call.constant(bias, y, BIAS)
    return y


def rms_norm(call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
             eps: float | None = None) -> Tensor:
    """`F.rms_norm`."""
    def run(x: Tensor) -> Tensor:
        return call.func(x, normalized_shape, weight, eps)

    if call.rule is not held:
        return unary(call, input, run, None)
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = torch.rsqrt(input.detach().square().mean(dims, keepdim=True) + eps)
    return HeldScale.apply(input, run, weight, scale, False, dims)


def group_norm(call: Call, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5, cudnn_enabled: bool = True) -> Tensor:
    """`F.group_norm`: the groups are normalised like the features of a LayerNorm."""
    def run(x: Tensor) -> Tensor:
        return call.func(x, num_groups, weight, bias, eps)

    if call.rule is not held:
        return unary(call, input, run, bias)
    per_channel = (1, num_groups, -1) + (1,) * (input.dim() - 2)
    grouped = input.reshape(input.shape[0], num_groups, -1, *input.shape[2:])
    dims = tuple(range(2, grouped.dim()))
    scale = torch.rsqrt(grouped.detach().var(dims, unbiased=False, keepdim=True) + eps)
    gain = None if weight is None else weight.reshape(per_channel)
    shift = 0 if bias is None else bias.reshape(per_channel)

    def run_grouped(x: Tensor) -> Tensor:
        return call.func(x.reshape(input.shape), num_groups, weight, bias, eps).reshape(x.shape)

    y = HeldScale.apply(grouped, run_grouped, gain, scale, True, dims)
    if bias is not None:
        call.constant(shift, y, BIAS)
    return y.reshape(input.shape)


def instance_norm(call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
                  running_var: Tensor | None, use_input_stats: bool, momentum: float, eps: float,
                  cudnn_enabled: bool) -> Tensor:
    """`torch.instance_norm`: a GroupNorm of one channel a group or, with running statistics, a BatchNorm."""
    if use_input_stats:
        return call.retrace(lambda: torch.group_norm(input, input.shape[1], weight, bias, eps, cudnn_enabled))
    return call.retrace(lambda: torch.batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps,
                                                 cudnn_enabled))


def batch_norm(call: Call, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
               weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
               *options: Any, **more: Any) -> Tensor:
    """`F.batch_norm` in eval mode: y = x a + c per channel, where c = b - mean a absorbs."""
    def run(x: Tensor) -> Tensor:
        return call.func(x, running_mean, running_var, weight, bias, training, *options, **more)

    if training or running_mean is None or call.rule not in (held, gradient):
        return unary(call, input, run, bias)
    y = run(input)
    with torch.no_grad():
        at_zero = run(torch.zeros_like(input[:1]))
    call.constant(at_zero, y, BIAS)
    return y


def scale(call: Call, *args: Any, **kwargs: Any) -> Any:
    """A root, variance or norm computed by hand: a constant under every rule but `gradient`, as a norm's scale is."""
    if call.rule is gradient:
        inputs = [x for x in args[:1] if dependent(x)]
        return call.booked(NORM, inputs, lambda x: call.func(x, *args[1:], **kwargs))
    output = call.func(*args, **kwargs)
    return output.detach() if isinstance(output, Tensor) else type(output)(t.detach() for t in output)


def var_mean(call: Call, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`torch.var_mean`, `torch.std_mean`: the spread is held, the mean is linear."""
    spread, mean = call.func(*args, **kwargs)
    if call.rule is gradient:
        return call.booked(NORM, [args[0]], lambda x: call.func(x, *args[1:], **kwargs)[0]), mean
    return spread.detach(), mean
