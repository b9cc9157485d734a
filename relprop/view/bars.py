"""The strongest mediators as bars: total, direct, indirect and interaction, with intervals."""

from __future__ import annotations

from ..result import Effects
from ..result.number import printed, signed
from . import color
from .sheet import BODY, SMALL, Sheet, shortened

STRONGEST = 8
"""Mediators with bars of their own."""
INKS = {"total": color.INK, "direct": color.LEAST_FIRST, "indirect": color.MOST_FIRST, "controlled": "#1b7837",
        "interaction": color.CHANCE}
_LINE, _NAME, _FOOT = 0.125, 0.36, 0.38  # inches: a bar, the heading, the axis
_SMALL = 0.1  # of the total effect: where the strongest mediators have less, bars are drawn without what is as large
_ACROSS, _HIGH = 460, 11  # of a page's bars, in pixels: width, and height of one


def main(effects: Effects) -> str:
    """The kind of effect that maps show: indirect if it is there."""
    return next((kind for kind in ("indirect", "direct", "controlled") if kind in effects.kinds), "total")


def drawn(effects: Effects) -> list[str]:
    """The kinds that have bars: all; where the strongest mediators have little of the total, those alone that are less
    than half of it."""
    total, strongest = (color.limit(effects.summaries[kind].mean) for kind in ("total", main(effects)))
    if strongest >= _SMALL * total:
        return list(effects.kinds)
    return [kind for kind in effects.kinds if color.limit(effects.summaries[kind].mean) < total / 2]


def height(effects: Effects) -> float:
    """Inches that `draw` takes."""
    return _NAME + _LINE * (_extent(effects)[-1] + 1.4) + _FOOT


def _extent(effects: Effects) -> list[float]:
    """Where each mediator's bars start, and where the last ones end, in lines."""
    kinds = drawn(effects)
    own = len(kinds) - ("total" in kinds)
    names = len(strongest(effects))
    first = 1.6 if "total" in kinds else 0.0
    return [first + (own + 0.6) * place for place in range(names)] + [max(1.0, first + (own + 0.6) * names - 1.6)]


def strongest(effects: Effects) -> list[str]:
    """Names of the mediators that have bars."""
    return effects.top(STRONGEST, main(effects)) if main(effects) != "total" else []


def told(effects: Effects) -> str:
    """What the bars show, in words."""
    left_out = [kind for kind in effects.kinds if kind not in drawn(effects)]
    return (("mean over examples with 95 % interval" if len(effects.base) > 1 else "one example")
            + f"; {main(effects)} effects decide what is strongest"
            + (f"; {' and '.join(left_out)} effects are far larger" if left_out else ""))


def rows(effects: Effects) -> list[tuple[str, list[tuple[str, int, float]]]]:
    """Each name with its bars: kind, number of the mediator, and place in lines."""
    kinds, starts = drawn(effects), _extent(effects)
    own = [kind for kind in kinds if kind != "total"]
    found = [("total", [("total", 0, 0.0)])] if "total" in kinds else []
    return found + [(name, [(kind, effects.mediators.index(name), start + line) for line, kind in enumerate(own)])
                    for name, start in zip(strongest(effects), starts)]


def draw(part: Sheet, effects: Effects, width: float) -> None:
    """The bars with their names, an axis and a legend."""
    part.write(0, 0, "The strongest mediators", size=BODY, weight="bold")
    part.write(0, 0.16, told(effects), size=SMALL, color=color.FAINT)
    axes = part.axes(1.5, _NAME, width - 2.6, height(effects) - _NAME - _FOOT)
    ticks = []
    for name, own in rows(effects):
        for kind, index, place in own:
            _bar(axes, effects, kind, index, place)
        ticks.append((own[0][2] / 2 + own[-1][2] / 2, shortened(name, 72 * 1.4, SMALL)))
    axes.axvline(0, color=color.LINE, linewidth=0.8, zorder=0)
    axes.set(ylim=(_extent(effects)[-1] + 0.7, -0.7))
    plain_ticks(axes.set_yticks(*zip(*ticks)))
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"effect ({effects.scale})", fontsize=SMALL, labelpad=1, color=color.FAINT)
    bare(axes)
    for line, kind in enumerate(drawn(effects)):
        part.write(width - 0.9, _NAME + 0.15 * line, f"■ {kind}", size=SMALL, color=INKS[kind])


def _bar(axes: object, effects: Effects, kind: str, index: int, y: float) -> None:
    one = effects.summaries[kind]
    axes.barh(y, float(one.mean[index]), height=0.78, color=INKS[kind], alpha=0.75, linewidth=0)
    if one.low is not None:
        axes.plot([float(one.low[index]), float(one.high[index])], [y, y], color=color.INK, linewidth=0.8)


def pages(effects: Effects) -> dict:
    """What a page shows of the bars; places in pixels."""
    found = [(name, own) for name, own in rows(effects)]
    spans = [(float(one.mean[at]), *((float(one.low[at]), float(one.high[at])) if one.low is not None else ()))
             for _, own in found for kind, at, _ in own for one in [effects.summaries[kind]]]
    low, high = min(0.0, *map(min, spans)), max(0.0, *map(max, spans))
    x = lambda value: round(_ACROSS * (value - low) / ((high - low) or 1.0), 1)
    top = lambda line: round(_HIGH * (line + 0.7), 1)
    bars, names = [], []
    for name, own in found:
        names.append((name, top(own[0][2] / 2 + own[-1][2] / 2 + 0.5)))
        for kind, at, line in own:
            one = effects.summaries[kind]
            mean, span = float(one.mean[at]), None
            if one.low is not None:
                span = (x(float(one.low[at])), x(float(one.high[at])))
            bars.append({"kind": kind, "x": min(x(mean), x(0.0)), "width": abs(x(mean) - x(0.0)), "y": top(line),
                         "span": span, "told": f"{name}: {kind} {signed(mean)}"})
    return {"bars": bars, "names": names, "zero": x(0.0), "width": _ACROSS, "high": 0.8 * _HIGH,
            "height": top(_extent(effects)[-1] + 1.2), "low": printed(low, 3), "end": printed(high, 3),
            "inks": {**INKS, "indirect": "#7a5cb8"}, "kinds": drawn(effects), "told": told(effects),
            "scale": effects.scale}


def plain_ticks(ticks: list) -> None:
    """Nothing in the labels is read as mathematics."""
    for tick in ticks:
        tick.label1.set_parse_math(False)


def bare(axes: object) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
