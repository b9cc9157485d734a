"""A circuit from scores to report: every number is what the parts of the library say, and the pictures show it."""
from __future__ import annotations

import json
import re

import pytest
import torch
from tiny import gpt2
from typer.testing import CliRunner

from relprop import cli
from relprop.circuit import Task, circuit
from relprop.circuit.evaluation import faithfulness
from relprop.circuit.run import outcomes
from relprop.circuit.study import Study, narrowed, strongest, study
from relprop.result import Circuit
from relprop.result.placement import label, placed
from relprop.subject import Subject


def task(rows=4):
    torch.manual_seed(0)
    clean = torch.randint(5, 20, (rows, 6))
    return Task("words", clean, clean.roll(1, 1), metric=7, spans={"first": 0, "end": -1})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return gpt2().double().eval()


@pytest.fixture(scope="module", params=["heads", "heads at positions", "edges"])
def found(request, model):
    return study(model, task(), "eap" if request.param == "edges" else "relp", level=request.param,
                 size=16 if request.param == "edges" else 3, randoms=20)


def test_scores_are_the_methods_and_exact_effects_are_ablations(model, found):
    level, prepared = found.circuit.level, task().prepared(Subject.from_module(model))
    alone = circuit(model, task(), "eap" if level == "edges" else "relp", level=level)
    assert dict(found.circuit.scores) == dict(alone.scores) and 0 < len(found.circuit) <= 16
    items = list(alone.scores)
    without = [[one for one in items if one != gone] for gone in found.circuit]
    values = outcomes(prepared, [items, *without], among=items)
    change = (values[1:] - values[0]).mean(1)
    torch.testing.assert_close(torch.tensor(list(found.exact.values()), dtype=torch.float64), change)
    assert list(found.exact) == list(found.circuit) and float(change.abs().max()) > 0
    expected = faithfulness(model, task(), found.circuit)
    torch.testing.assert_close(found.alone.outcome, expected.outcome)
    assert found.chance["count"] == 20 == len(found.chance["random"])


def test_the_smallest_circuit_that_is_faithful_enough_is_kept(model):
    one = study(model, task(), "exact", level="heads", reach=0.8, randoms=0)
    assert one.chance is None and float(one.alone.share) >= 0.8
    sizes = [int(kept) for kept, share in zip(one.curve.kept, one.curve.share) if share >= 0.8]
    assert len(one.circuit) == min(sizes) < len(one.circuit.scores)


def test_what_the_method_has_chosen_is_kept(model):
    own = circuit(model, task(), "cdt", options={"discover": True, "keep": 1})
    found = study(model, task(), "cdt", options={"discover": True, "keep": 1}, randoms=0)
    assert 0 < len(own) < len(own.scores) and found.circuit.kept == own.kept
    assert len(study(model, task(), "cdt", options={"discover": True, "keep": 1}, size=1, randoms=0).circuit) == 1


@pytest.mark.parametrize("given, said", [
    ({"reach": 1.5}, "up to 1; got 200 and 1.5"), ({"randoms": -1}, "0 or more"), ({"batch_size": 0}, "at least 1"),
    ({"size": 0}, "leaves nothing in; give a size from 1 to 3"), ({"size": 4}, "leaves nothing out"),
    ({"level": []}, "no address to score")])
def test_a_study_that_cannot_be_is_told(model, given, said):
    with pytest.raises(ValueError, match=said):
        study(model, task(), "random", **given)


def test_a_circuit_of_edges_that_lead_nowhere_is_told():
    edges = {("L1.mlp", "logits"): 3.0, ("embed", "L0.mlp"): 2.0, ("L0.mlp", "L1.mlp"): 1.0}
    found = Circuit.of(edges, level="edges", method="eap")
    with pytest.raises(ValueError, match="none is on a way from the input to the logits"):
        narrowed(found, None, size=2)


def test_files_bring_everything_back(found, tmp_path):
    again = Study.open(found.save(tmp_path / "found.json"))
    assert again.to_dict() == found.to_dict() and again.summary() == found.summary()
    assert again.table().equals(found.table())
    for suffix, begins in ("png", b"\x89PNG"), ("svg", b"<?xml"), ("dot", b"digraph"), ("graphml", b"<graphml"):
        assert found.save(tmp_path / f"found.{suffix}").read_bytes().lstrip().startswith(begins)
    with pytest.raises(ValueError, match="cannot write a circuit to found.txt"):
        found.save(tmp_path / "found.txt")
    damaged = {**found.to_dict(), "exact": []}
    with pytest.raises(ValueError, match="exact effects are of the"):
        Study.from_dict(damaged)


def test_the_page_shows_each_kept_item_and_needs_nothing_else(found, tmp_path):
    page = found.save(tmp_path / "found.html").read_text(encoding="utf-8")
    for name in found.table().index:
        assert name.replace(">", "&gt;") in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "<script" not in page
    assert page.count("<circle") == len(placed(found.circuit).nodes)
    assert f"faithfulness {float(found.alone.share):.3g}".replace("-", "−") in page


def test_nodes_stand_in_their_layers():
    where = placed(Circuit.of({("embed", "L0.attn.H1.q"): 1.0, ("L0.attn.H1", "L1.mlp"): 2.0, ("L1.mlp", "logits"): 1.0,
                               ("L0.attn.H0", "logits"): 0.5}, level="edges"))
    assert where.rows == ("input", "L0 attn", "L1 mlp", "logits") and where.columns == ()
    assert where.nodes["L0.attn.H0"] == (0.25, 1) and where.nodes["L0.attn.H1"] == (0.75, 1)
    named = placed(Circuit.of(["L0.attn.H0@end", "L0.attn.H0@2", "L0.attn.H0@-1"], level="heads at positions"))
    assert named.columns == ("@2", "@-1", "@end") and label("L0.attn.H0@end") == "H0"


def test_nodes_of_edges_are_ranked_by_what_touches_them():
    edges = {("embed", "L0.mlp"): 1.0, ("L0.mlp", "logits"): -3.0, ("embed", "logits"): 0.5}
    assert strongest(Circuit.of(edges, level="edges")) == ["L0.mlp", "logits", "embed"]


def test_the_command_writes_what_the_library_finds(tmp_path):
    arguments = ["circuit", "--task", "indirect-objects", "--method", "relp", "--count", "4", "--size", "3",
                 "--randoms", "5"]
    run = lambda *more: CliRunner().invoke(cli.app, [*arguments, *more], prog_name="relprop")
    result = run("-o", str(tmp_path / "found"))
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert {path.suffix[1:] for path in (tmp_path / "found").iterdir()} == {
        "html", "png", "svg", "json", "csv", "graphml", "dot"}
    said = json.loads(run("--json").stdout)
    assert said["kind"] == "study" and len(said["exact"]) == 3
    assert "3 of 32 nodes (heads) by relp" in result.stdout
    signed = json.loads(run("--json", "--signed").stdout)
    assert signed["curve"]["about"]["ranking"] == "signed" and signed["circuit"]["kept"] != said["circuit"]["kept"]
    for wrong, told in [(["--option", "steps"], "NAME=VALUE"), (["--option", "stairs=3"], "no option stairs"),
                        (["--level", "layers"], "relp has no level 'layers'; it has heads"),
                        (["--level", "L9.mlp"], "no layer 9"),
                        (["-o", str(tmp_path / "x.txt")], "cannot write a circuit")]:
        assert told in run(*wrong).stderr
