"""Memory that an explanation takes is known before it is made, and what to do where it is too much."""
from __future__ import annotations

import gc
import warnings

import pytest
import torch
from bench.cost import peak
from families import FAMILIES, _text
from test_bad_input import state
from torch import Tensor, nn

import relprop
from relprop import cli, memory
from relprop.explain import explain
from relprop.memory.prediction import _Small, cut, tokens
from relprop.memory.trace import Trace, grown, levels, traced
from relprop.ops.chunk import ENTRIES, entries, shrunk
from relprop.subject import Subject
from relprop.target import Prediction, Targets, Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WIDE = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=1024)


def text(name: str, **config: object) -> nn.Module:
    return _text(name, **WIDE | config | {"vocab_size": 400}).model()


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(5, 400, (rows, length), generator=torch.Generator().manual_seed(0))


def padded(rows: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, length // 2:] = 0
    return {"input_ids": ids(rows, length), "attention_mask": mask}


CASES = {
    "llama": (lambda: text("LlamaForCausalLM", num_key_value_heads=2), ids(1, 768), 7),
    "bert": (lambda: text("BertForSequenceClassification", num_labels=3), padded(5, 256), 1),
    "bert-eager": (lambda: text("BertForSequenceClassification", num_labels=3, attn_implementation="eager"),
                   padded(3, 256), 1),
    "mixtral": (lambda: text("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4), ids(2, 512), 7),
    "timm-vit": (FAMILIES["timm-vit"].model, FAMILIES["timm-vit"].inputs(rows=6)[0][0], 1),
    "timm-swin": (FAMILIES["timm-swin"].model, FAMILIES["timm-swin"].inputs(rows=4)[0][0], 1),
}
OPTIONS = [{"method": "attnlrp"}, {"method": "attnlrp", "checkpoint": True}, {"method": "cp-lrp", "ledger": False},
           {"method": "gamma"}, {"method": "transformer-attribution"}, {"method": "input-x-gradient"},
           {"method": "attnlrp", "layers": True, "at": ["L*.attn"]}]


def estimated(name: str, **options: object) -> tuple[float, float]:
    build, inputs, target = CASES[name]
    model = build()
    before = state(model)
    found = relprop.estimate(model, inputs, target, **options)
    assert state(model) == before
    gc.collect()
    return found.needed, peak(lambda: explain(model, inputs, target, **options))


@pytest.mark.parametrize("name", ["llama", "bert", "timm-vit"])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_an_estimate_is_right_within_a_quarter(name, options):
    found, expected = estimated(name, **options)
    assert abs(found / expected - 1) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_estimates_are_right_within_a_quarter(name, options):
    found, expected = estimated(name, **options)
    assert abs(found / expected - 1) < 0.25


def test_less_is_run_than_is_estimated(monkeypatch):
    model, seen = CASES["llama"][0](), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    relprop.estimate(model, ids(4, 768), 7, method="attnlrp")
    assert 0 < sum(seen) < 4 * 768 / 6


def test_the_first_rows_at_once_are_estimated():
    model = CASES["llama"][0]()
    one, of_four = (relprop.estimate(model, ids(rows, 256), 7, method="attnlrp", batch_size=1) for rows in (1, 4))
    assert abs(of_four.needed / one.needed - 1) < 0.1
    assert relprop.estimate(model, ids(4, 256), 7, method="attnlrp").needed > 3 * one.needed


def test_an_estimate_reads_well():
    found = memory.Estimate(2**30, 2 * 2**30, 2**29, "cpu", 12 * 2**30)
    assert str(found) == ("about 2.5 GiB of 12.0 free on cpu: 2.0 GiB kept for the way back, 512 MiB at work; "
                          "beside 1.0 GiB of weights")
    assert str(memory.Estimate(0, 2**20, 2**20, "cpu", 12 * 2**30)).startswith("about 2.0 MiB of 12.0 GiB free on cpu")
    assert found.fits and found.total == 3.5 * 2**30
    assert not memory.Estimate(0, 12 * 2**30, 1, "cpu", 12 * 2**30).fits
    assert memory.Estimate(0, 12 * 2**30, 1, "mps").fits  # nobody knows


def test_weights_count_once():
    model = text("BertForMaskedLM")  # whose embeddings are its head
    assert memory.held_by(model) == sum(p.numel() * 4 for p in model.parameters()) + sum(
        b.numel() * b.element_size() for b in model.buffers())


# -- warnings ----------------------------------------------------------------------------------------------------------

def test_explain_warns_before_it_starts(monkeypatch):
    model = CASES["llama"][0]()
    monkeypatch.setattr(memory.prediction, "free", lambda device: 2**18)
    with pytest.warns(UserWarning, match="takes about .* of 0.0 GiB free on cpu: .*; try batch_size=1 or checkpoint"):
        explain(model, ids(2, 256), 7, method="attnlrp")
    with pytest.warns(UserWarning, match="try a shorter input, or a device with more memory"):
        explain(model, ids(1, 256), 7, method="attnlrp", checkpoint=True)


def test_what_is_small_is_neither_estimated_nor_warned_of(monkeypatch):
    model = CASES["llama"][0]()
    monkeypatch.setattr(memory, "predicted", lambda *args: pytest.fail("estimated"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(model, ids(1, 16), 7, method="attnlrp")


def test_the_command_says_what_it_would_take():
    from typer.testing import CliRunner

    said = CliRunner().invoke(cli.app, ["explain", "A fine film.", "--model", "reviews-bert", "--estimate"])
    assert said.exit_code == 0 and "kept for the way back" in said.stdout
    said = CliRunner().invoke(cli.app, ["explain", "A fine film.", "--model", "reviews-bert", "--estimate", "--json",
                                        "--checkpoint"])
    assert '"needed": ' in said.stdout


# -- its parts ---------------------------------------------------------------------------------------------------------

def test_a_trace_is_what_the_allocator_sees():
    def run() -> None:
        x = torch.ones(1000, requires_grad=True)
        ((x * 2).exp()[:500] + 1).sum().backward()

    with traced() as trace:
        run()
    assert levels(trace.sizes, [])[0] == pytest.approx(peak(run), abs=32)  # but for a number or two
    assert sum(trace.sizes) == 0


def test_views_and_writes_take_nothing():
    x = torch.ones(10)
    with traced() as trace:
        x.view(2, 5).add_(1)
        y = x.exp()
        trace.mark()
        y[2:].zero_()
    assert trace.sizes == [40] and trace.marks == [1]
    assert isinstance(trace, Trace)


def test_the_peak_and_what_is_held_at_a_mark():
    assert levels([4, 8, -4, 2, -10], [1, 3]) == (12, 8)
    assert levels([], []) == (0, 0)


@pytest.mark.parametrize("of", [lambda T: 5.0, lambda T: 3 + 2.0 * T, lambda T: 7.0 * T * T, lambda T: T * (T + 3.0)])
def test_sizes_grow_as_they_do(of):
    assert grown(of(16), of(32), (16, 32), 1000) == pytest.approx(of(1000))


@pytest.mark.parametrize("left", [False, True])
def test_a_text_is_cut_where_it_is_not_padding(left):
    given = padded(2, 40)
    if left:
        given = {name: value.flip(1) for name, value in given.items()}
    batch = Subject.from_module(text("LlamaForCausalLM")).prepare(given)
    part = cut(batch, 12)
    assert tokens(part) == 12 and part.kwargs["input_ids"].shape == (2, 12) and part.kwargs["attention_mask"].all()
    assert torch.equal(part.kwargs["input_ids"], batch.kwargs["input_ids"][:, -12:] if left else
                       batch.kwargs["input_ids"][:, :12])
    assert part.units.padding == [[False] * 12] * 2


def test_what_is_padded_stays_so():
    """A mask costs memory, and models leave out one that masks nothing."""
    subject = Subject.from_module(text("BertForSequenceClassification"))
    batch, seen = subject.prepare(padded(4, 64)), []
    small = _Small(lambda subject, batch, targets: seen.append(batch.kwargs["attention_mask"]), subject, batch,
                   Targets((Prediction(),) * 4, Vocabulary()))
    small.traced(2, 16)
    small.traced(2, None)
    assert [mask.shape for mask in seen] == [(2, 16), (2, 64)] and not any(bool(mask.all()) for mask in seen)
    assert all(bool(mask.any(1).all()) for mask in seen)


def test_chunks_shrink_for_a_while():
    with shrunk(0.5, 0.25):
        assert entries() == ENTRIES // 2 and entries(of_pairs=True) == ENTRIES // 4
    assert entries() == entries(of_pairs=True) == ENTRIES


def test_an_allocator_that_is_out_of_memory_is_known():
    assert memory.out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not memory.out_of_memory(ValueError("out of memory"))
