"""A circuit and what holds of it, as a figure: its graph by layers, its faithfulness, scores beside exact effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..result import Circuit
from ..result.circuit import Item, said
from ..result.number import chance, percent, printed, signed
from ..result.placement import Placement, label, placed
from ..result.study import Study
from . import color
from .bars import bare
from .sheet import BODY, SMALL, TINY, TITLE, Sheet, extent, sheet, shortened, visible
from .words import spelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, MARGIN = 7.4, 0.3  # inches
INNER = WIDTH - 2 * MARGIN
LISTED = 14
"""Items whose scores stand beside their exact effects."""
LINEAR = 200
"""Items up to which a curve is over their number, not over its logarithm."""
LINES = {"q": (0, (4, 1.2)), "k": (0, (1, 1)), "v": "solid", "": "solid"}
"""How edges are drawn, by what a head makes of them."""
_HEAD, _ROW, _LEFT, _FOOT = 0.78, 0.3, 0.62, 0.42
_TALL, _GAP, _HALF = 1.9, 0.3, 3.0
_RADIUS, _LEGIBLE, _ABOVE = 0.12, 0.085, 0.11  # inches: of a node at most, from which a label fits into it, and room
# from which one fits above it


def wired(study: Study) -> Figure:
    """The circuit as a graph, each node in its layer and coloured by its score, from the input at the bottom to the
    logits at the top, with what is not kept as rings; beneath it faithfulness over the size of the circuit, and the
    scores of the strongest items beside what ablating them alone does.

    Colours are zero-centred with symmetric ends, which are printed.
    """
    where = placed(study.circuit)
    tall = _graph_height(where)
    page = sheet(WIDTH, _HEAD + tall + _GAP + _TALL + 0.75)
    room = 72 * INNER
    page.write(MARGIN, 0.14, shortened(heading(study), room, TITLE, True), size=TITLE, weight="bold")
    for line, text in enumerate(subheading(study)):
        page.write(MARGIN, 0.34 + 0.15 * line, shortened(text, room, SMALL), size=SMALL, color=color.FAINT)
    _graph(page.part(MARGIN, _HEAD, INNER), study, where)
    y = _HEAD + tall + _GAP
    _curve(page.part(MARGIN, y, _HALF), study)
    _bars(page.part(MARGIN + _HALF + 0.3, y, INNER - _HALF - 0.3), study)
    return page.figure


def heading(study: Study) -> str:
    about = study.circuit.about
    task = about.get("task", {})
    return f"{about.get('model', 'circuit')}: {task.get('name', 'task') if isinstance(task, Mapping) else task}"


def subheading(study: Study) -> list[str]:
    """What was found and how, and how far it goes, in two lines."""
    found, about = study.circuit, study.circuit.about
    rows = about.get("task", {}).get("rows") if isinstance(about.get("task"), Mapping) else None
    what = found.noun if found.level == found.noun else f"{found.noun} ({found.level})"
    how = [f"{len(found)} of {len(found.scores)} {what} by {found.method}",
           f"ablation: {about.get('ablation', '?')}", *([f"{rows} inputs"] if rows else [])]
    return ["; ".join(how), reached(study)]


def reached(study: Study) -> str:
    """How faithful the circuit is, in words."""
    one = study.alone
    low = "" if one.low is None else f" [{printed(float(one.low[0]), 3)}, {printed(float(one.high[0]), 3)}]"
    beaten = "" if study.chance is None else \
        f"; more than {percent(study.chance['beaten'])} of {study.chance['count']} random circuits of its size" \
        f" ({chance(study.chance['p'])})"
    return (f"{one.about.get('metric', 'metric')}: {signed(float(one.outcome.mean()))} of "
            f"{signed(float(one.full.mean()))}, faithfulness {printed(float(one.share[0]), 3)}{low}{beaten}")


def scale(study: Study, where: Placement, end: float) -> str:
    """What colours and lines mean, in words."""
    found = study.circuit
    ends = "all scores are zero" if end == 0 else f"red +, blue −, strongest at ±{printed(end, 3)}"
    lines = "queries dashed, keys dotted, " if found.edges else ""
    rings = "rings left out" if len(where.nodes) > len(found.members) else "what is left out is not drawn"
    return f"change of the metric where the clean value is replaced: {ends}; {lines}{rings}"


def node_scores(found: Circuit) -> dict[str, float]:
    """Of each node a score to colour it by: its own, or of a circuit of edges the sum of those kept that leave it."""
    if not found.edges:
        return {node: score or 0.0 for node, score in found.nodes.items()}
    sums: dict[str, float] = {}
    for u, v in found:
        sums[u] = sums.get(u, 0.0) + (found.edges[u, v] or 0.0)
    return sums


def strongest(study: Study, most: int = LISTED) -> list[Item]:
    """The kept items, that of the largest score first."""
    found = study.circuit
    return [item for item in found.ranking() if item in found.kept][:most]


def columns(study: Study, where: Placement) -> list[str]:
    """Names of positions, those that are numbers with the first example's tokens."""
    tokens = study.about.get("tokens") or []
    names = []
    for name in where.columns:
        at = int(name[1:]) if name[1:].lstrip("-").isdecimal() else None
        known = at is not None and -len(tokens) <= at < len(tokens)
        names.append(f"{at} {visible(spelled(tokens[at]))}" if known else name)
    return names


def _graph_height(where: Placement) -> float:
    return 0.32 + _ROW * len(where.rows) + (_FOOT if where.columns else 0)


def _graph(part: Sheet, study: Study, where: Placement) -> None:
    found, scores = study.circuit, node_scores(study.circuit)
    end = color.limit(list(scores.values()))
    part.write(0, 0, f"The circuit: {found.level}", size=BODY, weight="bold")
    part.write(0, 0.16, shortened(scale(study, where, end), 72 * INNER, SMALL), size=SMALL, color=color.FAINT)
    wide, tall = INNER - _LEFT, _ROW * len(where.rows)
    axes = part.axes(_LEFT, 0.32, wide, tall)
    axes.set(xlim=(0, 1), ylim=(-0.5, len(where.rows) - 0.5))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    every = 1 if _ROW * 72 >= SMALL else 2
    axes.set_yticks(range(0, len(where.rows), every), where.rows[::every], fontsize=SMALL)
    _positions(axes, study, where, wide)
    radius = min(_RADIUS, 0.42 * where.size * wide)
    _edges(axes, found, where)
    _nodes(axes, found, where, scores, end, radius)
    _labels(axes, found, where, {name: color.on(scores.get(name, 0.0), end) for name in found.members}, radius, wide)


def _positions(axes: Axes, study: Study, where: Placement, wide: float) -> None:
    if not where.columns:
        return axes.set_xticks([])
    count = len(where.columns)
    every = -(-count * 0.14 // wide) or 1
    names = [shortened(one, 72 * 0.7, SMALL) for one in columns(study, where)]
    shown = range(0, count, int(every))
    ticks = axes.set_xticks([(place + 0.5) / count for place in shown], [names[place] for place in shown], rotation=45,
                            ha="right", rotation_mode="anchor", fontsize=SMALL)
    for tick in ticks:
        tick.label1.set_parse_math(False)
    for place in range(1, count):
        axes.axvline(place / count, color=color.LINE, linewidth=0.4, zorder=0)


def _edges(axes: Axes, found: Circuit, where: Placement) -> None:
    if not found.edges:
        return
    end = color.limit([found.edges[edge] or 0.0 for edge in found]) or 1.0
    for (u, v), score, line in lines(found, where):
        (x0, y0), (x1, y1) = u, v
        size = abs(score) / end
        axes.plot([x0, x1], [y0, y1], color=color.sign(score), linewidth=0.3 + 1.7 * size, alpha=0.25 + 0.65 * size,
                  linestyle=line, zorder=1, solid_capstyle="round")


def lines(found: Circuit, where: Placement) -> list[tuple[tuple, float, object]]:
    """Each kept edge: both ends, its score, and how it is drawn; the strongest last."""
    node = found.ending()
    made = []
    for u, v in sorted(found, key=lambda edge: abs(found.edges[edge] or 0.0)):
        inner = v.partition("@")[0].rpartition(".")[2]
        made.append(((where.nodes[u], where.nodes[node(v)]), found.edges[u, v] or 0.0, LINES.get(inner, "solid")))
    return made


def _nodes(axes: Axes, found: Circuit, where: Placement, scores: Mapping[str, float], end: float, radius: float
           ) -> None:
    from matplotlib import colormaps

    own = set(found.members)
    paint, size = colormaps[color.SCALE], (2 * 72 * radius) ** 2
    out = [place for name, place in where.nodes.items() if name not in own]
    if out:
        axes.scatter(*zip(*out), s=0.3 * size, facecolors="white", edgecolors=color.LINE, linewidths=0.6, zorder=2)
    for name in own:
        x, y = where.nodes[name]
        value = scores.get(name, 0.0)
        axes.scatter([x], [y], s=size, color=[paint((float(color.share(value, end)) + 1) / 2)], edgecolors=color.FAINT,
                     linewidths=0.5, zorder=3)


def _labels(axes: Axes, found: Circuit, where: Placement, inks: Mapping[str, str], radius: float, wide: float) -> None:
    """Labels in the nodes of a circuit, or above them where these are small, or nowhere where they would overlap."""
    within = radius >= _LEGIBLE
    if not within and where.size * wide < _ABOVE:
        return
    lift = (0, 0) if within else (0, 72 * radius + 0.5)
    for name in found.members:
        axes.annotate(label(name), where.nodes[name], lift, textcoords="offset points", fontsize=TINY, ha="center",
                      va="center" if within else "bottom", zorder=4, parse_math=False,
                      color=inks[name] if within else color.INK)


def _curve(part: Sheet, study: Study) -> None:
    over, found = study.curve, study.circuit
    part.write(0, 0, "Faithfulness by size", size=BODY, weight="bold")
    part.write(0, 0.16, f"of the {over.about.get('ranking', 'absolute')} ranking; all else ablated "
               f"({over.about.get('ablation', '?')})", size=SMALL, color=color.FAINT)
    axes = part.axes(0.42, 0.36, _HALF - 0.5, _TALL)
    kept, share = over.kept.tolist(), over.share.tolist()
    for level in (0, 1):
        axes.axhline(level, color=color.LINE, linewidth=0.8, zorder=0)
    if over.low is not None:
        axes.fill_between(kept, over.low.tolist(), over.high.tolist(), color=color.MOST_FIRST, alpha=0.2, linewidth=0)
    axes.plot(kept, share, color=color.MOST_FIRST, linewidth=1.3)
    if study.chance is not None:
        random = study.chance["random"]
        axes.plot([len(found)] * len(random), random, ".", color=color.CHANCE, markersize=2, alpha=0.35)
    axes.plot([len(found)], study.alone.share.tolist(), "o", color=color.MOST_FIRST, markersize=5)
    if len(kept) and max(kept) > LINEAR:
        axes.set_xscale("symlog", linthresh=1)
    axes.set_ylim(*ends(study))
    said = f"{found.noun} kept" + ("" if study.chance is None else "; grey: random circuits of this size")
    axes.set_xlabel(said, fontsize=SMALL, labelpad=1, color=color.FAINT)
    bare(axes)


def ends(study: Study) -> tuple[float, float]:
    """Ends of the axis of faithfulness: of the curve, of 0 and 1, and most of what is drawn beside."""
    values = [0.0, 1.0, *study.curve.share.tolist(), *study.alone.share.tolist()]
    low, high = max(-2.0, min(values)), min(3.0, max(values))
    room = 0.06 * (high - low)
    return low - room, high + room


def _bars(part: Sheet, study: Study) -> None:
    items: Sequence[Item] = strongest(study)[::-1]
    part.write(0, 0, "Scores beside exact effects", size=BODY, weight="bold")
    part.write(0, 0.16, shortened("full: score by the method; line: ablated alone in the whole model", 72 * part.width,
                                  SMALL), size=SMALL, color=color.FAINT)
    longest = max((extent(said(item), SMALL) for item in items), default=0.0)
    left = min(1.7, longest / 72 + 0.12)
    axes = part.axes(left, 0.36, part.width - left - 0.05, _TALL)
    score = [study.circuit.scores[item] or 0.0 for item in items]
    exact = [study.exact[item] for item in items]
    axes.barh(range(len(items)), score, height=0.72, color=[color.sign(one) for one in score], alpha=0.75, linewidth=0)
    axes.barh(range(len(items)), exact, height=0.22, color=color.INK, linewidth=0)
    axes.axvline(0, color=color.LINE, linewidth=0.8, zorder=0)
    names = [shortened(said(item), 72 * left - 6, SMALL) for item in items]
    for tick in axes.set_yticks(range(len(items)), names, fontsize=SMALL):
        tick.label1.set_parse_math(False)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("change of the metric", fontsize=SMALL, labelpad=1, color=color.FAINT)
    bare(axes)


__all__ = ["columns", "ends", "heading", "lines", "node_scores", "reached", "scale", "strongest", "subheading", "wired"]
