"""The recipes of `demos/` run from end to end on small stand-ins for the data and models of the papers."""
from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from relprop.benchmark import open_benchmark
from relprop.benchmark.published import KS

DEMOS = Path(__file__).parents[1] / "demos"
RECIPES = sorted(path.stem.removeprefix("recipe_") for path in DEMOS.glob("recipe_*.py"))
WORDS = "a fine dull film with the worst best plot and no end question : answer paris is in france where ?".split()
SIDE = 12


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Runs a recipe as `python demos/recipe_NAME.py ...` does: what it prints, and its exit code."""
    def run(name: str, *options: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [f"recipe_{name}.py", *map(str, options)])
        monkeypatch.setattr(sys.modules["relprop.benchmark.summary"], "RESAMPLES", 99)  # the intervals are not tested
        code = 0
        try:
            runpy.run_path(str(DEMOS / f"recipe_{name}.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


# Stand-ins -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A random ViT of three classes in a folder."""
    from timm.models import VisionTransformer

    folder = tmp_path_factory.mktemp("vit")
    kwargs = dict(img_size=SIDE, patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2)
    torch.manual_seed(0)
    model = VisionTransformer(**kwargs)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "VisionTransformer", "kwargs": kwargs, "labels": ["cat", "dog", "eel"],
              "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spoken(folder: Path, kind: str, config: object, special: dict[str, str]) -> Path:
    """A random model of transformers with a tokenizer of `WORDS` in a folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "cls_token" in special:
        ends = [(special[name], vocabulary[special[name]]) for name in ("sep_token", "cls_token")]
        fast.post_processor = processors.BertProcessing(*ends)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=40, **special).save_pretrained(folder)
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    from transformers import BertConfig

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=2,
                        intermediate_size=32, max_position_embeddings=40, initializer_range=0.5)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}
    return spoken(tmp_path_factory.mktemp("bert"), "BertForSequenceClassification", config, special)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, num_key_value_heads=1, max_position_embeddings=40, initializer_range=0.5,
                         tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    return spoken(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", config, special)


def photographs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Noise with a brighter rectangle, taller than wide, and where it is."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        picture, mask = rng.integers(0, 120, (20, 15, 3)), np.zeros((20, 15), bool)
        y, x = rng.integers(1, 8, 2)
        mask[y:y + 9, x:x + 6] = True
        found.append((np.where(mask[..., None], picture + 120, picture).astype(np.uint8), mask))
    return found


@pytest.fixture
def masked(tmp_path) -> Path:
    folder = tmp_path / "masked"
    folder.mkdir()
    for number, (picture, mask) in enumerate(photographs(4)):
        Image.fromarray(picture).save(folder / f"{number}.png")
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / f"{number}_mask.png")
    return folder


@pytest.fixture
def matlab(tmp_path) -> Path:
    """The same pictures as `gtsegs_ijcv.mat` has them: cells of references, each array with its axes in reverse."""
    h5py = pytest.importorskip("h5py", reason="the file of ImageNet-Segmentation is HDF5; pip install h5py")
    path = tmp_path / "gtsegs_ijcv.mat"
    with h5py.File(path, "w") as file:
        shots = photographs(4)
        for field in ("img", "gt", "id"):
            file.create_dataset(f"value/{field}", (len(shots), 1), dtype=h5py.ref_dtype)
        for row, (picture, mask) in enumerate(shots):
            image = file.create_dataset(f"#refs#/img{row}", data=picture.T)
            truth = file.create_dataset(f"#refs#/mask{row}", data=mask.astype(np.uint8).T)
            cell = file.create_dataset(f"#refs#/gt{row}", (1, 1), dtype=h5py.ref_dtype)
            cell[0, 0] = truth.ref
            file["value/img"][row, 0], file["value/gt"][row, 0] = image.ref, cell.ref
    return path


@pytest.fixture
def sorted_pictures(tmp_path) -> Path:
    folder = tmp_path / "val"
    for number, (picture, _) in enumerate(photographs(6)):
        place = folder / ["cat", "dog", "eel"][number % 3] / f"{number}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place)
    return folder


@pytest.fixture
def reviews(tmp_path) -> Path:
    """A folder in the layout that ERASER was released in."""
    folder = tmp_path / "movies"
    (folder / "docs").mkdir(parents=True)
    lines = []
    for number, label in enumerate(["POS", "NEG", "POS"]):
        name = f"{label.lower()}R_{number}.txt"
        said = "best" if label == "POS" else "worst"
        (folder / "docs" / name).write_text(f"a film with the plot\nand the {said} end\nno question\n")
        spans = [{"docid": name, "start_token": 6, "end_token": 8, "text": f"the {said}"}]
        lines.append({"annotation_id": name, "classification": label, "evidences": [spans], "query": "?"})
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    for number, said in enumerate(["the best film is fine", "the worst film is dull"] * 2):
        place = folder / ["pos", "neg"][number % 2] / f"{number}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{said} <br /> and no end")
    return folder


@pytest.fixture
def paragraphs(tmp_path) -> Path:
    path = tmp_path / "wikipedia.jsonl"
    lines = [{"text": "paris is in france and a film\nwhere is the end"},
             {"text": "the plot is in paris and no question"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "dev-v2.0.json"
    context = "the film is in paris and the plot is dull"
    asked = [{"id": "1", "question": "where is the film ?", "answers": [{"text": "paris", "answer_start": 15}]},
             {"id": "2", "question": "where is the end ?", "answers": [], "is_impossible": True},
             {"id": "3", "question": "the plot is ?", "answers": [{"text": "dull", "answer_start": 37}]}]
    path.write_text(json.dumps({"data": [{"title": "Films", "paragraphs": [{"context": context, "qas": asked}]}]}))
    return path


# From end to end -----------------------------------------------------------------------------------------------------


def complete(folder: Path, *, of: Path | None = None) -> tuple[dict, object]:
    """What a recipe wrote beside the paper, and its table; every file is there."""
    of = folder if of is None else of
    for name in ("table.csv", "table.json", "table.html", "table.svg", "cost.csv", "rows.csv"):
        assert (of / name).stat().st_size > 50, name
    for name in ("paper.csv", "paper.html"):
        assert (folder / name).stat().st_size > 100, name
    return json.loads((folder / "paper.json").read_text()), open_benchmark(of)


@pytest.mark.parametrize("kind", ["masked", "matlab"])
def test_segmentation(recipe, vit, request, tmp_path, kind):
    data, out = request.getfixturevalue(kind), tmp_path / "out"
    options = ["--data", data, "--model", vit, "--out", out, "--methods", "transformer-attribution,rollout"]
    first = recipe("segmentation", *options)
    assert first.code == 0 and "79.70" in first.out and "here: vit" in first.out and "arXiv:2502.04320" in first.out
    paper, table = complete(out)
    assert table.methods == ("transformer-attribution", "rollout") and table.about["rows"] == 4
    for column, low in (("pixel accuracy", 0), ("mAP", 0), ("mIoU", 0)):
        values = [paper["measured"][column][name] for name in table.methods]
        assert all(low < value < 100 for value in values) and values[0] != values[1]
    right = {part: table.cell(part, "rollout").mean for part in ("right-foreground", "right-ground")}
    assert paper["measured"]["pixel accuracy"]["rollout"] == pytest.approx(100 * sum(right.values()))


def test_both_forms_of_the_pictures_give_the_same_table(recipe, vit, masked, matlab, tmp_path):
    numbers = []
    for data in (masked, matlab):
        out = tmp_path / f"of-{data.stem}"
        assert recipe("segmentation", "--data", data, "--model", vit, "--out", out, "--methods", "rollout").code == 0
        numbers.append(complete(out)[0]["measured"])
    assert numbers[0] == numbers[1]


def test_perturbation(recipe, vit, sorted_pictures, tmp_path):
    out = tmp_path / "out"
    found = recipe("perturbation", "--data", sorted_pictures, "--model", vit, "--out", out, "--methods",
                   "transformer-attribution,rollout", "--limit", 5)
    assert found.code == 0 and "54.16" in found.out and "17.03" in found.out
    paper, label = complete(out, of=out / "label")
    _, predicted = complete(out, of=out / "predicted")
    assert label.about["rows"] == predicted.about["rows"] == 5 and not label.about["skipped"]
    columns = paper["measured"]
    assert list(columns) == ["negative, predicted", "negative, label", "positive, predicted", "positive, label"]
    # rollout knows no class, so that the map is the same whose ever it is; the other method's is not
    assert columns["negative, predicted"]["rollout"] == columns["negative, label"]["rollout"]
    values = [(label.cell("negative-accuracy-area", name).mean, name) for name in label.methods]
    assert all(0 <= value <= 90 for value, _ in values) and any(value for value, _ in values)


def test_eraser(recipe, bert, reviews, tmp_path):
    out = tmp_path / "out"
    options = ["--data", reviews, "--model", bert, "--out", out, "--methods", "attnlrp,rollout"]
    unnamed = recipe("eraser", *options)
    assert unnamed.code == 2 and "LABEL_0, LABEL_1" in unnamed.err and unnamed.err.strip().count("error") == 1
    found = recipe("eraser", *options, "--labels", "NEGATIVE,POSITIVE", "--out", tmp_path / "named")
    assert found.code == 0 and "none is cited" in found.out
    out = tmp_path / "named"
    paper, table = complete(out)
    assert table.about["rows"] == 3 and table.about["options"]["baseline"] == "delete"
    assert list(paper["measured"]) == [*(f"token-f1@{k}" for k in KS), "auprc", "comprehensiveness", "sufficiency"]
    assert paper["measured"]["token-f1@20"]["rollout"] == pytest.approx(2 * 2 / (11 + 2))  # all words, 2 are marked
    assert paper["measured"]["token-f1@10"]["rollout"] < 2 * 2 / (10 + 2) + 1e-9
    assert (out / "curve.svg").stat().st_size > 5000


@pytest.mark.parametrize("task, data, model, metrics", [
    ("imagenet", "sorted_pictures", "vit", ["area"]), ("wikipedia", "paragraphs", "llama", ["zeroed-area"]),
    ("imdb", "texts", "bert", ["zeroed-area"]), ("squad", "questions", "llama", ["pointing-game", "top-iou",
                                                                                  "zeroed-area"])])
def test_attnlrp(recipe, request, tmp_path, task, data, model, metrics):
    out, places = tmp_path / "out", request.getfixturevalue(data)
    more = {"imdb": ["--classes", "neg=0,pos=1"], "wikipedia": ["--length", 8]}.get(task, [])
    found = recipe("attnlrp", task, "--data", places, "--model", request.getfixturevalue(model), "--out", out, "--all",
                   "--methods", "attnlrp,input-x-gradient", *more)
    assert found.code == 0, found.err
    paper, table = complete(out)
    assert list(paper["measured"]) == metrics and paper["paper"] == {}
    measured = [cell for cell in table.cells if cell.method == "attnlrp"]
    assert all(cell.rows and cell.mean is not None for cell in measured), measured


def test_a_recipe_goes_on_where_it_was_stopped(recipe, vit, masked, tmp_path):
    options = ["--data", masked, "--model", vit, "--methods", "rollout,attnlrp", "--batch-size", 2]
    assert recipe("segmentation", *options, "--out", tmp_path / "whole").code == 0
    assert recipe("segmentation", *options, "--out", tmp_path / "stopped").code == 0
    shards = sorted((tmp_path / "stopped" / "rows").rglob("*.jsonl"))
    assert len(shards) == 2 * 5
    kept = {path: path.stat().st_mtime_ns for path in shards[1:]}
    shards[0].unlink()
    (tmp_path / "stopped" / "paper.json").unlink()
    assert recipe("segmentation", *options, "--out", tmp_path / "stopped").code == 0
    assert shards[0].is_file() and {path: path.stat().st_mtime_ns for path in kept} == kept
    whole, stopped = (complete(tmp_path / name)[0] for name in ("whole", "stopped"))
    assert whole["measured"] == stopped["measured"]


def test_methods_are_a_default_that_can_be_extended(recipe, vit, masked, tmp_path):
    found = recipe("segmentation", "--data", masked, "--model", vit, "--out", tmp_path / "out", "--limit", 2,
                   "--methods", "+gradient")
    assert found.code == 0
    methods = complete(tmp_path / "out")[1].methods
    assert methods[-1] == "gradient" and {"transformer-attribution", "rollout", "full-lrp"} <= set(methods)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, more", [("segmentation", []), ("perturbation", []), ("eraser", []),
                                        *(("attnlrp", [task]) for task in ("imagenet", "wikipedia", "imdb", "squad"))])
def test_data_that_are_not_there_are_one_line(recipe, tmp_path, name, more):
    found = recipe(name, *more, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert found.code == 2 and not found.out and not (tmp_path / "out").exists()
    assert found.err.count("\n") == 1 and "nowhere" in found.err
    assert found.err.startswith(f"recipe_{name}.py: error: no ")


def test_every_recipe_is_tested():
    assert RECIPES == ["attnlrp", "eraser", "perturbation", "segmentation"]
    for name in RECIPES:
        assert len((DEMOS / f"recipe_{name}.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name, make, said", [
    ("segmentation", lambda folder: (folder / "gtsegs_ijcv.mat").write_bytes(b"MATLAB 5.0"), "no file of MATLAB 7.3"),
    ("segmentation", lambda folder: (folder / "a.png").write_bytes(b""), "no picture with a mask"),
    ("perturbation", lambda folder: (folder / "a.png").write_bytes(b""), "go into one subfolder a class"),
    ("eraser", lambda folder: (folder / "train.jsonl").write_text("{}"), "no test.jsonl"),
    ("eraser", lambda folder: ((folder / "docs").mkdir(), (folder / "test.jsonl").write_text('{"annotation_id": "a"}')),
     "line 1: no 'evidences'"),
])  # fmt: skip
def test_data_in_another_layout_are_one_line(recipe, tmp_path, name, make, said):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    if said.startswith("no file of MATLAB"):
        pytest.importorskip("h5py")
    found = recipe(name, "--data", folder, "--out", tmp_path / "out")
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1


def test_an_unknown_method_and_model_are_one_line(recipe, vit, masked, tmp_path):
    for option, said in ((["--model", vit, "--methods", "magic"], "unknown method 'magic'"),
                         (["--model", tmp_path / "no-model"], "no folder")):
        found = recipe("segmentation", "--data", masked, "--out", tmp_path / "out", *option)
        assert found.code == 2 and said in found.err and found.err.count("\n") == 1


def test_a_model_that_is_never_right_has_no_table(recipe, llama, questions, tmp_path):
    found = recipe("attnlrp", "squad", "--data", questions, "--model", llama, "--out", tmp_path / "out", "--methods",
                   "attnlrp")
    assert found.code == 2 and "the model does not say what is asked for" in found.err and found.err.count("\n") == 1


# On real models and data ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_perturbation_of_a_model_that_reads_digits(recipe, shared, tmp_path):
    with np.load(shared / "data" / "mnist" / "t10k.npz") as file:
        for number, (picture, label) in enumerate(zip(file["images"][:60], file["labels"][:60])):
            place = tmp_path / "digits" / str(label) / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place)
    found = recipe("perturbation", "--data", tmp_path / "digits", "--model", shared / "models" / "vit-mnist-timm",
                   "--out", tmp_path / "out", "--methods", "attnlrp-gamma")
    assert found.code == 0
    columns = complete(tmp_path / "out", of=tmp_path / "out" / "label")[0]["measured"]
    for of in ("predicted", "label"):
        up, down = columns[f"negative, {of}"], columns[f"positive, {of}"]
        assert up["attnlrp-gamma"] > up["random"] + 20 > up["reversed"] + 20
        assert down["attnlrp-gamma"] < down["random"] - 20 < down["reversed"] - 20
        assert up["reversed"] == pytest.approx(down["attnlrp-gamma"], abs=2)  # but for ties


@pytest.mark.slow
def test_rationales_of_a_model_that_reads_reviews(recipe, shared, tmp_path):
    model = shared / "models" / "minilm-sentiment"
    found = recipe("eraser", "--data", shared / "data" / "eraser_movies", "--model", model, "--out", tmp_path / "out",
                   "--methods", "transformer-attribution", "--limit", 12, "--length", 90)
    assert found.code == 0
    columns = complete(tmp_path / "out")[0]["measured"]
    for name in ("auprc", "token-f1@10", "comprehensiveness"):
        assert columns[name]["transformer-attribution"] > max(columns[name][other] for other in ("random", "reversed"))
