"""Run times of networks, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpdeploy.errors import VpdeployError
from vpdeploy.measure.engines import Session, Setting, Subject, check_all_ran_there, open_session, settings_kept
from vpdeploy.values import Conditions, Latency

Clock = Callable[[], int]  # nanoseconds
KEPT_ROUNDS = 2000
STEADY = 0.15  # a machine whose clock sinks, or that gets a neighbour, moves by more


@dataclass(frozen=True)
class Pace:
    """What is measured at least: ``rounds``, after a warm-up in windows of ``window`` seconds and ``runs`` runs.

    ``openings``: how often every network is opened anew, each time for its share of the rounds. Where its weights come to lie in
    memory is drawn when it is opened, and stays: copies of one file differ by some percent for as long as they are open.
    """

    rounds: int = 20
    window: float = 0.2
    runs: int = 5
    openings: int = 1


REPORTED = Pace(openings=5)
QUICK = Pace(rounds=6, window=0.05, runs=1)  # for a first look at many networks


@dataclass(frozen=True)
class Timed:
    """Distributions by name, and what the engine said of itself."""

    latencies: Mapping[str, Latency]
    about: Mapping[str, Any]


def measure_latency(
    subjects: Mapping[str, Subject],
    images: NDArray[Any],
    *,
    form: str,
    setting: Setting,
    seconds: float,
    pace: Pace = REPORTED,
) -> Timed:
    """Run every network on ``images`` [batch, ...], round by round, for ``seconds`` each, after a warm-up.

    All see the same input, and sample i of each is of the same round: what disturbs the machine disturbs all of them. Networks
    are opened ``pace.openings`` times, in an order that moves on by one; but once, where that takes longer than measuring does
    (an engine that compiles).

    Raises: VpdeployError when one cannot be run under ``setting``, or does not take such images.
    """
    parts: list[dict[str, NDArray[np.float64]]] = []
    with settings_kept(setting):
        openings = pace.openings
        while len(parts) < openings:
            begin = time.perf_counter()
            sessions = {name: open_session(subjects[name], setting) for name in _from(len(parts), list(subjects))}
            if time.perf_counter() - begin > max(1.0, seconds) * len(subjects):
                openings = len(parts) + 1
            runs = {name: _prepared(name, sessions[name], images) for name in subjects}
            for subject in subjects.values() if not parts else ():
                check_all_ran_there(subject, images, setting)
            # After the first opening the machine is warm, and only what was opened is not.
            window = pace.window / openings if parts else pace.window
            of_one = replace(pace, rounds=-(-pace.rounds // openings), window=window)
            for run in runs.values():
                warm_up(run, clock=time.perf_counter_ns, pace=of_one)
            parts.append(time_rounds(runs, seconds=seconds / openings, clock=time.perf_counter_ns, pace=of_one))
            about = next(iter(sessions.values())).about
            del sessions, runs, run  # before the next ones are opened: there may be memory for one of each
    at = Conditions(setting.engine, about["device"], setting.precision, form, setting.threads, len(images))
    return Timed({name: summarise(times_ms, at, len(parts)) for name, times_ms in evenly(parts).items()}, about)


def evenly(parts: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """The samples of all openings, one after the other, as many of each: arm -> [rounds of all].

    At most KEPT_ROUNDS in all, spread evenly over each opening, the same ones for every arm.
    """
    shortest = min(len(times) for part in parts for times in part.values())
    count = max(1, min(shortest, KEPT_ROUNDS // len(parts)))
    kept = [_spread(len(next(iter(part.values()))), count) for part in parts]
    return {arm: np.concatenate([part[arm][of] for part, of in zip(parts, kept, strict=True)]) for arm in parts[0]}


def _spread(rounds: int, count: int) -> NDArray[np.int64]:
    return np.linspace(0, rounds - 1, count).round().astype(np.int64)


def _from(start: int, names: Sequence[str]) -> list[str]:
    """``names``, the first of them moved on by ``start``."""
    start %= len(names)
    return [*names[start:], *names[:start]]


def _prepared(name: str, session: Session, images: NDArray[Any]) -> Callable[[], object]:
    """Raises: VpdeployError when ``session`` does not take ``images``."""
    inputs = session.prepare(images)
    try:
        session.run(inputs)
    except Exception as e:  # engines' errors share no base class but Exception
        raise VpdeployError(
            f"{name}: {session.about['engine']} does not run it on images {images.dtype} {list(images.shape)}: "
            f"{str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}; expected a batch size and an image size "
            "that it takes"
        ) from e
    return lambda: session.run(inputs)


def warm_up(run: Callable[[], object], *, clock: Clock, pace: Pace = REPORTED) -> int:
    """Run until two successive windows of ``pace`` agree within 10 %, or the time of ten has passed.

    Gives the number of runs. The first runs allocate, choose kernels and raise the clock frequency.
    """
    begin, runs, previous = clock(), 0, None
    while True:
        window_begin, window_runs = clock(), 0
        while window_runs < pace.runs or clock() - window_begin < pace.window * 1e9:
            run()
            window_runs += 1
        mean = (clock() - window_begin) / window_runs
        runs += window_runs
        settled = previous is not None and abs(mean - previous) <= 0.1 * previous
        if settled or clock() - begin >= 10 * pace.window * 1e9:
            return runs
        previous = mean


def time_rounds(
    runs: Mapping[str, Callable[[], object]], *, seconds: float, clock: Clock, pace: Pace = REPORTED
) -> dict[str, NDArray[np.float64]]:
    """Time every arm once a round, the first arm moving on by one each round; arm -> milliseconds [rounds].

    Stops when each arm has run for ``seconds`` and the rounds of ``pace`` are done. Of more than 2000 rounds, 2000 spread
    evenly over the run are kept, the same ones for every arm.
    """
    arms = list(runs)
    times: dict[str, list[int]] = {arm: [] for arm in arms}
    spent = dict.fromkeys(arms, 0)
    while min(spent.values()) < seconds * 1e9 or len(times[arms[0]]) < pace.rounds:
        for arm in _from(len(times[arms[0]]), arms):
            begin = clock()
            runs[arm]()
            elapsed = clock() - begin
            times[arm].append(elapsed)
            spent[arm] += elapsed
    rounds = len(times[arms[0]])
    kept = _spread(rounds, min(rounds, KEPT_ROUNDS))
    return {arm: np.asarray(values, np.float64)[kept] / 1e6 for arm, values in times.items()}


def summarise(times_ms: NDArray[np.float64], conditions: Conditions, openings: int = 1) -> Latency:
    """Figures of the very samples that are kept: the report recomputes from itself. times_ms: [rounds], of each
    opening as many.
    """
    # Tenths of a microsecond: below what the clock resolves, and a third of the bytes in report.json.
    samples = np.round(times_ms, 4)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(samples, [50, 90, 95, 99]))
    return Latency(
        *conditions,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        images_per_second=float(1000 * conditions.batch / samples.mean()),
        steady=is_steady(samples),
        samples_ms=tuple(samples.tolist()),
        openings=openings,
    )


def is_steady(samples: NDArray[np.float64]) -> bool:
    """Whether the median is known to STEADY: those of the first and the last half of the rounds are within it of each other, and
    so are the ends of its 95 % interval, by the ranks between which it falls.
    """
    if len(samples) < 2:
        return True
    first, last = (float(np.median(part)) for part in np.array_split(samples, 2))
    reach = 1.96 * np.sqrt(len(samples)) / 2
    ends = np.clip([len(samples) / 2 - reach, len(samples) / 2 + reach - 1], 0, len(samples) - 1)
    low, high = np.sort(samples)[[int(np.floor(ends[0])), int(np.ceil(ends[1]))]]
    return bool(max(first, last) <= (1 + STEADY) * min(first, last) and high <= (1 + STEADY) * low)


def told_unsteady(rows: Sequence[Latency]) -> str:
    """What is wrong with ``rows``, and what to do."""
    return (
        f"{len(rows)} measurements were not steady: their medians are not known to {100 * STEADY:.0f} %; "
        "stop what else runs on this machine, or measure longer"
    )
