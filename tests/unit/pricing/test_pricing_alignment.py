"""Width multiples that are fast on a target: found, chosen and kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from budgeted import priced, workbench
from strategies import group_of

from vpdeploy import pipeline
from vpdeploy.measure import latency
from vpdeploy.pricing import alignment
from vpdeploy.pricing.alignment import MULTIPLES
from vpdeploy.pricing.network import Network


def test_auto_takes_the_smallest_multiple_that_is_nearly_as_fast_as_the_best(tmp_path, monkeypatch):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    speeds = {"1": 0.4, "4": 0.96, "8": 0.98, "16": 1.0, "32": 0.99}
    monkeypatch.setattr(alignment, "speeds_of", lambda *args, **kwargs: speeds)
    monkeypatch.setattr(alignment, "COARSE", 1.0)
    found = priced(work)
    assert found.round_to == 8 and found.alignment == speeds


def test_no_multiple_is_taken_that_is_too_coarse_for_the_network(tmp_path, monkeypatch):
    """The fastest is not one under which single steps are large parts of the network."""
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    network = Network.of(work, pipeline.grouped(work))
    speeds = {"1": 0.4, "4": 0.7, "8": 0.8, "16": 0.9, "32": 1.0}
    monkeypatch.setattr(alignment, "speeds_of", lambda *args, **kwargs: speeds)
    for limit in (0.5, 0.1, 0.05, 0.03, 0.02, 0.001):
        monkeypatch.setattr(alignment, "COARSE", limit)
        fine = [k for k in MULTIPLES if network.typical_step(k) <= limit] or [1]
        assert alignment.multiple_of(None, network) == (max(fine), speeds)  # type: ignore[arg-type]
    assert fine == [1] and network.typical_step(1) > 0.001


def test_a_step_is_typical_when_half_of_the_groups_have_it(tmp_path):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto", "max_removal": 0.6})
    network = Network.of(work, pipeline.grouped(work))
    (first, *_) = network.groups.prunable
    one = replace(network, groups=replace(network.groups, groups=(first,)))
    dense = network.cost.dense_widths
    narrower = np.array([8, *dense[1:]], float)
    assert first.width == 16 and one.typical_step(8) == 1 - network.cost.macs(narrower) / network.cost.macs(dense)
    assert network.typical_step(8) > network.typical_step(4) > network.typical_step(1) > 0
    places = range(len(network.groups.prunable))
    steps = sorted(_step_of(network, place, 8) for place in places)
    middle = (steps[(len(steps) - 1) // 2] + steps[len(steps) // 2]) / 2
    assert network.typical_step(8) == middle < steps[-1]


def _step_of(network: Network, place: int, round_to: int) -> float:
    """The share of the MACs that one step of one group takes."""
    dense = network.cost.dense_widths
    narrower = dense.copy()
    narrower[place] = network.allowed(network.groups.prunable[place], round_to)[-2]
    return 1 - network.cost.macs(narrower) / network.cost.macs(dense)


def test_a_multiple_is_tried_at_widths_that_are_no_better_ones_by_chance(tmp_path):
    """Next to half the width, below and above, and odd multiples of it."""
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    network = Network.of(work, pipeline.grouped(work))
    group = group_of("g", 64)
    assert {k: alignment._odd_multiples(group, network, k) for k in MULTIPLES} == {
        1: (31, 33), 4: (28, 36), 8: (24, 40), 16: (16, 48), 32: (32, 32),
    }  # fmt: skip
    below, above = alignment._about_half(network, 4)
    pairs = [alignment._odd_multiples(group, network, 4) for group in network.groups.prunable]
    assert [tuple(sorted(pair)) for pair in zip(below, above, strict=True)] == pairs
    assert (below < above).any() and (below > above).any()  # neither network is the narrower one of all groups


def test_a_sweep_of_multiples_that_was_not_steady_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "is_steady", lambda samples: False)
    assert priced(workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})).alignment
    assert not [*(tmp_path / "cache").rglob("*.json")]


def test_a_sweep_of_multiples_is_kept_for_the_machine_and_the_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "is_steady", lambda samples: True)
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    first = priced(work)
    assert list(first.alignment) == ["1", "4", "8", "16", "32"] and max(first.alignment.values()) == 1
    (kept,) = (tmp_path / "cache").rglob("*.json")
    again = workbench(tmp_path / "again", {"macs_ratio": 0.6, "round_to": "auto"})
    assert priced(again).alignment == first.alignment
    whole = json.loads(kept.read_bytes())
    speeds = {"1": 1.0, "4": 0.5, "8": 0.5, "16": 0.5, "32": 0.5}
    assert alignment._kept(kept, {"machine": whole["machine"]}) == first.alignment
    for number, damaged in enumerate(
        [
            "{",
            "[" * 20000,  # deeper than Python recurses
            json.dumps({**whole, "speeds": dict.fromkeys(speeds, 0.5)}),
            json.dumps({**whole, "speeds": {**speeds, "4": float("nan")}}),
            json.dumps({**whole, "speeds": {**speeds, "4": 10**400}}),
            json.dumps({**whole, "speeds": speeds, "machine": {"cpu": "Intel 386"}}),
            json.dumps({**whole, "speeds": speeds, "target": "openvino-cpu, 4 threads"}),
            json.dumps({**whole, "speeds": speeds}) + " " * 2**16,
        ]
    ):
        kept.write_text(damaged)
        assert alignment._kept(kept, {"machine": whole["machine"], "target": whole["target"]}) is None, number
    third = priced(workbench(tmp_path / "third", {"macs_ratio": 0.6, "round_to": "auto"}))  # measured again
    assert third.alignment.keys() == first.alignment.keys() and third.alignment != speeds
    assert json.loads(kept.read_bytes())["speeds"] == third.alignment
    monkeypatch.setattr(alignment, "machine", lambda: {"cpu": "Another CPU"})
    priced(workbench(tmp_path / "fourth", {"macs_ratio": 0.6, "round_to": "auto"}))
    assert len([*(tmp_path / "cache").rglob("*.json")]) == 2


def test_without_groups_no_multiple_is_looked_for(tmp_path):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    network = Network.of(work, pipeline.grouped(work))
    bare = replace(network, groups=replace(network.groups, groups=()))
    assert not bare.groups.prunable and alignment.multiple_of(None, bare) == (1, {})
