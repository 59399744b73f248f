"""Width multiples that are fast on a target: found, chosen and kept."""

from __future__ import annotations

import json
from dataclasses import replace

from budgeted import priced, workbench
from strategies import group_of

from vpdeploy import pipeline
from vpdeploy.pricing import alignment
from vpdeploy.pricing.alignment import MULTIPLES
from vpdeploy.pricing.network import Network


def test_auto_takes_the_smallest_multiple_that_is_nearly_as_fast_as_the_best(tmp_path, monkeypatch):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    speeds = {"1": 0.4, "4": 0.96, "8": 0.98, "16": 1.0, "32": 0.99}
    monkeypatch.setattr(alignment, "speeds_of", lambda *args, **kwargs: speeds)
    found = priced(work)
    assert found.round_to == 8 and found.alignment == speeds


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


def test_a_sweep_of_multiples_is_kept_for_the_machine_and_the_layers(tmp_path, monkeypatch):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    first = priced(work)
    assert list(first.alignment) == ["1", "4", "8", "16", "32"] and max(first.alignment.values()) == 1
    (kept,) = (tmp_path / "cache").rglob("*.json")
    again = workbench(tmp_path / "again", {"macs_ratio": 0.6, "round_to": "auto"})
    assert priced(again).alignment == first.alignment
    for damaged in ("{", json.dumps({"speeds": dict.fromkeys(first.alignment, 0.5)})):  # measured again
        kept.write_text(damaged)
        third = priced(workbench(tmp_path / f"third {len(damaged)}", {"macs_ratio": 0.6, "round_to": "auto"}))
        assert third.alignment.keys() == first.alignment.keys() and max(third.alignment.values()) == 1
    monkeypatch.setattr(alignment, "machine", lambda: {"cpu": "Another CPU"})
    priced(workbench(tmp_path / "fourth", {"macs_ratio": 0.6, "round_to": "auto"}))
    assert len([*(tmp_path / "cache").rglob("*.json")]) == 2


def test_without_groups_no_multiple_is_looked_for(tmp_path):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    network = Network.of(work, pipeline.grouped(work))
    bare = replace(network, groups=replace(network.groups, groups=()))
    assert not bare.groups.prunable and alignment.multiple_of(None, bare) == (1, {})
