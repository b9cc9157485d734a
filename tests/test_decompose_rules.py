"""Forward rules against what their papers say, and every op of the table: all is all, nothing is nothing."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relprop import division
from relprop.ops import activation, lookup, matmul, norm, share, softmax
from relprop.ops.table import _TABLE
from relprop.trace import Tap
from relprop.trace.shadow import Shadow, shadowed

F64 = torch.float64
CLOSE = 1e-12


@pytest.fixture
def parts(seed):
    """A total (4, 5) and relevant parts of it by 3 sources."""
    x = torch.randn(4, 5, dtype=F64)
    return x, torch.randn(3, 4, 5, dtype=F64)


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max().clamp_min(1)


# -- rules -------------------------------------------------------------------------------------------------------------

def test_a_constant_is_shared_in_proportion(parts):
    x, r = parts
    b = torch.randn(5, dtype=F64)
    expected = torch.empty_like(r)
    for place in torch.cartesian_prod(*map(torch.arange, r.shape)).tolist():
        s, t, d = place
        rel, irrel = abs(float(r[s, t, d])), abs(float(x[t, d] - r[s, t, d]))
        expected[s, t, d] = float(b[d]) * rel / (rel + irrel)
    close(share.proportional(r, x, b), expected)
    close(share.proportional(r, x, b) + share.proportional(x - r, x.expand_as(r), b), b.expand_as(r))
    assert not share.proportional(torch.zeros_like(r), x, b).any()
    close(share.proportional(x.expand_as(r), x, b), b.expand_as(r))
    lost = b - share.proportional(r, x, b, eps=1e-8) - share.proportional(x - r, x.expand_as(r), b, eps=1e-8)
    close(lost, b * 1e-8 / (r.abs() + (x - r).abs() + 1e-8))
    assert not share.aside(r, x, b).any()


def test_rounding_of_nothing_takes_no_share(parts):
    x, _ = parts
    x[0, 0] = 1e-15  # where the total passes zero, a part of it that is all but rounding
    b = torch.ones(5, dtype=F64)
    close(share.proportional((x + 1e-16)[None], x, b), b.expand(1, 4, 5))


def test_clashing_signs_are_settled(parts):
    x, r = parts
    i = x - r
    clash = r * i < 0
    assert clash.any() and not clash.all()
    expected = torch.where(clash, torch.where(r.abs() >= i.abs(), r + i, torch.zeros_like(r)), r)
    close(share.unclashed(r, x), expected)
    assert not share.unclashed(torch.zeros_like(r), x).any()
    close(share.unclashed(x[None], x), x[None])


def test_a_norm_has_the_scale_of_the_total(parts):
    x, r = parts
    w = torch.randn(5, dtype=F64)
    scale = 1 / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    found = norm.of_total(r, w, scale, centre=True, dims=[-1])
    close(found, (r - r.mean(-1, keepdim=True)) * scale * w)
    close(found + norm.of_total(x - r, w, scale, centre=True, dims=[-1]), F.layer_norm(x, (5,), w).expand_as(r))


def test_activations_by_difference_and_by_shapley(parts):
    x, r = parts
    close(activation.difference(r, x, F.gelu(x), F.gelu), F.gelu(x) - F.gelu(x - r))
    both = activation.shapley(r, x, x.sigmoid(), torch.sigmoid) + activation.shapley(
        x - r, x, x.sigmoid(), torch.sigmoid)
    close(both, (x.sigmoid() - 0.5).expand_as(r))  # efficiency: what both players have is all there is
    orders = [r.sigmoid() - 0.5, x.sigmoid() - (x - r).sigmoid()]  # r comes first, r comes last
    close(activation.shapley(r, x, x.sigmoid(), torch.sigmoid), torch.stack(orders).mean(0))


def test_patterns(parts):
    x, r = parts
    run = lambda scores: scores.softmax(-1)
    assert softmax.pattern_held(r, x, run(x), run) is None
    close(softmax.pattern_difference(r, x, run(x), run), run(x) - run(x - r))
    x[:, 3] = -torch.inf
    found = softmax.pattern_decomposed(r, x, run(x), run)
    kept = [0, 1, 2, 4]
    assert not found[..., 3].any()
    close(found[..., kept], r[..., kept].softmax(-1))


def test_products(seed):
    a, b = torch.randn(3, 4, dtype=F64), torch.randn(4, 2, dtype=F64)
    r_a, r_b = torch.randn(5, 3, 4, dtype=F64), torch.randn(5, 4, 2, dtype=F64)
    i_a, i_b = a - r_a, b - r_b
    close(matmul.inner((r_a, a), (r_b, b), torch.matmul), r_a @ r_b)
    close(matmul.crossed((r_a, a), (r_b, b), torch.matmul), (a @ b) - i_a @ i_b)
    half = r_a @ r_b + (r_a @ i_b + i_a @ r_b) / 2
    close(matmul.halved((r_a, a), (r_b, b), torch.matmul), half)
    other = matmul.halved((i_a, a), (i_b, b), torch.matmul)
    close(half + other, (a @ b).expand_as(half))


# -- the table ---------------------------------------------------------------------------------------------------------

class Called(nn.Module):
    """A model that is one function of its input."""

    def __init__(self, function):
        super().__init__()
        self.inner = Passed()
        self.function = function

    def forward(self, x):
        return self.function(self.inner(x.clone()))


class Passed(nn.Module):
    def forward(self, x):
        return x


def split(function, x, rels, how="cdt", unruled="error"):
    """The output of a function, and its relevant part."""
    network = Called(function)
    tap = Tap("inner")
    shadow = Shadow(division.get(how), len(rels), {tap: lambda total, rel: rels.clone()}, unruled=unruled)
    with shadowed(network, shadow):
        output = network(x)
    close(output, function(x.clone()))  # some of torch's own are run as separate calls
    return output, shadow.part(output)


W, B = torch.randn(3, 4, dtype=F64), torch.randn(3, dtype=F64)
SQUARE, KERNEL, SQUARES = (torch.randn(*shape, dtype=F64) for shape in ((4, 4), (3, 4, 2), (3, 2, 2, 2)))
MASK = torch.tensor([True, False, True, False])


def written(x):
    y = torch.zeros(2, 4, 4, dtype=F64)
    y[:, 1:3] = x[:, :2]
    y[:, 0].copy_(x[:, 3])
    return y


def in_views(x):
    y = x * 2
    first = y[:, 0]
    first += x[:, 1]
    y.mul_(3).relu_()
    return y + first[:, None]


def instance(x):
    return F.instance_norm(x)


LINEAR = {
    "linear": lambda x: F.linear(x, W), "addmm": lambda x: torch.addmm(torch.zeros(4, dtype=F64), x[0], SQUARE),
    "conv1d": lambda x: F.conv1d(x, KERNEL), "conv2d": lambda x: F.conv2d(x.view(1, 2, 4, 4), SQUARES),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x.view(1, 2, 4, 4), SQUARES.transpose(0, 1)),
    "matmul": lambda x: x @ SQUARE, "rmatmul": lambda x: SQUARE @ x,
    "einsum": lambda x: torch.einsum("btd,de->bet", x, SQUARE),
    "bmm": lambda x: torch.bmm(x, SQUARE.expand(2, 4, 4)), "mv": lambda x: torch.mv(x[0], SQUARE[0]),
    "dot": lambda x: torch.dot(x[0, 0], SQUARE[0]), "mean": lambda x: x.mean(1), "sum": lambda x: x.sum((0, 2)),
    "cumsum": lambda x: x.cumsum(1), "avg_pool": lambda x: F.avg_pool1d(x, 2), "add": lambda x: x + x.flip(1),
    "sub": lambda x: x - 3 * x.roll(1, 0), "rsub": lambda x: torch.rsub(x, x.flip(0), alpha=2),
    "scaled": lambda x: x.mul(3).div(SQUARE), "cat": lambda x: torch.cat([x, torch.zeros_like(x), x[:, :1]], 1),
    "stack": lambda x: torch.stack([x, x * 2]), "where": lambda x: torch.where(MASK, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(MASK, 0), "pad": lambda x: F.pad(x, (1, 2)),
    "take": lambda x: x[:, [1, 3], :2].gather(2, torch.tensor([[[1], [0]]]).expand(2, 2, 1)),
    "masked": lambda x: x[..., MASK], "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(1, torch.ones(2, 4, 4, dtype=torch.long), x),
    "index_put": lambda x: torch.zeros_like(x).index_put((torch.tensor([0]), torch.tensor([2])), x[1, 1]),
    "shapes": lambda x: x.permute(2, 0, 1).reshape(4, -1).chunk(2)[1].unsqueeze(0).expand(3, 2, 8).flatten(1),
    "written": written, "lerp": lambda x: torch.lerp(x, x.flip(1), 0.3), "neg": lambda x: -x,
    "outer": lambda x: torch.outer(x[0, 0], SQUARE[0]), "interpolate": lambda x: F.interpolate(x, 8, mode="linear"),
    "to": lambda x: x.to(F64).contiguous().clone(), "unfold": lambda x: x.unfold(2, 2, 1), "tril": lambda x: x.tril(),
    "fold": lambda x: F.unfold(x.view(1, 2, 4, 4), 2)}
"""Ops that are linear in what a source reaches: rel is what they make of rel."""

OTHERS = {
    "biased": lambda x: F.linear(x, W, B), "addmm": lambda x: torch.addmm(SQUARE[0], x[0], SQUARE),
    "convolved": lambda x: F.conv1d(x, KERNEL, B), "layer_norm": lambda x: F.layer_norm(x, (4,), SQUARE[0], SQUARE[1]),
    "rms_norm": lambda x: F.rms_norm(x, (4,), SQUARE[0]), "instance": instance,
    "group_norm": lambda x: F.group_norm(x, 2, SQUARE[0], SQUARE[1]),
    "batch_norm": lambda x: F.batch_norm(x, SQUARE[0], SQUARE[1].abs(), SQUARE[2], SQUARE[3]),
    "by_hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * SQUARE[0],
    "normalize": lambda x: F.normalize(x, dim=-1), "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "relu": lambda x: F.relu(x, inplace=True), "clamp": lambda x: x.clamp(-0.5, 0.5),
    "exp": torch.exp, "prelu": lambda x: F.prelu(x, SQUARE[0]), "glu": F.glu, "pow": lambda x: x ** 3,
    "product": lambda x: x @ x.mT, "gate": lambda x: x * x.sigmoid(),
    "squares": lambda x: torch.einsum("btd,bsd->bts", x, x),
    "baddbmm": lambda x: torch.baddbmm(torch.zeros(2, 4, 4, dtype=F64), x, x.mT, alpha=0.5),
    "addcmul": lambda x: torch.addcmul(x, x, x.flip(1), value=0.5), "in_views": in_views,
    "hidden": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "max": lambda x: x.max(1).values, "amax": lambda x: x.amax(-1), "topk": lambda x: x.topk(2).values,
    "sort": lambda x: x.sort(1).values, "max_pool": lambda x: F.max_pool1d(x, 2),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(1) - x.flip(2), dim=-1),
    "bias": lambda x: x + SQUARE[0]}
"""Ops that are not: all of x is all of the output, and nothing of x nothing."""


@pytest.fixture
def x(seed):
    return torch.randn(2, 4, 4, dtype=F64)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_ops_do_to_parts_what_they_do_to_totals(name, x):
    rels = torch.randn(3, 2, 4, 4, dtype=F64)
    output, found = split(LINEAR[name], x, rels)
    assert output.abs().max() > 0
    close(found, torch.stack([LINEAR[name](rel) for rel in rels]))


@pytest.mark.parametrize("how", division.NAMES)
@pytest.mark.parametrize("name", OTHERS)
def test_all_is_all_and_nothing_is_nothing(name, how, x):
    output, found = split(OTHERS[name], x, torch.stack([x, torch.zeros_like(x)]), how)
    close(found[0], output)
    assert found[1].abs().max() <= CLOSE
    _, some = split(OTHERS[name], x, torch.randn(1, 2, 4, 4, dtype=F64), how)
    assert some.abs().max() > 0 and some.isfinite().all()


def test_one_part_of_a_view_that_was_written_into(x):
    """What a base and its other views see of a write into a view."""
    def function(x):
        y = torch.zeros(2, 4, 4, dtype=F64)
        rows = y.view(8, 4)
        rows[2:4] = x[0, :2]
        y[0].transpose(0, 1)[1] += x[1, 0]
        return torch.cat([rows, y.flatten(0, 1)])

    rels = torch.randn(2, 2, 4, 4, dtype=F64)
    _, found = split(function, x, rels)
    close(found, torch.stack([function(rel) for rel in rels]))


def substituted(A, B, unit):
    """Forward substitution of a lower triangle, row by row."""
    rows = []
    for i in range(A.shape[-1]):
        row = B[i] - A[i, :i] @ torch.stack(rows) if rows else B[i]
        rows.append(row if unit else row / A[i, i])
    return torch.stack(rows)


@pytest.mark.parametrize("upper, left", [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("how", division.NAMES)
def test_a_triangular_system_is_split_as_forward_substitution(how, unit, upper, left):
    x = torch.randn(4, 7, dtype=F64) / 2 + 2 * torch.eye(4, 7, dtype=F64)
    rels = torch.randn(3, 4, 7, dtype=F64)

    def solved(x):
        A, B = (x[:, :4].flip(0, 1), x[:, 4:].flip(0)) if upper != (not left) else (x[:, :4], x[:, 4:])
        A, B = (A, B) if left else (A.mT, B.mT)
        X = torch.linalg.solve_triangular(A, B, upper=upper, left=left, unitriangular=unit)
        X = X if left else X.mT
        return X.flip(0) if upper != (not left) else X

    _, part = split(solved, x, rels, how)
    _, expected = split(lambda x: substituted(x[:, :4], x[:, 4:], unit), x, rels, how)
    assert expected.abs().min() > 0
    close(part, expected)


def test_every_op_of_the_table_can_be_split():
    assert all(op.split is not None for op in _TABLE.values()) and len(_TABLE) > 300
    assert lookup(torch.Tensor.add_).split is lookup(torch.add).split


def test_a_function_of_ones_own_is_split_by_what_its_total_loses(x):
    from relprop.ops import register

    special = torch.special.i1
    before = dict(_TABLE)
    register(special, "activation", lambda call, x: special(x))
    try:
        _, found = split(special, x, x[None] / 2)
    finally:
        _TABLE.clear()
        _TABLE.update(before)
    close(found[0], special(x) - special(x / 2))


# -- divisions ---------------------------------------------------------------------------------------------------------

def test_a_division_says_which_rule_where():
    one = division.get("cdt").but("mine", rules={"mul": matmul.inner}, paths={"h.0.*": {"mul": matmul.crossed,
                                                                                      "share": share.aside}})
    assert one.rule("mul", "h.1.mlp") is matmul.inner and one.rule("mul", "h.0.mlp") is matmul.crossed
    assert one.rule("attention", "h.1.attn") == (matmul.inner, softmax.pattern_decomposed)
    assert one.constants("h.0.mlp") is share.aside and one.constants("h.1.mlp") is share.proportional
    assert one.describe()["mul"] == "inner" and division.get(one) is one
    assert not one.published().whole and one.whole


@pytest.mark.parametrize("changes, error, said", [
    ({"rules": {"gate": matmul.inner}}, ValueError, "unknown kind of op 'gate'"),
    ({"rules": {"mul": "inner"}}, TypeError, "must be a function"),
    ({"normalized": {"mlp": ("context",)}}, ValueError, "signs cannot be settled in 'mlp'"),
    ({"normalized": {"head": ("add",)}}, ValueError, "signs cannot be settled in 'head'")])
def test_a_division_that_cannot_be(changes, error, said):
    with pytest.raises(error, match=said):
        division.get("cdt").but(**changes)
