"""Arms are interleaved, warm-up settles, percentiles recompute from the samples. No test looks at a real clock."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from budgeted import workbench

from vpdeploy.measure import arms, latency
from vpdeploy.measure.engines import Session, Setting, Subject
from vpdeploy.measure.factors import factors, latency_factor
from vpdeploy.measure.latency import STEADY, Timed, is_steady, measure_latency, summarise, time_rounds, warm_up
from vpdeploy.values import Conditions, Latency, Measurement


class FakeClock:
    """Nanoseconds that pass only when a run says so."""

    def __init__(self):
        self.now = 0
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now

    def run(self, name: str, milliseconds: float):
        def call():
            self.log.append(name)
            self.now += int(milliseconds * 1e6)

        return call


def test_every_round_runs_every_arm_once_and_the_first_moves_on():
    clock = FakeClock()
    runs = {"dense": clock.run("d", 2), "pruned": clock.run("p", 1), "other": clock.run("o", 1)}
    samples = time_rounds(runs, seconds=0.0, clock=clock)
    assert "".join(clock.log) == ("dpo" + "pod" + "odp") * 6 + "dpo" + "pod"  # the least: 20 rounds
    assert {arm: times.tolist() for arm, times in samples.items()} == {
        "dense": [2.0] * 20,
        "pruned": [1.0] * 20,
        "other": [1.0] * 20,
    }


def test_rounds_go_on_until_the_fastest_arm_has_had_its_seconds():
    clock = FakeClock()
    samples = time_rounds({"dense": clock.run("d", 50), "pruned": clock.run("p", 10)}, seconds=1.0, clock=clock)
    assert len(samples["dense"]) == len(samples["pruned"]) == 100


def test_at_most_2000_rounds_are_kept_and_the_same_ones_of_every_arm():
    clock, rounds = FakeClock(), iter(range(10**6))

    def rising():
        clock.now += 1_000_000 + next(rounds)

    steps: list[int] = []

    def following():
        steps.append(len(steps))
        clock.now += 1_000_000 + steps[-1]

    samples = time_rounds({"dense": rising, "pruned": following}, seconds=5.0, clock=clock)
    assert len(samples["dense"]) == 2000
    assert np.array_equal(samples["dense"], samples["pruned"])
    assert (np.diff(samples["dense"]) > 0).all()  # in round order, spread over the whole run
    assert samples["dense"][-1] == pytest.approx(1 + (len(steps) - 1) / 1e6)


class Opened:
    """Sessions under a fake clock: one that is opened for the nth time takes the nth of its times, in ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: dict[str, list[float]], *, opens_in: float = 0.01):
        self.clock, self.order, self.times, self.opens_in = FakeClock(), list[str](), times, opens_in
        seen = SimpleNamespace(perf_counter=lambda: self.clock.now / 1e9, perf_counter_ns=self.clock)
        monkeypatch.setattr(latency, "time", seen)
        monkeypatch.setattr(latency, "open_session", self.open)
        monkeypatch.setattr(latency, "check_all_ran_there", lambda *args: None)

    def open(self, subject: Subject, setting: Setting) -> Session:
        name = str(subject.path)
        self.clock.now += int(self.opens_in * 1e9)
        run = self.clock.run(name, self.times[name][self.order.count(name)])
        self.order.append(name)
        return Session(lambda images: run(), {"device": "cpu"})

    def measure(self, seconds: float) -> dict[str, Latency]:
        subjects = {name: Subject(Path(name)) for name in self.times}
        images = np.zeros((1, 1), np.float32)
        found = measure_latency(subjects, images, form="float", setting=Setting(), seconds=seconds)
        return dict(found.latencies)


def test_every_network_is_opened_five_times_and_the_interval_knows_it(monkeypatch):
    """Each opening of a file keeps its own time: rounds of one opening say nothing of that."""
    opened = Opened(monkeypatch, {"a": [10, 11, 10, 12, 10.5], "b": [11, 10, 12, 10, 10.5]})
    found = opened.measure(seconds=10)
    assert "".join(opened.order) == "ab" + "ba" + "ab" + "ba" + "ab"
    assert [found[name].openings for name in "ab"] == [5, 5]
    of_each = np.reshape(found["a"].samples_ms, (5, -1))
    assert of_each.shape[1] >= 150 and (of_each == of_each[:, :1]).all()
    assert of_each[:, 0].tolist() == [10, 11, 10, 12, 10.5]
    low, high = latency_factor(found["a"], found["b"], seed=0).interval
    assert low < 0.96 and high > 1.04
    for name in "ab":
        found[name] = replace(found[name], openings=1)
    low, high = latency_factor(found["a"], found["b"], seed=0).interval
    assert low > 0.96 or high < 1.04  # what the rounds alone would have said


def test_an_engine_that_takes_longer_to_open_than_to_measure_is_opened_once(monkeypatch):
    opened = Opened(monkeypatch, {"a": [10], "b": [5]}, opens_in=3)
    found = opened.measure(seconds=2)
    assert opened.order == ["a", "b"] and found["a"].openings == 1
    assert latency_factor(found["a"], found["b"], seed=0).interval == (2, 2)


def test_warm_up_stops_when_two_windows_agree():
    clock = FakeClock()
    # The first window of 0.2 s starts slowly, the next ones are steady.
    runs = iter([100.0] * 2 + [10.0] * 1000)

    def run():
        clock.now += int(next(runs) * 1e6)

    assert warm_up(run, clock=clock) == 5 + 20 + 20
    assert clock.now < 2e9


def test_warm_up_gives_up_after_two_seconds():
    clock, durations = FakeClock(), iter(1.5**i for i in range(100))

    def run():
        clock.now += int(next(durations) * 1e6)

    warm_up(run, clock=clock)
    assert clock.now >= 2e9


def _latency(samples):
    return summarise(np.asarray(samples), Conditions("onnxruntime-cpu", "cpu", "fp32", "float", 1, 1))


def test_a_device_by_its_name_and_the_engines_first_are_told_once_where_they_are_the_same(tmp_path, monkeypatch):
    tables = {"bench": {"batches": [1], "threads": [1]}, "export": {"forms": ["float"]}, "target": {"device": "cpu"}}
    recipe = workbench(tmp_path, {"latency_ratio": 0.5}, **tables).recipe
    counts = iter((20, 30))  # of rounds, of the first and the second measurement

    def timed(subjects, *args, **kwargs):
        rounds = np.ones(next(counts))
        return Timed({arm: _latency(rounds) for arm in subjects}, {})

    monkeypatch.setattr(arms, "measure_latency", timed)
    subject = {"float": Subject(tmp_path / "none.onnx")}
    settings = arms.settings_to_report(recipe)
    measured = arms.measure_latencies(
        {"dense": subject, "pruned": subject}, recipe=recipe, settings=settings, seconds=1.0
    )
    found = measured.arms
    assert [len(row.samples_ms) for row in found["dense"]] == [30] == [len(row.samples_ms) for row in found["pruned"]]


def test_percentiles_are_those_of_the_samples_kept():
    latency = _latency(np.arange(1, 102, dtype=float))
    assert (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms) == (51.0, 91.0, 96.0, 100.0)
    assert latency.images_per_second == pytest.approx(1000 / 51)
    assert latency.samples_ms == tuple(float(i) for i in range(1, 102))


def test_a_measurement_is_steady_when_its_halves_agree():
    first = np.full(10, 2.0)
    for factor, steady in (
        (1.0, True),
        (1 + 0.9 * STEADY, True),
        (1 + 1.1 * STEADY, False),
        (1 / (1 + 1.1 * STEADY), False),
    ):
        samples = np.concatenate([first, factor * first])
        assert is_steady(samples) is steady and _latency(samples).steady is steady
    spikes = np.where(
        np.arange(20) % 5 == 0, 50.0, 2.0
    )  # now and then a slow round, all along: that is how it is there
    assert is_steady(spikes)


@pytest.mark.parametrize(
    ("rounds", "slow", "steady"), [(50, 0.2, True), (50, 0.4, False), (1000, 0.4, True), (1000, 0.48, False)]
)
def test_a_measurement_is_steady_when_its_median_is_known(rounds, slow, steady):
    """A share of slow rounds from the first to the last: both halves have the same median, whatever it is worth."""
    count = np.arange(rounds + 1) * round(slow * rounds) // rounds
    samples = np.where(np.diff(count) == 1, 20.0, 1.0)
    assert samples.mean() == pytest.approx(1 + 19 * slow) and np.median(samples) == 1
    assert is_steady(samples) is steady


def _measurement(latency):
    return Measurement(
        accuracy_top1=0.9,
        accuracy_top1_interval=(0.8, 1.0),
        accuracy_top1_torch=0.9,
        n=10,
        macs=1000,
        macs_uncounted={},
        macs_preprocessing=0,
        params=100,
        file_bytes={"float": 4000, "uint8": 6000},
        latency=latency,
        memory=(),
    )


def test_factors_are_dense_over_arm_and_match_by_settings():
    slow, fast = _latency([4.0, 6.0, 4.2]), _latency([2.0, 3.0, 2.1])
    dense = _measurement((slow, replace(slow, batch=8)))
    arm = replace(_measurement((replace(fast, threads=2), fast)), macs=400, params=50, file_bytes={"float": 1000})
    found = factors(dense, arm, seed=0)
    assert (found.macs, found.params, found.file_bytes) == (2.5, 2.0, {"float": 4.0})
    (row,) = found.latency_p50  # batch 8 and 2 threads have no counterpart
    assert (row.threads, row.batch, row.factor) == (1, 1, slow.p50_ms / fast.p50_ms)
    assert row.interval[0] <= row.factor <= row.interval[1]


def test_latencies_of_different_settings_are_never_compared():
    latency = _latency([1.0])
    with pytest.raises(AssertionError):
        latency_factor(latency, replace(latency, batch=8), seed=0)
