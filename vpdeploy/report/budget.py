"""What the files that ship have of what the budget speaks of, by what was measured of them at the end."""

from __future__ import annotations

from collections.abc import Iterator

from vpdeploy.report.headline import describe, factor_at, latency_at, main_arm
from vpdeploy.report.numbers import significant
from vpdeploy.values import Report


def came_to(report: Report, arm: str) -> dict[str, float]:
    """Quantity -> what ``arm`` has. Milliseconds are the table's dense ones over the factor that was measured, as those of
    another session are no measure; where a budget gives milliseconds they are as measured.
    """
    measured, price, asked = report.arms[arm], report.price, _asked(report, arm)
    at = None if price is None else price.conditions
    sizes = {form: size / 2**20 for form, size in measured.file_bytes.items()}
    found = {"macs": float(measured.macs), "params": float(measured.params), "file_mib": max(sizes.values())}
    if at is None or price is None:
        return found
    if "file_mib" not in asked:  # then the table is of the target's form alone
        found["file_mib"] = sizes.get(at.form, found["file_mib"])
    time, faster = latency_at(measured, at), factor_at(report, arm, at)
    if time is not None and faster is not None:
        found["latency_ms"] = time.p50_ms if "latency_ms" in asked else price.dense["latency_ms"] / faster.factor
    for row in measured.memory:
        if (row.form, row.batch, row.threads) == (at.form, at.batch, at.threads):
            found["memory_mib"] = row.peak_rss_mib
    return found


def budget_lines(report: Report) -> list[str]:
    """For everything that the main arm's budget asks for and only the files can tell, whether they have it."""
    arm = main_arm(report)
    return [] if arm is None else list(_lines(report, arm))


def _lines(report: Report, arm: str) -> Iterator[str]:
    came, at = came_to(report, arm), None if report.price is None else report.price.conditions
    faster = factor_at(report, arm, at)
    for kind, requested in _asked(report, arm).items():
        found, least, interval = came.get(kind), requested, ""
        if kind == "latency_ratio" and faster is not None:
            least, most = (1 / bound for bound in reversed(faster.interval))
            found, interval = 1 / faster.factor, f" (95 % {significant(least)} to {significant(most)})"
        if found is None:  # not measured there, or a formula tells it before and after
            continue
        verdict = "met"
        if found > requested:
            verdict = f"exceeded by {100 * (found / requested - 1):.1f} %"
            verdict += ", which is less than the measurement leaves open" if interval and least <= requested else ""
        where = "" if kind == "file_mib" or at is None else f", {describe(at)}"
        got = f"measured at the end {significant(found)}{interval}{where}"
        yield f"{arm}, {kind}: asked for at most {requested:g}, {got}: {verdict}."


def _asked(report: Report, arm: str) -> dict[str, float]:
    """Kind -> amount."""
    certificate = report.certificates.get(arm)
    if certificate is None:
        return {}
    return {
        certificate.budget: certificate.requested,
        **{kind: limit for kind, (limit, _) in certificate.limits.items()},
    }
