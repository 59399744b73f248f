"""What an arm saves: dense over arm, field by field."""

from __future__ import annotations

import numpy as np

from vpdeploy.measure.statistics import bootstrap_factor
from vpdeploy.values import Factors, Latency, LatencyFactor, Measurement


def latency_factor(dense: Latency, arm: Latency, *, seed: int) -> LatencyFactor:
    """Dense p50 over the arm's p50. Both come from one interleaved run: sample i of each is of the same round."""
    assert dense.conditions == arm.conditions, (dense.conditions, arm.conditions)
    assert dense.openings == arm.openings
    samples = np.asarray(dense.samples_ms), np.asarray(arm.samples_ms)
    _, interval = bootstrap_factor(*samples, seed=seed, openings=dense.openings)
    # The quotient of the reported medians, so that a reader of the report gets the same number to the last bit.
    factor = dense.p50_ms / arm.p50_ms
    return LatencyFactor(
        *dense.conditions, factor=factor, interval=(min(interval[0], factor), max(interval[1], factor))
    )


def factors(dense: Measurement, arm: Measurement, *, seed: int) -> Factors:
    """Dense over ``arm``, above 1 is better. Latencies are matched by their conditions."""
    measured = {row.conditions: row for row in arm.latency}
    pairs = [(row, measured.get(row.conditions)) for row in dense.latency]
    shared = [form for form in dense.file_bytes if form in arm.file_bytes]
    return Factors(
        macs=dense.macs / arm.macs,
        params=dense.params / arm.params,
        file_bytes={form: dense.file_bytes[form] / arm.file_bytes[form] for form in shared},
        latency_p50=tuple(latency_factor(row, other, seed=seed) for row, other in pairs if other is not None),
    )
