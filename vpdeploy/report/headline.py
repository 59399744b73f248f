"""Which of the many latencies stands for an arm where one number must do."""

from __future__ import annotations

from vpdeploy.report.numbers import counted
from vpdeploy.values import Latency, LatencyFactor, Measurement, Memory, Report

Settings = tuple[str, str, int, int]  # engine, form, threads, batch


def headline(report: Report) -> Settings | None:
    """The float form where it was measured, then the smallest batch, then the fewest threads; None without latencies.

    The float form times the network; the uint8 form's resize costs every arm the same and would hide what pruning gave.
    """
    rows = report.arms["dense"].latency
    best = min(rows, key=lambda row: (row.form != "float", row.batch, row.threads), default=None)
    return None if best is None else settings(best)


def settings(row: Latency | LatencyFactor) -> Settings:
    return row.engine, row.form, row.threads, row.batch


def describe(at: Settings) -> str:
    _, form, threads, batch = at
    return f"{form} form, batch {batch}, {counted(threads, 'thread')}"


def latency_at(arm: Measurement, at: Settings | None) -> Latency | None:
    return next((row for row in arm.latency if settings(row) == at), None)


def factor_at(report: Report, arm: str, at: Settings | None) -> LatencyFactor | None:
    rows = report.factors[arm].latency_p50 if arm in report.factors else ()
    return next((row for row in rows if settings(row) == at), None)


def memory_at(arm: Measurement, at: Settings | None) -> Memory | None:
    """Of the same form and batch if it was measured there, otherwise the first."""
    alike = [row for row in arm.memory if at is not None and (row.form, row.batch) == (at[1], at[3])]
    return (alike or list(arm.memory) or [None])[0]


def main_arm(report: Report) -> str | None:
    """The arm that the report is about: "pruned", or the last one that is not dense."""
    others = [name for name in report.arms if name != "dense"]
    return "pruned" if "pruned" in others else others[-1] if others else None
