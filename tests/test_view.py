"""Figures, pages and files: that they are there, whole, and say what is so. Beauty is for people to judge."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from test_result import curve, image, plain, text

from relprop import view
from relprop.result import read
from relprop.view import color, sheet, words
from relprop.view.grid import ends, together

MAGIC = {
    ".png": b"\x89PNG",
    ".svg": b"<?xml",
    ".pdf": b"%PDF",
    ".html": b"<!DOCTYPE html>",
    ".json": b"{",
    ".safetensors": b"",
}
KINDS = pytest.mark.parametrize("make", [text, image, plain])


def written(figure) -> str:
    """All that stands on a figure."""
    from matplotlib.text import Text

    return "\n".join(found.get_text() for found in figure.findobj(Text))


class Shown(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.names, self.titles, self.text = [], set(), [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names |= {name for name, _ in attributes}
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("suffix", view.SUFFIXES)
@KINDS
def test_every_suffix(seed, make, suffix, tmp_path):
    path = view.save(make(), tmp_path / f"map{suffix.upper()}", row=0)
    assert path.read_bytes().startswith(MAGIC[suffix]) and path.stat().st_size > 100


def test_unknown_suffixes_are_told_the_known_ones(seed, tmp_path):
    for name in ("map.jpg", "map"):
        with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf, \.html, \.json, \.safetensors"):
            view.save(image(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_check_is_saved_with_the_map(seed, tmp_path):
    r, check = replace(text(), curve=None), curve(2)
    (back,) = read(view.save(r, tmp_path / "r.json", check=check))
    assert back.equals(replace(r, provenance={"model": "tiny", "dtype": "torch.float32"}, curve=check))
    assert check.row(0).verdict in view.page(r, check=check)


@KINDS
def test_figures_say_what_was_explained(seed, make):
    r = make()
    said = written(view.figure(r))
    for target in r.target:
        assert f"target {target}" in said
    assert r.method in said and r.conservation in said and "max |R| = " in said
    assert ("ledger" in said) and all(name in said for name in (r.ledger.absorbed if r.ledger else ()))
    assert all(r.curve.row(row).verdict in said for row in range(r.rows)) if r.curve else "chance" not in said


def test_figures_print_the_scale_and_its_unit(seed):
    r = image()
    end = r.map[0].abs().max().item()
    assert f"max |R| = {end:.3g} (share of attention)" in written(view.image(r))
    end = max(abs(relevance) for _, relevance in text_of(0))
    torch.manual_seed(0)
    assert f"max |R| = {end:.3g} (unit of the target)" in written(view.text(text()))


def text_of(row):
    torch.manual_seed(0)
    return text().words(row)


@KINDS
@pytest.mark.parametrize("change", ["zero", "negative", "tiny", "huge"])
def test_maps_of_any_size(seed, make, change, tmp_path):
    r = make()
    values = {"zero": 0 * r.map, "negative": -r.map.abs(), "tiny": 1e-30 * r.map, "huge": 1e30 * r.map}[change]
    r = replace(r, map=values, ledger=None, curve=None)
    view.save(r, tmp_path / "map.png", row=0)
    assert ("all zero" in written(view.figure(r, 0))) == ("all zero" in view.page(r)) == (change == "zero")


def test_the_scale_is_symmetric_and_zero_is_white():
    painted = color.paint(torch.tensor([-2.0, 0.0, 2.0]), 2.0).astype(int)
    assert (abs(painted[1] - painted[1].mean()) < 3).all() and painted[1].min() > 240
    assert painted[0][2] > painted[0][0] and painted[2][0] > painted[2][2]  # negative is blue, positive is red
    assert (color.paint(torch.zeros(3), 0.0) == color.paint(torch.tensor([0.0]), 1.0)).all()
    picture = torch.randint(0, 256, (2, 2, 3), dtype=torch.uint8)
    assert (color.overlay(picture, torch.full((2, 2), -1.0), 1.0) == torch.tensor([0x21, 0x66, 0xAC]).numpy()).all()


def test_nothing_is_read_as_latex(seed, tmp_path):
    r = replace(text(), target=[r"$\frac{$", "$a$ $"])
    view.save(r, tmp_path / "map.png")
    assert r"target $\frac{$" in written(view.figure(r, 0)) and "$x$" in written(view.figure(r, 1))


def worded(*said: str):
    """A result whose first row has these words."""
    r = text().row(0)
    units = replace(
        r.units,
        words=[list(said)],
        word_ids=[list(range(len(said)))],
        tokens=[list(said)],
        offsets=[[(0, 0)] * len(said)],
        texts=[" ".join(said)],
        special=[[False] * len(said)],
        padding=[[False] * len(said)],
    )
    return replace(r, map=torch.randn(1, len(said)), units=units, inputs={})


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "said",
    [
        ["שלום", "עולם"],
        ["مرحبا", "بالعالم"],
        ["这", "部", "电影"],
        ["नमस्ते"],
        ["🎉", "é"],
        ["\n", "\t", "\x00", " "],
        ["x" * 500],
        ["word"] * 200,
        [""],
        ["\ud800"],
    ],
    ids=lambda said: ascii(said[0][:4]),
)
def test_any_text_can_be_drawn(seed, said, tmp_path):
    r = worded(*said)
    view.save(r, tmp_path / "map.png")
    view.save(r, tmp_path / "map.html")


def test_no_word_leaves_its_line(seed):
    said = [(word, torch.randn(()).item()) for word in ["a", ",", "Donaudampfschifffahrt" * 9, "of", "to", "."] * 30]
    for line in words.lines(said, 300.0, 3.0):
        places = sorted((box.x, box.x + box.width) for box in line)
        assert places[0][0] >= -1e-6 and places[-1][1] <= 300 + 1e-6
        assert all(one[1] <= other[0] for one, other in zip(places, places[1:], strict=False))


def test_texts_from_right_to_left_start_on_the_right():
    ((first, second),) = words.lines([("שלום", 1.0), ("עולם", 0.5)], 300.0, 1.0)
    assert first.x > second.x and first.x + first.width == pytest.approx(300)


def test_texts_are_cut_to_what_fits():
    cut = sheet.shortened("position embeddings and more", 60, 8)
    assert cut.endswith("…") and sheet.extent(cut, 8) <= 60
    assert sheet.shortened("short", 600, 8) == "short"


def test_pages_escape_all_text(seed):
    evil = "<script>alert(1)</script>"
    r = worded(evil, '" onmouseover="alert(1)', "'")
    r = replace(
        r,
        target=[evil],
        method=evil,
        conservation=evil,
        provenance={evil: evil, "unit": evil},
        ledger=replace(r.ledger, absorbed={evil: r.ledger.absorbed["biases"]}),
        curve=replace(r.curve, baseline=evil),
    )
    for html in (view.page(r, title=evil), view.fragment(r), view.page([r, r])):
        shown = Shown(html)
        assert evil not in html and "script" not in shown.tags and evil in shown.text
        assert not any(name.startswith("on") for name in shown.names)
        assert any(title.startswith(evil) for title in shown.titles)


@KINDS
def test_pages_stand_alone(seed, make):
    html = view.page(make())
    assert (
        "http" not in html
        and "<link" not in html
        and "@import" not in html
        and "url(" not in html
        and "<script" not in html
    )
    assert html.count("<html") == html.count("</html>") == 1


@KINDS
def test_pages_are_whole(seed, make):
    for html in (view.page(make()), view.fragment(make())):
        shown = Shown(html)
        for tag in ("div", "span", "p", "section", "svg", "figure", "details", "b", "i"):
            assert html.count(f"<{tag}>") + html.count(f"<{tag} ") == html.count(f"</{tag}>"), tag
        assert all(f"target {name}" in shown.text for name in make().target)


def test_pages_show_every_word_and_its_number(seed):
    r = text()
    shown = Shown(view.page(r))
    assert f"unhappy: {words.signed(r.words(0)[1][1], 4)}" in shown.titles
    assert "[CLS]" in shown.text and "2 × [PAD]" in shown.text
    assert "All inputs, attnlrp: not better than chance" in shown.text  # of the batch, beside each row's own


def test_a_fragment_is_one_element(seed):
    html = view.fragment(image()).strip()
    assert html.startswith('<div class="relprop">') and html.endswith("</div>") and "<html" not in html


def test_maps_of_one_method_share_a_scale_and_others_do_not(seed):
    r = image()
    one, other = r.row(0), replace(r.row(1), units=r.row(0).units)
    assert together([one, other], None) and len(set(ends([one, other], 0, True))) == 1
    foreign = replace(other, method="attnlrp", provenance={})
    assert not together([one, foreign], None) and ends([one, foreign], 0, False)[1] == foreign.map.abs().max().item()
    with pytest.raises(ValueError, match="cannot share a scale"):
        view.grid([one, foreign], shared=True)
    assert "one colour scale" in written(view.grid([one, other])) and "one colour scale" in view.page([one, other])
    said = written(view.grid([one, foreign]))
    assert "scale of its own" in said and f"max |R| = {one.map.abs().max().item():.3g} (share of attention)" in said


@pytest.mark.parametrize("make", [text, image])
@pytest.mark.parametrize("suffix", [".png", ".html", ".json"])
def test_grids(seed, make, suffix, tmp_path):
    first = make()
    results = [first, *(replace(first, map=torch.randn_like(first.map), method=f"method {i}") for i in range(5))]
    path = view.save(results, tmp_path / f"grid{suffix}", row=0)
    assert path.stat().st_size > 1000
    if suffix == ".png":
        said = written(view.grid(results, checks=[curve(2)] * 6))
        assert all(result.method in said for result in results) and said.count("better than chance") == 12


def test_what_is_under_a_heading_starts_with_words(seed):
    first = image()
    others = [replace(first, map=torch.randn_like(first.map), target=[name] * len(first.target), method=name)
              for name in ("one", "other")]
    several = view.page([first, *others], 0)
    under = [part.split("</p>")[0].strip() for part in several.split('<p class="faint">')[1:]]
    assert any("scale" in line for line in under) and not any(line.startswith("·") for line in under)


def test_grids_of_what_does_not_belong_together(seed):
    with pytest.raises(ValueError, match="at least one"):
        view.grid([])
    with pytest.raises(ValueError, match="same inputs"):
        view.grid([text(), image()])
    with pytest.raises(ValueError, match="2 checks for 1 maps"):
        view.grid([image()], checks=[None, None])
    with pytest.raises(ValueError, match="plain tensors"):
        view.grid([plain()])


def test_rows_that_are_not_there(seed):
    with pytest.raises(ValueError, match="no row 2; there are 2"):
        view.figure(image(), 2)
    with pytest.raises(ValueError, match="no row 2; there are 2"):
        view.page(image(), 2)
    r = image()
    many = replace(
        r,
        map=r.map[:1].expand(40, -1, -1),
        value=r.value[:1].expand(40),
        target=["7"] * 40,
        units=r.units.take([0] * 40),
    )
    with pytest.raises(ValueError, match="40 rows are too many"):
        view.figure(many)
    with pytest.raises(ValueError, match="no map of an image"):
        view.image(text())
    with pytest.raises(ValueError, match="no map of a text"):
        view.text(image())


def test_pyplot_is_left_alone():
    code = """if True:
        import sys, torch, relprop.view as view
        assert "matplotlib" not in sys.modules and "jinja2" not in sys.modules, "imported before it is needed"
        from relprop.result import Relevance
        from relprop.tokens import TensorUnits
        units = TensorUnits((1, 2))
        view.figure(Relevance(torch.ones(1, 2), torch.ones(1), ["y"], "epsilon", "strictly conservative", units))
        assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
