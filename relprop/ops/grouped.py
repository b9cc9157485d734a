"""Products of groups of rows with a matrix for each group, as mixtures of experts make them: linear maps side by side.

Rows are sorted by the expert that they are given to. The rules of `linear` look at one row at a time, so that they are
the rules here.
"""

from typing import Any

import torch
from torch import Tensor

from .call import Call, dependent
from .linear import Affine, run_affine
from .matmul import bilinear
from .split import Split, difference


def grouped_mm(call: Call, mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
               out_dtype: torch.dtype | None = None) -> Tensor:
    """`F.grouped_mm`: rows (N, K) in groups that end at `offs`, with the matrices (G, K, M) of the groups."""
    def product(x: Tensor, W: Tensor) -> Tensor:
        return call.func(x, W, offs=offs, out_dtype=out_dtype)

    if bias is not None:
        return call.retrace(lambda: torch.add(product(mat_a, mat_b), bias))
    if dependent(mat_b) or mat_a.dim() != 2 or mat_b.dim() != 3:
        return bilinear(call, mat_a, mat_b, product)
    affine = Affine(product, lambda s, W: product(s, W.mT), mat_b)
    return run_affine(call, mat_a, lambda x: product(x, mat_b), affine)


def split_grouped_mm(call: Split, mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None,
                     bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Any:
    """`F.grouped_mm`, forward: rows by rows, as a linear layer."""
    rel = call.rel(mat_a)
    if rel is None or bias is not None or call.rel(mat_b) is not None:
        return difference(call, mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    return torch.stack([call.func(part, mat_b, offs=offs, out_dtype=out_dtype) for part in rel])
