"""Budgets that only a target can tell: what can be reached, what is refused, and masks that meet them as measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from strategies import group_of

from vpdeploy import pipeline, pricing
from vpdeploy.candidates import Candidates
from vpdeploy.errors import BudgetError
from vpdeploy.measure.engines import EngineError, Setting
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.scoring.select import build_selector, prices
from vpdeploy.surgery.cost import CostModel, Sum
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.plan import plan
from vpdeploy.values import Conditions, Price
from vpdeploy.workbench import Workbench, open_workbench


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def workbench(folder: Path, budget: dict[str, Any], **tables: Any) -> Workbench:
    raw = {
        "model": {"name": "cifar_resnet8"},
        "data": {"name": "digits"},
        "input": {"image_size": 8, "canvas_size": 12},
        "prompt": {"pixels": {"size": 2}},
        "compute": {"precision": "fp32", "channels_last": "no"},
        "budget": budget,
        **tables,
    }
    return open_workbench(
        parse_recipe(raw, where="r", folder=folder), folder / "run", redo=None, display=Display(quiet=True)
    )


def priced(work: Workbench) -> Price:
    return pipeline.priced(work, pipeline.grouped(work))


# --- before training ----------------------------------------------------------------------------------------------------


def test_every_quantity_is_told_from_the_smallest_to_the_dense_one(tmp_path):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "limits": {"file_mib": 0.2}})
    found = priced(work)
    table = {row.quantity: row for row in found.table}
    expected = ["channels", "macs", "params", "file_mib", "latency_ms"]
    assert list(table)[:5] == expected and set(table) <= {*expected, "memory_mib"}
    assert all(0 < row.smallest < row.dense for row in table.values() if row.quantity != "memory_mib")
    assert table["macs"].requested == 0.5 * table["macs"].dense
    assert table["file_mib"].requested == 0.2 and table["params"].requested is None
    assert found.round_to == 8 and found.alignment == {}
    told = pricing.reach_text(found)
    assert "onnxruntime-cpu, 1 thread, batch 1, float form" in told and "latency, ms" in told
    assert found.seconds >= found.table_seconds > 0


def test_the_size_of_a_file_is_what_the_sum_says(tmp_path):
    """Of files that are exported in earnest. The sum is never below: a certificate's figures are taken as long as they get."""
    work = workbench(tmp_path, {"file_mib": 0.2})
    groups = pipeline.grouped(work)
    selector = pipeline.selector_for(work, groups, pipeline.priced(work, groups))
    generator = np.random.default_rng(0)
    scores = {root: generator.random(int(w)) for root, w in zip(selector.roots, selector.dense_widths, strict=True)}
    selection = pricing.settle(selector, scores, work, groups, arm="pruned")
    widths = np.array([sum(keep) for keep in selection.mask.keep.values()], float)
    assert 0.18 < selection.reached <= 0.2
    for form in ("float", "uint8"):
        files = Candidates(work, groups, tmp_path, form=form, prompted=True)
        small = cut(files.backbone, plan(files.backbone, groups.prunable, selection.mask))
        files.export(small, tmp_path / "real.onnx")
        size = (tmp_path / "real.onnx").stat().st_size / 2**20
        assert size <= selector.budget.cost(widths)
    assert selector.budget.cost(widths) - size < 0.001  # of the larger form
    for column in range(len(widths)):  # and no group may take a step more
        steps = selector.block_width[(selector.block_group == column) & ~selector.must]
        if widths[column] < selector.dense_widths[column]:
            wider = widths.copy()
            wider[column] += steps.min()
            assert selector.budget.cost(wider) > selector.budget.limit


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"latency_ratio": 0.01}, "budget.latency_ratio: got 0.01; the best reachable is 0."),
        ({"latency_ms": 1e-4}, "budget.latency_ms: got 0.0001; the best reachable is 0."),
        ({"macs_ratio": 0.5, "limits": {"latency_ms": 1e-4}}, "budget.limits.latency_ms: got 0.0001; the best"),
        ({"file_mib": 0.001}, "there it is made of "),
        ({"latency_ms": 1000.0}, "budget.latency_ms: got 1000; the dense network has 0."),
        (
            {"file_mib": 50.0},
            "so that nothing need be removed: ask for less, or give a ratio and this as budget.limits",
        ),
    ],
)
def test_what_cannot_be_met_is_told_before_any_training(tmp_path, budget, told):
    with pytest.raises(BudgetError) as caught:
        priced(workbench(tmp_path, budget))
    assert told in str(caught.value)
    assert not (tmp_path / "run" / "source.safetensors").exists()


def test_what_cannot_be_met_says_what_it_is_made_of(tmp_path):
    with pytest.raises(BudgetError) as caught:
        priced(workbench(tmp_path, {"latency_ratio": 0.01}))
    assert "what is no layer (sums, pools, layouts)" in str(caught.value)
    assert "lower budget.round_to, or raise budget.max_removal" in str(caught.value)


def test_a_network_whose_narrower_ones_do_not_run_still_goes_the_road(tmp_path, monkeypatch):
    """Unless a budget needs the times."""

    def fails(*args: object, **kwargs: object) -> None:
        raise EngineError("engine onnxruntime-cpu: does not run it")

    monkeypatch.setattr(pricing._Measured, "of", fails)
    found = priced(workbench(tmp_path, {"macs_ratio": 0.5}))
    assert [row.quantity for row in found.table] == ["channels", "macs", "params", "file_mib"]
    assert found.conditions is None and pricing.reach_text(found)
    with pytest.raises(EngineError):
        priced(workbench(tmp_path / "timed", {"latency_ratio": 0.5}))


def test_a_budget_of_another_machine_is_told(tmp_path, monkeypatch):
    said: list[str] = []
    work = workbench(tmp_path, {"latency_ratio": 0.9})
    found = priced(work)
    assert pricing.elsewhere(found) is None
    monkeypatch.setattr(pricing, "machine", lambda: {**found.machine, "cpu": "Another CPU"})
    other = pricing.elsewhere(found)
    assert other is not None and other.endswith("here Another CPU")
    heard = replace(work, display=SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    pipeline.priced(heard, pipeline.grouped(work))
    assert any(
        "warning: the budget was measured on another machine" in line and "--redo price" in line for line in said
    )


# --- widths that are fast -----------------------------------------------------------------------------------------------


def test_auto_takes_the_smallest_multiple_that_is_nearly_as_fast_as_the_best(tmp_path, monkeypatch):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    speeds = {"1": 0.4, "2": 0.5, "4": 0.94, "8": 0.96, "16": 1.0, "32": 0.99}
    monkeypatch.setattr(pricing, "_alignment", lambda *args, **kwargs: speeds)
    found = priced(work)
    assert found.round_to == 8 and found.alignment == speeds


def test_a_sweep_of_multiples_is_kept_for_the_machine_and_the_layers(tmp_path, monkeypatch):
    work = workbench(tmp_path, {"macs_ratio": 0.5, "round_to": "auto"})
    first = priced(work)
    assert list(first.alignment) == ["1", "2", "4", "8", "16", "32"] and max(first.alignment.values()) == 1
    (kept,) = (tmp_path / "cache").rglob("*.json")
    again = workbench(tmp_path / "again", {"macs_ratio": 0.6, "round_to": "auto"})
    assert priced(again).alignment == first.alignment
    kept.write_text("{")  # damaged: measured again
    assert set(priced(workbench(tmp_path / "third", {"macs_ratio": 0.6, "round_to": "auto"})).alignment) == set(
        first.alignment
    )
    monkeypatch.setattr(pricing, "machine", lambda: {"cpu": "Another CPU"})
    priced(workbench(tmp_path / "fourth", {"macs_ratio": 0.6, "round_to": "auto"}))
    assert len([*(tmp_path / "cache").rglob("*.json")]) == 2


# --- meeting a measured budget ------------------------------------------------------------------------------------------


class Machine:
    """In place of a target: the true cost of widths is no sum, and every measurement errs a little."""

    def __init__(self, *, noise: float, level: float = 1.3):
        self.generator, self.noise, self.level, self.runs = np.random.default_rng(0), noise, level, 0

    def true(self, widths: np.ndarray) -> float:
        return self.level * float(5 + np.ceil(widths / 6).sum() * 0.7 + 0.004 * (widths[:-1] * widths[1:]).sum())

    def _seen(self, widths: np.ndarray) -> float:
        self.runs += 1
        return self.true(widths) * (1 + self.noise * float(self.generator.uniform(-1, 1)))

    def against_dense(self, widths: np.ndarray) -> tuple[float, float]:
        return self._seen(widths), self._seen(DENSE)

    def memory(self, widths: np.ndarray, *, runs: int) -> float:
        return max(self._seen(widths) for _ in range(runs))


DENSE = np.array([48.0, 64, 80, 96, 64, 48])


def settling(machine: Machine, kind: str, requested: float) -> Any:
    count = len(DENSE)
    share, constant = np.zeros((2, count, count)), np.zeros((2, count))
    share[0], constant[1] = np.eye(count), 1
    linear = Sum(share, constant, np.full(count, 0.2))  # what is believed: a sum, 30 % and more off
    cost = CostModel(linear, linear, DENSE, {"latency_ms": linear, "memory_mib": linear})
    groups = [group_of(f"g{i}", int(width), unit=1) for i, width in enumerate(DENSE)]
    selector = build_selector(groups, cost, budget="macs_ratio", requested=0.999, round_to=1, max_removal=0.9)
    believed = cost.of(kind)
    limit = requested * (believed(DENSE) if kind == "latency_ratio" else 1.0)
    bound = replace(selector.budget, kind=kind, cost=believed, requested=requested, limit=limit, dense=believed(DENSE))
    generator = np.random.default_rng(1)
    scores = {group.root: generator.lognormal(size=group.width) for group in groups}
    return pricing._Settling(machine, replace(selector, bounds=(bound,)), scores, lambda line: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_ratio_of_times_is_met_as_measured(share):
    machine = Machine(noise=0.01)
    selection = settling(machine, "latency_ratio", share).done()
    widths = np.array([sum(keep) for keep in selection.mask.keep.values()], float)
    truth = machine.true(widths) / machine.true(DENSE)
    assert selection.reached <= share
    assert 0.93 * share <= truth <= 1.03 * share  # within 7 %, the noise of 2 % included
    assert machine.runs <= 2 * pricing.TRIES


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_memory_is_never_exceeded_and_the_next_mask_would(share):
    machine = Machine(noise=0.0)
    asked = share * machine.true(DENSE)
    search = settling(machine, "memory_mib", asked)
    selection = search.done()
    widths = np.array([sum(keep) for keep in selection.mask.keep.values()], float)
    assert selection.reached == machine.true(widths) <= asked
    bracket = search.brackets["memory_mib"]
    assert bracket.missed - bracket.met < 1e-3 * bracket.met
    above = pricing.select(search.selector.limited("memory_mib", bracket.missed), search.scores)
    assert machine.true(np.array([sum(keep) for keep in above.mask.keep.values()], float)) > asked


def test_a_budget_that_no_measurement_meets_is_an_error():
    with pytest.raises(BudgetError, match="no mask met latency_ratio 0.5 in 8 measurements"):
        never = Machine(noise=0.0)
        never.against_dense = lambda widths: (1.0, 1.0)  # type: ignore[method-assign]
        settling(never, "latency_ratio", 0.5).done()


def test_a_latency_budget_is_met_by_real_files(tmp_path):
    """No bound on the time itself: this machine may be busy. What was measured is within what was asked."""
    work = workbench(tmp_path, {"latency_ratio": 0.9, "round_to": 2})
    groups = pipeline.grouped(work)
    selector = pipeline.selector_for(work, groups, pipeline.priced(work, groups))
    generator = np.random.default_rng(0)
    scores = {root: generator.random(int(w)) for root, w in zip(selector.roots, selector.dense_widths, strict=True)}
    try:
        selection = pricing.settle(selector, scores, work, groups, arm="pruned")
    except BudgetError as e:
        assert "measurements" in str(e)  # too noisy, and said so
        return
    assert selection.budget == "latency_ratio" and 0 < selection.reached <= 0.9


# --- importance and speed -----------------------------------------------------------------------------------------------


def test_importance_is_weighed_against_milliseconds_under_a_budget_of_them():
    ms = Sum(np.array([np.eye(2), np.zeros((2, 2))]), np.array([[0.0, 0], [1, 1]]), np.array([3.0, 1.0]))
    macs = Sum(np.array([np.eye(2), np.zeros((2, 2))]), np.array([[0.0, 0], [1, 1]]), np.array([1.0, 2.0]))
    cost = CostModel(macs, macs, np.array([8.0, 8.0]), {"latency_ms": ms})
    groups = [group_of("a", 8, unit=1), group_of("b", 8, unit=1)]
    common: dict[str, Any] = {"requested": 0.5, "round_to": 1, "max_removal": 0.9}
    assert prices(build_selector(groups, cost, budget="latency_ratio", **common)).tolist() == [3, 1]
    assert prices(build_selector(groups, cost, budget="macs_ratio", **common)).tolist() == [1, 2]
    fast = build_selector(groups, cost, budget="macs_ratio", speed="latency_ms", **common)
    assert prices(fast).tolist() == [9 / 1, 1 / 2]


def test_a_network_whose_graph_cannot_be_followed_is_exported_each_time(tmp_path):
    (tmp_path / "heads.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, 10)\n\n"
        "    def forward(self, x):\n"
        "        y = torch.relu(self.b(torch.relu(self.a(x))))\n"
        "        return self.c(y.flatten(2).mean(2))\n"
    )
    work = workbench(tmp_path, {"macs_ratio": 0.5}, model={"name": f"{tmp_path / 'heads.py'}:Net"})
    groups = pipeline.grouped(work)
    (tmp_path / "files").mkdir()
    files = Candidates(work, groups, tmp_path / "files", form="float", prompted=True)
    least = np.array([8.0] * len(groups.prunable))
    files.check(least)
    subject = files.subject(least)
    assert files.graph is None or subject.path is not None
    assert subject.module is not None
    images = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    from vpdeploy.measure.engines import open_session

    with torch.no_grad():
        expected = subject.module()(torch.from_numpy(images)).numpy()
    assert np.allclose(open_session(subject, Setting())(images), expected, rtol=1e-3, atol=1e-5)


def test_conditions_of_a_price_are_those_that_were_timed(tmp_path):
    found = priced(workbench(tmp_path, {"macs_ratio": 0.5}, target={"threads": 2, "batch": 3, "form": "uint8"}))
    assert found.conditions == Conditions("onnxruntime-cpu", "cpu", "fp32", "uint8", 2, 3)
    assert found.target == "onnxruntime-cpu, 2 threads, batch 3, uint8 form"


def test_a_bracket_that_noise_has_turned_over_begins_again():
    bracket = pricing._Bracket(requested=1.0, limit=10.0, exact=False)
    bracket.move(0.8)
    assert bracket.met == 10.0 and bracket.limit > 10.0
    bracket.limit = 9.0  # a smaller one that was then missed
    bracket.move(1.1)
    assert (bracket.met, bracket.missed) == (None, 9.0) and bracket.limit < 9.0
    bracket.limit = 9.5  # and a larger one that was met
    bracket.move(0.9)
    assert (bracket.met, bracket.missed) == (9.5, None) and bracket.limit > 9.5
