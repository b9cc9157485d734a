"""The table: which torch function is which kind of op, and what runs it under a rule.

`register` adds a function of one's own. Names are looked up in every namespace that exports them, so that `torch.add`,
`Tensor.add`, `Tensor.__add__` and `Tensor.add_` are one op.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from . import (
    activation,
    add,
    attention,
    conv,
    embedding,
    grouped,
    linear,
    matmul,
    move,
    mul,
    norm,
    opaque,
    pool,
    recurrent,
    softmax,
    solve,
)
from .call import plain
from .split import difference
from .split import moved as split_moved

Run = Callable[..., Any]

KINDS = ("linear", "conv", "norm", "softmax", "activation", "matmul", "attention", "add", "mul", "embedding", "pool",
         "move")


@dataclass(frozen=True)
class Op:
    """A row of the table: the kind of op, and the function that runs a `Call` of it under its rule.

    `inplace` is the out-of-place sibling of a function that writes into its first argument. `split` runs a `Split` of
    it, forward; where it is `run` itself, the function only makes other calls, which are split in its place.
    """

    kind: str
    run: Run
    inplace: Callable[..., Any] | None = None
    split: Run = difference


_NAMESPACES = (torch, torch.Tensor, F, torch.special, torch.linalg, torch.fft, torch._C._nn)
_TABLE: dict[Any, Op] = {}

_MOVE = """view reshape view_as reshape_as permute transpose transpose_ swapaxes swapdims movedim moveaxis t T mT H mH
    adjoint contiguous expand expand_as squeeze squeeze_ unsqueeze unsqueeze_ flatten unflatten ravel repeat tile
    repeat_interleave split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unbind hsplit vsplit narrow
    select __getitem__ index_select gather take take_along_dim masked_select roll flip fliplr flipud rot90 unfold fold
    im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle broadcast_to broadcast_tensors meshgrid diagonal diag
    diag_embed tril triu clone to type type_as float double half bfloat16 cpu cuda detach detach_ alias as_strided
    cat concat concatenate stack hstack vstack dstack column_stack where masked_fill masked_fill_ masked_scatter
    index_put index_put_ __setitem__ index_copy index_copy_ index_add index_add_ index_fill scatter scatter_ scatter_add
    scatter_add_ scatter_reduce copy_ fill_ zero_ slice_scatter select_scatter pad dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout dropout_ neg __neg__ neg_ negative positive __pos__ real conj resolve_conj
    resolve_neg requires_grad_ retain_grad register_hook max min amax amin maximum minimum fmax fmin topk sort msort
    kthvalue median mode cummax cummin one_hot new_tensor nan_to_num nan_to_num_ view_as_real view_as_complex
    __deepcopy__ set_ set_data data grad backward
    """
_WRITTEN = """__setitem__ masked_fill_ masked_scatter_ index_put_ index_copy_ index_add_ index_fill_ scatter_
    scatter_add_ copy_ fill_"""
_POOL = """mean sum cumsum logcumsumexp nanmean nansum trace avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    upsample_bilinear2d upsample_nearest2d upsample_bicubic2d upsample_linear1d upsample_nearest1d upsample_trilinear3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sample grid_sampler _adaptive_avg_pool2d
    _adaptive_avg_pool3d unfold"""
_FOURIER = """fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 hfft2 ihfft2 fftn ifftn rfftn irfftn hfftn ihfftn
    fftshift ifftshift"""
"""Linear with constant weights; relevance of a complex number is that of its two parts."""
_ACTIVATION = """relu relu6 gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid leaky_relu elu selu celu
    softplus softsign tanhshrink softshrink hardshrink logsigmoid log_sigmoid threshold exp exp2 expm1 log log2 log10
    log1p sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv abs absolute __abs__ sign sgn clamp
    clip clamp_min clamp_max pow __pow__ square float_power ceil floor round trunc frac digamma lgamma expit sinc
    rrelu logit xlogy softplus"""
_SCALE = "sqrt rsqrt reciprocal var std norm vector_norm matrix_norm hypot logsumexp cdist pairwise_distance"


def _functions(name: str) -> Iterable[Any]:
    for namespace in _NAMESPACES:
        function = namespace.__dict__.get(name) if namespace is torch.Tensor else getattr(namespace, name, None)
        function = getattr(namespace, name, None) if function is None else function
        if callable(function) and not isinstance(function, type):
            yield function
        elif hasattr(function, "__get__"):  # a property, such as Tensor.T, is seen as its getter
            yield function.__get__


def register(function: Callable[..., Any], kind: str, run: Run | None = None, split: Run | None = None) -> None:
    """Add a torch function to the table, or replace its row.

    Args: function: as the model calls it. kind: one of `KINDS`. run: what runs it, `run(call, *args, **kwargs)`; by
        default the call as it is, its plain gradient being its rule, as is right for data movement. split: what splits
        it, forward, as of `ops.split`; by default what its total does, its relevant part does, or, where `run` is
        given, f(x) - f(x - rel).
    Raises: ValueError for an unknown kind, TypeError if `function` cannot be called.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of op {kind!r}; the kinds are {', '.join(KINDS)}")
    if not callable(function):
        raise TypeError(f"expected a torch function, got {type(function).__name__}")
    if split is None:
        split = move.split_move if run is None else difference
    _TABLE[function] = Op(kind, plain if run is None else run, split=split)


def lookup(function: Callable[..., Any]) -> Op | None:
    """The row of a torch function, None if it has none."""
    return _TABLE.get(function)


def _fill(names: str, kind: str, run: Run, split: Run) -> None:
    for name in names.split():
        for function in _functions(name):
            _TABLE.setdefault(function, Op(kind, run, split=split))


def _fill_inplace(names: str, kind: str, run: Run, split: Run) -> None:
    """Rows of `name_` and `__iname__`, which write into their first argument."""
    for name in names.split():
        sibling = next(iter(_functions(name)), None)
        for written in (f"{name}_", f"__i{name}__", f"__i{_OPERATORS.get(name, name)}__"):
            for function in _functions(written):
                _TABLE.setdefault(function, Op(kind, run, sibling, split))


_OPERATORS = {"div": "truediv", "divide": "truediv", "matmul": "matmul"}

_fill("linear", "linear", opaque.linear, linear.split_linear)
_fill("addmm", "linear", linear.addmm, linear.split_addmm)
_fill("grouped_mm _grouped_mm", "linear", grouped.grouped_mm, grouped.split_grouped_mm)
_fill("conv1d conv2d conv3d", "conv", conv.conv, conv.split_conv)
_fill("conv_transpose1d conv_transpose2d conv_transpose3d", "conv", conv.conv_transpose, conv.split_conv)
_fill("layer_norm", "norm", norm.layer_norm, norm.split_layer_norm)
_fill("rms_norm", "norm", norm.rms_norm, norm.split_rms_norm)
_fill("group_norm", "norm", norm.group_norm, norm.split_group_norm)
_fill("batch_norm", "norm", norm.batch_norm, norm.split_batch_norm)
register(torch.instance_norm, "norm", norm.instance_norm, norm.instance_norm)  # not F's, which calls it in the open
_fill("var_mean std_mean", "norm", norm.var_mean, norm.split_var_mean)
_fill(_SCALE, "norm", norm.scale, norm.split_scale)
_fill_inplace("sqrt rsqrt reciprocal", "norm", norm.scale, norm.split_scale)
_fill("softmax log_softmax _softmax softmin", "softmax", softmax.softmax, softmax.split_softmax)
_fill("matmul bmm mm mv dot inner vdot __matmul__ __rmatmul__", "matmul", matmul.matmul, matmul.split_matmul)
_fill("baddbmm", "matmul", matmul.baddbmm, matmul.split_baddbmm)
_fill("einsum", "matmul", matmul.einsum, matmul.split_einsum)
_fill("solve_triangular", "matmul", solve.solve_triangular, solve.split_solve_triangular)
_fill("scaled_dot_product_attention", "attention", attention.scaled_dot_product_attention, attention.split_attention)
_fill("multi_head_attention_forward", "attention", attention.multi_head_attention_forward,
      attention.multi_head_attention_forward)
register(torch.lstm, "linear", recurrent.lstm, recurrent.lstm)
register(torch.gru, "linear", recurrent.gru, recurrent.gru)
for _rnn in (torch.rnn_tanh, torch.rnn_relu):
    register(_rnn, "linear", recurrent.rnn, recurrent.rnn)
_fill("add __add__ __radd__", "add", add.add, add.split_sum)
_fill("sub subtract __sub__", "add", add.sub, add.split_sub)
_fill("rsub __rsub__", "add", add.rsub, add.split_rsub)
_fill_inplace("add", "add", add.add, add.split_sum)
_fill_inplace("sub", "add", add.sub, add.split_sub)
for _names, _run in (("addcmul", add.addcmul), ("addcdiv", add.addcdiv), ("lerp", add.lerp)):
    _fill(_names, "add", _run, _run)
    _fill_inplace(_names, "add", _run, _run)
_fill("mul multiply __mul__ __rmul__", "mul", mul.mul, mul.split_mul)
_fill("outer ger", "mul", mul.outer, mul.outer)
_fill("cosine_similarity", "mul", mul.cosine, mul.cosine)
_fill("div divide true_divide __truediv__ __div__", "mul", mul.div, mul.split_div)
_fill("__rtruediv__ __rdiv__", "mul", mul.rdiv, mul.split_rdiv)
_fill_inplace("mul", "mul", mul.mul, mul.split_mul)
_fill_inplace("div", "mul", mul.div, mul.split_div)
_fill("embedding embedding_bag", "embedding", embedding.embedding, move.split_move)
_fill("cat concat concatenate stack hstack vstack dstack column_stack", "move", move.joined, move.split_move)
_fill("where", "move", move.chosen, move.split_chosen)
_fill("masked_fill", "move", move.filled, move.split_filled)
_fill("pad", "move", move.padded, move.split_padded)
_fill("pad_sequence", "move", move.sequenced, move.sequenced)
_fill("index_fill scatter", "move", move.padded, move.split_placed)
_fill(_WRITTEN, "move", move.written, move.split_written)
_fill("prelu", "activation", activation.prelu, activation.split_prelu)
_fill("glu", "activation", activation.glu, activation.glu)
_fill(_ACTIVATION, "activation", activation.elementwise, activation.split_elementwise)
_fill_inplace(_ACTIVATION, "activation", activation.elementwise, activation.split_elementwise)
_fill(_POOL, "pool", pool.pool, pool.split_pool)
_fill(_FOURIER, "pool", plain, split_moved)
_fill(_MOVE, "move", plain, move.split_move)
