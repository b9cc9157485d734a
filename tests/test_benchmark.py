"""The benchmark: what its tables say of maps that are right, wrong or empty; stopped, resumed, and shared."""
from __future__ import annotations

import csv
import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from killed import killed, together
from torch import nn
from typer.testing import CliRunner

from relprop import cli, data
from relprop.benchmark import CONTROLS, METRICS, Benchmark, benchmark, open_benchmark, shard
from relprop.benchmark.method import listed
from relprop.benchmark.metric import named
from relprop.benchmark.summary import summary
from relprop.data import Data, Example
from relprop.errors import IndependentOutput
from relprop.load import load
from relprop.pixels import plain
from relprop.result import Cell, Cost, Relevance, Table
from relprop.subject import Subject
from relprop.view import forest, report
from relprop.view.forest import verdict

QUIET = {"show_progress": False}
MASKED = ("pixel-accuracy", "mean-average-precision", "mean-iou", "pointing-game", "relevance-mass", "relevance-rank",
          "class-mass")
PERTURBED = ("area", "positive-auc", "negative-auc", "deletion", "insertion", "comprehensiveness", "sufficiency",
             "road", "infidelity")


# A model and data of which everything is known -----------------------------------------------------------------------


class Quadrants(nn.Module):
    """Pictures of 8 x 8 pixels; a class for each quadrant, its logit the light in it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(quadrants().flatten(1).float())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(pixels.flatten(1))


def quadrants() -> torch.Tensor:
    """Mask of each quadrant, (4, 8, 8)."""
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    for number in range(4):
        y, x = 4 * (number // 2), 4 * (number % 2)
        masks[number, y:y + 4, x:x + 4] = True
    return masks


def subject() -> Subject:
    torch.manual_seed(0)
    return Subject(Quadrants().eval(), modality="image", labels=("a", "b", "c", "d"), name="quadrants", patch=(2, 2),
                   pixels=plain(1, (8, 8), (0.0,), (1.0,)))


def pictures(count: int = 24, *, wrong: int = 0) -> Data:
    """Dark pictures with light in one quadrant, and less in another; `wrong` of them ask for what is not there."""
    rng, masks, examples = np.random.default_rng(0), quadrants(), []
    for row in range(count):
        light, faint, dark, _ = rng.permutation(4).tolist()
        picture = 40.0 * rng.random((8, 8))
        picture[masks[light].numpy()] += 150 + 50 * rng.random(16)
        picture[masks[faint].numpy()] += 60
        asked = dark if row < wrong else light
        examples.append(Example(picture.round().astype(np.uint8), "abcd"[asked], marked=masks[asked],
                                others={"abcd"[faint]: masks[faint]}))
    return Data("pictures", "image", examples)


def answer(batch, targets, change=lambda masks: masks):
    """A map as `Relevance`: the mask of each row's own target, changed."""
    masks = torch.stack([quadrants()[target.index].float() for target in targets.targets])
    return Relevance(map=change(masks), value=torch.zeros(batch.rows), target=["?"] * batch.rows, method="answer",
                     conservation="none", units=batch.units, forwards=3, backwards=2)


def truth(model, batch, targets):
    return answer(batch, targets, lambda masks: masks + 0.01 * batch.args[0][:, 0] * masks)  # no ties but zeros


def wrong(model, batch, targets):
    return answer(batch, targets, lambda masks: (1 - masks) * (1.5 - batch.args[0][:, 0]) - masks)


def empty(model, batch, targets):
    return answer(batch, targets, torch.zeros_like)


def broken(model, batch, targets):
    if batch.args[0].flatten(1).sum(1).frac().lt(0.3).any():  # some rows, whichever batch they come in
        raise IndependentOutput("it does not depend on anything")
    return truth(model, batch, targets)


def slow(model, batch, targets):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return truth(model, batch, targets)


def run(methods, metrics=("pointing-game", "relevance-mass"), *, what=None, **options):
    return benchmark(subject(), pictures() if what is None else what, methods=methods, metrics=metrics,
                     **QUIET | {"batch_size": 8, **options})


# What a table says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", MASKED + PERTURBED)
def test_the_truth_is_best_chance_between_and_a_wrong_map_worst(metric):
    found = run({"truth": truth, "wrong": wrong, "input-x-gradient": "input-x-gradient"}, [metric])
    best, chance, worst = (found.cell(metric, name).mean for name in ("truth", "random", "wrong"))
    sign = 1 if METRICS[metric].best == "higher" else -1
    if metric == "infidelity":  # a map that predicts nothing and one that predicts the opposite are as bad
        assert 10 * best < chance == pytest.approx(worst, rel=0.05)
    else:
        assert sign * best > sign * chance > sign * worst, (best, chance, worst)
    if metric in MASKED:
        assert best == pytest.approx(1)
    reverse = found.cell(metric, "reversed").mean
    assert sign * best > sign * (worst if reverse is None else reverse)  # no positive relevance is left to weigh
    assert found.best(metric) in ("truth", "input-x-gradient")
    cell = found.cell(metric, "wrong")
    assert sign * cell.difference < 0 and verdict(found, cell) == "worse"
    assert cell.difference == pytest.approx(worst - best) and cell.difference_low <= cell.difference


def test_every_metric_says_what_it_is():
    assert len(METRICS) == 26 and all(metric.name == name for name, metric in METRICS.items())
    for metric in METRICS.values():
        assert metric.best in ("higher", "lower", "zero") and metric.about and " et al. " in metric.reference


def test_a_table_has_its_controls_intervals_and_tests():
    found = run({"truth": truth, "again": truth, "wrong": wrong}, ["relevance-mass"])
    assert list(found.table.index.get_level_values("method")) == ["truth", "again", "wrong", *CONTROLS[:3]]
    assert found.methods == ("truth", "again", "wrong") and found.controls == CONTROLS[:3]
    random = found.table.loc["relevance-mass", "random"]
    assert random["low"] < random["mean"] < random["high"] and random["rows"] == 24
    assert random["difference_high"] < 0 and 0 < random["p_value"] <= random["p_holm"] < 0.01
    same = found.cell("relevance-mass", "again")
    assert (same.difference, same.p_value, same.p_holm) == (0, 1, 1) and verdict(found, same) == ""
    first = found.cell("relevance-mass", "truth")
    assert first.difference is None and first.p_value is None and first.low == first.mean == first.high == 1
    assert found.table["best"].unique().tolist() == ["higher"]


def test_costs_are_counted_and_measured(monkeypatch):
    monkeypatch.setenv("SLOW", "0.25")
    found = run({"truth": truth, "slow": slow}, count=8)
    assert list(found.cost.index) == ["truth", "slow"]  # controls cost nothing that anyone wants to know
    assert found.cost.loc["truth", ["forwards", "backwards"]].tolist() == [3, 2]
    assert found.cost.loc["slow", "seconds"] > 0.25 / 8 > found.cost.loc["truth", "seconds"]
    assert found.cost.loc["slow", "relative"] > 5 * found.cost.loc["truth", "relative"] > 0


def test_an_empty_map_gets_no_number():
    metrics = [name for name in METRICS if METRICS[name].lacks(subject(), pictures()) is None]
    found = run({"truth": truth, "empty": empty}, metrics, count=4)
    assert len(metrics) > 20
    for metric in metrics:
        cell = found.cell(metric, "empty")
        assert cell.mean is None and cell.rows == 0 and cell.difference is None and cell.p_value is None
        assert cell.undefined == {"the map is 0 on all 64 units: there is nothing to rank": 4}
        assert np.isnan(found.table.loc[(metric, "empty"), "mean"])
        assert found.table.loc[(metric, "empty"), "undefined"] == 4
    assert "–" in found.written().loc["empty"].tolist()


def test_a_method_that_fails_on_some_rows_keeps_the_others():
    found = run({"truth": truth, "broken": broken}, ["relevance-rank"])
    cell = found.cell("relevance-rank", "broken")
    failed = cell.undefined["it does not depend on anything"]
    assert 0 < failed < 24 and cell.rows == 24 - failed and cell.mean == 1
    assert cell.difference == 0  # on the rows that both have


def test_inputs_the_model_gets_wrong_are_left_out_and_counted():
    found = run({"truth": truth}, what=pictures(wrong=5))
    assert found.about["skipped"] == {"the model does not say what is asked for": 5} and found.about["rows"] == 24
    assert found.cell("pointing-game", "random").rows == 19
    every = run({"truth": truth}, what=pictures(wrong=5), correct_only=False)
    assert every.cell("pointing-game", "random").rows == 24 and every.about["skipped"] == {}


def test_groups_of_rows_are_drawn_together():
    rows = pictures(40)
    twins = Data("twins", "image", [replace(one, group=f"g{row // 10}") for row, one in enumerate(rows.examples)])
    alone, together = (run({"truth": truth}, ["relevance-mass"], what=what) for what in (rows, twins))
    assert together.about["groups"] == 4 and alone.about["groups"] == 40
    assert alone.cell("relevance-mass", "random").mean == together.cell("relevance-mass", "random").mean
    assert together.cell("relevance-mass", "random").p_value == pytest.approx(2 / 2**4)


def test_maps_of_pixels_can_be_summed_over_patches():
    spotted = lambda model, batch, targets: answer(batch, targets, lambda masks: masks * checker())
    checker = lambda: (torch.arange(64).view(8, 8) + torch.arange(8)[:, None]) % 2
    pixels, patches = (run({"spotted": spotted}, ["relevance-rank"], by=by) for by in (None, "patch"))
    assert pixels.cell("relevance-rank", "spotted").mean < 0.8 < patches.cell("relevance-rank", "spotted").mean == 1


def test_randomised_weights_and_other_classes_are_measured_where_asked():
    names = ["cascading-randomisation", "full-randomisation", "independent-randomisation", "class-contrast",
             "max-sensitivity"]
    found = run({"gradient": "input-x-gradient", "truth": truth}, names, count=8)
    for name in names[:3]:
        assert found.cell(name, "truth").mean == pytest.approx(1)  # it does not look at the model
        assert abs(found.cell(name, "gradient").mean) < 0.5
    assert found.cell("class-contrast", "gradient").mean < 0.5
    assert found.cell("class-contrast", "centre-prior").mean == pytest.approx(1)  # it does not know what was asked
    assert 0 < found.cell("max-sensitivity", "gradient").mean < 0.2 < found.cell("max-sensitivity", "random").mean
    assert found.best("full-randomisation") == "gradient"
    assert not set(names) & {metric.name for metric in named(None, subject(), pictures())}


def test_texts_are_measured_against_rationales_and_labels(tmp_path):
    films = {"POSITIVE": ("wonderful", "great", "beautiful"), "NEGATIVE": ("terrible", "boring", "dull")}
    lines = [{"words": ["a", word, "film"], "spans": [[1, 2]], "labels": [0, 2, 0], "target": target}
             for target, words in films.items() for word in words]
    path = tmp_path / "films.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = benchmark("reviews-bert", path, methods=["attnlrp", "occlusion"], batch_size=4, **QUIET)
    assert found.controls == CONTROLS
    for metric in ("auprc", "token-f1", "rank-correlation", "sign-agreement"):
        assert found.cell(metric, "attnlrp").mean > 0.8 > found.cell(metric, "reversed").mean + 0.2
        assert found.cell(metric, "attnlrp").rows >= 5
    assert found.cell("area", "attnlrp").mean > found.cell("area", "random").mean
    hidden = benchmark("reviews-bert", path, methods=["attnlrp"], metrics=["area"], by="word", baseline="delete",
                       **QUIET)
    assert 0 < hidden.cell("area", "attnlrp").mean != found.cell("area", "attnlrp").mean


def test_sequences_are_measured_where_the_answer_is_known(shared):
    found = benchmark(load(shared / "models" / "gpt2-sorted-list"), "sorted-lists", methods=["attnlrp", "gradient"],
                      metrics=["relevance-mass", "auprc", "token-f1"], count=40, **QUIET)
    assert found.cell("relevance-mass", "attnlrp").mean > 0.8
    assert found.cell("auprc", "attnlrp").mean > 0.8 > found.cell("auprc", "random").high


def test_a_token_for_what_is_removed_is_also_where_methods_start_if_there_is_no_other():
    asked = {"methods": ["occlusion", "gradient"], "metrics": ["relevance-mass"], "count": 4, "correct_only": False}
    model = tiny.gpt2()
    found, given, other = (benchmark(model, "brackets", **asked, **options, **QUIET) for options in (
        {"baseline": 3}, {"options": {"occlusion": {"baseline": 3}}}, {"options": {"occlusion": {"baseline": 4}}}))
    assert found.about["methods"] == {**found.about["methods"], "occlusion": {"method": "occlusion", "baseline": 3},
                                      "gradient": {"method": "gradient"}}
    masses = [one.cell("relevance-mass", "occlusion").mean for one in (found, given, other)]
    assert masses[0] == masses[1] != masses[2]
    assert listed(load("reviews-bert"), ["occlusion"], baseline=3)[0].about == {"method": "occlusion"}


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"metrics": ["pointing-gme"]}, "unknown metric 'pointing-gme'; the metrics are area, positive-auc.*did you mean"),
    ({"metrics": []}, "no metric to measure with"),
    ({"metrics": ["auprc"]}, "'auprc' does not apply: data 'pictures' is pictures, and it measures text"),
    ({"metrics": ["sign-agreement"]}, "does not apply: data 'pictures' has no labels of words"),
    ({"methods": ["atnlrp"]}, "unknown method 'atnlrp'; the methods are attnlrp.*; did you mean 'attnlrp'\\?"),
    ({"methods": []}, "no method to compare"), ({"methods": ["gradient", "gradient"]}, "comes twice"),
    ({"methods": {"reversed": "gradient"}}, "'reversed' is the name of a control"),
    ({"options": {"rollout": {}}}, "options of 'rollout', which is not among the methods gradient"),
    ({"by": "letter"}, "by is one of token, word, patch"), ({"batch_size": 0}, "at least 1")])
def test_slips_say_what_there_is(options, message):
    arguments = {"methods": ["gradient"], "metrics": ["pointing-game"], **options}
    with pytest.raises(ValueError, match=message):
        run(**arguments)


def test_metrics_that_do_not_apply_say_why():
    bare = Data("bare", "image", [Example(np.zeros((8, 8), np.uint8))])
    texts = Data("texts", "text", [Example("a film")])
    for name, what, message in [("relevance-mass", bare, "marks nothing"), ("class-mass", bare, "no masks of other"),
                                ("road", texts, "is text, and it measures pictures")]:
        with pytest.raises(ValueError, match=message):
            named([name], subject(), what)
    assert {metric.name for metric in named(None, subject(), bare)} == set(PERTURBED)
    with pytest.raises(TypeError, match="method 'x' is a int"):
        run({"x": 3})
    with pytest.raises(ValueError, match="is of text, and quadrants reads image"):
        run(["gradient"], what=texts, metrics=["area"])


def test_a_mask_of_another_size_says_so():
    odd = Data("odd", "image", [Example(np.zeros((8, 8), np.uint8), "a", marked=torch.ones(4, 8).bool())])
    with pytest.raises(ValueError, match=r"a mask of \(4, 8\) for a picture of \(8, 8\)"):
        run(["gradient"], what=odd)


# Files, and what is left of a run that was stopped -------------------------------------------------------------------


def rows(folder):
    with (folder / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def shards(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "rows").rglob("[0-9]*.jsonl")}


def test_everything_is_saved_and_read_again(tmp_path):
    found = run({"truth": truth, "empty": empty}, out=tmp_path / "made", what=pictures(wrong=2))
    names = {"config.json", "rows", "rows.csv", "table.csv", "cost.csv", "table.json", "table.html", "table.svg"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == names
    again = open_benchmark(tmp_path / "made")
    assert isinstance(again, Benchmark) and again.to_dict() == found.to_dict()
    assert (tmp_path / "made" / "table.csv").read_text().startswith("metric,method,mean,low,high")
    values = rows(tmp_path / "made")
    assert len(values) == 24 * 5 * 2 and Counter(line["method"] for line in values)["truth"] == 48
    mean = np.mean([float(line["value"]) for line in values if line["value"] and line["method"] == "random"
                    and line["metric"] == "relevance-mass"])
    assert mean == pytest.approx(found.cell("relevance-mass", "random").mean)
    page = (tmp_path / "made" / "table.html").read_text()
    assert "quadrants on pictures" in page and "nothing to rank" in page and "does not say what is asked" in page
    assert found._repr_html_().startswith("<div")


def test_a_finished_run_is_read_not_run(tmp_path):
    first = run({"truth": truth}, out=tmp_path)
    before = shards(tmp_path)
    assert len(before) == 3 * 4 and run({"truth": truth}, out=tmp_path).to_dict() == first.to_dict()
    assert shards(tmp_path) == before


@pytest.mark.parametrize("change, message", [
    ({"methods": {"truth": truth, "wrong": wrong}}, r"methods.wrong: nothing there, \{.*wrong.*\} here"),
    ({"metrics": ["pointing-game"]}, r'metrics: \["pointing-game", "relevance-mass"\] there, \["pointing-game"\] here'),
    ({"seed": 1}, "options.seed: 0 there, 1 here"), ({"batch_size": 4}, "options.batch_size: 8 there, 4 here"),
    ({"correct_only": False}, "options.correct_only: true there, false here"),
    ({"what": pictures(23)}, "data.rows: 24 there, 23 here"),
    ({"what": pictures(wrong=1)}, "data.fingerprint")])
def test_another_configuration_in_the_same_folder_is_an_error(tmp_path, change, message):
    run({"truth": truth}, out=tmp_path)
    before = (tmp_path / "table.json").read_text()
    with pytest.raises(ValueError, match=message):
        run(**{"methods": {"truth": truth}, "out": tmp_path, **change})
    assert (tmp_path / "table.json").read_text() == before


def test_other_weights_and_other_things_in_the_folder_are_errors(tmp_path):
    run({"truth": truth}, out=tmp_path / "made")
    changed = subject()
    with torch.no_grad():
        changed.model.head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="subject.weights"):
        benchmark(changed, pictures(), methods={"truth": truth}, metrics=["pointing-game", "relevance-mass"],
                  out=tmp_path / "made", batch_size=8, **QUIET)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no benchmark; choose a new or an empty folder"):
        run({"truth": truth}, out=tmp_path / "else")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_benchmark as toys

if __name__ == "__main__":
    toys.torch.set_num_threads(1)
    toys.run({{"truth": toys.{method}, "wrong": toys.wrong}}, toys.SHARED_METRICS, out={out!r}, batch_size=2)
"""
SHARED_METRICS = ["pointing-game", "relevance-mass", "area", "infidelity", "road"]


def script(folder, method, out):
    path = folder / f"{method}.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), method=method, out=str(out)))
    return path


def test_a_run_that_is_killed_goes_on_and_counts_nothing_twice(tmp_path):
    out = tmp_path / "out"
    killed(script(tmp_path, "slow", out), lambda: len(list(out.glob("rows/00-*/[0-9]*.jsonl"))) >= 3, SLOW="0.3")
    kept = shards(out)
    assert 3 <= len(list(out.glob("rows/00-*/[0-9]*.jsonl"))) < 12 and not (out / "table.json").exists()
    stray = next(iter(kept)).with_name(".000022.jsonl.1234")
    stray.write_text('{"row": 22, "values"')  # what a kill in the middle of a file leaves
    again = run({"truth": slow, "wrong": wrong}, SHARED_METRICS, out=out, batch_size=2)
    assert {path: shards(out)[path] for path in kept} == kept  # nothing was run again
    whole = run({"truth": slow, "wrong": wrong}, SHARED_METRICS, out=tmp_path / "whole", batch_size=2)
    assert again.cells == whole.cells
    assert rows(out) == rows(tmp_path / "whole")
    counts = Counter((line["row"], line["method"], line["metric"]) for line in rows(out))
    assert len(counts) == 24 * 5 * 5 and set(counts.values()) == {1}


def test_two_processes_give_the_table_of_one(tmp_path):
    out = tmp_path / "out"
    together(script(tmp_path, "truth", out))
    alone = run({"truth": truth, "wrong": wrong}, SHARED_METRICS, out=tmp_path / "alone", batch_size=2)
    both = open_benchmark(out)
    assert both.cells == alone.cells and both.about == alone.about
    assert rows(out) == rows(tmp_path / "alone")


def test_several_processes_need_a_folder(monkeypatch):
    from relprop.benchmark import Crew

    monkeypatch.setattr(Crew, "gathered", classmethod(lambda cls, subject: cls(1, 2)))
    with pytest.raises(ValueError, match="2 processes share their work through a folder; give out=FOLDER"):
        run({"truth": truth})


def test_chunks_are_shared_without_a_rest():
    from relprop.benchmark import Crew, Run

    made = Run(subject(), pictures(), [], [], replace(options_of(), batch_size=5), Path("/nowhere"))
    own = [Run.todo(replace(made, methods=[Named("x")]), Crew(rank, 3)) for rank in range(3)]
    assert sorted(start for each in own for start in each) == [0, 5, 10, 15, 20] and max(map(len, own)) == 2


class Named:
    """As much of a method as a plan of work needs."""

    def __init__(self, name: str) -> None:
        self.name = name


def options_of():
    from relprop.benchmark.case import Options

    return Options()


def test_a_shard_that_is_missing_or_moved_is_found(tmp_path):
    run({"truth": truth}, out=tmp_path)
    from relprop.benchmark import Run

    made = Run(subject(), pictures(), [Named("truth")], [METRICS["pointing-game"]], replace(options_of(), batch_size=8),
               tmp_path)
    assert len(list(made.lines(made.methods[0]))) == 24
    first, second = sorted((tmp_path / "rows" / "00-truth").glob("[0-9]*.jsonl"))[:2]
    second.write_text(first.read_text())
    with pytest.raises(ValueError, match="000008.jsonl holds other rows than its name says"):
        list(made.lines(made.methods[0]))
    second.unlink()
    with pytest.raises(ValueError, match="000008.jsonl is missing: the run is not complete"):
        summary(made, {})


def test_a_file_appears_whole_and_has_no_nan(tmp_path):
    path = shard.place(tmp_path, 3, "my method/№1", 64)
    assert path == tmp_path / "rows" / "03-my-method-1" / "000064.jsonl"
    shard.write(path, [{"row": 64}, {"row": 65}])
    assert shard.read(path) == [{"row": 64}, {"row": 65}] and [one.name for one in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError):
        shard.write(path, [{"row": 66, "value": float("nan")}])
    assert len(shard.read(path)) == 2


# Views and the command -----------------------------------------------------------------------------------------------


def table(**changes):
    """A table by hand, with a method that is worse, one that is open, and one without a value."""
    cells = (Cell("m", "first", 0.8, 0.7, 0.9, 10),
             Cell("m", "low", 0.5, 0.4, 0.6, 10, {}, -0.3, -0.4, -0.2, 0.001, 0.002),
             Cell("m", "near", 0.79, 0.7, 0.9, 10, {}, -0.01, -0.1, 0.08, 0.7, 0.7),
             Cell("m", "none", None, None, None, 0, {"it <says> nothing": 10}))
    metrics = ({"name": "m", "best": "higher", "about": "what it is", "reference": "Someone et al. 2020"},)
    about = {"subject": {"name": "s"}, "data": {"name": "d"}, "rows": 12, "groups": 3, "skipped": {"wrong": 2}}
    return Table(**{"cells": cells, "costs": (Cost("first", 1.0, 1.0, 0.5, 1.25),), "metrics": metrics,
                    "methods": ("first", "low", "near"), "controls": ("none",), "about": about, **changes})


def test_a_verdict_follows_the_direction():
    found = table()
    verdicts = {cell.method: verdict(found, cell) for cell in found.cells}
    assert verdicts == {"first": "", "low": "worse", "near": "", "none": ""}
    turned = table(metrics=({**found.metrics[0], "best": "lower"},))
    assert verdict(turned, turned.cell("m", "low")) == "better" and turned.best("m") == "low"
    zero = table(metrics=({**found.metrics[0], "best": "zero"},))
    assert verdict(zero, zero.cell("m", "low")) == "better" and found.best("m") == "first"
    with pytest.raises(KeyError, match="no 'n' of 'low'"):
        found.cell("n", "low")


def test_a_table_survives_json_and_its_page_says_everything():
    found = table()
    assert Table.from_dict(json.loads(found.to_json())).to_dict() == found.to_dict()
    page = report(found)
    for said in ("0.8", "0.7 to 0.9", "p = 0.002", "−0.3", "it &lt;says&gt; nothing",
                 "12 inputs in 3 independent groups", "2 left out", "1.25×", "Someone et al. 2020"):
        assert said in page, said
    assert "<says>" not in page and "http" not in page
    figure = forest(found)
    assert len(figure.axes) == 1 and len(figure.axes[0].lines) == 1 + 2 * 3  # the first's line; points and intervals
    with pytest.raises(ValueError, match="not a 'benchmark'"):
        Table.from_dict({**found.to_dict(), "kind": "relevance"})


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["benchmark", *map(str, arguments)], prog_name="relprop")


def test_the_command(tmp_path):
    options = ["-m", "digits-vit", "-d", "digits", "--methods", "attnlrp,gradient", "--metrics", "relevance-mass",
               "--metrics", "pointing-game", "--count", 4]
    made = invoke(*options, "--out", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert "attnlrp" in made.stdout and "relevance-mass" in made.stdout and "centre-prior" in made.stdout
    found = open_benchmark(tmp_path / "out")
    assert found.methods == ("attnlrp", "gradient") and len(found.metrics) == 2 and found.about["rows"] == 4
    again = invoke(*options, "--out", tmp_path / "out", "--json")
    assert json.loads(again.stdout)["cells"] == found.to_dict()["cells"]
    other = invoke(*options, "--out", tmp_path / "out", "--seed", 1)
    assert other.exit_code == 2 and "options.seed: 0 there, 1 here" in other.stderr
    slip = invoke(*options, "--metrics", "mas", "--out", tmp_path / "new")
    assert slip.exit_code == 2 and "unknown metric 'mas'" in slip.stderr and not (tmp_path / "new").exists()


def test_the_digit_asked_for_holds_the_relevance():
    found = benchmark("digits-vit", data.digits(12, seed=3), methods=["attnlrp", "rollout"],
                      metrics=["class-mass", "pointing-game"], **QUIET)
    assert found.cell("class-mass", "attnlrp").mean > 0.75 > found.cell("class-mass", "rollout").mean
    assert found.cell("pointing-game", "attnlrp").mean > found.cell("pointing-game", "random").mean
