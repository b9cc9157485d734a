"""What stands beneath every map: the ledger as a waterfall, and the ablation curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..result import Curve, Ledger
from ..result.number import amount, column, percent, signed
from . import color
from .sheet import BODY, SMALL, Sheet, shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = 0.175  # inches from row to row of a ledger
CURVES = 1.25  # height of the curves in inches
_MOST = 7  # absorbers with a row of their own


def entries(ledger: Ledger, row: int) -> list[tuple[str, float, float]]:
    """The rows of a ledger's table, the smallest absorbers as one if there are many."""
    value, given, *absorbed, residual = ledger.table(row)
    if len(absorbed) > _MOST:
        absorbed = sorted(absorbed, key=lambda entry: -abs(entry[1]))
        rest = absorbed[_MOST - 1 :]
        absorbed = absorbed[: _MOST - 1] + [
            (f"{len(rest)} others", sum(entry[1] for entry in rest), sum(entry[2] for entry in rest))
        ]
    return [value, given, *absorbed, residual]


def spans(parts: list[float]) -> list[tuple[float, float]]:
    """Start and end of each bar of the waterfall.

    The value and the input start at zero, each further part where the last ended.
    """
    found = [(0.0, parts[0])]
    for part in parts[1:]:
        start = 0.0 if len(found) == 1 else found[-1][1]
        found.append((start, start + part))
    return found


def ledger_height(ledger: Ledger | None, row: int) -> float:
    """Inches that `draw_ledger` takes."""
    return 0.35 if ledger is None else 0.25 + LINE * len(entries(ledger, row))


def draw_ledger(part: Sheet, ledger: Ledger | None, row: int, *, compact: bool = False) -> None:
    """The value on top, each part where the one above ended; amounts (unless compact) and shares on the right."""
    size = SMALL if compact else BODY
    if ledger is None:
        part.write(0, 0, "no ledger: this method keeps no books", size=size, color=color.FAINT, style="italic")
        return
    part.write(0, 0, "ledger", size=size, weight="bold")
    error = f"error {amount(ledger.error[row].item(), 2)}"
    part.write(part.width, 0, error, size=SMALL, color=color.FAINT, ha="right")
    rows = entries(ledger, row)
    left, right = (1.12, 0.5) if compact else (1.28, 1.35)  # for the longest name: position embeddings
    parts = [amount for _, amount, _ in rows]
    axes = part.axes(left, 0.2, part.width - left - right, LINE * len(rows), frame=False)
    _bars(axes, spans(parts))
    for number, ((name, _, share), told) in enumerate(zip(rows, column(parts), strict=True)):
        y = 0.2 + LINE * (number + 0.5)
        style = {"size": size, "color": color.FAINT if number == len(rows) - 1 else color.INK, "va": "center"}
        part.write(0, y, shortened(name, left * 72 - 5, size), **style)
        if not compact:
            part.write(part.width - right + 0.68, y, told, ha="right", **style)
        part.write(part.width, y, percent(share).replace("-", "−"), ha="right", **style)


def _bars(axes: Axes, spans: list[tuple[float, float]]) -> None:
    """Rows of a waterfall; the first is the value itself."""
    for number, (start, end) in enumerate(spans):
        fill = "#4d4d4d" if number == 0 else color.sign(end - start)
        axes.barh(number, end - start, left=start, height=0.62, color=fill, linewidth=0)
        if 0 < number < len(spans) - 1:
            axes.plot([end, end], [number, number + 1], color=color.FAINT, linewidth=0.5)
    axes.axvline(0, color=color.FAINT, linewidth=0.6)
    ends = [0.0, *(end for span in spans for end in span)]
    low, high = min(ends), max(ends)
    room = 0.03 * (high - low) or 1.0
    axes.set(xlim=(low - room, high + room), ylim=(len(spans) - 0.5, -0.5))


def check_height(check: Curve | None) -> float:
    """Inches that `draw_check` takes."""
    return 0.0 if check is None else 0.36 + CURVES + 0.34


def draw_check(
    part: Sheet,
    check: Curve | None,
    row: int,
    *,
    compact: bool = False,
    ends: tuple[float, float] | None = None,
    legend: bool = True,
) -> None:
    """The curves of one row, most and least relevant first, over the range of random orders; the verdict above.

    Args: ends: of the vertical axis, to share it between panels.
    """
    if check is None:
        return
    own = check.row(row)
    size = SMALL if compact else BODY
    part.write(0, 0, own.verdict, size=size, weight="bold")
    part.write(0, 0.16, areas(own, compact), size=SMALL - 0.5 * compact, color=color.FAINT)
    axes = part.axes(0.42, 0.36, part.width - 0.47, CURVES)
    _curves(axes, own)
    axes.set_ylim(*(ends or curve_ends([own])))
    removed = "fraction removed" if compact else f"fraction removed ({visible(own.baseline)})"
    axes.set_xlabel(removed, fontsize=SMALL, labelpad=1, color=color.FAINT, parse_math=False)
    if not compact:
        axes.set_ylabel("explained value", fontsize=SMALL, labelpad=1, color=color.FAINT)
    if legend:
        axes.legend(fontsize=SMALL - compact, frameon=False, handlelength=1.4, labelspacing=0.2, borderpad=0.1)


def curve_ends(checks: list[Curve]) -> tuple[float, float]:
    """Ends of a vertical axis that holds all these curves."""
    low = min(float(curve.min()) for check in checks for curve in (check.morf, check.lerf, check.random))
    high = max(float(curve.max()) for check in checks for curve in (check.morf, check.lerf, check.random))
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _curves(axes: Axes, check: Curve) -> None:
    at = check.fractions.tolist()
    chance = check.random[:, 0]
    low, high = chance.amin(0).tolist(), chance.amax(0).tolist()
    axes.fill_between(at, low, high, color=color.CHANCE, alpha=0.3, linewidth=0, label=f"{len(chance)} random")
    least = check.lerf[0].tolist()
    axes.plot(at, least, color=color.LEAST_FIRST, linewidth=1.3, linestyle=(0, (4, 1.2)), label="least first")
    axes.plot(at, check.morf[0].tolist(), color=color.MOST_FIRST, linewidth=1.3, label="most first")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.locator_params(axis="y", nbins=4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def areas(check: Curve, compact: bool) -> str:
    """The area of one row, and those of random orders."""
    chance = check.random_area[:, 0]
    low, high = signed(chance.min().item(), 2), signed(chance.max().item(), 2)
    area = f"area {signed(check.area[0].item())}"
    spread = "" if check.interval is None else " [{}, {}]".format(*(signed(end, 2) for end in check.interval))
    if compact:
        return f"{area}{spread}; random {low} to {high}"
    return f"ablation {area}{spread}; {len(chance)} random {low} to {high}; {check.forwards} forwards"
