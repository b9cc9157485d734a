"""Every op under every rule of its kind, through the interception: value = relevance of the input + absorbed."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import Carrying, Written, name, randn, variants
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from relprop import composite
from relprop.composite import NOT, STRICT, UP_TO_BIASES, Composite
from relprop.errors import IndependentOutput, LedgerError
from relprop.ops import KINDS, activation, add, linear, lookup, matmul, mul, norm, pool, softmax, table
from relprop.ops.call import Call
from relprop.relevance import Propagation, propagate

parametrize = pytest.mark.parametrize
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
RULES = {"linear": linear, "conv": linear, "norm": norm, "softmax": softmax, "activation": activation,
         "matmul": matmul, "add": add, "mul": mul, "pool": pool}
"""Where the rules of each kind are; the other kinds follow the plain gradient."""


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every tensor here is random, the same each time."""


W, V, SQUARE, BIAS = (torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                      for shape in ((5, 6), (4, 6), (6, 6), (6,)))
MASK = torch.tensor([True, False, False, True, False, False])
SHIFT = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
LAST = torch.tensor([[0, 2], [5, 5], [1, 0]])


def kernel(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def written_to(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    """x after a write in place."""
    x = x * 1
    write(x)
    return x


def buffer(write: Callable[[Tensor], Any], fill: float = 0.5) -> Tensor:
    """A constant after a write in place of what depends on x."""
    base = torch.full((3, 6), fill, dtype=torch.float64)
    write(base)
    return base


def heads(x: Tensor) -> Tensor:
    """(B, 4, 6) as (B, 2, 4, 3)."""
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


def multi_head(x: Tensor, **options: Any) -> Tensor:
    x = x.transpose(0, 1)
    return F.multi_head_attention_forward(x, x, x, 6, 2, torch.cat([SQUARE, SQUARE.flip(0), SQUARE.flip(1)]),
                                          torch.cat([BIAS, SHIFT, BIAS]), None, None, False, 0.0, SQUARE, BIAS,
                                          training=False, need_weights=False, **options)[0].transpose(0, 1)


FLAT, TOKENS, IMAGE, VOLUME = (6,), (4, 6), (2, 4, 6), (2, 3, 2, 2)
OPS: dict[str, dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]] = {
    "linear": {
        "linear": (TOKENS, lambda x: F.linear(x, W)),
        "written to": (FLAT, lambda x: F.linear(x, SQUARE, BIAS).add_(SHIFT).relu_()),
        "linear, bias": (FLAT, lambda x: F.linear(x, W, W[:, 0])),
        "addmm": (FLAT, lambda x: torch.addmm(BIAS, x, SQUARE)),
        "addmm of a sum": (FLAT, lambda x: torch.addmm(x, x, SQUARE, beta=0.5, alpha=2)),
        "weights that depend on x": (TOKENS, lambda x: torch.stack([F.linear(t, t[:2], t[0, :2]) for t in x]))},
    "conv": {
        "conv1d": (TOKENS, lambda x: F.conv1d(x, kernel(2, 4, 3), kernel(2), padding=1)),
        "conv2d": (IMAGE, lambda x: F.conv2d(x, kernel(3, 2, 2, 3), kernel(3), stride=2, dilation=(1, 2))),
        "conv2d same": (IMAGE, lambda x: F.conv2d(x, kernel(4, 1, 2, 3), padding="same", groups=2)),
        "conv3d": (VOLUME, lambda x: F.conv3d(x, kernel(2, 2, 2, 2, 1), kernel(2))),
        "conv of padding with numbers": (TOKENS, lambda x: F.conv1d(F.pad(x, (2, 1), value=0.7), kernel(2, 4, 3))),
        "conv_transpose1d": (TOKENS, lambda x: F.conv_transpose1d(x, kernel(4, 2, 3), kernel(2), stride=2)),
        "conv_transpose2d": (IMAGE, lambda x: F.conv_transpose2d(x, kernel(2, 1, 2, 3), groups=2)),
        "conv_transpose3d": (VOLUME, lambda x: F.conv_transpose3d(x, kernel(2, 1, 2, 2, 1), kernel(1)))},
    "norm": {
        "layer norm": (TOKENS, lambda x: F.layer_norm(x, (6,), BIAS, SHIFT)),
        "written to": (TOKENS, lambda x: F.layer_norm(x, (6,), BIAS, SHIFT).add_(BIAS).mul_(BIAS)),
        "layer norm, bare": (TOKENS, lambda x: F.layer_norm(x, (4, 6)) * BIAS),
        "rms norm": (TOKENS, lambda x: F.rms_norm(x, (6,), BIAS)),
        "group norm": (TOKENS, lambda x: F.group_norm(x, 2, BIAS[:4], SHIFT[:4])),
        "instance norm": (IMAGE, lambda x: F.instance_norm(x) * BIAS),
        "instance norm of torch": (TOKENS, lambda x: torch.instance_norm(x, BIAS[:4], SHIFT[:4], None, None, True, 0.1,
                                                                         1e-5, False)),
        "instance norm, running": (TOKENS, lambda x: F.instance_norm(x, BIAS[:4], SHIFT[:4].abs(), SHIFT[1:5],
                                                                     BIAS[1:5], use_input_stats=False)),
        "batch norm": (TOKENS, lambda x: F.batch_norm(x, BIAS[:4], SHIFT[:4].abs(), SHIFT[1:5], BIAS[1:5])),
        "by hand": (TOKENS, lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * BIAS),
        "by hand, centred": (TOKENS, lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1) * BIAS),
        "by hand, in place": (TOKENS, lambda x: (x - x.mean(-1, keepdim=True)).div_(x.var(-1, keepdim=True).sqrt_())
                              * BIAS),
        "var_mean": (TOKENS, lambda x: by_moments(x) * BIAS), "F.normalize": (TOKENS, lambda x: F.normalize(x, dim=-1)),
        "vector norm": (TOKENS, lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True))},
    "softmax": {
        "softmax": (TOKENS, lambda x: F.softmax(x, -1) * SHIFT), "method": (TOKENS, lambda x: x.softmax(1) * SHIFT),
        "log_softmax": (TOKENS, lambda x: F.log_softmax(x, -1)),
        "masked": (TOKENS, lambda x: F.softmax(x.masked_fill(MASK, -math.inf), -1) * SHIFT)},
    "activation": {
        "gelu": (FLAT, F.gelu), "written to": (FLAT, lambda x: F.gelu(x).add_(SHIFT).mul_(x)),
        "relu in place": (FLAT, lambda x: (x * 1).relu_()), "sigmoid": (FLAT, torch.sigmoid),
        "softplus": (FLAT, F.softplus), "exp": (FLAT, torch.exp), "power": (FLAT, lambda x: x**3),
        "powers": (FLAT, lambda x: x ** torch.arange(6)), "clamp": (FLAT, lambda x: x.clamp(min=-0.9, max=2.0)),
        "bounds of its own": (FLAT, lambda x: torch.clamp(x, min=SHIFT - 1.5)),
        "bounds that depend on x": (FLAT, lambda x: torch.clamp(x, max=x.mean(1, keepdim=True))),
        "prelu": (TOKENS, lambda x: F.prelu(x, BIAS[:4])), "glu": (FLAT, F.glu)},
    "matmul": {
        "of two": (TOKENS, lambda x: x @ x.mT), "written to": (TOKENS, lambda x: (x @ x.mT).mul_(0.5).add_(2.0)),
        "bmm": (TOKENS, lambda x: torch.bmm(x.mT, x)),
        "by a constant": (TOKENS, lambda x: x @ SQUARE), "of a constant": (TOKENS, lambda x: SQUARE[:, :4] @ x),
        "einsum": (TOKENS, lambda x: torch.einsum("bti,bsi->bts", x, x)),
        "einsum of three": (TOKENS, lambda x: torch.einsum("bti,bsi,bsj->btj", x, x, x)),
        "einsum of one": (TOKENS, lambda x: torch.einsum("bti,ij->bj", x, SQUARE)),
        "baddbmm": (TOKENS, lambda x: torch.baddbmm(SQUARE[:4, :4], x, x.mT, beta=0.5, alpha=0.3)),
        "baddbmm of a sum": (TOKENS, lambda x: torch.baddbmm(x[:, :, :4], x, x.mT, alpha=0.3)),
        "dot": (FLAT, lambda x: torch.stack([row.dot(row) for row in x]))},
    "attention": {
        "fused": (TOKENS, lambda x: F.scaled_dot_product_attention(*[heads(x)] * 3)),
        "causal": (TOKENS, lambda x: F.scaled_dot_product_attention(*[heads(x)] * 3, is_causal=True, scale=0.5)),
        "masked": (TOKENS, lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=SQUARE[:4, :4] > -0.5)),
        "added": (TOKENS, lambda x: F.scaled_dot_product_attention(x, x * 2, x - 1, attn_mask=SQUARE[:4, :4])),
        "grouped": (TOKENS, lambda x: F.scaled_dot_product_attention(heads(x), heads(x)[:, :1], heads(x)[:, 1:],
                                                                     enable_gqa=True)),
        "of constant values": (TOKENS, lambda x: F.scaled_dot_product_attention(x, x, SQUARE[None, :4])
                               + F.linear(x, SQUARE)),
        "in parts": (TOKENS, lambda x: torch.softmax(x @ x.mT / 2, -1) @ x),
        "multi-head": (TOKENS, multi_head),
        "multi-head, masked": (TOKENS, partial(multi_head, attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(1)))},
    "add": {
        "of two": (FLAT, lambda x: x + F.linear(x, SQUARE)), "of itself": (FLAT, lambda x: x + x),
        "constant": (FLAT, lambda x: SHIFT + x), "number": (FLAT, lambda x: 2.0 + x),
        "in place": (FLAT, lambda x: (x * 1).add_(SHIFT)), "in place, of two": (FLAT, lambda x: (x * 2).add_(x**2)),
        "into a view": (FLAT, lambda x: written_to(x, lambda y: y[:, :2].add_(SHIFT[:2]))),
        "into a view, +=": (FLAT, lambda x: written_to(x, into_slice)),
        "into a constant": (FLAT, lambda x: buffer(lambda y: y.add_(x))), "minus": (FLAT, lambda x: x - F.gelu(x)),
        "minus a constant": (FLAT, lambda x: x.sub(SHIFT, alpha=2)), "constant minus": (FLAT, lambda x: SHIFT - x),
        "one minus": (FLAT, lambda x: 1 - x), "rsub": (FLAT, lambda x: torch.rsub(x, x**2, alpha=3)),
        "addcmul": (FLAT, lambda x: torch.addcmul(x, x, x**2, value=0.5)),
        "addcmul in place": (FLAT, lambda x: (x * 1).addcmul_(x, BIAS)),
        "addcdiv": (FLAT, lambda x: torch.addcdiv(SHIFT, x, 2 + x.abs())),
        "lerp": (FLAT, lambda x: torch.lerp(x, SHIFT, 0.3)), "lerp of two": (FLAT, lambda x: x.lerp(x**3, BIAS)),
        "broadcast": (TOKENS, lambda x: x + x.mean(1, keepdim=True)), "list": (FLAT, lambda x: sum([x, SHIFT, x**3]))},
    "mul": {
        "of two": (FLAT, lambda x: x * F.linear(x, SQUARE)), "gate": (FLAT, lambda x: F.silu(x) * x.roll(1, 1)),
        "constant": (FLAT, lambda x: x * SHIFT), "number": (FLAT, lambda x: 3 * x),
        "square": (FLAT, lambda x: x * x), "outer": (FLAT, lambda x: torch.stack([row.outer(row) for row in x])),
        "in place": (FLAT, lambda x: (x + 0).mul_(x.exp())),
        "divided": (FLAT, lambda x: x / (1 + x.abs())), "divided by a constant": (FLAT, lambda x: x / SHIFT),
        "reciprocal": (FLAT, lambda x: x * (1 / (1 + x.exp()))), "broadcast": (TOKENS, lambda x: x * x[:, :1]),
        "divided in place": (FLAT, lambda x: (x * 1).div_(2 + x**2))},
    "embedding": {"table that depends on x": (TOKENS, lambda x: torch.stack(
        [F.embedding(torch.tensor([1, 1, 3]), row) for row in x]))},
    "pool": {
        "mean": (TOKENS, lambda x: x.mean(1)), "written to": (TOKENS, lambda x: x.sum(1).mul_(BIAS).add_(x[:, 0])),
        "sum": (TOKENS, lambda x: x.sum(2)),
        "average pool": (IMAGE, lambda x: F.avg_pool2d(x, 2)), "max pool": (IMAGE, lambda x: F.max_pool2d(x, 2)),
        "adaptive": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, (3, 4))), "cumsum": (TOKENS, lambda x: x.cumsum(1)),
        "upsampled": (IMAGE, lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
        "to one": (TOKENS, lambda x: x.amax(1)), "class token": (TOKENS, lambda x: x[:, 0])},
    "move": {
        "reshape": (TOKENS, lambda x: x.transpose(1, 2).reshape(3, 8, 3).permute(1, 0, 2).movedim(0, 1)),
        "written to": (FLAT, lambda x: torch.cat([x, SHIFT.expand(3, 6)], 1).mul_(2.0).add_(1.0)),
        "rotate half": (FLAT, lambda x: torch.cat([-x[:, 3:], x[:, :3]], -1)),
        "chunk": (FLAT, lambda x: torch.stack(x.chunk(3, -1)[::2], 1)),
        "shift": (TOKENS, lambda x: x.roll((1, 2), (1, 2))),
        "gather": (FLAT, lambda x: x.gather(1, LAST)), "index": (FLAT, lambda x: x[torch.arange(3)[:, None], LAST]),
        "class token put in front": (TOKENS, lambda x: torch.cat([SHIFT.expand(3, 1, 6), x], 1)),
        "stacked with a constant": (FLAT, lambda x: torch.stack([x, SHIFT.expand(3, 6)], 1)),
        "where": (FLAT, lambda x: torch.where(MASK, x, SHIFT)), "where, method": (FLAT, lambda x: x.where(MASK, SHIFT)),
        "where, a number": (FLAT, lambda x: torch.where(x > 0, x, -1.5)),
        "where, of two": (FLAT, lambda x: torch.where(MASK, x, x * 2)),
        "constant where": (FLAT, lambda x: SHIFT.where(MASK, x)),
        "masked_fill": (FLAT, lambda x: x.masked_fill(MASK, 3.0)),
        "masked_fill_": (FLAT, lambda x: (x * 1).masked_fill_(MASK, 3.0)),
        "pad": (TOKENS, lambda x: F.pad(x, (1, 2, 0, 1))),
        "pad with a number": (FLAT, lambda x: F.pad(x, (1, 2), value=2)),
        "pad by reflection": (TOKENS, lambda x: F.pad(x, (2, 1), mode="reflect")),
        "scatter": (FLAT, lambda x: x.scatter(1, LAST, 0.5)),
        "index_fill": (FLAT, lambda x: x.index_fill(1, LAST[0], 2.0)),
        "index_add": (FLAT, lambda x: SHIFT.expand(3, 6).index_add(1, torch.arange(6).flip(0), x)),
        "index_put": (FLAT, lambda x: x.index_put((torch.tensor(1), torch.tensor(2)), BIAS[0])),
        "setitem, number": (FLAT, lambda x: written_to(x, lambda y: y.__setitem__((slice(None), 1), 3.0))),
        "setitem, constant": (FLAT, lambda x: written_to(x, lambda y: y.__setitem__((slice(None), MASK), SHIFT[MASK]))),
        "setitem, into a constant": (FLAT, lambda x: buffer(lambda y: y.__setitem__((slice(None), MASK), x[:, MASK]))),
        "setitem, of two": (FLAT, lambda x: written_to(x, lambda y: y.__setitem__((slice(None), 0), x[:, 1] * 2))),
        "fill a view": (FLAT, lambda x: written_to(x, lambda y: y[:, :2].fill_(4.0))),
        "copy": (FLAT, lambda x: buffer(lambda y: y[:, :2].copy_(x[:, 2:4]))),
        "index_add_": (FLAT, lambda x: buffer(lambda y: y.index_add_(1, LAST[0], x[:, :2]))),
        "zero_": (FLAT, lambda x: written_to(x, lambda y: y[:, 1:3].zero_())),
        "sorted": (FLAT, lambda x: x.sort(1).values), "top": (FLAT, lambda x: x.topk(2, 1).values),
        "maximum": (FLAT, lambda x: torch.maximum(x, SHIFT)), "unfold": (TOKENS, lambda x: x.unfold(1, 2, 1)),
        "copy of all": (FLAT, lambda x: buffer(lambda y: y.copy_(x))),
        "unfolded patches": (IMAGE, lambda x: F.unfold(x, 2)), "triangle": (TOKENS, lambda x: x.tril()),
        "expanded": (FLAT, lambda x: x[:, None].expand(3, 4, 6)), "dropout": (FLAT, lambda x: F.dropout(x, 0.5, False)),
        "windows": (IMAGE, lambda x: x.unflatten(2, (2, 2)).unflatten(-1, (3, 2)).movedim((2, 4), (1, 2)).flatten(0, 2)
                    .reshape(3, 6, -1)),
        "same precision": (FLAT, lambda x: x.to(torch.float64).double())}}
CASES = [(kind, op) for kind, ops in OPS.items() for op in ops]


def by_moments(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-3)


def into_slice(y: Tensor) -> None:
    y[:, :2] += SHIFT[:2]


def rules_of(kind: str) -> list[dict[str, Any]]:
    """Every assignment of rules that concerns a kind of op, the others as AttnLRP has them."""
    if kind == "attention":
        return [{"matmul": of_product, "softmax": of_softmax} for of_product in variants(matmul)
                for of_softmax in variants(softmax)]
    return [{kind: rule} for rule in variants(RULES[kind])] if kind in RULES else [{}]


def books(kind: str, op: str, rules: Composite, *, inner: bool) -> Propagation:
    """The run of one op, at the input or behind a product and a sum."""
    shape, function = OPS[kind][op]
    x = randn(3, *shape)
    behind = function if not inner else lambda x: function(x * 1.5 + x.new_tensor(0.25))
    torch.manual_seed(3)
    return propagate(Written(behind).double(), (x,), {}, Carrying(randn(*function(x).shape)), rules)


def assert_balanced(found: Propagation) -> None:
    """Of every row, not only of their sum, and of a case that is not empty."""
    ledger = found.ledger
    parts = [ledger.input, *ledger.absorbed.values()]
    largest = torch.stack([part.abs() for part in (ledger.value, *parts)]).amax(0)
    assert ((ledger.value - sum(parts)).abs() <= 1e-9 * largest).all()
    assert found.value.all() and found.relevance["0"].flatten(1).any(1).all()
    rows = found.relevance["0"].flatten(1).sum(1)
    assert torch.allclose(rows, ledger.input, rtol=1e-9, atol=1e-12)


@parametrize("kind, op, rules", [(kind, op, rules) for kind, op in CASES for rules in rules_of(kind)],
             ids=lambda v: ", ".join(name(r) for r in v.values()) if isinstance(v, dict) else v)
def test_books_balance(kind, op, rules):
    whole = composite.gradient() if norm.gradient in rules.values() else composite.attnlrp()
    held = {softmax.hold, activation.hold} & set(rules.values())
    try:
        assert_balanced(books(kind, op, whole.but(rules=rules), inner=False))
    except IndependentOutput:
        assert held, "only a held constant leaves nothing to explain"


@parametrize("rules", composite.NAMES)
@parametrize("kind, op", CASES)
def test_books_balance_under_every_composite(kind, op, rules):
    """Behind other ops."""
    try:
        found = books(kind, op, composite.get(rules), inner=True)
    except IndependentOutput:
        assert kind == "softmax" and composite.get(rules).rules["softmax"] is softmax.hold
        return
    assert_balanced(found)


# -- what a rule says of itself ----------------------------------------------------------------------------------------

CLAIMS = [(kind, rule) for kind, module in RULES.items() if kind != "conv" for rule in variants(module)
          if "Strictly conservative" in getattr(rule, "func", rule).__doc__
          and getattr(rule, "func", rule) not in (linear.z_plus, softmax.hold)]  # on a condition: see their oracles
WHOLE = {"linear": "linear, bias", "add": "of two", "mul": "of two", "matmul": "of two", "activation": "gelu",
         "norm": "layer norm", "softmax": "softmax", "pool": "mean"}


@parametrize("kind, rule", CLAIMS, ids=lambda v: v if isinstance(v, str) else name(v))
def test_what_is_strictly_conservative_absorbs_nothing(kind, rule):
    found = books(kind, WHOLE[kind], composite.attnlrp().but(rules={kind: rule}), inner=False)
    assert_balanced(found)
    assert torch.allclose(found.ledger.input, found.ledger.value, rtol=1e-9)


def test_there_are_claims_of_every_class():
    assert len(CLAIMS) >= 10
    assert {composite.get(rules).conservation for rules in composite.NAMES} <= {STRICT, UP_TO_BIASES, NOT}


# -- the table ---------------------------------------------------------------------------------------------------------

class Recorder(TorchFunctionMode):
    """The functions of the table that a block calls upon, those called from the inside of others included."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: set[Callable[..., Any]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = lookup(func)
        if op is not None:
            self.runs.add(op.run)
        return func(*args, **(kwargs or {}))


ELSEWHERE = {"grouped_mm": "grouped", "gru": "recurrent", "lstm": "recurrent", "rnn": "recurrent",
             "solve_triangular": "solve"}
"""What takes more than one tensor of rows: tests/test_rules_*.py have its books."""
COMPOSED = {"cosine", "sequenced"}
"""What makes calls that have cases: tests/test_target_similarity.py and test_mechanisms_vision.py."""


def test_every_function_of_the_table_has_a_case():
    with Recorder() as recorder:
        for kind, op in CASES:
            shape, function = OPS[kind][op]
            function(randn(3, *shape))
    left = {op.run.__name__ for op in table._TABLE.values() if op.run not in recorder.runs}
    assert left == set(ELSEWHERE) | COMPOSED
    assert all((Path(__file__).parent / f"test_rules_{name}.py").is_file() for name in ELSEWHERE.values())
    assert set(OPS) == set(KINDS)


# -- words -------------------------------------------------------------------------------------------------------------

class Words(nn.Module):
    """Embeddings of tokens, positions and one kind of segment, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pos_embed, self.token_type = nn.Embedding(9, 6), nn.Embedding(4, 6), nn.Embedding(2, 6)
        self.cls_token, self.head = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.pos_embed(torch.arange(4)) + self.token_type(torch.zeros_like(input_ids))
        return self.head(torch.cat([self.cls_token.expand(3, 1, 6), x], 1).mean(1))


@parametrize("rules", composite.NAMES)
def test_embeddings(rules):
    """Positions, segments and class tokens are constants with an account of their own."""
    model, ids = Words().double(), torch.randint(9, (3, 4))
    found = propagate(model, (), {"input_ids": ids}, lambda y: y[:, 1], rules)
    ledger = found.ledger
    assert (ledger.error <= 1e-9).all()
    assert {"position embeddings", "token type embeddings", "class token"} <= set(ledger.absorbed)
    assert found.relevance["input_ids"].shape == (3, 4, 6)
    if rules == "attnlrp":
        expected = model.words(ids) * model.head.weight[1] / 5
        torch.testing.assert_close(found.relevance["input_ids"], expected.detach())
        torch.testing.assert_close(ledger.absorbed["biases"], model.head.bias[1].detach().expand(3))


# -- the books can fail ------------------------------------------------------------------------------------------------

def leaky(call: Call, x: Tensor, *args: Any) -> Tensor:
    """A bias that tells nobody."""
    return call.func(x, *args)


def test_a_leak_is_an_error(monkeypatch):
    monkeypatch.setitem(table._TABLE, F.linear, table.Op("linear", leaky))
    with pytest.raises(LedgerError, match="do not balance"):
        books("linear", "linear, bias", composite.attnlrp(), inner=False)


def test_a_rule_that_gives_more_than_it_took_is_booked():
    def doubled(a: Tensor, b: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * g, 2 * g

    found = books("add", "of two", composite.attnlrp().but(rules={"add": doubled}), inner=False)
    assert_balanced(found)
    torch.testing.assert_close(found.ledger.absorbed["stabilizer"], -found.ledger.value)
