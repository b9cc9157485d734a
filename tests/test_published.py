"""What is set beside published numbers is computed as the papers' code computes it; their data are read as they are."""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TOKENIZER, bert, images, targets, text, vit

from relprop import data
from relprop.benchmark.metric import HIGHER, Metric, named
from relprop.benchmark.published import (
    ATTNLRP,
    ERASER,
    KS,
    PERTURBATION,
    SEGMENTATION,
    SEGMENTATION_METRICS,
    Published,
    means,
    segmentation,
)
from relprop.benchmark.recipe import chosen, leads, of_prediction, pairs
from relprop.check import convention, perturbation
from relprop.check.perturbation import Readout
from relprop.data import Data, Example
from relprop.data.answer import Beginning
from relprop.errors import Undefined
from relprop.explain import explain
from relprop.load import load
from relprop.method import METHODS
from relprop.pixels import plain, squeezed
from relprop.result import Cell, Table
from relprop.subject import Subject
from relprop.target import Vocabulary
from relprop.view import beside, series

README = (Path(__file__).parents[1] / "README.md").read_text()

# Measures ------------------------------------------------------------------------------------------------------------


def pictures_and_masks(count: int = 5):
    rng = torch.Generator().manual_seed(3)
    masks = torch.rand(count, 6, 8, generator=rng) > torch.linspace(0.2, 0.9, count)[:, None, None]
    return torch.rand(count, 6, 8, generator=rng, dtype=torch.float64), masks


def test_pooled_iou_and_accuracy_are_those_of_all_pixels_in_one(seed):
    maps, masks = pictures_and_masks()
    parts = torch.tensor([convention.right_parts(*pair) for pair in zip(maps, masks)], dtype=torch.float64).mean(0)
    told = torch.stack([one > one.mean() for one in maps])  # each map is cut at its own mean, then all are pooled
    accuracy = (told == masks).double().mean()
    ious = [(one & two).sum() / (one | two).sum() for one, two in ((told, masks), (~told, ~masks))]
    assert float(parts.sum()) == pytest.approx(float(accuracy), rel=1e-12)
    assert convention.pooled_iou(*parts.tolist()) == pytest.approx(float(sum(ious) / 2), rel=1e-6)
    alone = [convention.pooled_iou(*convention.right_parts(*pair)) for pair in zip(maps, masks)]
    assert abs(np.mean(alone) - float(sum(ious) / 2)) > 1e-3  # the mean over pictures is another number


def test_joint_average_precision_is_that_of_both_classes_in_one_list(seed):
    from sklearn.metrics import average_precision_score

    (one, *_), (mask, *_) = pictures_and_masks()
    scaled = ((one - one.min()) / (one.max() - one.min())).flatten().numpy()
    truth = mask.flatten().numpy().astype(int)
    expected = average_precision_score(np.concatenate([1 - truth, truth]), np.concatenate([1 - scaled, scaled]))
    assert convention.joint_average_precision(3 * one - 7, mask) == pytest.approx(expected, rel=1e-12)
    assert convention.joint_average_precision(mask.double(), mask) == 1.0
    assert convention.joint_average_precision(-mask.double(), mask) <= 0.5


@pytest.mark.parametrize("measure", [convention.right_parts, convention.joint_average_precision, convention.top_iou,
                                     lambda relevance, marked: convention.top_f1(relevance, marked, 2)])
def test_a_map_or_marks_that_say_nothing_have_no_value(measure):
    some = torch.tensor([True, False, True])
    for relevance, marked in ((torch.ones(3), some), (torch.rand(3), ~some & some), (torch.rand(3), some | ~some)):
        with pytest.raises(Undefined):
            measure(relevance, marked)
    with pytest.raises(ValueError, match="size"):
        measure(torch.rand(4), some)


def test_words_of_a_rationale():
    marked = torch.tensor([True, False, True, False, False])
    relevance = torch.tensor([5.0, 4.0, 1.0, 0.0, -1.0])
    assert convention.top_f1(relevance, marked, 2) == pytest.approx(2 * 1 / (2 + 2))
    assert convention.top_f1(relevance, marked, 3) == pytest.approx(2 * 2 / (3 + 2))
    assert convention.top_f1(relevance, marked, 80) == pytest.approx(2 * 2 / (5 + 2))  # no more words than there are
    assert convention.top_iou(relevance, marked) == pytest.approx(1 / 3)
    assert convention.top_iou(marked.float(), marked) == 1.0 and convention.top_iou(-relevance, marked) == 0.0


def test_maps_of_patches_are_drawn_smoothly_and_maps_of_pixels_are_left(seed):
    batch = images(torch.rand(2, 3, 24, 24), 6)
    coarse = torch.rand(2, 4, 4)
    blocks = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)
    expected = torch.nn.functional.interpolate(coarse[:, None], scale_factor=6, mode="bilinear")[:, 0]
    torch.testing.assert_close(convention.drawn(blocks, batch) / 36, expected)  # sums over patches, whose scale is free
    fine = torch.rand(2, 24, 24)
    assert convention.drawn(fine, batch) is fine


class Steps:
    """A course whose decision falls at a given share of the units."""

    def __init__(self, falls: list[float]) -> None:
        self.falls = torch.tensor(falls, dtype=torch.float64)

    def removing(self, fractions):
        kept = (torch.tensor(fractions, dtype=torch.float64) < self.falls[:, None]).double()
        return torch.stack([kept, kept, kept], -1)


def test_area_under_the_accuracy_is_in_percent_and_not_divided_by_its_width():
    found = convention.accuracy_area(Steps([2.0, 0.0, 0.45]))
    whole, never, half = found.tolist()
    assert whole == pytest.approx(90) and never == 0 and half == pytest.approx(45)  # 0, .1 ... .4, and half a step
    accuracy = np.array([[1, 0, 1]] * 5 + [[1, 0, 0]] * 5).mean(1)
    assert float(found.mean()) == pytest.approx(100 * np.trapezoid(accuracy, np.arange(10) / 10))


def readout(subject: Subject, batch, spec) -> tuple[Readout, torch.Tensor]:
    return Readout.of(subject, batch, spec, batch_size=8)


def test_black_is_black_whatever_the_normalisation(seed):
    pixels = plain(3, (24, 24), (0.5, 0.4, 0.3), (0.2,) * 3)
    subject = Subject(vit().float(), modality="image", patch=(6, 6), pixels=pixels)
    batch = subject.prepare(torch.randn(2, 3, 24, 24))
    out = convention.blackened(subject, batch)
    assert out.counts.tolist() == [576, 576]  # pixels, not patches
    gone = torch.zeros(1, 576, dtype=torch.bool)
    gone[0, 30] = True
    changed = out.without(torch.tensor([1]), gone).args[0]
    assert torch.equal(subject.pixels.shown(changed)[0, 1, 6], torch.zeros(3, dtype=torch.uint8))
    assert (changed[0] != batch.args[0][1]).any(0).nonzero().tolist() == [[1, 6]]
    with pytest.raises(ValueError, match="mean and standard deviation"):
        convention.blackened(Subject(vit(), modality="image"), batch)


def test_a_zero_vector_stands_for_a_token_and_the_table_comes_back(seed):
    network = bert().float()
    subject, batch = Subject(network, TOKENIZER, "text"), text([2, 7, 9, 11, 3], [2, 8, 3])
    table = network.get_input_embeddings()
    weight, before = table.weight, network(**batch.kwargs).logits
    gone = torch.tensor([[False, True, False], [True, False, False]])
    with convention.zeroed(subject, batch) as out:
        changed = out.without(torch.arange(2), gone)
        found = network(**changed.kwargs).logits
    assert table.weight is weight and torch.equal(network(**batch.kwargs).logits, before)
    vectors = weight.detach()[batch.kwargs["input_ids"]].clone()
    vectors[0, 2] = vectors[1, 1] = 0  # after the class token
    own = network(inputs_embeds=vectors, attention_mask=batch.kwargs["attention_mask"]).logits
    torch.testing.assert_close(found, own)
    assert (found - before).abs().min() > 1e-6


def test_the_best_order_has_a_larger_area_than_its_reverse(seed):
    subject, batch = Subject(bert().float(), TOKENIZER, "text"), text([2, 7, 9, 11, 12, 13, 3])
    fixed, start = readout(subject, batch, targets(1, batch))
    effects = torch.zeros(1, 7)
    with convention.zeroed(subject, batch) as out:
        for place in range(5):
            gone = torch.zeros(1, 5, dtype=torch.bool)
            gone[0, place] = True
            left = fixed.read(out.without(torch.tensor([0]), gone), torch.tensor([0]))[0, 0]
            effects[0, place + 1] = start[0, 0] - left
        areas = [float(perturbation.area(*perturbation.courses(fixed, out, sign * effects, start))) for sign in (1, -1)]
    assert areas[0] > 0 and areas[0] == pytest.approx(-areas[1])


# Numbers of others ---------------------------------------------------------------------------------------------------


def table(values: dict[str, dict[str, float]]) -> Table:
    """A table of these means, the last method being a control."""
    cells = [Cell(metric, method, value, *((None, None) if value is None else (value - 0.1, value + 0.1)), 3)
             for metric, column in values.items() for method, value in column.items()]
    methods = tuple(next(iter(values.values())))
    metrics = tuple({"name": name, "best": HIGHER, "about": "", "reference": ""} for name in values)
    about = {"subject": {"name": "<model>"}, "data": {"name": "data"}, "rows": 3, "groups": 3, "skipped": {}}
    return Table(cells=tuple(cells), costs=(), metrics=metrics, methods=methods[:-1], controls=methods[-1:],
                 about=about)


def test_ours_stands_beside_theirs(tmp_path):
    paper = Published("A table <b>", "Someone 2020, table 1", "read there", "nothing", {"x": {"a": 79.70, "c": 1.0}})
    measured = {"x": {"a": 50.0, "b": None}, "y": {"a": -1.5, "b": 2.0}}
    frame = paper.save(measured, tmp_path, of=table({"x": {"a": 1, "b": 2}}))
    assert list(frame.columns) == [("x", "here"), ("x", "paper"), ("y", "here")]  # no column of theirs for y
    assert list(frame.index) == ["a", "b", "c"] and frame.loc["a", ("x", "paper")] == 79.70
    assert math.isnan(frame.loc["b", ("x", "here")]) and math.isnan(frame.loc["c", ("y", "here")])
    page = (tmp_path / "paper.html").read_text()
    assert "79.70" in page and "A table &lt;b&gt;" in page and "&lt;model&gt; on 3 inputs of data" in page
    assert "<b>" not in page and "table.html" not in page and "read there" in page
    said = json.loads((tmp_path / "paper.json").read_text())
    assert said["paper"]["x"]["a"] == 79.70 and said["measured"] == measured and said["reference"] == paper.reference
    assert (tmp_path / "paper.csv").read_text().splitlines()[0] == "method,x (here),x (paper),y (here)"


def test_the_columns_of_the_segmentation_table_are_theirs():
    values = {"right-foreground": {"a": 0.2, "b": None, "random": 0.1},
              "right-ground": {"a": 0.6, "b": 0.5, "random": 0.4},
              "joint-average-precision": {"a": 0.9, "b": 0.4, "random": 0.5}}
    found = segmentation(table(values))
    assert found["pixel accuracy"]["a"] == pytest.approx(80) and found["mAP"]["a"] == pytest.approx(90)
    assert found["mIoU"]["a"] == pytest.approx(50 * (0.2 / 0.4 + 0.6 / 0.8)) and found["mIoU"]["b"] is None
    assert set(found) == set(SEGMENTATION.numbers) and means(table(values), "right-ground", 10)["b"] == 5


@pytest.mark.parametrize("paper", [SEGMENTATION, PERTURBATION, ERASER, ATTNLRP])
def test_what_is_cited_has_a_source_and_names_our_methods(paper):
    assert paper.reference and paper.source and paper.apart
    assert "cited" in paper.source or paper.numbers
    for column in paper.numbers.values():
        assert column and all(0 < value < 100 for value in column.values())
        assert "transformer-attribution" in column and "transformer-attribution" in METHODS


def test_the_readme_cites_the_same_numbers():
    section = README.split("## Recipes for published tables\n", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    (_, *columns), _, *rows = [[cell.strip(" `") for cell in line] for line in lines]
    cited = {column: {name: float(values[at]) for name, *values in rows} for at, column in enumerate(columns)}
    assert cited == SEGMENTATION.numbers
    for column in PERTURBATION.numbers.values():
        assert all(f"{value:g}" in section for value in column.values())


def test_curves_have_a_line_a_method():
    figure = series(table({f"token-f1@{k}": {"a": k / 100, "b": None, "random": 0.2} for k in KS}),
                    {f"token-f1@{k}": k for k in KS}, title="F1", along="k", up="F1")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines) == ["a", "b", "random"] and list(lines["a"].get_xdata()) == list(KS)
    assert list(lines["a"].get_ydata()) == [k / 100 for k in KS] and not len(lines["b"].get_xdata())


def test_a_page_needs_no_number_of_theirs():
    frame = Published("t", "r", "s", "a").beside({"x": {"m": 1.0}})
    page = beside(frame, title="t", here="h", reference="r", source="s", apart="a")
    assert 'class="paper"' not in page and "are theirs" not in page


def test_a_metric_of_ones_own_is_taken_as_it_is(seed):
    own = Metric("own", HIGHER, lambda case: [1.0] * len(case.relevance), "", "")
    shots = Data("d", "image", [Example(np.zeros((4, 4), np.uint8), marked=torch.eye(4) > 0)])
    subject = Subject(vit(), modality="image")
    assert [one.name for one in named([own, "pixel-accuracy"], subject, shots)] == ["own", "pixel-accuracy"]
    assert named(own, subject, shots) == [own]
    with pytest.raises(ValueError, match="'right-ground' does not apply: data 'd' marks nothing"):
        named(SEGMENTATION_METRICS[1:], subject, Data("d", "image", [Example(np.zeros((4, 4), np.uint8))]))


def test_the_map_of_the_prediction_asks_for_no_other_class(seed):
    subject = load("reviews-bert")
    batch = subject.prepare(["A wonderful film.", "A dull film."])
    found = of_prediction(subject, batch, subject.targets(["NEGATIVE"] * 2, 2), method="attnlrp")
    torch.testing.assert_close(found.map, explain(subject, batch, method="attnlrp").map)
    assert found.target == ["POSITIVE", "NEGATIVE"]


def test_the_first_of_several_processes_concludes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert leads()
    monkeypatch.setenv("RANK", "1")
    assert not leads()


def test_methods_and_classes_of_the_command_line():
    assert chosen("+b,a", ["a"]) == ["a", "b"] and chosen(" x , y,", ["a"]) == ["x", "y"]
    assert pairs("neg=0,pos=POSITIVE") == {"neg": 0, "pos": "POSITIVE"}
    with pytest.raises(ValueError, match="NAME=CLASS"):
        pairs("neg=0,pos")


# Data ----------------------------------------------------------------------------------------------------------------


def saved(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), 10 * number).save(folder / name)
    return folder


def test_pictures_in_a_folder_a_class(tmp_path):
    folder = saved(tmp_path, "7/a.png", "cat/b.png", "cat/c.png")
    found = data.imagefolder(folder)
    assert [one.target for one in found.examples] == [7, "cat", "cat"] and found.modality == "image"
    assert [one.target for one in data.imagefolder(folder, classes={"7": 0, "cat": 5}).examples] == [0, 5, 5]
    assert len(data.imagefolder(folder, 2, seed=1)) == 2 and len(data.get(f"imagefolder:{folder}", count=None)) == 3
    for name, content in (("list.txt", "7 seven\ncat\n"), ("a.json", '{"7": 0, "cat": 1}'),
                          ("keras.json", '{"0": ["7", "seven"], "1": ["cat", "cat"]}')):
        (tmp_path / name).write_text(content)
        assert [one.target for one in data.imagefolder(folder, classes=tmp_path / name).examples] == [0, 1, 1]
    with pytest.raises(ValueError, match="no class is known for the subfolder '7'"):
        data.imagefolder(folder, classes={"cat": 1})
    (tmp_path / "wrong.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="neither"):
        data.imagefolder(folder, classes=tmp_path / "wrong.json")


def test_the_folders_of_imagenet_are_its_classes(tmp_path):
    folder = saved(tmp_path, "n01440764/a.JPEG", "n15075141/b.JPEG")
    assert [one.target for one in data.imagefolder(folder).examples] == [0, 999]
    saved(tmp_path, "n00000000/c.JPEG")
    with pytest.raises(ValueError, match="subfolder 'n00000000'"):
        data.imagefolder(folder)


def test_texts_in_a_folder_a_class(tmp_path):
    for name, content in (("pos/1.txt", "so<br />good and long"), ("neg/1.txt", "bad")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    found = data.textfolder(tmp_path, length=3, classes={"neg": 0, "pos": 1})
    assert [(one.input, one.target) for one in found.examples] == [("bad", 0), ("so good and", 1)]
    (tmp_path / "neg" / "2.txt").write_text(" ")
    with pytest.raises(ValueError, match="empty"):
        data.textfolder(tmp_path)


def test_passages_are_the_beginnings_of_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five\n\nsix\nseven eight\n")
    (tmp_path / "b.jsonl").write_text('{"text": "nine ten eleven\\n"}\n')
    found = data.passages(tmp_path, length=4)
    assert [one.input for one in found.examples] == ["one two three four", "seven eight", "nine ten eleven"]
    assert found.examples[0].target is None
    with pytest.raises(ValueError, match="no paragraph of 50 words"):
        data.passages(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(ValueError, match="c.jsonl, line 1: no 'text'"):
        data.passages(tmp_path / "c.jsonl")


def test_the_answer_of_a_question_is_marked_and_its_first_token_asked_for(tmp_path):
    context = "Paris, in France, has two million people."
    asked = {"id": "1", "question": "Where is Paris?", "answers": [{"text": "France", "answer_start": 10}]}
    path = tmp_path / "dev.json"
    write = lambda: path.write_text(json.dumps({"data": [{"title": "P", "paragraphs": [{"context": context,
                                                                                         "qas": [asked]}]}]}))
    write()
    [one] = data.squad(tmp_path).examples
    assert one.input == f"{context}\nQuestion: Where is Paris?\nAnswer:" and one.group == "P"
    assert [one.input[start:end] for (start, end), mark in zip(one.words, one.marked) if mark] == ["France,"]
    assert one.target == Beginning("France")
    with pytest.raises(ValueError, match="in a paragraph of at most 3 words"):
        data.squad(path, length=3)
    asked["answers"][0]["answer_start"] = 0
    write()
    with pytest.raises(ValueError, match="'France' does not stand at 0"):
        data.squad(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no 'data'"):
        data.squad(path)


@pytest.mark.parametrize("name", ["gpt2", "stories260k"])
def test_the_first_token_of_an_answer(shared, name):
    from transformers import AutoTokenizer

    folder = shared / "data" / "gpt2-tokenizer" if name == "gpt2" else shared / "models" / name
    vocabulary = Vocabulary(tokenizer=AutoTokenizer.from_pretrained(folder))
    found = vocabulary.target(Beginning("girl ran"))
    assert vocabulary.tokenizer.decode([found.token]).strip() and "girl ran".startswith(
        vocabulary.tokenizer.decode([found.token]).strip())
    with pytest.raises(ValueError, match="no tokenizer"):
        Vocabulary().target(Beginning("girl"))


def test_reviews_are_read_as_they_were_released(tmp_path):
    first = {"annotation_id": "a", "classification": "POS", "query": "", "query_type": None,
             "evidences": [[{"docid": "a", "start_token": 2, "end_token": 4, "text": "c d"}]]}
    (tmp_path / "test.jsonl").write_text(json.dumps(first) + "\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a").write_text("a b\nc d e\n\nf g\n")
    [one] = data.eraser(tmp_path).examples
    assert one.input == "a b c d e f g" and one.target == "POSITIVE" and one.group == "a"
    assert one.marked.tolist() == [False, False, True, True, False, False, False]
    [part] = data.eraser(tmp_path, length=3).examples  # the sentence with the evidence; the others have none
    assert part.input == "c d e"
    (tmp_path / "docs" / "a").unlink()
    with pytest.raises(ValueError, match="no document 'a'"):
        data.eraser(tmp_path)
    (tmp_path / "docs").rmdir()
    (tmp_path / "docs.jsonl").write_text('{"docid": "a", "document": "a b\\nc d e\\nf g"}\n')
    assert data.eraser(tmp_path).examples[0].input == one.input


def test_reviews_in_one_file_are_read_as_well(shared):
    whole, cut = (data.eraser(shared / "data" / "eraser_movies", 3, length=length) for length in (None, 90))
    assert max(len(one.words) for one in cut.examples) < 300 < max(len(one.words) for one in whole.examples)
    assert all(one.marked.any() for one in [*whole.examples, *cut.examples])


def test_matlab_needs_its_reader(tmp_path, monkeypatch):
    import sys

    (tmp_path / "gtsegs_ijcv.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        data.segmentation(tmp_path)


def test_whole_pictures_are_squeezed_and_not_cut():
    pixels = squeezed(plain(3, (8, 8), (0.5,) * 3, (0.25,) * 3))
    wide = np.zeros((8, 32, 3), np.uint8)
    wide[:, :8] = 255  # a crop of the centre would not see it
    read = pixels.read([wide])
    assert read.shape == (1, 3, 8, 8) and read[0, :, 4, 0].tolist() == pytest.approx([2.0] * 3)
    assert read[0, :, 4, -1].tolist() == pytest.approx([-2.0] * 3)
    square = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    torch.testing.assert_close(pixels.read([square]), plain(3, (8, 8), (0.5,) * 3, (0.25,) * 3).read([square]))
