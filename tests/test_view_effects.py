"""Figures and pages of effects: what they show is what was measured, drawn without a model."""
from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.collections import PathCollection
from PIL import Image
from torch.testing import assert_close

from relprop import view
from relprop.mediation.finding import SUFFIXES, Effects, Subset, Subsets
from relprop.mediation.statistic import summary
from relprop.result.arrangement import arranged
from relprop.result.number import signed
from relprop.view import color
from relprop.view.account import _board
from relprop.view.mediation import columns, estimated, found, grid, layers, rounded
from relprop.view.spread import spread

HEADS = [f"L{layer}.attn.H{head}" for layer in range(3) for head in range(4)]


def made(mediators=HEADS, *, examples=8, kinds=("indirect", "direct"), size=1.0, **about):
    """Effects of the k-th mediator about 0.1 k, of some of them alike on all examples."""
    torch.manual_seed(0)
    M, B = len(mediators), examples
    base = torch.randn(B, dtype=torch.float64)
    indirect = size * torch.arange(M, dtype=torch.float64)[:, None] / 10 + 0.05 * size * torch.randn(M, B).double()
    outcomes = {"indirect": base + indirect, "direct": base + 3 - indirect}
    plain = Effects(tuple(mediators), base, base + 3, *(outcomes[kind] if kind in kinds else None for kind in
                    ("indirect", "direct")), None, "difference", "he <she> & $x$", about={"model": "m<b>", **about})
    summaries = {kind: summary(plain.effect(kind), resamples=500) for kind in plain.kinds}
    return Effects(**{**vars(plain), "summaries": summaries})


class Document(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.said = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.said.append(data)


def said(figure):
    """All that is written on a figure."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_heads_stand_in_their_layer_and_column():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    (board,) = arranged([HEADS[place] for place in order])
    assert board.rows == ("L0", "L1", "L2") and board.columns == ("H0", "H1", "H2", "H3")
    cells = grid(made([HEADS[place] for place in order]), board, "indirect")
    assert [[HEADS[order[one]] for one in row] for row in cells] == [HEADS[at:at + 4] for at in (0, 4, 8)]


def test_each_kind_of_mediator_has_its_place():
    names = ["L10.attn.H1", "L2.attn.H1", "L0.mlp", "L1@0", "L1@-1", "L0@0", "embed@2", "L1.mlp.N7", "L0.mlp[3]",
             "layer 3", "L0.attn.H1.pattern", "L0.attn.H0@-1"]
    parts = {one.title: one for one in arranged(names)}
    assert parts["attention heads"].rows == ("L2", "L10")  # by number, not by letter
    assert parts["residual stream after layers"].columns == ("@0", "@-1")
    shapes = {title: one.shape for title, one in parts.items()}
    assert shapes["neurons of MLPs"] == shapes["coordinates of MLPs"] == "cloud" and shapes["MLPs"] == "board"
    assert shapes["sets of mediators"] == "list" and "attention heads at @-1" in shapes
    assert sorted(one for part in parts.values() for one in part.index) == list(range(len(names)))


def test_layers_are_the_sum_of_their_mediators():
    effects = made()
    mean, low, high = layers(effects, arranged(HEADS)[0], "indirect")
    assert_close(mean, effects.indirect.view(3, 4, 8).sum(1).mean(1))
    assert (low < mean).all() and (mean < high).all() and mean.abs().min() > 0.1
    assert layers(made(examples=1), arranged(HEADS)[0], "indirect")[1] is None


def test_marks_are_the_corrected_ones():
    effects = made()
    effects.summaries["indirect"].q[5] = 0.2  # of a mediator whose own p-value is small
    assert effects.summaries["indirect"].p[5] < 0.05
    marks = found(effects, "indirect")
    assert marks == (effects.summaries["indirect"].q <= 0.05).tolist() and any(marks) and not all(marks)
    page = Document(view.account(effects))
    cells = [value for name, value in page.attributes if name == "class" and value == "holds"]
    assert len(cells) == 2 * sum(marks)  # in the map, and in the table, which has all twelve


def test_a_page_has_every_number():
    effects = made()
    words = " ".join(Document(view.account(effects)).said)
    for kind in ("direct", "indirect", "interaction"):
        assert kind in words
    for cells in _board(effects, arranged(HEADS)[0], "indirect")["rows"]:
        assert all(cell["text"] in words for cell in cells[1])
    top = effects.top(1)[0]
    assert top == HEADS[-1] and words.index(f"{top}") < words.index(effects.top(2)[1])


def test_a_page_needs_nothing_else_and_escapes():
    text = view.account(made(tokens=["<script>alert(1)</script>"] * 9, pair=["<i>a", "b"]))
    page = Document(text)
    assert not {"script", "link", "iframe", "object", "i>a"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert not re.search(r"https?://|@import|url\(", text) and "m<b>" not in text and "he <she>" not in text
    assert "m<b>: he <she> & $x$" in page.said


def test_a_figure_says_what_it_shows():
    words = said(view.mediation(made(pair=["The nurse", "The man"])))
    assert "m<b>: he <she> & $x$" in words and "The nurse → The man (and others)" in words
    assert any("total effect" in text and "[" in text and "p = 0.0078" in text for text in words)
    assert {"■ total", "■ direct", "■ indirect", "■ interaction"} <= set(words) and "L2.attn.H3" in words
    assert any("Benjamini" in text for text in words)


def test_small_effects_are_not_drawn_beside_large_ones():
    words = said(view.mediation(made(size=0.01)))
    assert "■ indirect" in words and "■ total" not in words
    assert any("total and direct effects are far larger" in text for text in words)


def test_positions_have_their_tokens():
    names = [f"L{layer}@{at}" for layer in range(2) for at in (0, 1, 2)] + ["L0@-1"]
    effects = made(names, tokens=["The", "nurse", "said", "that"])
    board = arranged(names)[0]
    assert columns(effects, board) == ["0 The", "1 nurse", "2 said", "-1 that"]
    assert "1 nurse" in said(view.mediation(effects)) and "1 nurse" in Document(view.account(effects)).said


def test_numbers_of_a_map_have_the_same_decimals():
    assert [rounded(value, 7.07) for value in (7.07, -0.084, -0.0012)] == ["7.07", "−0.08", "0.00"]
    assert rounded(1.2e-7, 3e-7) == "1.2e−07" and rounded(0.0, 0.0) == "0"


@pytest.mark.parametrize("effects", [
    made(examples=1), made(kinds=()), made(kinds=("direct",)), made(["layer 3", "all heads"]),
    made([f"L{layer}.mlp.N{one}" for layer in range(2) for one in range(1500)]), made(["embed@1"]), made(size=0.0)],
    ids=["one example", "total alone", "direct alone", "sets", "neurons", "one mediator", "hardly any effect"])
def test_any_effects_are_drawn(effects, tmp_path):
    effects.save(tmp_path / "it.png")
    assert Image.open(tmp_path / "it.png").width > 1000
    assert "total effect" in view.account(effects)


def test_files(tmp_path):
    effects = made()
    for suffix in SUFFIXES:
        assert effects.save(tmp_path / f"it{suffix}").stat().st_size > 1000
    for suffix in (".json", ".safetensors"):
        again = Effects.open(tmp_path / f"it{suffix}")
        assert isinstance(again, Effects) and view.account(again) == view.account(effects)
    with pytest.raises(ValueError, match="cannot write effects to it.xlsx"):
        effects.save(tmp_path / "it.xlsx")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        effects.save(tmp_path / "nowhere" / "it.png")


def test_estimates_of_all_stand_beside_the_exact_ones():
    every = {f"L{layer}.mlp.N{one}": 0.1 * layer - 0.01 * one for layer in range(3) for one in range(20)}
    told = {"method": "attribution", "count": 60, "verified": 2, "mean": every}
    effects = made(["L1.mlp.N3", "L2.mlp.N4"], kinds=("indirect",), estimate=told)
    assert_close(estimated(effects).indirect[:, 0], torch.tensor(list(every.values())).double())
    figure = view.mediation(effects)
    clouds = [one for axes in figure.axes for one in axes.collections if isinstance(one, PathCollection)]
    assert [len(one.get_offsets()) for one in clouds] == [2, 60]
    shown = sorted(float(x) for x, _ in clouds[1].get_offsets())
    assert shown == pytest.approx(sorted(every.values()))
    assert {"Indirect effects: neurons of MLPs", "Estimated indirect effects: neurons of MLPs"} <= set(said(figure))
    page = Document(view.account(effects))
    assert page.tags.count("circle") == 62
    assert any("of all 60, to first order by attribution" in one for one in page.said)
    assert estimated(made()) is None


# -- subsets ---------------------------------------------------------------------------------------------------------


def chosen(count=4, *, examples=8, name="L2.attn.H{}", whole=2.0):
    """A subset whose effect together is more than the sum of its parts."""
    torch.manual_seed(0)
    alone = 0.3 + 0.01 * torch.randn(count + 1, examples, dtype=torch.float64)
    names = tuple(name.format(one) for one in range(count + 1))
    together = alone[:count].cumsum(0) + 0.1 * torch.arange(count)[:, None]
    return Subset("greedy", names[:count], together, names, alone, torch.full((examples,), whole).double(),
                  torch.full((examples,), 3.0).double(), "difference", "he <she>", {"model": "m<b>"})


def test_a_curve_has_the_effect_the_parts_and_the_lines_across():
    found = chosen()
    (axes,) = found.show().axes
    together = next(line for line in axes.lines if line.get_color() == color.MOST_FIRST)
    parts = next(line for line in axes.lines if line.get_color() == color.LEAST_FIRST)
    assert list(together.get_ydata()) == [0.0, *found.effects.mean(1).tolist()]
    assert list(parts.get_ydata()) == [0.0, *found.parts.mean(1).tolist()]
    across = {line.get_color(): line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1}
    assert across[color.INK] == found.whole.mean() and across[color.CHANCE] == found.total.mean()
    assert not torch.equal(found.effects, found.parts)
    words = said(found.show())
    assert "+ L2.attn.H0" in words and "m<b>: he <she>" in words
    assert "4 do less than all, 74.8 % of +2" in words


def test_a_page_of_a_subset_has_every_step():
    words = " ".join(Document(view.selection(chosen())).said)
    for line in chosen().table().itertuples():
        assert line.mediator in words and signed(line.synergy) in words and signed(line.effect) in words
    assert "m<b>" not in view.selection(chosen()) and "m<b>" in words


def test_several_subsets_have_one_scale(tmp_path):
    several = Subsets({"L0": chosen(3, name="L0.attn.H{}", whole=9.0), "": chosen(1, examples=1, name="embed@{}")})
    figure = several.show()
    assert len({axes.get_ylim() for axes in figure.axes}) == 1 and figure.axes[0].get_ylim()[1] > 9
    assert several.table().index.names == ["of", "count"] and len(several.table()) == 4
    for suffix in SUFFIXES:
        assert several.save(tmp_path / f"it{suffix}").stat().st_size > 100
    for suffix in (".json", ".safetensors"):
        again = Subsets.open(tmp_path / f"it{suffix}")
        assert view.selection(again) == view.selection(several) and type(again["L0"]) is Subset
    with pytest.raises(ValueError, match="a 'subsets', not a 'subset'"):
        Subset.open(tmp_path / "it.json")


@pytest.mark.parametrize("found", [chosen(1, examples=1), chosen(60, name="L10.mlp.N{}"), chosen(2, whole=0.0)],
                         ids=["one", "many", "nothing in all"])
def test_any_subset_is_drawn(found, tmp_path):
    for suffix in SUFFIXES:
        assert found.save(tmp_path / f"it{suffix}").stat().st_size > 100
    assert view.selection(Subset.open(tmp_path / "it.json")) == view.selection(found)
    assert "nan" not in view.selection(found)


def test_layers_and_curves_have_intervals_of_groups():
    number = [0, 0, 1, 1, 1, 2, 3, 3]
    torch.manual_seed(0)
    values = torch.randn(5, 8, dtype=torch.float64)
    sums = torch.stack([(values - values.mean(1, keepdim=True))[:, [at for at in range(8) if number[at] == one]].sum(1)
                        for one in range(4)])
    assert_close(spread(values, {"grouped": number}), 1.96 * (4 / 3 * (sums**2).sum(0)).sqrt() / 8)
    assert_close(spread(values, {}), 1.96 * values.std(1) / 8**0.5)
    assert spread(values, {"grouped": [0] * 8}).abs().max() == 0 == spread(values[:, :1], {}).abs().max()
    mean, low, high = layers(made(grouped=number, groups=4), arranged(HEADS)[0], "indirect")
    each = made().indirect.view(3, 4, 8).sum(1)
    assert_close(high - mean, spread(each, {"grouped": number}))
    assert_close(mean - low, spread(each, {"grouped": number}))
    assert any("8 examples in 4 groups" in word for word in said(view.mediation(made(grouped=number, groups=4))))
