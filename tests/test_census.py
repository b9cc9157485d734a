"""The census: what it asks, how it is run and written, and that what it finds holds for a sample of architectures."""
from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from relprop.census import architectures, census, examination, keys, run, versions
from relprop.census.architecture import DEVIATION, Architecture
from relprop.result.census import EXPLAINED, QUESTIONS, Census, Entry, Failure

ROOT = Path(__file__).parents[1]
ASSET, RECORD, TABLE = ROOT / "assets/census.json", ROOT / "relprop/census/record.json", ROOT / "assets/census.md"
BERT = "transformers/fill-mask/bert/BertForMaskedLM"
SAMPLE = 70  # every so-manieth architecture is asked by default


class Scale(torch.autograd.Function):
    """An op that leaves torch's functions: no rule can be known for it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Layered(nn.Module):
    """A model of one's own; `spoil` is what it does to its states."""

    def __init__(self, spoil=lambda x: x) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))
        self.head, self.spoil = nn.Linear(16, 3), spoil

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.spoil(x).mean(1))


def of(spoil=lambda x: x) -> Architecture:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 5, 16, generator=generator)
    return Architecture("own", "classification", "own", "Layered", lambda: Layered(spoil), lambda model: {"x": given})


def test_every_class_of_the_auto_tables_is_asked():
    from transformers.models.auto import modeling_auto

    names = {name for key in architectures() if key.startswith("transformers") for name in [key.rsplit("/", 1)[1]]}
    for table in ("CAUSAL_LM", "MASKED_LM", "QUESTION_ANSWERING", "IMAGE_TEXT_TO_TEXT", "AUDIO_CLASSIFICATION"):
        for found in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            assert {found} <= names if isinstance(found, str) else set(found) <= names


def test_keys_are_unique_and_matched_by_pattern():
    assert keys("/bert/BertForMaskedLM$") == [BERT]
    with pytest.raises(ValueError, match="no architecture matches nonsense"):
        keys("nonsense")
    with pytest.raises(ValueError, match="no regular expression"):
        keys("(")


def test_weights_are_random_and_the_same_each_time():
    one, other = (of().model(seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    weight = one["layers.0.linear1.weight"]
    assert weight.std() == pytest.approx(DEVIATION, rel=0.15) and one["layers.0.norm1.weight"].std() > 0.05


def test_what_works_passes_every_question():
    entry = examination.examine(of())
    assert entry.passed == [*QUESTIONS, "time"] and not entry.failures
    assert entry.ruled and entry.explained and entry.layers == 2 and entry.heads == 2
    assert max(entry.ledger.values()) < 1e-4 and max(entry.change.values()) < 1e-5 and entry.time > 0


def test_what_cannot_be_built_is_told_with_its_reason():
    def broken():
        raise RuntimeError("no such\nthing")

    entry = examination.examine(replace(of(), build=broken))
    assert entry.failures == {"builds": Failure("RuntimeError", "no such thing")} and not entry.works


def test_what_does_not_run_by_itself_is_not_held_against_us():
    entry = examination.examine(of(lambda x: x / 0))
    assert "NaN" in str(entry.failures["runs"]) and "attnlrp" not in entry.failures


def test_an_op_without_a_rule_is_named():
    entry = examination.examine(of(lambda x: torch.prod(x, 1, True)))
    assert not entry.explained and entry.ruled is False
    assert entry.failures["attnlrp"].kind == "UnruledOp" and "prod" in entry.failures["attnlrp"].reason


def test_books_that_do_not_balance_are_found():
    entry = examination.examine(of(Scale.apply))
    assert entry.failures["attnlrp"].kind == "LedgerError" and not entry.explained


def test_an_output_that_changes_is_found(monkeypatch):
    monkeypatch.setattr(examination, "_change", lambda plain, output: 1e-3)
    assert "the output changed by 1.0e-03" in examination.examine(of()).failures["cp-lrp"].reason


def test_one_that_takes_too_long_is_told(monkeypatch):
    monkeypatch.setattr(run, "examine", lambda architecture: time.sleep(5))
    with pytest.raises(TimeoutError, match="took more than 1 s"):
        run._entry(BERT, 1)


def test_a_census_is_written_read_and_gone_on_with(tmp_path):
    found = census("fill-mask/(bert|mpnet)/", processes=1, out=tmp_path / "run")
    assert [one.family for one in found] == ["bert", "mpnet"] and found.versions == versions()
    found.save(tmp_path / "census.json")
    assert Census.open(tmp_path / "census.json").to_dict() == found.to_dict()
    lines = tmp_path / "run" / "entries.jsonl"
    first, second = lines.read_text().splitlines()
    marked = json.dumps(json.loads(first) | {"parameters": 7})  # so that it is seen which was not asked again
    lines.write_text(f"{marked}\n{second[:40]}")  # stopped in the middle of a line
    again = census("fill-mask/(bert|mpnet)/", processes=1, out=tmp_path / "run")
    assert sum(one.parameters == 7 for one in again) == 1 and all(one.explained for one in again)
    assert len(lines.read_text().splitlines()) == 2
    (tmp_path / "run" / "config.json").write_text(json.dumps({"versions": {"torch": "0.1"}, "seconds": run.SECONDS}))
    with pytest.raises(ValueError, match='torch: "0.1" there'):
        census("fill-mask/bert/", out=tmp_path / "run")


def test_shares_are_of_what_runs_by_itself():
    made = Entry("own", "t", "a", "A", passed=["builds", "runs", *EXPLAINED, "anatomy"])
    why = {"cp-lrp": Failure("E", "why | so")}
    half = Entry("own", "t", "b", "B", passed=["builds", "runs", "attnlrp"], failures=why)
    none = Entry("own", "t", "c", "C", failures={"builds": Failure("ImportError", "needs natten")})
    found = Census((made, half, none), {"torch": "1"})
    assert found.share("explained") == 0.5 and found.share("attnlrp") == 1
    assert found.counts().loc[("own", "t"), "run"] == 2
    written = found.written()
    assert "why \\| so" in written and "needs natten" in written and "torch 1" in written
    assert found.verdicts()["architectures"]["own/t/c/C"] == ["-......", "builds: ImportError: needs natten"]
    assert "cp-lrp: E: why | so" in found.summary()
    assert len(found.matching("/b/")) == 1
    assert found.table().loc["own/t/a/A", "attnlrp"] and found.table().loc["own/t/c/C", "attnlrp"] is None


@pytest.mark.parametrize("key", list(architectures())[::SAMPLE])
def test_a_sample_is_explained(key):
    entry = run._entry(key, run.SECONDS)
    if not entry.works:
        pytest.skip(f"does not run by itself: {entry.failures}")
    assert entry.explained, entry.failures


@pytest.fixture(scope="module")
def shipped() -> Census:
    return Census.open(ASSET)


def test_the_shipped_census_says_what_was_promised(shipped):
    assert shipped.share("explained") >= 0.95 and shipped.share("anatomy") >= 0.85
    assert len(shipped.works) >= 0.9 * len(shipped) and not any(one.ruled is False and one.explained for one in shipped)
    for one in shipped.works:
        assert all(name in one.passed or one.failures[name].reason for name in EXPLAINED)
        assert not one.explained or max(one.ledger.values()) <= 1e-3 and max(one.change.values()) <= 1e-5


def test_everything_that_is_shipped_of_it_agrees(shipped):
    assert json.loads(RECORD.read_text()) == shipped.verdicts()
    assert TABLE.read_text() == shipped.written()
    assert shipped.written_counts() in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_whole_census():
    """Every architecture of the installed libraries, about ten minutes."""
    found = census()
    assert found.share("explained") >= 0.95 and found.share("anatomy") >= 0.85, found.summary()
    unnamed = [one.key for one in found.works if one.ruled is False and not re.search("no rule for", str(one.failures))]
    assert not unnamed
