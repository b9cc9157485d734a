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

from ..numerics import stabilize, widened
from .call import Call, Unary, dependent, wide
from .journal import BIAS, NORM
from .split import Split, difference, each, refilled


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


def finite(passed: Tensor, along: Tensor, size: Tensor, relevance: Tensor) -> Tensor:
    """What relevance changes by where x moves by a finite d, exactly: sum_j g_j (y(x + d) - y(x))_j.

    With u the relevance per unit of x under `held`, R = sum_i x_i u_i, and s the scale of x: the scale of x + d is
    rho s, rho = (1 + 2 c + e)^(-1/2), c = s^2 mean(x d), e = s^2 mean(d^2), and the change is

    rho sum_i d_i u_i + (rho - 1) R:

    the part that `held` passes, by the new scale, and what the new scale does to all that was there (x and d without
    their means where the norm takes these out). To first order in d it is `gradient`, sum_i d_i u_i - c R. A
    backward pass, which knows no d, passes the gradient on; relevance patching adds the rest, at the norms that read
    what a mediator writes (see `relprop.approximation`).

    Args: passed: sum_i d_i u_i. along: c. size: e. relevance: R. They broadcast; unit of R.
    """
    more = rescaled(along, size)
    return passed + more * (passed + relevance)


def rescaled(along: Tensor, size: Tensor) -> Tensor:
    """rho - 1 of `finite`, (1 + 2 c + e)^(-1/2) - 1, without cancellation where it is small."""
    least = torch.finfo(along.dtype).eps - 1  # what is under the root is positive, but for rounding
    return (-0.5 * (2 * along + size).clamp_min(least).log1p()).expm1()


PLAIN = (gradient, finite)
"""Rules that a backward pass runs as the plain gradient."""


class Held(Function):
    """LayerNorm with the standard deviation held, fused: less work than the backward of the real one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None,
                eps: float) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(rstd, weight)
        ctx.axes = len(shape)
        return wide(ctx, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        scale, weight = ctx.saved_tensors
        return held(g, weight, scale, centre=True, dims=range(-ctx.axes, 0)), None, None, None, None


class HeldScale(Function):
    """y = run(x) = (x - mean x) scale w + b for a scale that the caller has computed, of x in the shape `seen`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any, weight: Tensor | None, scale: Tensor, centre: bool,
                dims: tuple[int, ...], seen: torch.Size | None = None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.centre, ctx.dims, ctx.seen = centre, dims, x.shape if seen is None else seen
        return wide(ctx, run(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        g_x = held(g.reshape(ctx.seen), weight, scale, centre=ctx.centre, dims=ctx.dims).reshape(g.shape)
        return g_x, None, None, None, None, None, None


def unary(call: Call, x: Tensor, run: Any, bias: Tensor | None) -> Tensor:
    """A norm under any rule but `held`."""
    if call.rule in PLAIN:
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
    scale = torch.rsqrt(widened(input.detach()).square().mean(dims, keepdim=True) + eps)
    return HeldScale.apply(input, run, weight, scale, False, dims)


def group_norm(call: Call, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5, cudnn_enabled: bool = True) -> Tensor:
    """`F.group_norm`: the groups are normalised like the features of a LayerNorm."""
    def run(x: Tensor) -> Tensor:
        return call.func(x, num_groups, weight, bias, eps)

    if call.rule is not held:
        return unary(call, input, run, bias)
    per_channel = (1, num_groups, -1) + (1,) * (input.dim() - 2)
    grouped = input.detach().reshape(input.shape[0], num_groups, -1, *input.shape[2:])
    dims = tuple(range(2, grouped.dim()))
    scale = torch.rsqrt(widened(grouped).var(dims, unbiased=False, keepdim=True) + eps)
    gain = None if weight is None else weight.reshape(per_channel)
    y = HeldScale.apply(input, run, gain, scale, True, dims, grouped.shape)  # no view, which models may update in place
    if bias is not None:
        call.constant(bias.reshape(-1, *(1,) * (input.dim() - 2)), y, BIAS)
    return y


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

    if training or running_mean is None or call.rule not in (held, *PLAIN):
        return unary(call, input, run, bias)
    y = run(input)
    with torch.no_grad():
        at_zero = run(torch.zeros_like(input[:1]))
    call.constant(at_zero, y, BIAS)
    return y


def scale(call: Call, *args: Any, **kwargs: Any) -> Any:
    """A root, variance or norm computed by hand: a constant, as a norm's scale is, but under the rules of `PLAIN`."""
    if call.rule in PLAIN:
        inputs = [x for x in args[:1] if dependent(x)]
        return call.booked(NORM, inputs, lambda x: call.func(x, *args[1:], **kwargs))
    output = call.func(*args, **kwargs)
    return output.detach() if isinstance(output, Tensor) else type(output)(t.detach() for t in output)


def var_mean(call: Call, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`torch.var_mean`, `torch.std_mean`: the spread is held, the mean is linear."""
    spread, mean = call.func(*args, **kwargs)
    if call.rule in PLAIN:
        return call.booked(NORM, [args[0]], lambda x: call.func(x, *args[1:], **kwargs)[0]), mean
    return spread.detach(), mean


# -- forward ---------------------------------------------------------------------------------------------------------

def of_total(rel: Tensor, weight: Tensor | None, scale: Tensor, *, centre: bool, dims: Sequence[int]) -> Tensor:
    """rel -> (rel - mean rel) w scale with the scale of the total: each part is centred by its own mean (Hsu et al.
    2024, section 3). Linear in rel; the bias is shared by `share`.

    Args: rel: (S, ...). scale: 1 / std or 1 / rms of the total, broadcasts to it. dims: the normalised dimensions.
    """
    rel = (rel - rel.mean(tuple(dims), keepdim=True)).mul_(scale) if centre else rel * scale
    return rel if weight is None else rel.mul_(weight)


def by_difference(rel: Tensor, weight: Tensor | None, scale: Tensor, *, centre: bool, dims: Sequence[int]) -> Tensor:
    """Marker: rel = f(x) - f(x - rel), with the scale that the irrelevant part has by itself."""
    raise NotImplementedError("the machine runs this rule as a difference")


def _shifted(call: Split, rel: Tensor, input: Tensor, image: Tensor, bias: Tensor | None) -> Tensor:
    """The image of rel with its share of the bias, by the sizes that the parts had before the norm."""
    return image if bias is None else image.add_(call.constant(rel, input, bias))


def split_layer_norm(call: Split, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                     bias: Tensor | None = None, eps: float = 1e-5, *rest: Any) -> Tensor:
    """`F.layer_norm`, forward."""
    rel = call.rel(input)
    if call.rule is by_difference:
        return difference(call, input, normalized_shape, weight, bias, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    _, _, scale = torch.native_layer_norm(input, list(normalized_shape), None, None, eps)
    return _shifted(call, rel, input, call.rule(rel, weight, scale, centre=True, dims=dims), bias)


def split_rms_norm(call: Split, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                   eps: float | None = None) -> Tensor:
    """`F.rms_norm`, forward."""
    if call.rule is by_difference:
        return difference(call, input, normalized_shape, weight, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = torch.rsqrt(input.square().mean(dims, keepdim=True) + eps)
    return call.rule(call.rel(input), weight, scale, centre=False, dims=dims)


def split_group_norm(call: Split, input: Tensor, num_groups: int, weight: Tensor | None = None,
                     bias: Tensor | None = None, eps: float = 1e-5, *rest: Any) -> Tensor:
    """`F.group_norm`, forward."""
    rel = call.rel(input)
    if call.rule is by_difference:
        return difference(call, input, num_groups, weight, bias, eps)
    grouped = input.unflatten(1, (num_groups, -1))
    scale = torch.rsqrt(grouped.flatten(2).var(-1, unbiased=False) + eps).reshape(*grouped.shape[:2],
                                                                                *(1,) * (grouped.dim() - 2))
    part = call.rule(rel.unflatten(2, (num_groups, -1)), None, scale, centre=True, dims=range(3, rel.dim() + 1))
    part = part.reshape(rel.shape)
    per_channel = (-1,) + (1,) * (input.dim() - 2)
    part = part if weight is None else part * weight.reshape(per_channel)
    return _shifted(call, rel, input, part, None if bias is None else bias.reshape(per_channel))


def split_batch_norm(call: Split, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.batch_norm` in eval mode, forward: y = x a + c per channel, c shared as a bias."""
    at_zero = call.func(torch.zeros_like(input[:1]), *args, **kwargs)
    rel = each(lambda part: call.func(part, *args, **kwargs) - at_zero, call.rel(input))
    return rel + call.constant(rel, call.output - at_zero, at_zero)


def split_scale(call: Split, *args: Any, **kwargs: Any) -> Any:
    """A root, variance or norm computed by hand, forward: of the total, as a norm's scale is, so not split."""
    return difference(call, *args, **kwargs) if call.rule is by_difference else None


def split_var_mean(call: Split, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor]:
    """`torch.var_mean`, forward: the spread is of the total, the mean is linear."""
    if call.rule is by_difference:
        return tuple(difference(call, *args, **kwargs))
    return None, refilled(args, kwargs, call.rel, lambda *a, **k: call.func(*a, **k)[1])
