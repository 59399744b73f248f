"""What a build server asks of a run: bounds on the report, each met or not."""

from __future__ import annotations

from dataclasses import dataclass

from vpdeploy.report.headline import describe, factor_at, headline, latency_at, main_arm
from vpdeploy.report.numbers import factor, factor_range, points, points_range, significant
from vpdeploy.values import Conditions, Report


@dataclass(frozen=True)
class Bound:
    """One bound, whether the report meets it, and a line that says so with the figure."""

    met: bool
    line: str


def bounds(
    report: Report,
    *,
    min_speedup: float | None = None,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
) -> list[Bound]:
    """Those that are given, of the report's main arm at its headline conditions.

    min_speedup: dense p50 over the arm's. max_drop: percentage points of top-1 below dense. max_latency_ms: the arm's p90,
    the single-stream figure of MLPerf. All compare the measured figure itself; its interval is told beside it.
    """
    arm, at = main_arm(report), headline(report)
    if arm is None:
        return [Bound(False, "no arm but dense is in the report; add pruned to compare.arms")]
    found: list[Bound] = []
    measured = at is not None and latency_at(report.arms[arm], at) is not None
    where = "" if at is None else f" ({describe(at)}{_unless_steady(report, arm, at) if measured else ''})"
    if min_speedup is not None:
        faster = factor_at(report, arm, at)
        got = "not measured" if faster is None else f"{factor(faster.factor)}, 95 % {factor_range(faster.interval)}"
        met = faster is not None and faster.factor >= min_speedup
        found.append(_bound(met, f"speed-up {got}{where}; asked for at least {min_speedup:g}x"))
    if max_drop is not None:
        row = report.accuracy_difference[arm]
        got = f"{points(row.difference, row.n)} points, 95 % {points_range(row.interval, row.n)}, n = {row.n}"
        met = -100 * row.difference <= max_drop + 1e-9
        found.append(_bound(met, f"top-1 against dense {got}; asked for a drop of at most {max_drop:g}"))
    if max_latency_ms is not None:
        latency = latency_at(report.arms[arm], at)
        got = "not measured" if latency is None else f"{significant(latency.p90_ms)} ms"
        met = latency is not None and latency.p90_ms <= max_latency_ms
        found.append(_bound(met, f"p90 latency {got}{where}; asked for at most {max_latency_ms:g} ms"))
    return found


def _unless_steady(report: Report, arm: str, at: Conditions) -> str:
    rows = [row for name in ("dense", arm) if (row := latency_at(report.arms[name], at)) is not None]
    return "" if all(row.steady for row in rows) else "; not a steady measurement"


def _bound(met: bool, line: str) -> Bound:
    return Bound(met, f"{'met' if met else 'FAILED'}: {line}")
