"""Run times of the exported files, all arms interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpdeploy.measure.engine import ENGINE, open_session, random_images
from vpdeploy.values import Latency

Clock = Callable[[], int]  # nanoseconds
KEPT_ROUNDS = 2000
MIN_ROUNDS = 20


def measure_latency(
    files: Mapping[str, Path],
    *,
    form: str,
    image_shape: Sequence[int],
    batch: int,
    threads: int,
    seconds: float,
    seed: int,
) -> dict[str, Latency]:
    """Run every arm's file on random images, round by round, for ``seconds`` each; arm -> its distribution.

    image_shape: one image as the form takes it, [h, w, 3] for uint8 and [3, h, w] for float. All arms see the same
    input, and sample i of every arm is of the same round: what disturbs the machine disturbs all of them.

    Raises: VpdeployError when a file cannot be run.
    """
    images = random_images(form, image_shape, batch=batch, seed=seed)
    runs = {arm: _runner(path, images, threads=threads) for arm, path in files.items()}
    for run in runs.values():
        warm_up(run, clock=time.perf_counter_ns)
    samples = time_rounds(runs, seconds=seconds, clock=time.perf_counter_ns)
    return {arm: summarise(times_ms, form=form, threads=threads, batch=batch) for arm, times_ms in samples.items()}


def _runner(path: Path, images: NDArray[Any], *, threads: int) -> Callable[[], object]:
    session = open_session(path, threads=threads)
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def warm_up(run: Callable[[], object], *, clock: Clock) -> int:
    """Run until two successive windows (at least 5 runs and 0.2 s each) agree within 10 %, or 2 s have passed.

    Gives the number of runs. The first runs allocate, choose kernels and raise the clock frequency.
    """
    begin, runs, previous = clock(), 0, None
    while True:
        window_begin, window_runs = clock(), 0
        while window_runs < 5 or clock() - window_begin < 200_000_000:
            run()
            window_runs += 1
        mean = (clock() - window_begin) / window_runs
        runs += window_runs
        settled = previous is not None and abs(mean - previous) <= 0.1 * previous
        if settled or clock() - begin >= 2_000_000_000:
            return runs
        previous = mean


def time_rounds(
    runs: Mapping[str, Callable[[], object]], *, seconds: float, clock: Clock
) -> dict[str, NDArray[np.float64]]:
    """Time every arm once a round, the first arm moving on by one each round; arm -> milliseconds [rounds].

    Stops when each arm has run for ``seconds`` and at least 20 rounds are done. Of more than 2000 rounds, 2000 spread
    evenly over the run are kept, the same ones for every arm.
    """
    arms = list(runs)
    times: dict[str, list[int]] = {arm: [] for arm in arms}
    spent = dict.fromkeys(arms, 0)
    while min(spent.values()) < seconds * 1e9 or len(times[arms[0]]) < MIN_ROUNDS:
        start = len(times[arms[0]]) % len(arms)
        for arm in arms[start:] + arms[:start]:
            begin = clock()
            runs[arm]()
            elapsed = clock() - begin
            times[arm].append(elapsed)
            spent[arm] += elapsed
    rounds = len(times[arms[0]])
    kept = np.linspace(0, rounds - 1, min(rounds, KEPT_ROUNDS)).round().astype(np.int64)
    return {arm: np.asarray(values, np.float64)[kept] / 1e6 for arm, values in times.items()}


def summarise(times_ms: NDArray[np.float64], *, form: str, threads: int, batch: int) -> Latency:
    """Percentiles of the very samples that are kept: the report recomputes from itself. times_ms: [rounds]."""
    # Tenths of a microsecond: below what the clock resolves, and a third of the bytes in report.json.
    samples = np.round(times_ms, 4)
    p50, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
    return Latency(
        engine=ENGINE,
        form=form,
        threads=threads,
        batch=batch,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        samples_ms=tuple(samples.tolist()),
    )
