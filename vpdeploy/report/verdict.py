"""The comparison in words, and what the prompt gave. Says so where a difference cannot be told from none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vpdeploy.report.compare import PROMPT_PAIRS
from vpdeploy.report.headline import describe, factor_at, headline, latency_at, main_arm
from vpdeploy.report.numbers import factor, factor_range, mebibytes, minus, percent, points, points_range, significant
from vpdeploy.values import AccuracyDifference, Conditions, Interval, LatencyFactor, Layer, Report

ARMS = {
    "dense": "tuned, nothing removed, no prompt",
    "dense+prompt": "tuned with the prompt, nothing removed",
    "pruned": "searched, cut and tuned as the recipe says",
    "pruned-prompt": "searched, cut and tuned without the prompt",
}
# Below and above this, time and MACs are said to part.
FELL_SHORT, WENT_BEYOND = 0.8, 1.25


def verdicts(report: Report) -> list[str]:
    """One or two sentences for every arm but dense."""
    at = headline(report)
    return [_verdict(report, name, at) for name in report.arms if name != "dense"]


def _verdict(report: Report, name: str, at: Conditions | None) -> str:
    factors, difference, faster = report.factors[name], report.accuracy_difference[name], factor_at(report, name, at)
    parts = [_macs(factors.macs)]
    if faster is not None and at is not None:
        parts.append(_speed(faster, at))
    parts.append(_accuracy(difference))
    sentence = f"{name} against dense: {', '.join(parts)}.{_zeros(report, name)}"
    if faster is None:
        return f"{sentence} Latency was not measured."
    return sentence + _parting(factors.macs, faster)


def _zeros(report: Report, name: str) -> str:
    """Of an arm whose single weights were set to 0: what that gives, and what it does not."""
    certificate = report.certificates.get(name)
    if certificate is None or certificate.budget != "weight_ratio":
        return ""
    arm, dense = report.arms[name].compressed_bytes, report.arms["dense"].compressed_bytes
    told = f" {1 - certificate.reached:.1%} of its weights are 0: dense runtimes, as those measured here, gain nothing from that"
    if arm and dense:
        form = next(iter(arm))
        told += (
            f"; compressed by gzip its file has {mebibytes(arm[form])} MiB and the dense one {mebibytes(dense[form])}"
        )
    if math.isclose(certificate.requested, 0.5):
        told += "; two of every four pay on sparse tensor cores, by TensorRT or cuSPARSELt, where the mask is 2:4"
    return told + "."


def _macs(value: float) -> str:
    if math.isclose(value, 1, abs_tol=0.005):
        return "the same MACs"
    return f"{factor(value)} fewer MACs" if value > 1 else f"{factor(1 / value)} more MACs"


def _speed(row: LatencyFactor, at: Conditions) -> str:
    low, high = row.interval
    bounds = f"95 % interval {factor_range(row.interval)}; {describe(at)}"
    if low <= 1 <= high:
        return f"speed not distinguishable from dense (factor {row.factor:.2f}, {bounds})"
    if row.factor > 1:
        return f"{factor(row.factor)} faster ({bounds})"
    bounds = f"95 % interval {factor_range((1 / high, 1 / low))}; {describe(at)}"
    return f"{factor(1 / row.factor)} slower ({bounds})"


def _accuracy(row: AccuracyDifference) -> str:
    low, high = row.interval
    where = f"n = {row.n}; {percent(row.changed, row.n)} of predictions changed"
    if low <= 0 <= high:
        return (
            f"top-1 not distinguishable from dense ({points(row.difference, row.n)} points, "
            f"95 % interval {points_range(row.interval, row.n)}; {where})"
        )
    size = points(abs(row.difference), row.n).removeprefix("+")
    bounds = " to ".join(points(bound, row.n).removeprefix("+") for bound in sorted((abs(low), abs(high))))
    word = "higher" if row.difference > 0 else "lower"
    return f"{size} points {word} top-1 (95 % interval {bounds} {word}; {where})"


def _parting(macs: float, row: LatencyFactor) -> str:
    """Where the time did not follow the MACs, in either direction: widths, memory and small layers decide it."""
    if math.isclose(macs, 1, abs_tol=0.005):
        return ""
    figures = f"{factor(row.factor)} against {factor(macs)}"
    if row.factor < FELL_SHORT * macs:
        return f" The time fell less than the MACs ({figures}): plan with the measured time."
    if row.factor > WENT_BEYOND * macs:
        return f" The time fell more than the MACs ({figures})."
    return ""


def partings(report: Report) -> list[str]:
    """A line for every condition under which time and MACs of the main arm part, and what explains it."""
    arm = main_arm(report)
    if arm is None:
        return []
    macs, why = report.factors[arm].macs, _lost_in(report, arm)
    lines = []
    for row in report.factors[arm].latency_p50:
        if macs > 1.005 and row.factor < FELL_SHORT * macs:
            lines.append(f"{describe(row.conditions)}: {factor(macs)} fewer MACs, {_faster(row.factor)}{why}.")
        elif macs > 1.005 and row.factor > WENT_BEYOND * macs:
            lines.append(
                f"{describe(row.conditions)}: {factor(macs)} fewer MACs, {_faster(row.factor)}: more than the MACs."
            )
    return lines


def _faster(value: float) -> str:
    return f"{factor(value)} faster" if value >= 1 else f"{factor(1 / value)} slower"


def _lost_in(report: Report, arm: str) -> str:
    """The layers that keep most of the time which their MACs do not explain, and what is known of widths."""
    pruned = {row.module: row for row in report.arms[arm].layers}
    whole = {row.module: row.width for row in report.arms["dense"].layers}
    lost: list[tuple[float, str]] = []
    total = sum(row.ms for row in pruned.values())
    for row in report.arms["dense"].layers:
        left = pruned.get(row.module)
        if left is None or not row.ms or not left.ms:
            continue
        excess = left.ms - row.ms * (left.macs / row.macs if row.macs else 0.0)
        if row.module and left.macs < row.macs:
            was = f"{row.width} -> {left.width} outputs, {factor(row.macs / left.macs)} fewer MACs, {_faster(row.ms / left.ms)}"
            lost.append((excess, f"{row.module} ({was})"))
        elif not row.module:
            lost.append((excess, f"what is no layer ({100 * left.ms / total:.0f} % of the time)"))
    worst = [text for excess, text in sorted(lost, reverse=True)[:2] if excess > 0.02 * total]
    told = f": most is lost in {' and '.join(worst)}" if worst else ""
    return told + _alignment(report, [row for row in pruned.values() if row.width != whole.get(row.module)])


def _alignment(report: Report, narrowed: Sequence[Layer]) -> str:
    """Where widths that were chosen are no multiples of what is fast here, a name and by how much they would gain."""
    speeds = {} if report.price is None else {int(k): speed for k, speed in report.price.alignment.items()}
    if not speeds:
        return ""
    best = max(speeds, key=lambda k: speeds[k])
    for row in narrowed:
        own = max((k for k in speeds if row.width and row.width % k == 0), default=best)
        if speeds[own] < FELL_SHORT * speeds[best]:
            gain = factor(speeds[best] / speeds[own])
            return f"; {row.module} has {row.width} outputs, and multiples of {best} are {gain} faster on this machine"
    return ""


def prompt_cost(report: Report) -> str | None:
    """What the prompt costs in time: an addition and a clamp in every run; None where nothing tells."""
    at = headline(report)
    row = factor_at(report, "dense+prompt", at) if "dense+prompt" in report.arms else None
    dense = latency_at(report.arms["dense"], at)
    if row is None or dense is None or at is None:
        return None
    ms = dense.p50_ms / row.factor - dense.p50_ms
    low, high = (100 * (1 / bound - 1) for bound in reversed(row.interval))
    return (
        f"In time: {minus(f'{ms:+.3f}')} ms of {significant(dense.p50_ms)} ({minus(f'{low:+.1f}')} to {minus(f'{high:+.1f}')} %; "
        f"dense+prompt against dense; {describe(at)})."
    )


def prompt_effect(report: Report) -> list[str]:
    """What the prompt gave: each comparison is of arms trained with and without it, never one with it switched off."""
    cost = prompt_cost(report)
    gains = [_gain(report, "Without pruning", "dense+prompt"), _gain(report, "With pruning", "pruned")]
    return gains if cost is None else [*gains, cost]


def _gain(report: Report, when: str, arm: str) -> str:
    row, without = report.prompt_difference.get(arm), PROMPT_PAIRS[arm]
    if row is None:
        missing = next(name for name in (arm, without) if name not in report.arms)
        return f"{when}: not compared; add the arm '{missing}' to compare.arms."
    gain = f"{arm} has {points(row.difference, row.n)} points top-1 against {without}"
    bounds = f"paired 95 % interval {points_range(row.interval, row.n)}"
    return f"{when}: {gain} ({bounds}){_told_apart(row.interval)}."


def _told_apart(interval: Interval) -> str:
    return ", which is not distinguishable from none" if interval[0] <= 0 <= interval[1] else ""
