"""Sweeps that are written as they go: stopped, resumed and shared, with nothing lost or counted twice."""
from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from killed import killed, together
from test_effects import CLOSE, model, two
from torch.testing import assert_close

from relprop.crew import Crew
from relprop.intervene import Zero
from relprop.mediation import KL, LogOdds, effects, path_effects, record, subset, subsets
from relprop.mediation.experiment import Experiment
from relprop.mediation.stage import Stage
from relprop.subject import Subject

AT = ["L*.mlp[*]", "L*.attn.H*"]
OPTIONS = dict(at=AT, kind=["total", "direct", "indirect"], batch_size=8, resamples=9)  # two pairs a piece
SCRIPT = """
import os, sys, time
sys.path[:0] = {path!r}
import torch
from test_effects_record import SWEEPS
from relprop.mediation import record
from relprop.mediation.stage import Stage

record.BLOCK = 10
answers = Stage.answers
Stage.answers = lambda self, copies, groups: (time.sleep({pause}), answers(self, copies, groups))[1]
if __name__ == "__main__":
    from pathlib import Path
    Path(__file__).with_name("rank" + os.environ.get("RANK", "")).write_text("of " + os.environ.get("WORLD_SIZE", "1"))
    found = SWEEPS[{kind!r}](out={out!r})
    if {saved!r}:
        torch.save(found.indirect, {saved!r} + os.environ["RANK"])
"""
PATHS = dict(sender=["embed", "L0.attn.H*", "L0.mlp"], receiver=["L1.mlp", "L1.attn.H*"], batch_size=8, resamples=9)
CHOICE = dict(at=["L*.attn.H*", "L*.mlp"], k=3, batch_size=8)
SMALL = {"effects": dict(at=["L*.attn.H*"])}  # for tests that need no more


def sweep(**options):
    return effects(model("gpt2"), *two("gpt2"), LogOdds(5, 6), **{**OPTIONS, **options})


def paths(**options):
    return path_effects(model("gpt2"), *two("gpt2"), LogOdds(5, 6), **{**PATHS, **options})


def few(**options):
    return subset(model("gpt2"), *two("gpt2"), LogOdds(5, 6), **{**CHOICE, **options})


def in_layers(**options):
    return subsets(model("gpt2"), *two("gpt2"), LogOdds(5, 6), **{**CHOICE, "how": "top-k", **options})


SWEEPS = {"effects": sweep, "paths": paths, "subset": few, "subsets": in_layers}


def numbers(found):
    """All that a sweep of any kind found, by name."""
    if isinstance(found, dict):
        return {f"{layer} {name}": value for layer, one in found.items() for name, value in numbers(one).items()}
    if hasattr(found, "chosen"):
        return {name: getattr(found, name) for name in ("chosen", "effects", "alone", "whole", "total")}
    return {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}


def agree(found, wanted):
    found, wanted = numbers(found), numbers(wanted)
    assert found.keys() == wanted.keys() and len(found) > 2
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert_close(found[name], value, **CLOSE)
        else:
            assert found[name] == value


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(record, "BLOCK", 10)


def script(folder, out, pause=0.0, kind="effects", saved=""):
    path = folder / "script.py"
    path.write_text(SCRIPT.format(path=[str(Path(__file__).parent)], out=out and str(out), pause=pause, kind=kind,
                                  saved=saved))
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
@pytest.mark.parametrize("kind", ["paths", "subset"])
def test_sweeps_of_every_kind_are_killed_and_go_on(tmp_path, kind):
    out = tmp_path / "out"
    killed(script(tmp_path, out, pause=0.05, kind=kind), lambda: len(shards(out)) >= 3)
    kept = shards(out)
    found = SWEEPS[kind](out=out)
    assert {path: when for path, when in shards(out).items() if path in kept} == kept and len(shards(out)) > len(kept)
    agree(found, SWEEPS[kind]())


@pytest.mark.parametrize("kind", SWEEPS)
def test_what_is_stopped_anywhere_goes_on(tmp_path, monkeypatch, kind):
    """Stopped every few runs, again and again: nothing that was written is run again, and the end is the same."""
    monkeypatch.setattr(record, "BLOCK", 3 if kind == "paths" else 10)
    out, answers, runs, stops, kept, most = tmp_path / "out", Stage.answers, [], 0, {}, 10 ** 9

    def some(self, copies, groups):
        runs.append(copies)
        if len(runs) > most:
            raise KeyboardInterrupt
        return answers(self, copies, groups)

    monkeypatch.setattr(Stage, "answers", some)
    wanted = SWEEPS[kind](out=tmp_path / "whole")
    most = len(runs) // 3
    while True:
        runs.clear()
        try:
            found = SWEEPS[kind](out=out)
            break
        except KeyboardInterrupt:
            stops += 1
            now = shards(out)
            assert {path: when for path, when in now.items() if path in kept} == kept and len(now) > len(kept)
            kept = now
    assert 2 <= stops < 20
    agree(found, wanted)
    runs.clear()
    agree(SWEEPS[kind](out=out), wanted)
    assert not runs  # nothing left to run
    if kind == "subset":
        before, most = shards(out), 10 ** 9
        more = few(out=out, k=4)
        assert more.chosen[:3] == wanted.chosen and len(more.chosen) == 4
        assert {path.relative_to(out).parts[0] for path in set(shards(out)) - set(before)} == {"greedy-004"}
        agree(more, few(k=4))


@pytest.mark.slow
def test_two_processes_share_a_sweep(tmp_path):
    out = tmp_path / "out"
    together(script(tmp_path, out))
    before = shards(out)
    assert len(before) == 8 and set(counted(out).values()) == {1}
    assert [path.read_text() for path in tmp_path.glob("rank*")] == ["of 2"] * 2
    same(sweep(out=out), sweep())
    assert shards(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["effects", "paths"])
def test_two_processes_share_a_sweep_without_a_folder(tmp_path, kind):
    saved = str(tmp_path / "found")
    together(script(tmp_path, None, kind=kind, saved=saved))
    wanted = SWEEPS[kind]().indirect
    for rank in "01":
        assert_close(torch.load(saved + rank, weights_only=True), wanted, **CLOSE)


class Together:
    """Crews of several processes, run one after the other in this one: their tensors are summed when all have come, the
    first time they pass with their own alone."""

    def __init__(self, size, asked=None):
        self.size, self.given, self.asked = size, [], asked

    def crew(self, rank):
        group = self

        class Member(Crew):
            def summed(self, x):
                number = self.counted = getattr(self, "counted", -1) + 1
                group.given.append((rank, number, x.clone()))
                return sum(y for _, which, y in group.given if which == number)

            def agree(self, digest):
                return group.asked is None or group.asked

        Member.__setattr__ = object.__setattr__
        return Member(rank, self.size)


@pytest.mark.parametrize("kind", ["effects", "paths"])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_all_the_work_without_a_folder(monkeypatch, kind, size):
    wanted, together, runs, answers = SWEEPS[kind](), Together(size), [], Stage.answers
    monkeypatch.setattr(Stage, "answers", lambda self, copies, groups: (
        runs.append(copies * self.rows if groups else 0), answers(self, copies, groups))[1])
    each = []
    for rank in range(size):
        monkeypatch.setattr(Crew, "gathered", classmethod(lambda cls, subject, rank=rank: together.crew(rank)))
        runs.clear()
        found = SWEEPS[kind]()
        each.append(sum(runs))
    agree(found, wanted)  # of the last, which has the sums of all
    assert min(each) > 0 and max(each) < 0.8 * sum(each)
    apart = Together(size, asked=False)  # processes that were asked different things do their own
    monkeypatch.setattr(Crew, "gathered", classmethod(lambda cls, subject: apart.crew(1)))
    agree(SWEEPS[kind](), wanted)
    assert not apart.given


@pytest.mark.parametrize("other, same", [("0123456789abcdef", True), ("0123456789abcdee", False),
                                         ("1123456789abcdef", False)])
def test_processes_tell_whether_they_were_asked_the_same(other, same):
    given = []

    class Two(Crew):
        def summed(self, x):
            given.append(x)
            return sum(given)

    Two(0, 2).agree("0123456789abcdef")
    assert Two(1, 2).agree(other) is same and len(given) == 2
    assert Crew().agree("ffffffffffffffff")


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


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("kind", SWEEPS)
def test_progress_comes_to_its_end(tmp_path, monkeypatch, kind, written):
    """Also where a part, or all, is there already."""
    import tqdm.auto

    bars = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    options = dict(out=tmp_path / "out") if written else {}
    SWEEPS[kind](show_progress=True, **options)
    assert len(bars) == 1 and bars[0].n == bars[0].total > 0
    if written:
        SWEEPS[kind](show_progress=True, **options)
        assert bars[1].n == bars[1].total


SHORTAGES = [torch.OutOfMemoryError("no more"), MemoryError(),
             RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")]


@pytest.mark.parametrize("kind, error", [*((kind, SHORTAGES[0]) for kind in SWEEPS),
                                         *(("effects", error) for error in SHORTAGES[1:])])
def test_memory_that_runs_out_halves_what_is_run(tmp_path, monkeypatch, kind, error):
    """First the copies, then the pairs: in the end one row at a time."""
    run = partial(SWEEPS[kind], **SMALL.get(kind, {}))
    whole, answers, made, tried, indirect = run(), Stage.answers, [], [], Experiment.indirect

    def short(self, copies, groups):
        tried.append(copies * self.rows)
        if copies * self.rows > 1:
            raise error
        made.append(self.rows)
        return answers(self, copies, groups)

    monkeypatch.setattr(Stage, "answers", short)
    agree(run(), whole)
    assert set(made) == {1} and max(tried) > 1 and indirect is Experiment.indirect
    if error is SHORTAGES[0]:
        agree(run(out=tmp_path), whole)
    monkeypatch.setattr(Stage, "answers", lambda self, copies, groups: short(replace(self), 2, groups))
    with pytest.raises(type(error)):
        run()


def test_an_error_that_is_no_shortage_is_no_reason_to_try_again(monkeypatch):
    tried = []

    def wrong(self, copies, groups):
        tried.append(copies)
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Experiment, "_sweep", lambda *args: wrong(None, 1, {}))
    with pytest.raises(RuntimeError, match="shapes differ"):
        sweep()
    assert len(tried) == 1


@pytest.mark.parametrize("method", ["attribution", "integrated-gradients"])
def test_memory_that_runs_out_halves_an_estimate(monkeypatch, method):
    from relprop.approximation.run import Run

    options = dict(estimate=method, verify=3, batch_size=None)
    whole, made, sizes = sweep(**options), Run.__init__, []

    def short(self, model, known, queries, *args, **more):
        sizes.append(queries[0].base.rows)
        if queries[0].base.rows > 1:
            raise torch.OutOfMemoryError("no more")
        made(self, model, known, queries, *args, **more)

    monkeypatch.setattr(Run, "__init__", short)
    found = sweep(**options)
    assert found.mediators == whole.mediators and sizes[0] == 3 and sizes[-3:] == [1, 1, 1]
    agree(found, whole)


@pytest.mark.parametrize("ask", [None, KL()], ids=["prediction", "KL"])
def test_memory_that_runs_out_halves_the_runs_that_fix_an_outcome(monkeypatch, ask):
    run = lambda: effects(model("gpt2"), *two("gpt2"), ask, at="L0.mlp", resamples=9)
    whole, forward, sizes = run(), Subject.forward, []

    def short(self, batch):
        sizes.append(batch.rows)
        if batch.rows > 1:
            raise torch.OutOfMemoryError("no more")
        return forward(self, batch)

    monkeypatch.setattr(Subject, "forward", short)
    agree(run(), whole)
    assert sizes == [3, 1, 2, 1, 1]


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
