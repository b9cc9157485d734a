"""The command `relprop`: its verbs, what it takes for input, and one line for each slip."""
from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from relprop import cli, zoo

TORCHLESS = """
import sys
from relprop.cli import app
app({argv}, standalone_mode=False, prog_name="relprop")
print("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """File of a canvas with two digits, and their labels."""
    from relprop.zoo.digits import canvases

    drawn = canvases(1, seed=7, digits=(2, 2))
    path = tmp_path_factory.mktemp("pictures") / "digits.png"
    Image.fromarray((drawn.images[0, 0] * 255).round().byte().numpy()).save(path)
    return str(path), [str(label) for label in drawn.labels[0].nonzero().flatten().tolist()]


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin, prog_name="relprop")


def good(*arguments, stdin=None):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


@pytest.mark.parametrize("argv", [["--help"], ["explain", "--help"], ["models"], []])
def test_help_does_not_wait_for_torch(argv):
    said = python("-c", TORCHLESS.format(argv=argv)).stdout
    assert ("digits-vit" if argv == ["models"] else "Usage: relprop") in said
    assert said.splitlines()[-1] == "False"


def test_the_help_of_data_names_all_there_is():
    from typer.main import get_command

    from relprop.data import FILES, MAKERS

    option = next(option for option in get_command(cli.app).commands["benchmark"].params if option.name == "data")
    named = set(option.help.replace(",", " ").replace(";", " ").split())
    assert FILES and MAKERS and named >= {*FILES, *MAKERS}


def test_python_dash_m():
    said = python("-m", "relprop", "--help").stdout
    assert all(verb in said for verb in ("explain", "compare", "check", "models", "demo"))
    assert said.split() == good().split() == good("--help").split()  # the width is the terminal's


def test_explain_a_text(tmp_path):
    said = good("explain", "A wonderful film.", "--target", "POSITIVE", "--output", tmp_path / "map.html")
    assert "POSITIVE" in said and "wonderful" in said and "attnlrp" in said
    assert "wonderful" in (tmp_path / "map.html").read_text()


def test_explain_an_image_for_two_targets(picture, tmp_path):
    path, labels = picture
    said = good("explain", path, "-t", labels[0], "-t", labels[1], "-o", tmp_path / "map.png")
    assert all(f"target {label}" in said for label in labels)
    assert Image.open(tmp_path / "map.png").width > 100


def test_explain_prints_nothing_but_json():
    said = json.loads(good("explain", "A wonderful film.", "--json"))
    assert said["target"] == ["POSITIVE"] and said["ledger"]["value"] == said["value"]


def test_explain_lines(tmp_path):
    lines = "A wonderful film.\n\n  A dull, lifeless mess.  \n"
    (tmp_path / "lines.txt").write_text(lines)
    rows = [json.loads(good("explain", source, "--json", stdin=lines)) for source in (tmp_path / "lines.txt", "-")]
    assert rows[0]["target"] == rows[1]["target"] == ["POSITIVE", "NEGATIVE"]
    assert rows[0]["value"] == rows[1]["value"]


def test_explain_in_batches(tmp_path):
    lines = "A wonderful film.\nA dull, lifeless mess.\nThe best film of the year, by far.\n"
    sizes = [], ["--batch-size", 2]
    whole, parts = (json.loads(good("explain", "-", "--json", *size, stdin=lines)) for size in sizes)
    assert whole["value"] == pytest.approx(parts["value"], rel=1e-5)


def test_explain_in_float64():
    texts = ["explain", "A fine film.", "--json", "--device", "cpu", "--dtype"]
    single, double = (json.loads(good(*texts, dtype)) for dtype in ("float32", "float64"))
    assert single["value"] == pytest.approx(double["value"], rel=1e-4)
    assert [said["provenance"]["dtype"] for said in (single, double)] == ["float32", "float64"]


def test_check():
    said = good("check", "A wonderful film.", "--steps", 4, "--randoms", 3)
    assert "area" in said
    curve = json.loads(good("check", "A wonderful film.", "--steps", 4, "--randoms", 3, "--seed", 1, "--json"))
    assert curve["forwards"] > 0


def test_compare(tmp_path):
    methods = ["--method", "attnlrp", "--method", "random"]
    said = good("compare", "A wonderful film.", *methods, "--output", tmp_path / "grid.png")
    assert "attnlrp" in said and "random" in said and (tmp_path / "grid.png").exists()


def test_models():
    said = good("models")
    assert all(name in said for name in zoo.names())
    cards = json.loads(good("models", "--json"))
    assert [card["name"] for card in cards] == zoo.names()
    assert all(card["parameters"] > 5e5 and card["about"] for card in cards)
    assert [card["name"] for card in cards if not card["labels"]] == ["tasks-gpt2"]  # predicts tokens


def test_methods_say_what_they_conserve():
    from relprop.method import METHODS

    said = good("models", "--methods")
    assert all(f"\n{name} " in f"\n{said}" for name in METHODS) and "conservative up to biases" in said


def test_version():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("relprop") in good("--version")
    except PackageNotFoundError:
        pytest.skip("relprop is not installed here, so that it has no version")


@pytest.mark.slow
def test_demo(tmp_path):
    said = good("demo", "--output", tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"digits.png", "digits.html", "review.png", "review.html", "heads.png", "heads.html"}
    assert "softmax" in said and "position embeddings" in said  # of the ledger
    assert "heads of tasks-gpt2" in said and "makes a, ' he', likely against b, ' she'" in said


def test_stdin_is_lines(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert cli.read("-") == (["one", "two"], "text")


def test_a_text_may_look_odd():
    for text in ("Is it .png?", "a/b", "Great. Truly great", "x" * 5000, "no suffix"):
        assert cli.read(text) == ([text], "text")
    assert cli.read("two\nlines") == (["two lines"], "text")


def test_a_file_is_told_by_what_is_in_it(tmp_path, picture):
    odd = tmp_path / "no_suffix"
    odd.write_bytes(open(picture[0], "rb").read())
    assert cli.read(str(odd))[1] == "image"
    odd.write_text("just\nlines")
    assert cli.read(str(odd)) == (["just", "lines"], "text")


def slips(picture, folder):
    (folder / "empty.txt").write_text(" \n")
    (folder / "odd.bin").write_bytes(bytes(range(128, 256)))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)))
    return {
        "no such file": (["explain", "nothing/here.png"], "no file nothing/here.png"),
        "folder": (["explain", folder], "is a folder"),
        "empty text": (["explain", "  "], "empty"),
        "empty file": (["explain", folder / "empty.txt"], "empty"),
        "neither": (["explain", folder / "odd.bin"], "neither an image nor a text"),
        "broken image": (["explain", folder / "broken.png"], "broken.png"),
        "model": (["explain", "text", "--model", "digits-vet"], "digits-vet"),
        "text for images": (["explain", "text", "--model", "digits-vit"], "image"),
        "image for texts": (["explain", picture[0], "--model", "reviews-bert"], "text"),
        "label": (["explain", "text", "--target", "GLORIOUS"], "POSITIVE"),
        "index": (["explain", "text", "--target", "7"], "7"),
        "targets": (["explain", "-", "-t", "POSITIVE", "-t", "NEGATIVE"], "3"),
        "method": (["explain", "text", "--method", "magic"], "attnlrp"),
        "methods": (["compare", "text", "--method", "magic"], "attnlrp"),
        "device": (["explain", "text", "--device", "abacus"], "abacus"),
        "dtype": (["explain", "text", "--dtype", "int8"], "float32"),
        "suffix": (["explain", "text", "--output", folder / "map.doc"], "png"),
        "batch size": (["explain", "text", "--batch-size", "0"], "--batch-size"),
        "steps": (["check", "text", "--steps", "none"], "--steps"),
        "option": (["explain", "text", "--colour", "red"], "--colour"),
        "verb": (["explian", "text"], "explian"),
        "no input": (["explain"], "Missing argument"),
    }


SLIPS = [
    "no such file", "folder", "empty text", "empty file", "neither", "broken image", "model", "text for images",
    "image for texts", "label", "index", "targets", "method", "methods", "device", "dtype", "suffix", "batch size",
    "steps", "option", "verb", "no input",
]  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_line(slip, picture, tmp_path):
    arguments, hint = slips(picture, tmp_path)[slip]
    result = run(*arguments, stdin="one\ntwo\nthree\n")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line, = result.stderr.strip().splitlines()
    assert line.startswith("relprop: error: ") and hint in line


def test_all_slips_are_tried(picture, tmp_path):
    assert list(slips(picture, tmp_path)) == SLIPS


def test_debug_shows_where():
    result = run("--debug", "explain", "nothing/here.png")
    assert isinstance(result.exception, FileNotFoundError)


def test_exit_code_of_the_command():
    done = python("-m", "relprop", "explain", "nothing/here.png")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "relprop: error: no file nothing/here.png\n"
