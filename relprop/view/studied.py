"""A circuit and what holds of it as a page: the graph as SVG, curves, tables and attention patterns; no script."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..result.circuit import said
from ..result.number import percent, printed, signed
from ..result.placement import Placement, label, placed
from ..result.study import Study
from . import color, patch, pattern, wiring
from .page import png
from .template import template

LISTED = 40
"""Items in the table."""
_ACROSS, _ROW, _LEFT, _FOOT = 860, 30, 70, 90  # of the graph, in pixels
_SVG = (420, 170)  # of the curve
_WITHIN, _ABOVE = 8, 14  # of a node: its radius from which a label fits into it, the room from which one fits above
_PICTURE = 160  # of an example, across, at least
_DASHES = {"solid": "", wiring.LINES["q"]: "5 3", wiring.LINES["k"]: "1.5 3"}
_SIDES = {"base": "clean", "counterfactual": "corrupted"}


def studied(study: Study) -> str:
    """A whole HTML document that needs nothing else."""
    return template("circuit.html").render(
        title=wiring.heading(study), under=wiring.subheading(study), example=_example(study), graph=_graph(study),
        curve=_curve(study), lines=_lines(study), count=len(study.circuit), noun=study.circuit.noun,
        heads=pattern.pages(study), sides=_SIDES, said=pattern.scale(), tests=[_test(one) for one in study.tests or ()],
        facts=_facts(study))


def _example(study: Study) -> list[dict]:
    """Both sides of the first example: what each says, or its picture as a data address and how wide that is shown."""
    texts = [{"text": f": {said}", "picture": "", "width": 0} for said in study.about.get("pair", [])]
    pictures = [{"text": "", "picture": png(one.images[0].numpy()), "width": max(one.size[1], _PICTURE)}
                for one in patch.sides(study)]
    return [{"side": side, **one} for side, one in zip(_SIDES.values(), texts or pictures)]


def _graph(study: Study) -> dict:
    found, where = study.circuit, placed(study.circuit)
    scores = wiring.node_scores(found)
    end = color.limit(list(scores.values()))
    wide, tall = _ACROSS - _LEFT, _ROW * len(where.rows)
    at = lambda place: (round(_LEFT + wide * place[0], 1), round(tall - _ROW * (place[1] + 0.5), 1))
    radius = min(11.0, 0.42 * where.size * wide)
    own = set(found.members)
    inks = _inks([scores.get(node, 0.0) for node in where.nodes], end)
    within, fits = radius >= _WITHIN, where.size * wide >= _ABOVE  # a label is in its node, or above it, or nowhere
    nodes = [{"at": at(place), "kept": node in own, "ink": ink, "label": label(node) if within or fits else "",
              "text": color.on(scores.get(node, 0.0), end) if within else "currentColor",
              "lift": 3 if within else -radius - 2, "font": min(8.5, 27 / max(1, len(label(node)))),
              "told": _told(study, node, scores)}
             for (node, place), ink in zip(where.nodes.items(), inks)]
    return {"width": _ACROSS, "height": tall + (_FOOT if where.columns else 10), "base": tall, "radius": radius,
            "rows": [(name, tall - _ROW * (row + 0.5)) for row, name in enumerate(where.rows)],
            "columns": _columns(study, where, wide), "scale": wiring.scale(study, where, end), "level": found.level,
            "nodes": sorted(nodes, key=lambda one: one["kept"]), "edges": _edges(study, where, at)}


def _edges(study: Study, where: Placement, at: object) -> list[dict]:
    found = study.circuit
    if not found.edges:
        return []
    end = color.limit([found.edges[edge] or 0.0 for edge in found]) or 1.0
    made = []
    for (u, v), score, line in wiring.lines(found, where):
        size = abs(score) / end
        made.append({"from": at(u), "to": at(v), "ink": color.sign(score), "width": round(0.5 + 2.5 * size, 2),
                     "opacity": round(0.25 + 0.65 * size, 2), "dash": _DASHES[line]})
    return made


def _columns(study: Study, where: Placement, wide: float) -> list[dict]:
    count = len(where.columns)
    return [{"name": name, "x": round(_LEFT + wide * (place + 0.5) / count, 1),
             "edge": round(_LEFT + wide * place / count, 1)} for place, name in enumerate(wiring.columns(study, where))]


def _inks(values: list[float], end: float) -> list[str]:
    """Colours of the scale as CSS has them."""
    return [f"rgb({r},{g},{b})" for r, g, b in color.paint(torch.tensor(values, dtype=torch.float64), end).tolist()]


def _told(study: Study, node: str, scores: Mapping[str, float]) -> str:
    exact = study.exact.get(node)
    return f"{node}: score {signed(scores.get(node, 0.0))}" + ("" if exact is None else f", exact {signed(exact)}")


def _curve(study: Study) -> dict:
    """Faithfulness over the number of items kept, places in pixels."""
    over, (wide, tall) = study.curve, _SVG
    low, high = wiring.ends(study)
    most = max(over.kept.tolist()) or 1
    rising = math.log1p if most > wiring.LINEAR else float
    x = lambda count: round(wide * rising(count) / rising(most), 1)
    y = lambda value: round(tall * (high - min(max(value, low), high)) / (high - low), 1)
    points = lambda values: [f"{x(count)},{y(value)}" for count, value in zip(over.kept.tolist(), values.tolist())]
    band = [] if over.low is None else points(over.high) + points(over.low)[::-1]
    random = [] if study.chance is None else [y(value) for value in study.chance["random"]]
    return {"width": wide, "height": tall, "zero": y(0.0), "one": y(1.0), "points": " ".join(points(over.share)),
            "band": " ".join(band), "x": x(len(study.circuit)), "y": y(float(study.alone.share[0])), "random": random,
            "low": printed(low, 2), "high": printed(high, 2), "most": most, "log": rising is math.log1p,
            "noun": study.circuit.noun, "ablation": over.about.get("ablation", "?"),
            "ranking": over.about.get("ranking", "absolute"), "reached": wiring.reached(study),
            "rows": [(name, int(kept), printed(float(share), 3)) for name, kept, share in
                     zip(over.names, over.kept, over.share)]}


def _lines(study: Study) -> list[dict]:
    items = wiring.strongest(study, LISTED)
    exact = torch.tensor([study.exact[item] for item in items], dtype=torch.float64)
    score = torch.tensor([study.circuit.scores[item] or 0.0 for item in items], dtype=torch.float64)
    tints = [[color.tint(value, color.limit(values)) for value in values.tolist()] for values in (score, exact)]
    total = study.circuit.total
    share = lambda value: "–" if not total else percent(value / total).replace("-", "−")
    return [{"name": said(item), "score": signed(one), "exact": signed(other), "share": share(other), "tints": both}
            for item, one, other, *both in zip(items, score.tolist(), exact.tolist(), *tints)]


def _test(one: Mapping) -> dict:
    number = lambda name: "–" if one.get(name) is None else printed(float(one[name]), 3)
    span = "" if one.get("low") is None else f"{number('low')} to {number('high')}"
    return {"test": one["test"], "hypothesis": one["hypothesis"], "statistic": number("statistic"), "span": span,
            "p": number("p"), "passed": "passed" if one["passed"] else "not passed"}


def _facts(study: Study) -> list[tuple[str, str]]:
    found = []
    for name, value in study.circuit.about.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        found += [(f"{name} {key}".strip(), printed(one) if isinstance(one, float) else str(one))
                  for key, one in parts if isinstance(one, (str, int, float)) and not isinstance(one, bool)]
    return [("method", study.circuit.method), ("level", study.circuit.level), *found]


__all__ = ["LISTED", "studied"]
