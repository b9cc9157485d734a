"""What cannot be explained is said in one line, as early as it can be known, and the model stays as it was.

Names of models, pictures, texts and targets that cannot be are tried where they are read: `test_load`, `test_target`.
"""
from __future__ import annotations

import re
import warnings
from inspect import signature

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_cli import run
from torch import Tensor, nn

import relprop
from relprop import METHODS, IndependentOutput, Token, compare, explain, load

TEXT = "A wonderful film."
DEAF = ("random",)  # methods that do not ask the model
METHOD_OPTIONS = {name: {"baseline": tiny.MASK} for name in METHODS
                  if "baseline" in signature(METHODS[name]).parameters}  # where there is no tokenizer to know it


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every model here is random, the same each time."""


@pytest.fixture(scope="module")
def reviews():
    return load("reviews-bert")


@pytest.fixture(scope="module")
def digits():
    return load("digits-vit")


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


def vectors(rows: int = 2) -> Tensor:
    return torch.randn(rows, 4)


def pixels(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 24, 24, dtype=torch.float64)


def named(value: object) -> str:
    """A test by the options that it is about."""
    options = value.items() if isinstance(value, dict) else ()
    return " ".join(f"{name}={getattr(option, '__name__', option)}" for name, option in options)


def state(model: nn.Module) -> list[object]:
    """All that a run might leave behind, in the model and in torch."""
    modules = [(path, type(module), module.training, sorted(module.__dict__), len(module._forward_hooks),
                len(module._forward_pre_hooks)) for path, module in model.named_modules()]
    tensors = [(name, id(t), t._version, t.dtype, t.requires_grad, t.grad)
               for name, t in [*model.named_parameters(), *model.named_buffers()]]
    flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    return [modules, tensors, flags, torch.overrides._get_current_function_mode_stack(), torch.get_num_threads()]


# -- methods, options and addresses ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options, error, said", [
    ({"method": "magic"}, ValueError, "unknown method 'magic'; the methods are attnlrp, .*, random$"),
    ({"method": "attn-lrp"}, ValueError, "unknown method 'attn-lrp'; .*; did you mean 'attnlrp'?"),
    ({"method": 3}, TypeError, "a method is a name or a Composite, not int; the names are attnlrp"),
    ({"method": ["attnlrp"]}, TypeError, "a method is a name or a Composite, not list"),
    ({"method": "attnlrp", "options": {"n_steps": 3}}, ValueError, "attnlrp is a composite and has no option n_steps"),
    ({"method": "rollout", "options": {"steps": 3}}, ValueError, "rollout has no option steps; it has head_fusion"),
    ({"method": "rollout", "options": {"head_fusion": "sum"}}, ValueError, "no head fusion 'sum'; there are mean"),
    ({"method": "rollout", "at": ["L0"]}, ValueError, "rollout has no at: .*; the methods that do are attnlrp"),
    ({"method": "rollout", "spread_bias": True}, ValueError, "rollout has no spread_bias"),
    ({"unruled": "ignore"}, ValueError, "unruled must be 'error' or 'gradient', got 'ignore'"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1 .* got 0"),
    ({"batch_size": 1.5}, ValueError, "batch_size must be at least 1 and whole, .* got 1.5"),
    ({"batch_size": "2"}, ValueError, "batch_size must be at least 1 and whole, .* got '2'"),
    ({"at": ["head 3"]}, ValueError, "'head 3' is no address; write L5, L5.in"),
    ({"at": "foo"}, ValueError, "'foo' is no address"),  # and not its first letter
    ({"at": ["L99"]}, ValueError, "no layer 99; the model has layers 0 to 2"),
    ({"at": ["L0.attn.H9"]}, ValueError, "no H9 in layer 0, which has 2 heads"),
    ({"at": ["L0.mlp.N999"]}, ValueError, "no N999 in layer 0, which has 32 neurons"),
    ({"at": ["L0@9"]}, ValueError, "L0@9: row 0 has 3 positions, so 9 is not one of them"),
    ({"target": 7}, ValueError, "no class index 7; the model has 0 to 2"),
    ({"target": [0, 1, 2]}, ValueError, "3 targets for 2 rows; give one target, or a list with one a row"),
    ({"target": []}, ValueError, "0 targets for 2 rows"),
    ({"target": torch.eye(2)}, ValueError, r"targets of shape \(2, 2\); give one index a row, \(2,\)"),
    ({"target": {"class": 1}}, TypeError, "a target is an index, a label, a Target or a function of the output"),
    ({"target": Token(3)}, ValueError, "give the index or the label of a class"),
    ({"target": lambda output: output.logits}, ValueError, r"floating tensor of shape \(2,\), one number a row"),
    ({"target": lambda output: output.logits[:, 0] * torch.nan}, ValueError, "of row 0 is nan: the model's output is "
                                                                            "finite, so the target makes it"),
    ({"target": lambda output: output.logits[:, 0].detach()}, IndependentOutput, "does not depend on the input"),
], ids=named)
def test_what_is_asked_for(options, error, said):
    model = tiny.bert().train()
    model.bert.encoder.eval()  # in parts
    before = state(model)
    with pytest.raises(error, match=said) as raised:
        explain(model, torch.tensor([[2, 5, 3], [2, 9, 3]]), **options)
    assert "\n" not in str(raised.value) and state(model) == before


@pytest.mark.parametrize("options, error, said", [
    ({"method": "magic"}, ValueError, "unknown method"),
    ({"at": "foo"}, ValueError, "is no address"),
    ({"batch_size": 0}, ValueError, "batch_size"),
], ids=named)
def test_a_slip_is_found_before_the_model_is_loaded(options, error, said):
    with pytest.raises(error, match=said):
        explain("no such model", TEXT, **options)


def test_one_address_needs_no_list(reviews):
    result = explain(reviews, TEXT, at="L0")
    assert torch.equal(result.at("L0"), explain(reviews, TEXT, at=["L0"]).latents["L0"])


@pytest.mark.parametrize("options, error, said", [
    ({"methods": []}, ValueError, r"methods is a list of names, got \[\]"),
    ({"methods": "attnlrp"}, ValueError, "methods is a list of names, got 'attnlrp'"),
    ({"methods": ["attnlrp", "magic"]}, ValueError, "unknown method 'magic'"),
    ({"options": {"rollout": {}}}, ValueError, "options of 'rollout', which is not among the methods attnlrp"),
    ({"options": {"attnlrp": {"n_steps": 3}}}, ValueError, "attnlrp is a composite and has no option n_steps"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"steps": 0}, ValueError, "steps and batch_size must be at least 1"),
    ({"target": [0, 1, 0]}, ValueError, "3 targets for 2 rows"),
], ids=named)
def test_what_cannot_be_compared(options, error, said):
    model = tiny.vit().train()
    before = state(model)
    with pytest.raises(error, match=said):
        compare(model, pixels(), **{"methods": ["attnlrp"], **options})
    assert state(model) == before


def test_a_map_that_has_nothing_to_rank_is_compared_unchecked(reviews):
    found = compare(reviews, "A gripping, beautifully acted story.", methods=["attention-gradcam", "attnlrp"],
                    options={"attention-gradcam": {"layer": 0}}, steps=2, randoms=2)
    empty, ranked = found.results
    assert not empty.map.any() and "nothing to rank" in empty.provenance["unchecked"]
    assert ranked.map.any() and "unchecked" not in ranked.provenance
    assert found.table()["area"].isna().tolist() == [True, False]


def test_what_a_tokenizer_would_know_can_be_given():
    model, ids, methods = tiny.gpt2(), torch.tensor([[3, 4, 5, 6]]), ["integrated-gradients", "attnlrp"]
    with pytest.raises(ValueError, match="without a tokenizer there is no mask"):
        compare(model, ids, methods=methods, steps=2, randoms=2)
    options = {"integrated-gradients": {"baseline": tiny.MASK, "n_steps": 4}}
    found = compare(model, ids, methods=methods, options=options, steps=2, randoms=2, baseline=tiny.MASK)
    assert found.table()["area"].notna().all() and found.results[0].forwards == 4 + 2


@pytest.mark.parametrize("options, said", [
    ({"steps": 0}, "must be at least 1"), ({"randoms": 0}, "must be at least 1"),
    ({"batch_size": 0}, "must be at least 1"), ({"baseline": "grey"}, "no baseline 'grey' for text; there are mask"),
    ({"by": "letter"}, "units are taken by token or word, not by 'letter'"),
], ids=named)
def test_what_cannot_be_checked(reviews, options, said):
    result, before = explain(reviews, TEXT), state(reviews.model)
    with pytest.raises(ValueError, match=said):
        result.check(**options)
    assert state(reviews.model) == before


@pytest.mark.parametrize("method", ["rollout", "raw-attention"])
def test_a_model_without_attention(method):
    model = plain()
    before = state(model)
    with pytest.raises(ValueError, match="no attention was found .* use a method that needs none"):
        explain(model, vectors(), 0, method=method)
    for options in ({"at": "L0"}, {"layers": True}):
        with pytest.raises(ValueError, match="no stack of layers was found"):
            explain(model, vectors(), 0, **options)
    assert state(model) == before


# -- inputs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("inputs, error, said", [
    (None, TEXT, "takes a text, a list of texts, or a tuple of two as a pair, not NoneType"),
    ((), TEXT, "not a tuple of 0"), (("a", "b", "c"), TEXT, "not a tuple of 3"), ([["a"]], TEXT, "not list"),
    ([TEXT, None], TEXT, "not NoneType"), (b"film", TEXT, "not bytes"), ({TEXT}, TEXT, "not set"),
    (np.array([TEXT]), TEXT, "not ndarray$"), (np.zeros(3), TEXT, "not ndarray; it is a text model, a picture is"),
    (torch.ones(1, 2, 3).long(), TEXT, r"token ids of dtype torch.int64 and shape \(1, 2, 3\), expected integers"),
    (torch.tensor([[1, -1]]), TEXT, "token ids from -1 to 1, the model has 0 to"),
    ("\u200b", TEXT, "the tokenizer finds no token in '\\\\u200b'"), ({}, TEXT, "was given an empty mapping; it takes"),
    (None, "picture", "takes a path, a PIL image, a numpy array or a tensor, not NoneType"),
    ({}, "picture", "was given an empty mapping"),
    ([torch.zeros(1, 54, 54), np.zeros((54, 54))], "picture", "some rows are tensors .* and some are pictures"),
    (np.zeros((0, 54, 54, 3), np.uint8), "picture", "the batch is empty"),
    (np.zeros((3, 54, 54), np.uint8), "picture", r"an array of shape \(3, 54, 54\) is no picture; expected \(Y, X\)"),
], ids=named)
def test_inputs_of_no_kind(reviews, digits, inputs, error, said):
    subject = reviews if error == TEXT else digits
    before = state(subject.model)
    with pytest.raises((TypeError, ValueError), match=said):
        explain(subject, inputs)
    assert state(subject.model) == before


@pytest.mark.parametrize("inputs, said", [
    (None, "takes a tensor .* not NoneType"), ("text", "not str"), ((), "not nothing"),
    (torch.tensor(1.0), "not a tensor without rows"), (torch.zeros(0, 4), "the batch is empty"),
    (np.zeros((2, 4)), "not ndarray"),
    ({"x": torch.zeros(2, 4)}, "Sequential takes no argument x; it takes input"),
    (torch.tensor([[0.0, 1.0, torch.nan, torch.inf]]), "the input has 2 NaN or infinite values; replace them"),
], ids=named)
def test_inputs_of_a_plain_module(inputs, said):
    model = plain().train()
    before = state(model)
    with pytest.raises((TypeError, ValueError), match=said):
        explain(model, inputs, 0)
    assert state(model) == before


def test_what_the_model_itself_cannot_take_is_its_own_error():
    model = plain().train()
    before = state(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        explain(model, torch.zeros(2, 5), 0)
    assert state(model) == before


def test_pictures_are_resized_and_tensors_are_not(digits, tmp_path):
    """A picture is of any size and mode, and prepared as the model asks; a tensor is what goes into the model."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    result = explain(digits, tmp_path / "wide.png", 3)
    assert result.map.shape == (1, 54, 54) and result.units.images.shape == (1, 54, 54, 3) and result.map.any()
    with pytest.raises(ValueError, match=r"pixels of shape \(1, 1, 40, 90\), expected \(B, 1, 54, 54\); give a PIL"):
        explain(digits, torch.zeros(1, 1, 40, 90), 3)


def test_a_picture_that_breaks_off(digits, tmp_path):
    whole, broken = tmp_path / "whole.png", tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (54, 54), dtype=np.uint8)).save(whole)
    broken.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken.png' is no picture that Pillow reads \(OSError: "):
        explain(digits, broken)


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="no device 'gpu0'; give cpu, cuda"):
        load("digits-vit", device="gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' cannot be used here: ") as raised:
            load("digits-vit", device="cuda")
        assert "\n" not in str(raised.value)


# -- values that are no numbers, and that do not depend ---------------------------------------------------------------

@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_broken_weights_are_named_whatever_the_method(method, number):
    model = tiny.vit(depth=1).train()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[3, 3] = number
    before = state(model)
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight of .* has 1 NaN or infinite values of 768"):
        explain(model, pixels(1), 1, method=method)
    assert state(model) == before


@pytest.mark.parametrize("method", [method for method in METHODS if method not in DEAF])
def test_an_output_that_does_not_depend_is_an_error_and_no_map_of_zeros(method):
    model = tiny.vit(depth=1).train()
    nn.init.zeros_(model.head.weight)
    before = state(model)
    with pytest.raises(IndependentOutput):
        explain(model, pixels(), 1, method=method)
    assert state(model) == before


def test_the_row_that_does_not_depend_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(torch.cat([x[:1], torch.ones_like(x[1:])]))

    with pytest.raises(IndependentOutput, match="the explained value of row 1, 2 does not depend on the input"):
        explain(Half(), vectors(3), 0, ledger=False)


# -- train mode -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_train_mode_is_explained_in_eval_mode(method):
    model, x = tiny.bert(num_hidden_layers=1, hidden_dropout_prob=0.5), torch.tensor([[2, 5, 6, 3]])

    def outcome() -> list | str:
        try:
            return explain(model, x, 1, method=method, options=METHOD_OPTIONS.get(method)).map.tolist()
        except ValueError as error:
            return str(error)

    expected = outcome()
    assert ("does not apply" in expected) if method == "deeplift" else any(expected[0])
    model.train()
    model.bert.encoder.eval()  # in parts
    before = state(model)
    assert outcome() == expected
    assert state(model) == before
    assert not torch.equal(model(x).logits, model(x).logits), "it would have made a difference"


def test_a_check_leaves_train_mode_as_it_is():
    model, x = tiny.vit(depth=1, drop_rate=0.5), pixels(1)
    expected = explain(model, x, 1).check(steps=2, randoms=2).area
    before = state(model.train())
    assert torch.equal(explain(model, x, 1).check(steps=2, randoms=2).area, expected)
    assert state(model) == before


# -- results ----------------------------------------------------------------------------------------------------------

def test_what_a_result_does_not_have(reviews, tmp_path):
    result = explain(reviews, TEXT)
    for ask, error, said in [
        (lambda: result.save(tmp_path / "map.doc"), ValueError, "cannot save as 'map.doc': the suffix must be one of"),
        (lambda: result.save(tmp_path / "map"), ValueError, "cannot save as 'map'"),
        (lambda: result.save(tmp_path), ValueError, "cannot save as"),
        (lambda: result.save(tmp_path / "no" / "map.png"), FileNotFoundError, "cannot save map.png: there is no fold"),
        (lambda: result.save(tmp_path / "map.png", row=3), ValueError, "no row 3; there are 1"),
        (lambda: result.at("foo"), ValueError, "'foo' is no address"),
        (lambda: result.at(3), ValueError, "3 is no address"),
        (lambda: result.at("L99"), ValueError, "no layer 99; the model has layers 0 to"),
        (lambda: explain(reviews, TEXT, method="random").at("L0"), ValueError, "does not pass through the layers"),
        (lambda: result.words(5), IndexError, "no row 5; there are 1"),
        (lambda: result.top(2, 5), IndexError, "no row 5; there are 1"),
        (lambda: result.row(-2), IndexError, "no row -2; there are 1"),
        (lambda: result.patches(), ValueError, "patches are of images, and this is a map of text"),
        (lambda: relprop.open(tmp_path), ValueError, "results are read from .json and .safetensors"),
        (lambda: relprop.open(tmp_path / "no.json"), FileNotFoundError, "no.json"),
    ]:
        with pytest.raises(error, match=said):
            ask()
    assert not list(tmp_path.iterdir())


# -- the command ------------------------------------------------------------------------------------------------------

def slips(folder) -> dict[str, tuple[list[object], str]]:
    """Arguments, and all of the line that they are answered with."""
    (folder / "file").write_text("{}")
    (folder / "empty").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (54, 54), dtype=np.uint8)).save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    Image.new("I;16", (54, 54)).save(folder / "deep.png")
    (folder / "utf16.txt").write_bytes("film".encode("utf-16"))
    whole, empty = folder / "whole.png", folder / "empty"
    return {
        "half a picture": (["explain", folder / "half.png"], ".*half.png is an image that cannot be read .OSError: .*"),
        "16 bits": (["explain", folder / "deep.png"], "a picture of mode 'I;16' has more than 8 bits; .*"),
        "utf-16": (["explain", folder / "utf16.txt"], ".*utf16.txt is neither an image nor a text in UTF-8"),
        "folder without a model": (["explain", TEXT, "-m", empty], "no config.json in .*empty; save the model th.*"),
        "file as a model": (["explain", TEXT, "-m", folder / "file"], ".*file is a file; give the folder .*"),
        "no model": (["explain", TEXT, "-m", ""], "no folder ''; give one with a config.json, or one of digits-vi.*"),
        "text for images": (["explain", TEXT, "-m", "digits-vit"], "digits-vit takes images, and the input is a text"),
        "image for texts": (["explain", whole, "-m", "reviews-bert"],
                            "reviews-bert takes texts, and the input is an image"),
        "more targets": (["explain", "-", *(["-t", "POSITIVE"] * 3)], "3 targets for 2 rows; .*"),
        "no target": (["explain", TEXT, "-t", ""], "no label ''; there are NEGATIVE, POSITIVE"),
        "target": (["check", TEXT, "-t", "9"], r"no class index 9; the model has 0 to 1 \(NEGATIVE, POSITIVE\)"),
        "method": (["check", TEXT, "--method", "rolout"], "unknown method 'rolout'; .*; did you mean 'rollout'\\?"),
        "half precision": (["explain", TEXT, "--dtype", "float16"], "float16 on a CPU is not precise enough .*"),
        "device": (["explain", TEXT, "--device", "gpu"], "no device 'gpu'; give cpu, cuda, cuda:0 or mps"),
        "no folder to save in": (["explain", TEXT, "-o", folder / "no" / "map.png"],
                                 "cannot save map.png: there is no folder .*no"),
        "folder to save as": (["compare", TEXT, "-o", empty], "cannot save as 'empty': the suffix must be one of .*"),
        "batch size": (["compare", TEXT, "--batch-size", "-1"], "Invalid value for '--batch-size': .*"),
        "randoms": (["check", TEXT, "--randoms", "0"], "Invalid value for '--randoms': .*"),
        "folder that is a file": (["demo", "-o", folder / "file"], ".*file: File exists"),
    }


@pytest.mark.parametrize("slip", [
    "half a picture", "16 bits", "utf-16", "folder without a model", "file as a model", "no model", "text for images",
    "image for texts", "more targets", "no target", "target", "method", "half precision", "device",
    "no folder to save in", "folder to save as", "batch size", "randoms", "folder that is a file"])
def test_a_slip_in_the_command_is_one_line(slip, tmp_path):
    arguments, said = slips(tmp_path)[slip]
    result = run(*arguments, stdin="one\ntwo\n")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    line, = result.stderr.splitlines()
    assert re.fullmatch(f"relprop: error: {said}", line), line


def test_all_slips_are_tried(tmp_path):
    marked, = (mark for mark in test_a_slip_in_the_command_is_one_line.pytestmark if mark.name == "parametrize")
    assert marked.args[1] == list(slips(tmp_path))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "mine.png").write_bytes(b"")
    monkeypatch.setattr(Image, "open", refused)
    result = run("explain", tmp_path / "mine.png")
    assert result.exit_code == 2 and result.stderr == f"relprop: error: {tmp_path}/mine.png: Permission denied\n"


def test_where_to_save_is_looked_at_before_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("relprop.cli.given.subject_of", lambda *_, **__: pytest.fail("loaded before the slip is found"))
    assert run("explain", TEXT, "-o", tmp_path / "map.doc").exit_code == 2


def test_a_warning_is_one_line_and_the_text_is_cut():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("explain", " ".join(["film"] * 200))
    assert result.exit_code == 0 and "film" in result.stdout
    line, = result.stderr.splitlines()
    assert re.fullmatch(r"relprop: warning: the text of row 0 has 202 tokens, the model takes 128: 74 are cut .*", line)


@pytest.mark.parametrize("method, option, value", [
    ("transformer-attribution", "start_layer", "a"), ("transformer-attribution", "normalize", "maybe"),
    ("partial-lrp", "layer", 1.5), ("integrated-gradients", "n_steps", True), ("rollout", "discard", "much"),
    ("generic-attention", "rules", 3)])
def test_an_option_of_another_type_is_named(method, option, value):
    with pytest.raises(TypeError, match=f"{method}: {option} is of type .*, got {value!r}"):
        explain("reviews-bert", TEXT, method=method, options={option: value})
