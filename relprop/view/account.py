"""Effects as a page: maps, the strongest mediators with intervals and p-values, and how it was made; no script."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..result import Effects
from ..result.arrangement import Arrangement
from ..result.number import percent, printed, signed
from . import bars, color, patch, pattern
from .mediation import (
    LEVEL,
    columns,
    drawn,
    found,
    grid,
    heading,
    interval,
    layers,
    main,
    maps,
    rounded,
    scale,
    subheading,
    titled,
)
from .page import png
from .template import template

LISTED = 20
"""Mediators in the table of the strongest."""
_ACROSS, _HIGH = 640, 22  # of the points of neurons, in pixels: width, and height of a layer
_POINTS = 2000  # drawn of a cloud, the strongest
_DRAWN = ("model", "pair", "tokens", "pictures", "patterns", "grouped")  # of what is known, shown elsewhere on the page


def account(effects: Effects) -> str:
    """A whole HTML document that needs nothing else."""
    kind = main(effects)
    kinds = [one for one in effects.kinds if one != "total"]
    names = effects.top(LISTED, kind) if kinds else []
    parts = [(of, part) for of, part in drawn(effects) if not patch.over_patches(of, part)]
    return template("mediation.html").render(
        title=heading(effects), under=subheading(effects), kind=kind, kinds=kinds, level=LEVEL,
        lines=[_line(effects, name, kinds, kind) for name in names], count=len(effects.mediators),
        boards=[_board(of, part, kind) for of, part in parts if part.shape == "board"],
        pictures=_pictures(effects, kind), heads=pattern.pages(effects), said=pattern.scale(), sides={},
        clouds=[_cloud(of, part, kind) for of, part in parts if part.shape == "cloud"],
        bars=bars.pages(effects) if kinds else None, examples=_examples(effects), facts=_facts(effects))


def _line(effects: Effects, name: str, kinds: list[str], kind: str) -> dict:
    """A row of the table of the strongest; bars in percent of the largest mean of any."""
    index, total = effects.mediators.index(name), float(effects.total.mean())
    p, q = _p(effects, kind, index)
    return {"name": name, "p": p, "q": q, "holds": found(effects, kind)[index],
            "share": percent(float(effects.summaries[kind].mean[index]) / total).replace("-", "−") if total else "–",
            "effects": [_number(effects, one, index) for one in kinds]}


def _number(effects: Effects, kind: str, index: int) -> dict:
    one, end = effects.summaries[kind], color.limit(effects.summaries[kind].mean)
    low = "" if one.low is None else f"{signed(float(one.low[index]))} to {signed(float(one.high[index]))}"
    mean = float(one.mean[index])
    return {"mean": signed(mean), "span": low, "tint": color.tint(mean, end)}


def _p(effects: Effects, kind: str, index: int) -> tuple[str, str]:
    one = effects.summaries[kind]
    said = lambda values: "–" if values is None else _chance(float(values[index]))
    return said(one.p), said(one.q)


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _board(effects: Effects, part: Arrangement, kind: str) -> dict:
    mean, holds = effects.summaries[kind].mean, found(effects, kind)
    end = color.limit(mean[list(part.index)])
    cell = lambda one: None if one is None else {
        "text": rounded(float(mean[one]), end), "tint": color.tint(float(mean[one]), end), "holds": holds[one],
        "told": f"{effects.mediators[one]}: {interval(effects, kind, one)}"
                + ("" if effects.summaries[kind].q is None else f", q {_p(effects, kind, one)[1]}")}
    bars = _sums(*layers(effects, part, kind))
    rows = list(zip(part.rows, [[cell(one) for one in row] for row in grid(effects, part, kind)], bars))
    turned = max(map(len, part.columns)) > 4 or part.across == "position"
    return {"title": titled(effects, part, kind), "scale": scale(effects, kind, end), "rows": rows, "turned": turned,
            "columns": columns(effects, part), "alone": part.columns == ("",)}


def _sums(sums: Tensor, low: Tensor | None, high: Tensor | None) -> list[dict]:
    """Bars of layers, with places in percent of the width."""
    reach = color.limit(sums) or 1.0
    span = lambda row: "" if low is None else f"[{signed(float(low[row]))}, {signed(float(high[row]))}]"
    return [{"text": signed(value), "width": 50 * abs(value) / reach, "left": 50 - 50 * max(0.0, -value) / reach,
             "color": color.sign(value), "span": span(row)} for row, value in enumerate(sums.tolist())]


def _pictures(effects: Effects, kind: str) -> list[dict]:
    """Pictures with the effects of their patches; of other mediators the pictures alone."""
    boards = [part for part in maps(effects) if patch.over_patches(effects, part)]
    found = [{"title": f"{kind.capitalize()} effects: {part.title}", "scale": patch.scale(effects, part, kind),
              "panels": [(name, rest, png(pixels)) for name, rest, pixels in patch.panels(effects, part, kind)]}
             for part in boards]
    if boards or not patch.sides(effects):
        return found
    both = zip(("base", "counterfactual"), patch.sides(effects))
    return [{"title": "The first example", "scale": "",
             "panels": [(name, "", png(one.images[0].numpy())) for name, one in both]}]


def _cloud(effects: Effects, part: Arrangement, kind: str) -> dict:
    """Points of neurons, with places in pixels."""
    mean, holds = effects.summaries[kind].mean, found(effects, kind)
    values = mean[list(part.index)]
    end = color.limit(values) or 1.0
    sums = layers(effects, part, kind)
    shown = values.abs().topk(min(_POINTS, len(values))).indices.tolist()
    points = [{"x": round(_ACROSS * (0.5 + 0.48 * float(mean[one]) / end), 1), "holds": holds[one],
               "y": round(_HIGH * (row + 0.5 + ((7 * place) % 11 - 5) / 20), 1),
               "told": f"{effects.mediators[one]}: {interval(effects, kind, one)}"}
              for place, one, row in ((place, part.index[place], part.row[place]) for place in shown)]
    rows = [(name, _HIGH * (place + 0.5), bar) for place, (name, bar) in enumerate(zip(part.rows, _sums(*sums)))]
    return {"title": titled(effects, part, kind), "scale": scale(effects, kind, None), "points": points,
            "rows": rows, "width": _ACROSS, "height": _HIGH * len(part.rows), "end": printed(end, 3),
            "drawn": "" if len(shown) == len(values) else f"; the {len(shown)} strongest of {len(values)}"}


def _examples(effects: Effects) -> list[dict]:
    """Each example's outcomes and total effect, the first ones of many."""
    return [{"base": printed(float(y0)), "counterfactual": printed(float(y1)), "total": signed(float(total))}
            for y0, y1, total in zip(effects.base[:LISTED], effects.counterfactual, effects.total)]


def _facts(effects: Effects) -> list[tuple[str, str]]:
    shown = {name: value for name, value in effects.about.items() if name not in _DRAWN}
    said = []
    for name, value in shown.items():  # of a mapping, such as that of an estimate, what is no table itself
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        said += [(f"{name} {key}".strip(), str(one)) for key, one in parts
                 if one not in (None, False) and not isinstance(one, Mapping)]
    return [("model", str(effects.about.get("model", "?"))), ("outcome", effects.outcome), ("scale", effects.scale),
            *said]


__all__ = ["LISTED", "account"]
