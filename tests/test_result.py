"""Results: sums hold, and a file gives back what was written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from relprop.result import Curve, Ledger, Relevance, read, write
from relprop.result.number import column
from relprop.tokens import ImageUnits, TensorUnits, TextUnits

F, N = 5, 7  # fractions and random orders


def ledger(value: torch.Tensor) -> Ledger:
    biases, softmax = torch.randn(2, len(value)).to(value)
    return Ledger(value, value - biases - softmax, {"biases": biases, "softmax": softmax}, {"layer 0": value - biases})


def curve(rows: int) -> Curve:
    fractions = torch.linspace(0, 1, F)
    morf, lerf = torch.randn(2, rows, F)
    interval = None if rows == 1 else (-0.5, 1.5)
    return Curve(
        fractions,
        morf,
        lerf,
        torch.randn(N, rows, F),
        torch.trapezoid(lerf - morf, fractions),
        torch.randn(N, rows),
        0.125,
        interval,
        99,
        "mask token",
        morf[:, 0],
    )


def text() -> Relevance:
    """Two rows: a word of two tokens, a word that comes twice, special tokens, padding on the right."""
    units = TextUnits(
        tokens=[["[CLS]", "no", "un", "##happy", "no", "[SEP]"], ["[CLS]", "<b>", "$x$", "[SEP]", "[PAD]", "[PAD]"]],
        words=[["no", "unhappy", "no"], ["<b>", "$x$"]],
        word_ids=[[None, 0, 1, 1, 2, None], [None, 0, 1, None, None, None]],
        offsets=[[(0, 0), (0, 2), (3, 5), (5, 10), (11, 13), (0, 0)], [(0, 0), (0, 3), (4, 7), (0, 0), (0, 0), (0, 0)]],
        texts=["no unhappy no", "<b> $x$"],
        special=[[True, False, False, False, False, True], [True, False, False, True, True, True]],
        padding=[[False] * 6, [False] * 4 + [True] * 2],
    )
    relevance = torch.randn(2, 6)
    value = torch.randn(2)
    return Relevance(
        relevance,
        value,
        ["POSITIVE", "é"],
        "attnlrp",
        "conservative up to biases",
        units,
        ledger(value),
        1,
        1,
        {"input_ids": torch.randn(2, 6, 3)},
        {"L0.attn": torch.randn(2, 4, dtype=torch.float64)},
        {"model": "tiny", "dtype": torch.float32},
        curve(2),
    )


def image() -> Relevance:
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    return Relevance(
        torch.randn(2, 8, 12),
        torch.randn(2).double(),
        ["7", "3"],
        "rollout",
        "not conservative",
        ImageUnits((8, 12), (4, 4), (2, 3), images),
        provenance={"unit": "share of attention"},
    )


def plain() -> Relevance:
    return Relevance(
        torch.randn(1, 3, 4), torch.randn(1), ["y"], "epsilon", "strictly conservative", TensorUnits((1, 3, 4))
    )


KINDS = pytest.mark.parametrize("make", [text, image, plain])


def test_words_and_specials_sum_to_the_map(seed):
    r = text()
    for row in range(2):
        told = sum(relevance for _, relevance in [*r.words(row), *r.specials(row)])
        assert told == pytest.approx(r.map[row].double().sum().item(), rel=1e-12)
    assert r.words() == [r.words(0), r.words(1)] and r.specials() == [r.specials(0), r.specials(1)]


def test_words_keep_duplicates_apart_and_join_subwords(seed):
    r = text()
    said = r.words(0)
    assert [word for word, _ in said] == ["no", "unhappy", "no"]
    assert said[0][1] == r.map[0, 1].item() and said[2][1] == r.map[0, 4].item()
    assert said[1][1] == pytest.approx(r.map[0, 2:4].double().sum().item())
    assert [token for token, _ in r.specials(1)] == ["[CLS]", "[SEP]", "[PAD]", "[PAD]"]


def test_patches_sum_to_the_map(seed):
    r = image()
    assert r.patches().shape == (2, 2, 3)
    assert_close(r.patches().sum((1, 2)), r.map.sum((1, 2)))
    assert_close(r.patches()[1, 0, 2], r.map[1, :4, 8:].sum())


def test_pixels_past_the_last_patch_belong_to_none(seed):
    r = image()
    r = replace(r, units=replace(r.units, patch=(3, 5), grid=(2, 2)))
    assert_close(r.patches().sum((1, 2)), r.map[:, :6, :10].sum((1, 2)))


def test_top_is_sorted(seed):
    assert [value for _, value in text().top(2, 0)] == sorted((value for _, value in text_words()), reverse=True)[:2]
    r = image()
    (place, value), *rest = r.top(row=1)
    assert value == r.patches()[1].max() == r.patches()[1][place] and len(rest) == 4
    ((place, value),) = plain().top(1)[0]
    assert len(place) == 2


def text_words():
    torch.manual_seed(0)
    return text().words(0)


@KINDS
def test_a_row_is_that_row(seed, make):
    r = make()
    for row in (0, -1):
        one = r.row(row)
        assert (
            one.rows == 1
            and one.target == [r.target[row]]
            and one.value == r.value[row]
            and torch.equal(one.map[0], r.map[row])
        )
        assert one.ledger is None or torch.equal(one.ledger.error[0], r.ledger.error[row])
    with pytest.raises(IndexError):
        r.row(2)


def test_a_row_of_a_check_has_its_own_p_value(seed):
    whole = curve(2)
    own = whole.row(1)
    assert own.p_value == (1 + int((whole.random_area[:, 1] >= whole.area[1]).sum())) / (1 + N)
    assert own.interval is None and torch.equal(own.morf[0], whole.morf[1])


@KINDS
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_files_give_back_what_was_written(seed, make, suffix, tmp_path):
    r = make()
    r = replace(r, provenance={key: str(entry) for key, entry in r.provenance.items()})  # as they come back
    write([r], tmp_path / f"r{suffix}")
    (back,) = read(tmp_path / f"r{suffix}")
    assert back.equals(r) and back.units == r.units and type(back.units) is type(r.units)
    assert back.value.dtype == r.value.dtype
    assert not back.equals(replace(r, map=r.map + 1e-6)) and not back.equals(replace(r, method="other"))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_several_results_in_one_file(seed, suffix, tmp_path):
    results = [image(), image()]
    write(results, tmp_path / f"r{suffix}")
    back = read(tmp_path / f"r{suffix}")
    assert len(back) == 2 and all(one.equals(other) for one, other in zip(back, results, strict=True))


def test_json_is_strict_and_of_primitive_lists(seed):
    r = text()
    said = json.loads(r.to_json(full=False), parse_constant=pytest.fail)
    assert (
        said["map"] == r.map.tolist()
        and said["target"] == ["POSITIVE", "é"]
        and said["ledger"]["value"] == said["value"]
    )
    assert said["inputs"] == said["latents"] == {} and said["provenance"]["dtype"] == "torch.float32"
    assert Relevance.from_json(r.to_json()).latents["L0.attn"].dtype == torch.float64


def test_json_refuses_nan(seed):
    r = replace(image(), latents={"L0": torch.tensor([[0.0], [float("nan")]])})
    with pytest.raises(ValueError, match="latents.L0 holds NaN"):
        r.to_json()


def broken(tree: dict) -> dict:
    """Texts that are no result, and what the error says of them."""
    return {
        "no JSON": ("{", "not JSON"),
        "other JSON": ('{"a": 1}', "not a result of relprop"),
        "a list": ("[]", "not a result of relprop"),
        "NaN": (json.dumps({**tree, "forwards": float("nan")}), "NaN"),
        "later version": (json.dumps({**tree, "version": 2}), "version 2"),
        "other kind": (json.dumps({**tree, "kind": "circuit"}), "'circuit', not a 'relevance'"),
        "nothing in it": (json.dumps({key: tree[key] for key in ("format", "version", "kind")}), "damaged"),
        "bad dtype": (json.dumps({**tree, "dtypes": {"map": "load"}}), "no dtype 'load'"),
        "rows lost": (json.dumps({**tree, "target": []}), "rows must agree"),
    }


@pytest.mark.parametrize("case", broken({"format": 0, "version": 0, "kind": 0}))
def test_a_file_that_is_no_result(seed, case, tmp_path):
    told, message = broken(plain().to_dict())[case]
    (tmp_path / "r.json").write_text(told)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "r.json")
    assert "r.json" in str(error.value)


def test_a_safetensors_file_that_is_no_result(tmp_path):
    from safetensors.torch import save_file

    save_file({"map": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a result of relprop"):
        read(tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read(tmp_path / "junk.safetensors")
    with pytest.raises(ValueError, match=".json and .safetensors"):
        read(tmp_path / "map.png")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.json")


def test_bad_results_are_refused(seed):
    r = image()
    with pytest.raises(ValueError, match="1 of 192 entries"):
        replace(
            r, map=r.map.index_fill(0, torch.tensor(1), 0).index_put((torch.tensor(0),) * 3, torch.tensor(float("inf")))
        )
    with pytest.raises(ValueError, match="rows must agree"):
        replace(r, target=["7"])
    with pytest.raises(ValueError, match="one number a row"):
        Ledger(torch.zeros(2), torch.zeros(2), {"biases": torch.zeros(1)})
    with pytest.raises(ValueError, match="lerf is"):
        replace(curve(2), lerf=torch.zeros(1, F))


def test_asking_for_what_is_not_there(seed):
    with pytest.raises(ValueError, match="use .patches"):
        image().words()
    with pytest.raises(ValueError, match="use .words"):
        text().patches()
    with pytest.raises(ValueError, match="use .map"):
        plain().specials(0)
    r = image()
    with pytest.raises(ValueError, match="no patches that are known"):
        replace(r, units=replace(r.units, patch=None, grid=None)).patches()
    with pytest.raises(ValueError, match="overlap"):
        replace(r, units=replace(r.units, patch=(4, 4), grid=(5, 3))).patches()


def test_ledger_closes_and_says_so(seed):
    value = torch.randn(3, dtype=torch.float64)
    books = ledger(value)
    assert (books.error < 1e-12).all()
    assert_close(books.input + books.total_absorbed + books.residual, value)
    leak = Ledger(value, books.input + 0.1 * value, books.absorbed)
    assert_close(leak.error, torch.full_like(value, 0.1))
    names, amounts, shares = zip(*leak.table(1), strict=True)
    assert names == ("value", "input", "biases", "softmax", "residual")
    assert amounts[0] == pytest.approx(sum(amounts[1:])) and shares[0] == 1 and sum(shares[1:]) == pytest.approx(1)
    lines = str(leak).splitlines()
    assert (
        len(lines) == 3 and len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in lines}) == 1
    )  # aligned


def test_ledger_of_nothing_has_no_shares():
    books = Ledger(torch.zeros(1), torch.zeros(1), {})
    assert books.error.item() == 0 and str(books) == "value 0 | input 0 (–) | error 0"
    assert Ledger(torch.zeros(1), torch.ones(1), {}).error.isinf()


def test_verdicts(seed):
    assert replace(curve(1), p_value=0.0476).summary().startswith("better than chance (p = 0.048): area ")
    assert replace(curve(2), p_value=0.33).summary().startswith("not better than chance (p = 0.33): area ")
    assert "99 forwards" in curve(1).summary() and "[-0.5, 1.5], mean of 2 inputs" in curve(2).summary()
    assert Curve.from_dict(json.loads(json.dumps(curve(2).to_dict()))).interval == (-0.5, 1.5)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-30, 1.0], [1e9, -2.5], [0.0, 3.0]])
def test_columns_of_any_size(values):
    assert len(column(values)) == 2 and all(column(values))
