"""Results as HTML: everything inline, no script, every word escaped; readable on light and on dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..result import Curve, Ledger, Relevance
from ..result.number import amount, column, percent, printed, signed
from ..tokens import ImageUnits, TextUnits
from . import color, panel, words
from .figure import chosen, heading, subheading
from .grid import ends, same_inputs, scales, titles, together
from .template import template

if TYPE_CHECKING:
    from numpy import ndarray

_STRONGEST = 0.75  # opacity of the strongest word, so that it can be read on light and on dark
_RED, _BLUE = "178,24,43", "33,102,172"  # color.POSITIVE and color.NEGATIVE
_WIDTH, _HEIGHT = 300, 130  # of the curves, in pixels


def page(
    relevance: Relevance | Sequence[Relevance], row: int | None = None, *, check: Curve | None = None, title: str = ""
) -> str:
    """A whole HTML document of a result, or of several of the same inputs beside each other.

    Args: row: one row of the batch; None: all. check: instead of `relevance.curve`. title: of the window.
    """
    content = _content(relevance, row, check)
    return template("page.html").render({**content, "title": title or content["title"]})


def fragment(relevance: Relevance | Sequence[Relevance], row: int | None = None, *, check: Curve | None = None) -> str:
    """The same as `page` as one element, for a notebook."""
    return template("fragment.html").render(_content(relevance, row, check))


def _content(relevance: Relevance | Sequence[Relevance], row: int | None, check: Curve | None) -> dict:
    """What the templates show; all of it plain text and numbers."""
    if isinstance(relevance, Relevance):
        relevances, checks = [relevance], [check or relevance.curve]
    else:
        relevances = list(relevance)
        checks = [other.curve for other in relevances]
        same_inputs(relevances, checks)
    first = relevances[0]
    rows = range(first.rows) if row is None else chosen(first, row)
    pairs = list(zip(relevances, checks, strict=True)) if len(rows) > 1 else []
    whole = [f"{other.method}: {own.summary()}" for other, own in pairs if own is not None]
    name = f"{first.target[rows[0]]}, {first.method}" if len(relevances) == 1 else f"{len(relevances)} maps"
    return {
        "sections": [_section(relevances, each, checks) for each in rows],
        "summaries": whole,
        "provenance": [_facts(other) for other in relevances],
        "title": name,
        "width": _WIDTH,
        "height": _HEIGHT,
        "positive": color.POSITIVE,
        "negative": color.NEGATIVE,
        "chance": color.CHANCE,
        "most": color.MOST_FIRST,
        "least": color.LEAST_FIRST,
    }


def _section(relevances: list[Relevance], row: int, checks: list[Curve | None]) -> dict:
    """One input with its maps."""
    shared = together(relevances, None)
    found = ends(relevances, row, shared)
    if len(relevances) == 1:
        first = relevances[0]
        top, each = (heading(first, row), subheading(first)), [("", "")]
    else:
        top, each = titles(relevances, row)
    maps = [
        _map(relevance, row, check, end, title, compact=len(relevances) > 1)
        for relevance, check, end, title in zip(relevances, checks, found, each, strict=True)
    ]
    units = relevances[0].units
    picture = png(units.images[row].numpy()) if isinstance(units, ImageUnits) else None
    return {
        "title": top[0],
        "under": top[1],
        "note": scales(relevances, shared),
        "picture": picture,
        "maps": maps,
        "is_text": isinstance(units, TextUnits),
    }


def _map(
    relevance: Relevance, row: int, check: Curve | None, end: float, title: tuple[str, str], *, compact: bool
) -> dict:
    found = {
        "title": title[0],
        "under": title[1],
        "scale": color.scale(relevance, color.limit(color.shown(relevance, row))),
        "low": signed(-end) if end else "",
        "high": signed(end) if end else "",
        "texts": [],
        "aside": [],
        "pictures": [],
        "beside": [],
        "ledger": _ledger(relevance.ledger, row),
        "check": _check(check, row, compact),
        "direction": "ltr",
    }
    if isinstance(relevance.units, TextUnits):
        said = relevance.words(row)
        direction = "ltr" if words.rightward("".join(word for word, _ in said)) else "rtl"
        bar = f"linear-gradient(to right,rgba({_BLUE},{_STRONGEST}),transparent,rgba({_RED},{_STRONGEST}))"
        return {
            **found,
            "texts": [_words(one, end) for one in words.texts(relevance, row)],
            "aside": words.aside(relevance, row),
            "direction": direction,
            "gradient": bar,
            "beside": [[(label, png(pixels)) for label, pixels in color.panels(one, end)]
                       for one in color.beside(relevance, row)],
        }
    stops = ",".join(map(_hex, color.paint(torch.linspace(-1, 1, 11), 1.0)))
    found["gradient"] = f"linear-gradient(to right,{stops})"
    if isinstance(relevance.units, ImageUnits):
        picture, values = relevance.units.images[row], relevance.map[row]
        over = [("overlay", png(color.overlay(picture, values, end)))] if not compact else []
        return {**found, "pictures": [*over, ("relevance", png(color.paint(values, end)))]}
    values = color.shown(relevance, row)
    return {**found, "pictures": [("relevance of each entry", png(color.paint(values, color.limit(values))))]}


def _words(said: list[tuple[str, float]], end: float) -> list[dict]:
    """Words with their colour as a CSS value, and what a pointer that rests on them reads."""
    found = []
    for before, (word, value) in zip(["", *(word for word, _ in said)], said, strict=False):
        strength = _STRONGEST * float(color.share(value, end))
        tint = f"rgba({_RED if strength >= 0 else _BLUE},{abs(strength):.3f})"
        found.append(
            {"text": word, "glued": words.glued(before, word), "color": tint, "told": f"{word}: {signed(value, 4)}"}
        )
    return found


def _ledger(ledger: Ledger | None, row: int) -> dict | None:
    """Rows of the waterfall, with places in percent of its width."""
    if ledger is None:
        return None
    rows = panel.entries(ledger, row)
    parts = [part for _, part, _ in rows]
    spans = panel.spans(parts)
    low, high = min(0.0, *map(min, spans)), max(0.0, *map(max, spans))
    place = lambda at: 100 * (at - low) / ((high - low) or 1.0)
    found = []
    for (name, part, share), told, (low_end, high_end) in zip(rows, column(parts), map(sorted, spans), strict=True):
        bar = {"left": place(low_end), "width": place(high_end) - place(low_end), "color": color.sign(part)}
        found.append({"name": name, "amount": told, "share": percent(share).replace("-", "−"), **bar})
    found[0]["color"] = "#777"
    return {"rows": found, "zero": place(0.0), "error": amount(ledger.error[row].item(), 2)}


def _check(check: Curve | None, row: int, compact: bool) -> dict | None:
    """The curves of one row as points of an SVG."""
    if check is None:
        return None
    own = check.row(row)
    low, high = panel.curve_ends([own])
    at = [_WIDTH * float(fraction) for fraction in own.fractions]
    up = lambda values: [_HEIGHT * (high - value) / (high - low) for value in values.tolist()]
    drawn = lambda points: " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = lambda values: list(zip(at, up(values), strict=True))
    chance = own.random[:, 0]
    return {
        "verdict": own.verdict,
        "areas": panel.areas(own, compact),
        "label": "" if compact else "ablation: ",
        "axis": "fraction removed" if compact else f"fraction removed ({own.baseline})",
        "low": printed(low, 2),
        "high": printed(high, 2),
        "most": drawn(line(own.morf[0])),
        "least": drawn(line(own.lerf[0])),
        "orders": len(chance),
        "chance": drawn(line(chance.amax(0)) + line(chance.amin(0))[::-1]),
    }


def _facts(relevance: Relevance) -> list[tuple[str, str]]:
    cost = f"{relevance.forwards} forwards, {relevance.backwards} backwards"
    return [
        ("method", subheading(relevance)),
        ("cost", cost),
        *((str(name), str(value)) for name, value in relevance.provenance.items()),
    ]


def png(pixels: ndarray) -> str:
    """Pixels as a data address."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _hex(pixel: Sequence[int]) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in pixel)
