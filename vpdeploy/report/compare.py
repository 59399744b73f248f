"""From measurements to one report. Assembles and checks; measures and renders nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vpdeploy.errors import VpdeployError
from vpdeploy.values import (
    AccuracyDifference,
    Certificate,
    EpochRecord,
    Factors,
    Latency,
    LatencyFactor,
    Measurement,
    Price,
    Report,
)

# Arms that differ by the prompt alone: with it, without it.
PROMPT_PAIRS = {"dense+prompt": "dense", "pruned": "pruned-prompt"}


@dataclass(frozen=True)
class About:
    """Where the numbers come from: what was asked, on which machine. ``recipe`` is the resolved TOML."""

    title: str
    recipe: str
    command: str
    environment: Mapping[str, Any]
    skipped_images: Sequence[str] = ()
    price: Price | None = None


def compare(
    arms: Mapping[str, Measurement],
    *,
    factors: Mapping[str, Factors],
    accuracy_difference: Mapping[str, AccuracyDifference],
    prompt_difference: Mapping[str, AccuracyDifference],
    certificates: Mapping[str, Certificate],
    history: Sequence[EpochRecord],
    about: About,
) -> Report:
    """The report of all arms, "dense" first. Factors and accuracy differences of every other arm are against dense, prompt
    differences of those of PROMPT_PAIRS that stand in it with their partner.

    Raises: VpdeployError when factors or differences do not follow from the measurements they stand beside.
    """
    report = Report(
        title=about.title,
        arms=dict(arms),
        factors=dict(factors),
        accuracy_difference=dict(accuracy_difference),
        prompt_difference=dict(prompt_difference),
        certificates=dict(certificates),
        history=tuple(history),
        skipped_images=tuple(about.skipped_images),
        recipe=about.recipe,
        command=about.command,
        environment=dict(about.environment),
        price=None if about.price is None else replace(about.price, costs={}),
    )
    check_consistency(report)
    return report


def check_consistency(report: Report) -> None:
    """Nothing in ``report`` contradicts its own fields: every factor and difference recomputes from the arms.

    Raises: VpdeployError with every contradiction.
    """
    problems = list(_problems(report))
    if problems:
        raise VpdeployError(
            f"report: {len(problems)} figures do not follow from the measurements beside them; "
            "run `vpdeploy bench` again\n" + "\n".join(f"  {problem}" for problem in problems)
        )


def _problems(report: Report) -> Iterator[str]:
    names = list(report.arms)
    if not names or names[0] != "dense":
        yield f"arms: got {names}; expected 'dense' first"
        return
    for field in ("factors", "accuracy_difference"):
        if set(getattr(report, field)) != set(names[1:]):
            yield f"{field}: got {sorted(getattr(report, field))}; expected every arm but dense: {sorted(names[1:])}"
            return
    unknown = sorted(set(report.certificates) - set(names[1:]))
    if unknown:
        yield f"certificates: got {unknown}; expected arms of the report: {names[1:]}"
    paired = prompt_pairs(names)
    if set(report.prompt_difference) != set(paired):
        yield f"prompt_difference: got {sorted(report.prompt_difference)}; expected {sorted(paired)}"
        return
    wrong = [problem for name, arm in report.arms.items() for problem in figure_problems(name, arm)]
    if wrong:
        yield from wrong
        return
    for name in names[1:]:
        yield from _accuracy_problems(report, name, "dense", field="accuracy_difference")
        yield from _factor_problems(name, report)
    for name, without in paired.items():
        yield from _accuracy_problems(report, name, without, field="prompt_difference")


def figure_problems(name: str, arm: Measurement) -> Iterator[str]:
    """Figures of one arm that cannot be: amounts that are not above 0, and times that are not those of their samples."""
    amounts = {"macs": arm.macs, "params": arm.params, **{f"file_bytes.{k}": v for k, v in arm.file_bytes.items()}}
    yield from (
        f"arms.{name}.{key}: got {value}; expected more than 0" for key, value in amounts.items() if not value > 0
    )
    yield from _token_problems(name, arm)
    for row in arm.latency:
        key = f"arms.{name}.latency[{row.engine}, {row.form}, {row.threads} threads, batch {row.batch}]"
        samples = np.asarray(row.samples_ms, float)
        if not len(samples) or not bool((samples > 0).all()):
            yield f"{key}.samples_ms: expected times above 0"
            continue
        if row.openings < 1 or len(samples) % row.openings:
            yield f"{key}.openings: got {row.openings}; expected a divisor of the number of samples, {len(samples)}"
        figures = {"p50_ms": row.p50_ms, "p90_ms": row.p90_ms, "p95_ms": row.p95_ms, "p99_ms": row.p99_ms}
        expected = [*np.percentile(samples, [50, 90, 95, 99]), 1000 * row.batch / samples.mean()]
        for (figure, got), value in zip(
            [*figures.items(), ("images_per_second", row.images_per_second)], expected, strict=True
        ):
            if not math.isclose(got, value, rel_tol=1e-9):
                yield f"{key}.{figure}: got {got}; the samples beside it say {value:.6g}"


def _token_problems(name: str, arm: Measurement) -> Iterator[str]:
    """Of the file that ships there is one count."""
    if arm.tokens is not None:
        shipped = arm.tokens.costs[-1]
        if (shipped.macs, shipped.params) != (arm.macs, arm.params):
            yield (
                f"arms.{name}.tokens: {shipped.form} has {shipped.macs} MACs and {shipped.params} parameters; expected those of "
                f"the arm, {arm.macs} and {arm.params}"
            )


def prompt_pairs(arms: Iterable[str]) -> dict[str, str]:
    """Those of PROMPT_PAIRS of which both stand among ``arms``."""
    there = set(arms)
    return {given: without for given, without in PROMPT_PAIRS.items() if {given, without} <= there}


def _accuracy_problems(report: Report, name: str, other: str, *, field: str) -> Iterator[str]:
    base, arm, difference = report.arms[other], report.arms[name], getattr(report, field)[name]
    if not difference.n == arm.n == base.n:
        yield f"{field}.{name}.n: got {difference.n}; {other} has {base.n} images, {name} {arm.n}"
    expected = arm.accuracy_top1 - base.accuracy_top1
    if not math.isclose(difference.difference, expected, abs_tol=1e-9):
        yield f"{field}.{name}: got {difference.difference}; the accuracies differ by {expected}"
    low, high = difference.interval
    if not low <= difference.difference <= high:
        yield f"{field}.{name}.interval: {difference.interval} does not contain {difference.difference}"


def _factor_problems(name: str, report: Report) -> Iterator[str]:
    dense, arm, factors = report.arms["dense"], report.arms[name], report.factors[name]
    pairs = [
        ("macs", factors.macs, dense.macs / arm.macs),
        ("params", factors.params, dense.params / arm.params),
    ]
    for form, factor in factors.file_bytes.items():
        pairs.append((f"file_bytes.{form}", factor, _quotient(dense.file_bytes.get(form), arm.file_bytes.get(form))))
    for row in factors.latency_p50:
        key = f"latency_p50[{row.engine}, {row.form}, {row.threads} threads, batch {row.batch}]"
        pairs.append((key, row.factor, _quotient(_p50(dense.latency, row), _p50(arm.latency, row))))
        if not row.interval[0] <= row.factor <= row.interval[1]:
            yield f"factors.{name}.{key}: the interval {row.interval} does not contain {row.factor}"
    for key, got, expected in pairs:
        if not math.isclose(got, expected, rel_tol=1e-9):
            yield f"factors.{name}.{key}: got {got}; dense over {name} is {expected}"


def _quotient(dense: float | None, arm: float | None) -> float:
    return dense / arm if dense is not None and arm is not None else math.nan


def _p50(latencies: Sequence[Latency], at: LatencyFactor) -> float | None:
    found = [row.p50_ms for row in latencies if row.conditions == at.conditions]
    return found[0] if found else None
