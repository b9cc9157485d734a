"""Sweeps that are written as they go: stopped, resumed and shared, with nothing lost or counted twice."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed import killed
from test_effects import CLOSE, model, two
from torch.testing import assert_close

from relprop.crew import Crew
from relprop.intervene import Zero
from relprop.mediation import LogOdds, effects, record
from relprop.mediation.experiment import Experiment
from relprop.mediation.stage import Stage

AT = ["L*.mlp[*]", "L*.attn.H*"]
OPTIONS = dict(at=AT, kind=["total", "direct", "indirect"], batch_size=8, resamples=9)  # two pairs a piece
SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
from test_effects_record import sweep
from relprop.mediation import record
from relprop.mediation.stage import Stage

record.BLOCK = 10
answers = Stage.answers
Stage.answers = lambda self, copies, groups: (time.sleep({pause}), answers(self, copies, groups))[1]
if __name__ == "__main__":
    sweep(out={out!r})
"""


def sweep(**options):
    return effects(model("gpt2"), *two("gpt2"), LogOdds(5, 6), **{**OPTIONS, **options})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(record, "BLOCK", 10)


def script(folder, out, pause=0.0):
    path = folder / "script.py"
    path.write_text(SCRIPT.format(path=[str(Path(__file__).parent)], out=str(out), pause=pause))
    return str(path)


def shards(out):
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.jsonl"))}


def counted(out):
    return Counter((row, json.loads(line)["mediator"]) for path in shards(out) for rows, *lines in
                   [path.read_text().splitlines()] for line in lines for row in json.loads(rows)["rows"])


def same(found, wanted):
    assert found.mediators == wanted.mediators and len(wanted.mediators) == 36
    for name in ("base", "counterfactual", "indirect_outcome", "direct_outcome"):
        assert_close(getattr(found, name), getattr(wanted, name), **CLOSE)


def test_a_sweep_that_is_killed_goes_on_and_counts_nothing_twice(tmp_path):
    out = tmp_path / "out"
    killed(script(tmp_path, out, pause=0.05), lambda: len(shards(out)) >= 3)
    kept = shards(out)
    assert 3 <= len(kept) < 8
    next(iter(kept)).with_name(".000030.jsonl.1234").write_text('{"rows": [0, 1')  # what a kill in a file leaves
    found = sweep(out=out)
    assert {path: when for path, when in shards(out).items() if path in kept} == kept  # nothing was run again
    same(found, sweep())
    counts = counted(out)
    assert len(counts) == 3 * 36 and set(counts.values()) == {1}


@pytest.mark.slow
def test_two_processes_share_a_sweep(tmp_path):
    out = tmp_path / "out"
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--cpu", "--main_process_port", "0"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, script(tmp_path, out)]
    made = subprocess.run(launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          timeout=300)
    assert made.returncode == 0, made.stderr
    before = shards(out)
    assert len(before) == 8 and set(counted(out).values()) == {1}
    same(sweep(out=out), sweep())
    assert shards(out) == before


@pytest.mark.parametrize("size", [2, 3])  # of two pieces: each has one, and each has blocks
def test_processes_share_all_the_work(tmp_path, monkeypatch, size):
    out, own = tmp_path / "out", []
    for rank in range(size):
        monkeypatch.setattr(Crew, "gathered", classmethod(lambda cls, subject, rank=rank: cls(rank, size)))
        before = shards(out)
        if rank < size - 1:
            with pytest.raises(ValueError, match="is missing: the sweep is not complete"):
                sweep(out=out)
        else:
            found = sweep(out=out)
        own.append(len(shards(out)) - len(before))
    same(found, sweep())
    assert sum(own) == 8 and max(own) - min(own) <= 1


def test_controlled_effects_and_estimates_are_written_too(tmp_path):
    options = dict(kind=["total", "controlled"], fixed=Zero())
    assert_close(sweep(out=tmp_path / "a", **options).controlled, sweep(**options).controlled, **CLOSE)
    options = dict(estimate="attribution", verify=5)
    found = sweep(out=tmp_path / "b", **options)
    assert_close(found.indirect, sweep(**options).indirect, **CLOSE)
    assert sum(counted(tmp_path / "b").values()) == 3 * 10  # the first five, and as many drawn


def test_memory_that_runs_out_halves_the_pairs(tmp_path, monkeypatch):
    whole = sweep()
    answers, made, indirect = Stage.answers, [], Experiment.indirect

    def short(self, copies, groups):
        if copies * self.rows > 1:
            raise torch.OutOfMemoryError("no more")
        made.append(self.rows)
        return answers(self, copies, groups)

    monkeypatch.setattr(Stage, "answers", short)
    same(sweep(), whole)
    same(sweep(out=tmp_path), whole)
    assert set(made) == {1} and indirect is Experiment.indirect
    monkeypatch.setattr(Stage, "answers", lambda self, copies, groups: short(replace(self), 2, groups))
    with pytest.raises(torch.OutOfMemoryError):
        sweep()


def test_a_folder_of_other_arguments(tmp_path):
    found = sweep(out=tmp_path)
    assert_close(sweep(out=tmp_path, scale="ratio").indirect, found.indirect_outcome / found.base - 1)  # not run again
    base, other = two("gpt2")
    for options, said in ((dict(at="L*"), "mediators"), (dict(kind="total"), "kinds"), (dict(batch_size=4), "piece"),
                          (dict(keep=torch.tensor([True, False, True])), "rows")):
        with pytest.raises(ValueError, match=f"holds a sweep of effects of another configuration: .*{said}"):
            sweep(out=tmp_path, **options)
    with pytest.raises(ValueError, match="outcome: "):
        effects(model("gpt2"), base, other, LogOdds(5, 7), out=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="inputs.counterfactual"):
        effects(model("gpt2"), base, {**other, "input_ids": other["input_ids"].roll(1, 0)}, LogOdds(5, 6), out=tmp_path,
                **OPTIONS)
    path = next(iter(shards(tmp_path)))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="holds other pairs or mediators"):
        sweep(out=tmp_path)
    path.write_text("\n".join([json.dumps({**json.loads(lines[0]), "base": [9.0, 9.0]}), *lines[1:]]))
    with pytest.raises(ValueError, match="disagree on the outcome itself"):
        sweep(out=tmp_path)
