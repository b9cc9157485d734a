"""Effects as a matplotlib figure: the strongest mediators with total, direct and indirect effects, and maps of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..result import Effects, Summary
from ..result.arrangement import Arrangement, arranged
from ..result.number import chance, printed, signed
from . import bars, color, patch
from .bars import bare, main, plain_ticks
from .sheet import BODY, SMALL, TINY, TITLE, Sheet, sheet, shortened, visible
from .spread import spread
from .words import spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.05
"""Mediators whose corrected p-value is at most this are marked."""
WIDTH, MARGIN = 7.4, 0.3  # inches
INNER = WIDTH - 2 * MARGIN
_HEAD, _NAME, _FOOT, _GAP = 0.72, 0.36, 0.38, 0.12
_LEFT, _SIDE, _CELL = 0.62, 1.35, 0.46  # names of layers, bars of layers, most of a cell


def mediation(effects: Effects) -> Figure:
    """The strongest mediators as bars, total, direct, indirect and interaction, with 95 % intervals; then a map of all,
    layer by head or layer by position, with the sum of each layer beside it; of neurons a point each; patches over
    their picture.

    Colours are zero-centred with symmetric ends, which are printed. A dot marks what holds after the correction for
    the number of mediators (Benjamini and Hochberg, q <= `LEVEL`).
    """
    parts = drawn(effects)
    tall = [bars.height(effects), *(_height(of, part) for of, part in parts)]
    page = sheet(WIDTH, _HEAD + sum(tall) + _GAP * (len(tall) - 1) + MARGIN)
    page.write(MARGIN, 0.14, shortened(heading(effects), 72 * INNER, TITLE, True), size=TITLE, weight="bold")
    for line, text in enumerate(subheading(effects)):
        page.write(MARGIN, 0.34 + 0.15 * line, shortened(text, 72 * INNER, SMALL), size=SMALL, color=color.FAINT)
    y = _HEAD
    bars.draw(page.part(MARGIN, y, INNER), effects, INNER)
    y += tall[0] + _GAP
    for (of, part), height in zip(parts, tall[1:]):
        _part(page.part(MARGIN, y, INNER), of, part, main(effects))
        y += height + _GAP
    return page.figure


def drawn(effects: Effects) -> list[tuple[Effects, Arrangement]]:
    """The maps that are drawn, and of what: of the effects, and where an estimate ranked the mediators, of that."""
    every = estimated(effects)
    return [(of, part) for of in (effects, every) if of is not None for part in maps(of)]


def estimated(effects: Effects) -> Effects | None:
    """The estimates that ranked the mediators as effects of their own, on one example; None where there are none."""
    told = effects.about.get("estimate")
    if not told or not told.get("mean"):
        return None
    mean = torch.tensor(list(told["mean"].values()), dtype=torch.float64)
    base = torch.ones(1, dtype=torch.float64)
    total = effects.total.mean().reshape(1)  # on either scale 1 + effect is an outcome of a base of 1
    return Effects(tuple(told["mean"]), base, base + total, base + mean[:, None], None, None, effects.scale,
                   effects.outcome, {"total": Summary(total), "indirect": Summary(mean)},
                   {"estimated": told["method"], "tokens": effects.about.get("tokens")})


def _part(page: Sheet, effects: Effects, part: Arrangement, kind: str) -> None:
    if patch.over_patches(effects, part):
        return patch.draw(page, effects, part, kind, INNER)
    return (_board if part.shape == "board" else _cloud)(page, effects, part, kind)


def maps(effects: Effects) -> list[Arrangement]:
    """What maps are drawn of: boards and clouds; none where the total effect alone was asked for."""
    parts = arranged(effects.mediators) if main(effects) != "total" else []
    return [part for part in parts if part.shape != "list"]


def heading(effects: Effects) -> str:
    return f"{effects.about.get('model', 'effects')}: {effects.outcome}"


def subheading(effects: Effects) -> list[str]:
    """What was compared, in two lines: scale and total effect; the first base and counterfactual."""
    p = effects.summaries["total"].p
    total = interval(effects, "total", 0) + ("" if p is None else f", {chance(float(p[0]))}")
    count = len(effects.base)
    said = [f"total effect {total} ({effects.scale}), {examples(effects.about, count)}, "
            f"{len(effects.mediators)} mediators"]
    pair = effects.about.get("pair")
    if "corrupted" in effects.about:
        return [f"{said[0]}; {_noise(effects)}", *([pair[0]] if pair else [])]
    other = [f"a, b: {effects.about['a, b']}"] if "a, b" in effects.about else []
    pairs = [f"{pair[0]} → {pair[1]}" + (" (and others)" if count > 1 else "")] if pair else []
    return [*said, *(["; ".join([*pairs, *other])] if pairs or other else [])]


def examples(about: Mapping, count: int) -> str:
    """How many, and in how many groups where there are fewer."""
    groups = about.get("groups", count)
    return f"{count} example{'s' * (count != 1)}" + (f" in {groups} groups" if groups < count else "")


def _noise(effects: Effects) -> str:
    """What was under noise in causal tracing, in words."""
    about = effects.about
    what = "each place" if about["window"] == 1 else f"{about['window']} layers around each place"
    return (f"{what} restored alone; * under noise of standard deviation {printed(about['noise'], 3)}, "
            f"{'means of ' if about['draws'] > 1 else ''}{about['draws']} draw{'s' * (about['draws'] != 1)}")


def interval(effects: Effects, kind: str, index: int) -> str:
    """A mean with its 95 % interval."""
    one = effects.summaries[kind]
    mean = signed(float(one.mean[index]))
    return mean if one.low is None else f"{mean} [{signed(float(one.low[index]))}, {signed(float(one.high[index]))}]"


def found(effects: Effects, kind: str) -> list[bool]:
    """Which mediators' effects hold after the correction."""
    q = effects.summaries[kind].q
    return [False] * len(effects.summaries[kind].mean) if q is None else (q <= LEVEL).tolist()


def layers(effects: Effects, part: Arrangement, kind: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of each row of a board, the mean of the sum over its mediators, and the ends of its interval, None of one
    example: 1.96 standard errors, of groups where there are any, or of a single mediator its own interval.

    Parts that are changed each for itself do not add up to what changing all of them at once does.
    """
    each = effects.effect(kind)[list(part.index)]
    sums = each.new_zeros(len(part.rows), each.shape[1]).index_add_(0, torch.tensor(part.row), each)
    mean, one = sums.mean(1), effects.summaries[kind]
    if one.low is None:
        return mean, None, None
    if part.columns == ("",):
        index = torch.tensor(part.index)[torch.tensor(part.row).argsort()]
        return mean, one.low[index], one.high[index]
    error = spread(sums, effects.about)
    return mean, mean - error, mean + error


def rounded(value: float, end: float) -> str:
    """A number of a board: as many decimals for all as the strongest, `end`, needs for three digits.

    >>> rounded(-0.0051, 7.07), rounded(0.25, 0.0)
    ('−0.01', '0.25')
    """
    if not 1e-4 <= end < 1e4:
        return printed(value, 2)
    said = f"{value:.{max(0, 2 - math.floor(math.log10(end)))}f}"
    return (said if float(said) else said.lstrip("-")).replace("-", "−")


def grid(effects: Effects, part: Arrangement, kind: str) -> list[list[int | None]]:
    """The number of the mediator in each row and column of a board; None where there is none."""
    cells: list[list[int | None]] = [[None] * len(part.columns) for _ in part.rows]
    for index, row, column in zip(part.index, part.row, part.column):
        cells[row][column] = index
    return cells


def _cell(part: Arrangement) -> tuple[float, float]:
    """Width and height of a cell in inches."""
    wide = min(_CELL, (INNER - _LEFT - _SIDE - 0.15) / len(part.columns))
    return wide, min(0.25, max(0.11, wide))


def _height(effects: Effects, part: Arrangement) -> float:
    if patch.over_patches(effects, part):
        return patch.height(effects, part, INNER)
    if part.shape == "cloud":
        return _NAME + max(0.5, 0.24 * len(part.rows)) + _FOOT
    return _NAME + _cell(part)[1] * len(part.rows) + _FOOT + (0.2 if _turned(part) else 0)


def _tall(effects: Effects, part: Arrangement) -> float:
    """Height in inches of what is between the heading and the axis."""
    if part.shape == "cloud":
        return _height(effects, part) - _NAME - _FOOT
    return _cell(part)[1] * len(part.rows)


def _ends(part: Arrangement) -> tuple[float, float]:
    """Ends of the vertical axis, from bottom to top."""
    return (len(part.rows) - 0.4, -0.6) if part.shape == "cloud" else (len(part.rows) - 0.5, -0.5)


def _turned(part: Arrangement) -> bool:
    return part.across == "position" and part.columns != ("",)


def _board(part: Sheet, effects: Effects, board: Arrangement, kind: str) -> None:
    mean, holds = effects.summaries[kind].mean, found(effects, kind)
    cells, (wide, tall) = grid(effects, board, kind), _cell(board)
    end = color.limit(mean[list(board.index)])
    _name(part, effects, board, kind, end)
    if board.columns == ("",):
        return _layer_bars(part, effects, board, kind, _LEFT, INNER - _LEFT - 0.1, alone=True)
    axes = part.axes(_LEFT, _NAME, wide * len(board.columns), tall * len(board.rows))
    values = torch.tensor([[float("nan") if one is None else float(mean[one]) for one in row] for row in cells])
    axes.imshow(values.numpy(), cmap=color.SCALE, vmin=-(end or 1), vmax=end or 1, aspect="auto",
                interpolation="nearest")
    for row, line in enumerate(cells):
        for column, one in enumerate(line):
            if one is not None:
                _in_cell(axes, column, row, float(mean[one]), end, holds[one], wide)
    every = max(1, round(0.17 / tall))
    axes.set_yticks(range(0, len(board.rows), every), board.rows[::every])
    _across(axes, effects, board, wide)
    _layer_bars(part, effects, board, kind, _LEFT + wide * len(board.columns) + 0.15, _SIDE - 0.1, alone=False)


def _in_cell(axes: object, column: int, row: int, value: float, end: float, holds: bool, wide: float) -> None:
    ink = color.on(value, end)
    if wide >= 0.4:
        axes.text(column - 0.06 * holds, row, rounded(value, end), fontsize=TINY, color=ink, ha="center", va="center")
    if holds:
        axes.plot([column + (0.42 if wide >= 0.4 else 0)], [row], ".", markersize=2.4, color=ink)


def _across(axes: object, effects: Effects, board: Arrangement, wide: float) -> None:
    """Names of the columns; of positions with the first example's tokens."""
    names = columns(effects, board)
    every = math.ceil((0.14 if _turned(board) else 0.26) / wide)
    shown = [shortened(visible(name), 72 * 0.75, SMALL) for name in names[::every]]
    plain_ticks(axes.set_xticks(range(0, len(names), every), shown, **(
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if _turned(board) else {})))


def columns(effects: Effects, board: Arrangement) -> list[str]:
    """Names of a board's columns; a position that is a number has the token there, in the first example's base."""
    tokens, noisy = effects.about.get("tokens") or [], effects.about.get("corrupted", [])
    said = []
    for name in board.columns:
        at = int(name[1:]) if name[1:].lstrip("-").isdecimal() and name.startswith("@") else None
        known = at is not None and -len(tokens) <= at < len(tokens)
        mark = " *" if known and at % len(tokens) in noisy else ""
        said.append(f"{at} {visible(spelled(tokens[at]))}{mark}" if known else name)
    return said


def _layer_bars(part: Sheet, effects: Effects, board: Arrangement, kind: str, left: float, width: float, *,
                alone: bool) -> None:
    mean, low, high = layers(effects, board, kind)
    error = None if low is None else torch.stack([mean - low, high - mean]).clamp_min(0).numpy()
    axes = part.axes(left, _NAME, width, _tall(effects, board))
    places = range(len(board.rows))
    axes.barh(places, mean.tolist(), xerr=error, height=0.75, linewidth=0, alpha=0.8, error_kw={"linewidth": 0.8},
              color=[color.sign(value) for value in mean.tolist()])
    axes.axvline(0, color=color.LINE, linewidth=0.8, zorder=0)
    axes.set(ylim=_ends(board), yticks=[])
    if alone:
        holds = dict(zip(board.row, (found(effects, kind)[one] for one in board.index)))
        axes.set_yticks(places, [f"{name} •" if holds[row] else name for row, name in enumerate(board.rows)])
    axes.locator_params(axis="x", nbins=5 if alone else 3)
    axes.set_xlabel(f"{kind} effect ({effects.scale})" if alone else "sum of the layer", fontsize=SMALL, labelpad=1,
                    color=color.FAINT)
    bare(axes)


def _cloud(part: Sheet, effects: Effects, cloud: Arrangement, kind: str) -> None:
    """Every neuron a point, layer by effect."""
    mean, holds = effects.summaries[kind].mean, found(effects, kind)
    _name(part, effects, cloud, kind, None)
    wide = INNER - _LEFT - _SIDE - 0.15
    axes = part.axes(_LEFT, _NAME, wide, _tall(effects, cloud))
    values = mean[list(cloud.index)]
    inks = [color.MOST_FIRST if holds[one] else color.CHANCE for one in cloud.index]
    spread = [row + ((7 * place) % 11 - 5) / 20 for place, row in enumerate(cloud.row)]  # apart, so that all are seen
    axes.scatter(values.tolist(), spread, s=5, c=inks, linewidths=0, alpha=0.8)
    for place in {int(values.argmin()), int(values.argmax())}:
        axes.annotate(cloud.columns[place], (float(values[place]), spread[place]), fontsize=TINY, xytext=(0, 4),
                      textcoords="offset points", color=color.INK, ha="center", parse_math=False)
    axes.axvline(0, color=color.LINE, linewidth=0.8, zorder=0)
    axes.set(ylim=_ends(cloud))
    axes.set_yticks(range(len(cloud.rows)), cloud.rows)
    axes.margins(x=0.12)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(f"{kind} effect ({effects.scale})", fontsize=SMALL, labelpad=1, color=color.FAINT)
    bare(axes)
    _layer_bars(part, effects, cloud, kind, _LEFT + wide + 0.15, _SIDE - 0.1, alone=False)


def _name(part: Sheet, effects: Effects, board: Arrangement, kind: str, end: float | None) -> None:
    part.write(0, 0, shortened(titled(effects, board, kind), 72 * INNER, BODY, True), size=BODY, weight="bold")
    part.write(0, 0.16, scale(effects, kind, end), size=SMALL, color=color.FAINT)


def titled(effects: Effects, board: Arrangement, kind: str) -> str:
    """The heading of a map."""
    what = f"estimated {kind}" if "estimated" in effects.about else kind
    return f"{what.capitalize()} effects: {board.title}"


def scale(effects: Effects, kind: str, end: float | None) -> str:
    """What colours and dots mean, in words."""
    known = effects.summaries[kind].q is not None
    ends = [] if end is None else ["all zero" if end == 0 else f"red +, blue −, strongest at ±{printed(end, 3)}"]
    if "estimated" in effects.about:
        return "; ".join([*ends, f"of all {len(effects.mediators)}, to first order by {effects.about['estimated']}"])
    marks = ["one example, which has no p-value" if not known else
             f"{'dot' if end is not None else 'purple'}: q ≤ {LEVEL:g} (Benjamini–Hochberg)"]
    return "; ".join([*ends, *marks])


__all__ = ["LEVEL", "columns", "drawn", "examples", "found", "grid", "heading", "interval", "layers", "main", "maps",
           "mediation", "rounded", "scale", "subheading", "titled"]
