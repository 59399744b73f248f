"""Which of the many latencies stands for an arm where one number must do."""

from __future__ import annotations

from vpdeploy.report.numbers import counted
from vpdeploy.values import Conditions, Latency, LatencyFactor, Measurement, Memory, Report

USUAL_ENGINE = "onnxruntime-cpu"


def headline(report: Report) -> Conditions | None:
    """What a latency budget was measured under; otherwise the first engine's float form where it was measured, then the smallest
    batch, then the fewest threads; None without latencies.

    The float form times the network; the uint8 form's resize costs every arm the same and would hide what pruning gave.
    """
    rows = report.arms["dense"].latency
    timed = any("latency" in name for c in report.certificates.values() for name in (c.budget, *c.limits))
    if timed and report.price is not None and any(row.conditions == report.price.conditions for row in rows):
        return report.price.conditions
    engines = list(dict.fromkeys(row.engine for row in rows))
    best = min(
        rows, key=lambda row: (engines.index(row.engine), row.form != "float", row.batch, row.threads), default=None
    )
    return None if best is None else best.conditions


def engine_of(at: Conditions) -> str:
    """With its precision, where that is not the usual one."""
    return at.engine if at.precision == "fp32" else f"{at.engine}, {at.precision}"


def describe(at: Conditions) -> str:
    """The engine is not told where it is the usual one."""
    engine = "" if at.engine == USUAL_ENGINE else f"{at.engine}, "
    precision = "" if at.precision == "fp32" else f"{at.precision}, "
    return f"{engine}{precision}{at.form} form, batch {at.batch}, {counted(at.threads, 'thread')}"


def latency_at(arm: Measurement, at: Conditions | None) -> Latency | None:
    return next((row for row in arm.latency if row.conditions == at), None)


def factor_at(report: Report, arm: str, at: Conditions | None) -> LatencyFactor | None:
    rows = report.factors[arm].latency_p50 if arm in report.factors else ()
    return next((row for row in rows if row.conditions == at), None)


def memory_at(arm: Measurement, at: Conditions | None) -> Memory | None:
    """Of the same form and batch if it was measured there, otherwise the first."""
    alike = [row for row in arm.memory if at is not None and (row.form, row.batch) == (at.form, at.batch)]
    return (alike or list(arm.memory) or [None])[0]


def main_arm(report: Report) -> str | None:
    """The arm that the report is about: "pruned", or the last one that is not dense."""
    others = [name for name in report.arms if name != "dense"]
    return "pruned" if "pruned" in others else others[-1] if others else None
