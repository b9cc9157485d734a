"""Systems of linear equations A X = B with a triangular A, as gated delta rules solve them: products, row by row.

Forward substitution x_i = (b_i - sum_{j<i} a_ij x_j) / a_ii is made of ops that the table has: sums, products of two
tensors, and a division by a scale. The rules here are those of the pieces, put together.

References: Achtibat et al. 2024 (AttnLRP, eq. 15: the uniform rule of products), Yang et al. 2024 (Parallelizing linear
transformers with the delta rule over sequence length: the triangular system).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .call import Call, dependent
from .journal import PRODUCT
from .matmul import gradient, uniform
from .split import Split


class Substituted(Function):
    """X = A^-1 B, A lower triangular, with half of each product's relevance to either factor and the diagonal held.

    With A = D + S, S what is off the diagonal, and g relevance per unit of X: (D + S / 2)^T g_B = g, g_S = -g_B X^T /
    2, g_D = 0. Strictly conservative: X g = B g_B + S g_S.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, unit: bool) -> Tensor:
        X = torch.linalg.solve_triangular(A, B, upper=False, unitriangular=unit)
        ctx.save_for_backward(A, X)
        ctx.unit, ctx.shape = unit, B.shape
        return X

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        A, X = ctx.saved_tensors
        halved = (A.tril(-1) / 2 + A.diagonal(dim1=-2, dim2=-1).diag_embed()).mT
        g_B = torch.linalg.solve_triangular(halved, g, upper=True, unitriangular=ctx.unit)
        g_S = (g_B @ X.mT / -2).tril(-1)
        return g_S.sum_to_size(A.shape), g_B.sum_to_size(ctx.shape), None


def solve_triangular(call: Call, A: Tensor, B: Tensor, *, upper: bool, left: bool = True,
                     unitriangular: bool = False) -> Tensor:
    """`torch.linalg.solve_triangular`: linear in B; an A that depends on the input shares as a factor does.

    Of a constant B the first rows of X are constants too, and the products with them are linear: in the open.
    """
    if not dependent(A):
        return call.func(A, B, upper=upper, left=left, unitriangular=unitriangular)
    if call.rule is gradient:
        def run(*moving: Tensor) -> Tensor:
            return call.func(moving[0], moving[1] if len(moving) > 1 else B, upper=upper, left=left,
                             unitriangular=unitriangular)

        return call.booked(PRODUCT, [A, B] if dependent(B) else [A], run)
    if call.rule is uniform and dependent(B):
        X = Substituted.apply(*_lower(A, B, upper, left), unitriangular)
    else:
        X = call.retrace(lambda: _by_row(*_lower(A, B, upper, left), unitriangular))
    return _turned(X, upper, left)


def _lower(A: Tensor, B: Tensor, upper: bool, left: bool) -> tuple[Tensor, Tensor]:
    """A system with a lower triangle on the left that has the same solution, up to `_turned`."""
    if not left:  # X A = B is A^T X^T = B^T
        A, B, upper = A.mT, B.mT, not upper
    return (A.flip(-2, -1), B.flip(-2)) if upper else (A, B)


def _turned(X: Tensor, upper: bool, left: bool) -> Tensor:
    """The solution as it was asked for."""
    X = X.flip(-2) if upper == left else X
    return X if left else X.mT


def _by_row(A: Tensor, B: Tensor, unit: bool) -> Tensor:
    """Forward substitution in the open, for rules of products of one's own."""
    rows: list[Tensor] = []
    for i in range(A.shape[-1]):
        row = B[..., i:i + 1, :]
        if rows:
            row = row - A[..., i:i + 1, :i] @ torch.cat(rows, -2)
        rows.append(row if unit else row / A[..., i:i + 1, i:i + 1])
    return torch.cat(rows, -2)


# -- forward ---------------------------------------------------------------------------------------------------------

def split_solve_triangular(call: Split, A: Tensor, B: Tensor, *, upper: bool, left: bool = True,
                           unitriangular: bool = False) -> Any:
    """`torch.linalg.solve_triangular`, forward: by the rules of the products that it is made of."""
    rel = call.rel(B)
    if call.rel(A) is None:
        return torch.linalg.solve_triangular(A, rel, upper=upper, left=left, unitriangular=unitriangular)
    return call.retrace(lambda: _turned(_by_row(*_lower(A, B, upper, left), unitriangular), upper, left))
