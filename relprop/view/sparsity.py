"""How few mediators do what all do: the effect of those chosen together by their number, as a figure and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..result.number import percent, printed, signed
from ..result.subset import Subset
from . import color
from .mediation import examples
from .sheet import BODY, SMALL, TITLE, Sheet, sheet, shortened
from .spread import spread
from .template import template

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 3  # curves beside each other, where there are several
NAMED = 24  # steps that have the name of what was added
_WIDTH, _MARGIN, _HEAD = 7.4, 0.3, 0.85  # inches
_TALL, _NAME, _FOOT, _LEFT = 1.5, 0.36, 0.75, 0.5
_SVG = (420, 150)  # of a page's curve, in pixels
LINES = {"together": ("effect together", color.MOST_FIRST), "parts": ("sum of parts", color.LEAST_FIRST),
         "whole": ("all mediators together", color.INK), "total": ("total effect", color.CHANCE)}

Found = Subset | Mapping[str, Subset]


def sparsity(found: Found) -> Figure:
    """Mean indirect effect of the first k of the chosen mediators together, k from 0, with 1.96 standard errors; the
    sum of what each of them does alone, the difference of both being their synergy; and as lines across what all
    mediators do together, and the total effect. A panel for each of several subsets, such as of layers, on one scale.
    """
    each = named(found)
    across = min(ACROSS, len(each))
    bands = -(-len(each) // across)
    wide, tall = (_WIDTH - 2 * _MARGIN) / across, _NAME + _TALL + _FOOT
    page = sheet(_WIDTH, _HEAD + 0.2 + bands * tall)
    room = 72 * (_WIDTH - 2 * _MARGIN)
    page.write(_MARGIN, 0.14, shortened(heading(each), room, TITLE, True), size=TITLE, weight="bold")
    page.write(_MARGIN, 0.34, shortened(subheading(each), room, SMALL), size=SMALL, color=color.FAINT)
    _legend(page.part(_MARGIN, 0.56, _WIDTH - 2 * _MARGIN))
    low, high = ends(list(each.values()))
    for number, (name, one) in enumerate(each.items()):
        row, column = divmod(number, across)
        part = page.part(_MARGIN + column * wide, _HEAD + row * tall, wide)
        part.write(0, 0.04, shortened(titled(name, one), 72 * wide - 8, BODY, True), size=BODY, weight="bold")
        part.write(0, 0.19, shortened(reached(one), 72 * wide - 8, SMALL), size=SMALL, color=color.FAINT)
        axes = part.axes(_LEFT, _NAME, wide - _LEFT - 0.15, _TALL)
        _curve(axes, one, long=72 * (_FOOT - 0.1))
        axes.set_ylim(low, high)
        if column == 0:
            axes.set_ylabel(f"effect ({one.scale})", fontsize=SMALL, labelpad=1, color=color.FAINT)
    return page.figure


def selection(found: Found) -> str:
    """The same as a whole HTML document that needs nothing else, with the numbers of every step."""
    each = named(found)
    low, high = ends(list(each.values()))
    first = next(iter(each.values()))
    return template("subset.html").render(
        title=heading(each), under=subheading(each), parts=[_part(name, one, low, high) for name, one in each.items()],
        lines=LINES, facts=[(name, str(value)) for name, value in first.about.items() if isinstance(value, str)])


def named(found: Found) -> dict[str, Subset]:
    """Subsets by name, one alone as "".

    Raises: ValueError if there is none.
    """
    each = {"": found} if isinstance(found, Subset) else dict(found)
    if not each:
        raise ValueError("there is no subset to show")
    return each


def heading(each: Mapping[str, Subset]) -> str:
    first = next(iter(each.values()))
    return f"{first.about.get('model', 'subset')}: {first.outcome}"


def subheading(each: Mapping[str, Subset]) -> str:
    """What was chosen from what, in a line."""
    first = next(iter(each.values()))
    count = sum(len(one.mediators) for name, one in each.items() if name or len(each) == 1)
    how = {"greedy": "one after the other, greedily", "top-k": "by their effects alone"}.get(first.how, first.how)
    return (f"few mediators of {count}, chosen {how}; total effect {signed(float(first.total.mean()))} "
            f"({first.scale}), {examples(first.about, first.rows)}")


def titled(name: str, one: Subset) -> str:
    return f"{name or 'all'}: {len(one.chosen)} of {len(one.mediators)} mediators"


def reached(one: Subset) -> str:
    """How few reach what all do, in words."""
    whole = float(one.whole.mean())
    few = one.reaches() if whole else None
    if few is not None:
        return f"{few} reach{'es' * (few == 1)} what all do, {signed(whole)}"
    share = f", {percent(float(one.effects[-1].mean()) / whole)} of {signed(whole)}" if whole else ""
    return f"{len(one.chosen)} {'does' if len(one.chosen) == 1 else 'do'} less than all{share}"


def ends(each: Sequence[Subset]) -> tuple[float, float]:
    """Ends of a vertical axis that holds all these curves."""
    values = [0.0]
    for one in each:
        mean, error = one.effects.mean(1), spread(one.effects, one.about)
        values += [*(mean - error).tolist(), *(mean + error).tolist(), *one.parts.mean(1).tolist(),
                   float(one.whole.mean()), float(one.total.mean())]
    room = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def _curve(axes: Axes, one: Subset, *, long: float) -> None:
    steps = range(len(one.chosen) + 1)
    mean, error = one.effects.mean(1), spread(one.effects, one.about)
    line = lambda values: [0.0, *values.tolist()]
    axes.fill_between(steps, line(mean - error), line(mean + error), color=color.MOST_FIRST, alpha=0.2, linewidth=0)
    axes.axhline(0, color=color.LINE, linewidth=0.6, zorder=0)
    axes.axhline(float(one.total.mean()), color=color.CHANCE, linewidth=0.9, linestyle=(0, (1, 1.5)))
    axes.axhline(float(one.whole.mean()), color=color.INK, linewidth=0.9)
    dots = {"marker": "o", "markersize": 2.2} if len(one.chosen) <= NAMED else {}
    axes.plot(steps, line(one.parts.mean(1)), color=color.LEAST_FIRST, linewidth=1.2, linestyle=(0, (4, 1.2)))
    axes.plot(steps, line(mean), color=color.MOST_FIRST, linewidth=1.3, **dots)
    every = -(-len(one.chosen) // NAMED)
    names = [shortened(f"+ {name}", long / 0.72, SMALL) for name in one.chosen[::every]]
    for tick in axes.set_xticks(range(1, len(one.chosen) + 1, every), names, rotation=45, ha="right",
                                rotation_mode="anchor"):
        tick.label1.set_parse_math(False)
    axes.set_xlim(0, len(one.chosen) + 0.3)
    axes.locator_params(axis="y", nbins=5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(part: Sheet) -> None:
    marks = {"together": "●—", "parts": "- -", "whole": "—", "total": "· ·"}
    for place, (name, (said, ink)) in enumerate(LINES.items()):
        part.write(1.7 * place, 0, f"{marks[name]} {said}", size=SMALL, color=ink)


def _part(name: str, one: Subset, low: float, high: float) -> dict:
    """What a page shows of one subset; places in pixels."""
    wide, tall = _SVG
    count = len(one.chosen)
    x, y = lambda step: round(wide * step / count, 1), lambda value: round(tall * (high - value) / (high - low), 1)
    points = lambda values: " ".join(f"{x(step)},{y(value)}" for step, value in enumerate([0.0, *values.tolist()]))
    mean, error = one.effects.mean(1), spread(one.effects, one.about)
    way = points(mean + error).split() + points(mean - error).split()[::-1]
    return {"title": titled(name, one), "reached": reached(one), "width": wide, "height": tall, "zero": y(0.0),
            "low": printed(low, 2), "high": printed(high, 2), "whole": y(float(one.whole.mean())),
            "total": y(float(one.total.mean())), "band": " ".join(way), "together": points(mean),
            "parts": points(one.parts.mean(1)), "steps": _steps(one, mean, error)}


def _steps(one: Subset, mean: Tensor, error: Tensor) -> list[dict]:
    """A row of the table for each number of mediators."""
    whole, spread = float(one.whole.mean()), one.rows > 1
    at = [one.mediators.index(name) for name in one.chosen]
    alone, parts, synergy = (values.mean(1).tolist() for values in (one.alone[at], one.parts, one.synergy))
    return [{"count": step + 1, "name": name, "alone": signed(alone[step]), "effect": signed(float(mean[step])),
             "span": f"± {printed(float(error[step]), 2)}" if spread else "", "parts": signed(parts[step]),
             "synergy": signed(synergy[step]),
             "share": percent(float(mean[step]) / whole).replace("-", "−") if whole else "–"}
            for step, name in enumerate(one.chosen)]


__all__ = ["selection", "sparsity"]
