"""Numbers as people read them, the same in every table, figure and page."""

from __future__ import annotations

import math


def amount(value: float, digits: int = 4) -> str:
    """A number with this many significant digits.

    >>> amount(4.12345), amount(-3.21e-8, digits=2), amount(1250.0)
    ('4.123', '-3.2e-08', '1250')
    """
    return f"{value:.{digits}g}"


def printed(value: float, digits: int = 4) -> str:
    """An `amount` with a real minus, as figures and pages print it.

    >>> printed(-0.25)
    '−0.25'
    """
    return amount(value, digits).replace("-", "−")


def column(values: list[float], digits: int = 4) -> list[str]:
    """Numbers to stand beneath each other: as many decimals for all as the first needs for this many digits.

    What would show as zero keeps one digit of its own.

    >>> column([13.1412, -0.23, 8.9e-08, 0.0]), column([1.234e-7, -2e-8])
    (['13.14', '−0.23', '9e−08', '0.00'], ['1.23e−07', '−2.00e−08'])
    """
    size = abs(values[0]) or max(map(abs, values))
    exponent = math.floor(math.log10(size)) if size else 0
    if not -4 <= exponent < 6:
        return [f"{value:.{digits - 2}e}".replace("-", "−") for value in values]
    decimals = max(0, digits - 1 - exponent)
    plain = lambda value: f"{value:.{decimals}f}" if value == 0 or abs(value) >= 0.5 * 10**-decimals else f"{value:.0e}"
    return [plain(value).replace("-", "−") for value in values]


def percent(share: float) -> str:
    """A share of the whole; a dash where the whole is zero and shares mean nothing.

    >>> percent(0.9461), percent(-1e-9), percent(213.4), percent(float("nan"))
    ('94.6 %', '0.0 %', '2.1e+04 %', '–')
    """
    if not math.isfinite(share):
        return "–"
    if abs(share) >= 100:
        return f"{100 * share:.1e} %"
    return f"{100 * share:.1f} %".replace("-0.0 %", "0.0 %")


def chance(p_value: float, letter: str = "p") -> str:
    """A p-value with its letter, which is q where it was corrected.

    >>> chance(0.0476), chance(1e-5), chance(0.0021, "q")
    ('p = 0.048', 'p < 0.001', 'q = 0.0021')
    """
    return f"{letter} < 0.001" if p_value < 0.001 else f"{letter} = {p_value:.2g}"


def signed(value: float, digits: int = 3) -> str:
    """A `printed` number with its sign, plus or minus.

    >>> signed(0.12345), signed(-0.5), signed(0.0)
    ('+0.123', '−0.5', '0')
    """
    return "0" if value == 0 else f"{value:+.{digits}g}".replace("-", "−")
