"""Figures as a reader wants them: few digits, a unit, a true minus sign."""

from __future__ import annotations

from vpdeploy.values import Interval

NOTHING = "–"


def significant(value: float, digits: int = 3) -> str:
    """``value`` with at least ``digits`` significant digits and no exponent between 0.001 and a million."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return minus(f"{value:.{digits - 1}e}")
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    leading_zeros = 0 if abs(value) >= 0.1 else 1 if abs(value) >= 0.01 else 2
    return minus(f"{value:.{max(0, digits - whole + leading_zeros)}f}")


def amount(value: int) -> str:
    """1_814_073_344 -> "1.81 G"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(value) >= size:
            return f"{significant(value / size)} {unit}"
    return str(value)


def percent(fraction: float, n: int) -> str:
    """0.9178 -> "91.78 %"; one decimal below a thousand images, where a second one would be noise."""
    return f"{100 * fraction:.{_decimals(n)}f} %"


def percent_range(interval: Interval, n: int) -> str:
    low, high = (f"{100 * bound:.{_decimals(n)}f}" for bound in interval)
    return f"{low} to {high}"


def points(difference: float, n: int) -> str:
    """A difference of accuracies in percentage points, signed."""
    text = f"{100 * difference:+.{_decimals(n)}f}"
    return minus("0" + text[2:] if float(text) == 0 else text)


def points_range(interval: Interval, n: int) -> str:
    return f"{points(interval[0], n)} to {points(interval[1], n)}"


def factor(value: float) -> str:
    """Dense over arm: "2.05x"."""
    return f"{value:.2f}x" if value < 10 else f"{significant(value)}x"


def factor_range(interval: Interval) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def mebibytes(size: int) -> str:
    return significant(size / 2**20)


def tiny(value: float) -> str:
    """An error or a relative difference: "3.1e−07"; 0 stays 0."""
    return "0" if value == 0 else minus(f"{value:.1e}")


def counted(number: int, noun: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def minus(text: str) -> str:
    return text.replace("-", "−")


def _decimals(n: int) -> int:
    return 1 if n < 1000 else 2
