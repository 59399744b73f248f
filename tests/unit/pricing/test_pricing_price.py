"""What can be reached on a target, and what is refused, before any training."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from budgeted import priced, workbench
from strategies import group_of

from vpdeploy import pipeline
from vpdeploy.deploy.bake import bake
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.session import read_metadata
from vpdeploy.errors import BudgetError
from vpdeploy.measure.engines import EngineError
from vpdeploy.measure.macs import count_macs
from vpdeploy.models.tokens.fold import fold
from vpdeploy.models.tokens.prompt import new_tokens
from vpdeploy.pricing import price, target
from vpdeploy.pricing.candidates import Candidates
from vpdeploy.pricing.network import Network
from vpdeploy.pricing.price import elsewhere, selector_for
from vpdeploy.pricing.reach import reach_text
from vpdeploy.pricing.settle import settle
from vpdeploy.pricing.target import Measured
from vpdeploy.recipe.tables import BudgetTable
from vpdeploy.scoring.select import build_selector, unreachable
from vpdeploy.surgery.cost import CostModel, Sum
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelMask, Conditions, Tuned


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
    told = reach_text(found)
    assert "onnxruntime-cpu, 1 thread, batch 1, float form" in told and "latency, ms" in told
    assert found.seconds >= found.table_seconds > 0


def test_the_size_of_a_file_is_what_the_sum_says(tmp_path):
    """Of files that are exported in earnest. The sum is never below: a certificate's figures are taken as long as they get."""
    work = workbench(tmp_path, {"file_mib": 0.2})
    groups = pipeline.grouped(work)
    selector = selector_for(work, groups, pipeline.priced(work, groups))
    generator = np.random.default_rng(0)
    scores = {root: generator.random(int(w)) for root, w in zip(selector.roots, selector.dense_widths, strict=True)}
    selection = settle(selector, scores, work, groups, arm="pruned")
    widths = np.array([sum(keep) for keep in selection.mask.keep.values()], float)
    assert 0.18 < selection.reached <= 0.2
    for form in ("float", "uint8"):
        files = Candidates(work, groups, tmp_path, form=form, prompted=True)
        small = cut(files.backbone, plan(files.backbone, groups.prunable, selection.mask))
        files.export(small, tmp_path / "real.onnx")
        size = (tmp_path / "real.onnx").stat().st_size / 2**20
        assert size <= selector.budget.cost(widths)
        taken = json.loads(read_metadata(tmp_path / "real.onnx")["certificate"])["groups"]  # what is known as it is
        assert [record["difference"] for record in taken] == [g.difference for g in groups.groups]
    assert (
        selector.budget.cost(widths) - size < 512 / 2**20
    )  # of the larger form: shapes that an export may write twice
    for column in range(len(widths)):  # and no group may take a step more
        steps = selector.block_width[(selector.block_group == column) & ~selector.must]
        if widths[column] < selector.dense_widths[column]:
            wider = widths.copy()
            wider[column] += steps.min()
            assert selector.budget.cost(wider) > selector.budget.limit


TRANSFORMER = """
from torchvision.models import VisionTransformer


def vit():
    return VisionTransformer(image_size=12, patch_size=4, num_layers=4, num_heads=6, hidden_dim=24, mlp_dim=48, num_classes=10)
"""


def test_so_it_is_of_a_transformer_whose_layers_have_one_shape_until_their_heads_differ(tmp_path):
    (tmp_path / "net.py").write_text(TRANSFORMER)
    work = workbench(tmp_path, {"file_mib": 0.1}, model={"name": f"{tmp_path / 'net.py'}:vit"})
    groups = pipeline.grouped(work)
    found = pipeline.priced(work, groups)
    network = Network.of(work, groups)
    heads = iter((2, 3, 4, 5))
    widths = np.array([next(heads) if g.unit > 1 else 24 for g in groups.prunable], float)
    files = Candidates(work, groups, tmp_path, form="uint8", prompted=True)
    files.check(network.narrowest(1))
    assert files.graph is not None  # nothing but the first was exported
    files.export(cut(files.backbone, plan(files.backbone, groups.prunable, files.mask(widths))), tmp_path / "real.onnx")
    size, told = (
        (tmp_path / "real.onnx").stat().st_size,
        network.shapes.sum_of(found.costs["file_mib"]).at(widths) * 2**20,
    )
    assert 0 <= told - size < 4096
    assert found.dense["file_mib"] * 2**20 == files.whole.stat().st_size


def test_of_a_transformer_formulas_tell_what_files_compute(tmp_path):
    """Of its last block the class token alone; the counter says the same of the network that was cut and folded."""
    (tmp_path / "net.py").write_text(TRANSFORMER)
    work = workbench(tmp_path, {"macs_ratio": 0.5}, model={"name": f"{tmp_path / 'net.py'}:vit"})
    groups, backbone = pipeline.grouped(work), work.built.backbone
    network = Network.of(work, groups)
    keep = {g.root: tuple(channel // g.unit % 2 == 0 for channel in range(g.width)) for g in groups.prunable}
    small = cut(backbone, plan(backbone, groups.prunable, ChannelMask(keep)))
    widths = np.array([sum(kept) for kept in keep.values()], float)
    for trained, at in ((backbone, network.cost.dense_widths), (small, widths)):
        whole, shipped = trained, copy.deepcopy(trained)
        assert [made.done for made in fold(shipped, canvas_size=12)] == [True]
        counted, all_tokens = (count_macs(one, canvas_size=12) for one in (shipped, whole))
        assert network.cost.macs(at) == counted.macs < 0.9 * all_tokens.macs
        layers = {layer.module: layer for layer in network.shapes.layers}
        last = [name for name in layers if "layer_3.mlp" in name]
        assert len(last) == 2 and all(layers[name].positions == 1 for name in last)


@pytest.mark.parametrize(
    ("kind", "condense"),
    [
        ("vpt-deep", {"keep": 0.5, "scope": "layer"}),
        ("vpt-deep", {"keep": 0.5}),
        ("vpt-shallow", {}),
        ("cvpt", {}),
        ("ffn-memory", {}),
    ],
)
def test_tokens_are_in_the_file_that_is_budgeted(tmp_path, kind, condense):
    (tmp_path / "net.py").write_text(TRANSFORMER)
    asked, count = 0.1, 8
    work = workbench(
        tmp_path, {"file_mib": asked}, model={"name": f"{tmp_path / 'net.py'}:vit"},
        prompt={"pixels": {"kind": "none"}, "tokens": {"kind": kind, "count": count}}, condense=condense,
        search={"method": "vpns"},
    )  # fmt: skip
    groups = pipeline.grouped(work)
    selector = selector_for(work, groups, pipeline.priced(work, groups))
    generator = np.random.default_rng(0)
    scores = {root: generator.random(int(w)) for root, w in zip(selector.roots, selector.dense_widths, strict=True)}
    selection = settle(selector, scores, work, groups, arm="pruned")
    backbone = work.built.backbone
    small = cut(backbone, plan(backbone, groups.prunable, selection.mask))
    tokens = new_tokens(small, work.recipe.prompt.tokens, generator=torch.Generator().manual_seed(0))
    left = {f"tokens.{name}": rows[: count // 2 if condense else count] for name, rows in tokens.items()}
    certificate = Candidates(work, groups, tmp_path, form="uint8", prompted=True)._certificate

    def mib(prompt: dict[str, torch.Tensor]) -> float:
        made = bake(Tuned(small, prompt, None), recipe=work.recipe, classifier=work.built.classifier, form="uint8")
        to_onnx(made, tmp_path / "real.onnx", opset=18, metadata={"certificate": certificate})
        return (tmp_path / "real.onnx").stat().st_size / 2**20

    assert 0.9 * asked < mib(left) <= asked
    assert mib({}) + sum(rows.numel() for rows in left.values()) * 4 / 2**20 < asked  # what they take was left for them


@pytest.mark.parametrize(
    ("count", "budget", "condense", "refused"),
    [
        (8, {"file_mib": 0.1}, {"keep": 0.5}, True),
        (8, {"macs_ratio": 0.5, "limits": {"file_mib": 0.15}}, {"keep": 0.5}, True),
        (8, {"file_mib": 0.1}, {"keep": 0.5, "scope": "layer"}, False),
        (4, {"file_mib": 0.1}, {"keep": 0.5}, False),  # two linear layers, however many stay
        (8, {"macs_ratio": 0.5}, {"keep": 0.5}, False),
    ],
)
def test_a_bound_of_bytes_that_fewer_tokens_may_exceed_is_refused(tmp_path, count, budget, condense, refused):
    """Of 24 channels and six heads: four tokens of cvpt fold to two linear layers, five to keys and values, which are smaller."""
    (tmp_path / "net.py").write_text(TRANSFORMER)
    work = workbench(
        tmp_path, budget, model={"name": f"{tmp_path / 'net.py'}:vit"},
        prompt={"pixels": {"kind": "none"}, "tokens": {"kind": "cvpt", "count": count}}, condense=condense,
        search={"method": "vpns"},
    )  # fmt: skip
    groups = pipeline.grouped(work)
    if refused:
        with pytest.raises(
            BudgetError, match="fewer than 8 of cvpt may take more bytes; expected condense.scope = 'layer'"
        ):
            pipeline.priced(work, groups)
    else:
        pipeline.priced(work, groups)


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


@pytest.mark.parametrize(("glance", "measured", "fits"), [(5.3, 4.9, True), (4.8, 5.1, False), (9.0, 4.0, False)])
def test_a_glance_refuses_nothing_that_is_near(tmp_path, monkeypatch, glance, measured, fits):
    """It may be off by more than what decides: near the limit the narrowest network is measured as masks will be."""
    measure = price._with_ends
    monkeypatch.setattr(
        price,
        "_with_ends",
        lambda *args: replace(
            made := measure(*args), least={**made.least, "latency_ms": glance}, dense={**made.dense, "latency_ms": 20.0}
        ),
    )
    monkeypatch.setattr(target.Target, "against_dense", lambda *_: (measured, 20.0))
    work = workbench(tmp_path, {"latency_ms": 5.0})
    if fits:
        assert priced(work).limits
    else:
        with pytest.raises(
            BudgetError,
            match=f"^budget.latency_ms: got 5; the best reachable is {max(glance, measured):g} .measured on ",
        ):
            priced(work)


@pytest.mark.parametrize(
    ("point", "told"),
    [
        ({"latency_ratio": 0.01}, "budget.latency_ratio: got 0.01; the narrowest network has 0."),
        ({"file_mib": 0.001}, "budget.file_mib: got 0.001; the narrowest network has 0."),
        ({"memory_mib": 1.0}, "budget.memory_mib: got 1; the narrowest network has "),
        ({"macs_ratio": 0.001}, "budget.macs_ratio: got 0.001; the best reachable is "),
        (
            {"macs_ratio": 0.5, "limits": {"latency_ms": 1e-5}},
            "budget.limits.latency_ms: got 1e-05; the narrowest network has ",
        ),
        ({"file_mib": 100.0}, "budget.file_mib: got 100; the dense network has 0."),
        ({"latency_ms": 1000.0}, "budget.latency_ms: got 1000; the dense network has 0."),
    ],
)
def test_other_budgets_out_of_reach_are_told_by_the_table_of_the_first(tmp_path, point, told):
    work = workbench(tmp_path, {"macs_ratio": 0.5})
    groups = pipeline.grouped(work)
    found = pipeline.priced(work, groups)
    price.check_reachable(work, groups, found, BudgetTable(latency_ratio=0.9, round_to=8))
    with pytest.raises(BudgetError) as caught:
        price.check_reachable(work, groups, found, BudgetTable.model_validate(point))
    assert told in str(caught.value)


BARE = """
import torch
from torch import nn


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.bare = nn.Parameter(torch.randn(432, 10))

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3))) + x.flatten(1) @ self.bare


def bare():
    return Bare()
"""


@pytest.mark.parametrize("kind", ["file_mib", "params_ratio"])
def test_a_bare_parameter_that_stops_it_is_named(tmp_path, kind):
    (tmp_path / "net.py").write_text(BARE)
    with pytest.raises(BudgetError, match=r"there it is made of .*\bbare \d\d%"):
        priced(workbench(tmp_path, {kind: 0.001}, model={"name": f"{tmp_path / 'net.py'}:bare"}))


def test_what_cannot_be_met_says_what_it_is_made_of(tmp_path):
    with pytest.raises(BudgetError) as caught:
        priced(workbench(tmp_path, {"latency_ratio": 0.01}))
    assert "what is no layer (sums, pools, layouts)" in str(caught.value)
    assert "ask for that or more; a smaller round_to, or a larger max_removal reaches less" in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        ({"macs_ratio": 0.001}, r"layer1.0.conv1 \d+%, layer1.0.conv2 \d+%"),
        ({"params_ratio": 0.001}, r"layer\d.0.conv2 \d+%, layer3.0.conv1 \d+%"),
        ({"channel_ratio": 0.001}, r"the group of \S+ \d+%, the group of \S+ \d+%, the group of \S+ \d+%"),
    ],
)
def test_so_does_what_formulas_tell(tmp_path, budget, parts):
    with pytest.raises(BudgetError) as caught:
        priced(workbench(tmp_path, budget))
    text = str(caught.value)
    assert "there it is made of" in text
    assert re.search(parts, text), text
    shares = [int(share) for share in re.findall(r"(\d+)%", text)]
    assert shares == sorted(shares, reverse=True) and 10 < sum(shares) <= 101
    assert "excluded" not in text  # of this network the classifier alone is, and its outputs are the classes


def test_a_network_that_is_slower_than_the_dense_one_meets_no_ratio():
    selector = build_selector(
        [group_of("a", 8, unit=1)],
        CostModel(*[constant_and(1.0)] * 2, np.array([8.0]), {"latency_ms": constant_and(10.0)}, {"latency_ms": 9.0}),
        budget="latency_ratio", requested=0.9, round_to=1, max_removal=0.5,
    )  # fmt: skip
    told = str(unreachable(selector.budget, selector, 10.5, made_of=""))
    assert (
        "the best reachable is 1.1667 (with" in told and "no ratio can be met: the narrowest network costs more" in told
    )
    assert "ask for that or more" not in told


def constant_and(share: float) -> Sum:
    shares, constant = np.zeros((2, 1, 1)), np.ones((2, 1))
    shares[0] = share
    return Sum(shares, constant, np.ones(1))


def test_groups_that_stay_whole_are_told(tmp_path, capsys):
    """At most 0.15 of 32 channels is less than 8 of them, of 64 it is more."""
    work = workbench(tmp_path, {"macs_ratio": 0.97, "max_removal": 0.15})
    found = priced(work)
    groups = {group.root: group.width for group in pipeline.grouped(work).prunable}
    assert found.whole and all(groups[root] <= 32 for root in found.whole) and len(found.whole) < len(groups)
    assert f"{', '.join(found.whole)}, which stay whole." in reach_text(found)
    assert not priced(workbench(tmp_path / "b", {"macs_ratio": 0.97})).whole


@pytest.mark.parametrize(
    ("budget", "fitted"),
    [
        ({"macs_ratio": 0.5}, []),
        ({"macs_ratio": 0.5, "speed": True}, ["latency_ms"]),
        ({"macs_ratio": 0.5, "limits": {"latency_ms": 1000.0}}, ["latency_ms"]),
    ],
)
def test_times_are_fitted_where_something_is_chosen_by_them(tmp_path, monkeypatch, budget, fitted):
    measured = Measured.of
    seen: list[np.ndarray] = []
    monkeypatch.setattr(
        Measured, "of", lambda target, widths, **asked: seen.append(widths) or measured(target, widths, **asked)
    )
    found = priced(workbench(tmp_path, budget))
    ends, *others = seen
    assert len(ends) == 2 and (ends[0] < ends[1]).all()
    assert [len(widths) for widths in others] == ([2 + price.MIXED] if fitted else [])
    assert all(len(np.unique(widths[:, 0])) > 2 for widths in others)
    assert [name for name in found.costs if name == "latency_ms"] == fitted
    (told,) = (row for row in found.table if row.quantity == "latency_ms")
    assert 0 < told.smallest < told.dense


def test_memory_is_reached_when_the_largest_of_eight_processes_has_it(tmp_path, monkeypatch):
    """One process of the narrowest network may well have less."""
    processes: Counter[Path] = Counter()

    def peak(path: Path, **conditions: object) -> SimpleNamespace:
        processes[path] += 1
        fits = 60 + 60 * path.stat().st_size / 2**20
        return SimpleNamespace(peak_rss_mib=fits + 5 * (processes[path] > 3))

    monkeypatch.setattr(target, "measure_memory", peak)
    with pytest.raises(BudgetError, match=r"^budget.memory_mib: got 63; the best reachable is 6[5-7]"):
        priced(workbench(tmp_path, {"memory_mib": 63.0}))


def test_a_network_whose_narrower_ones_do_not_run_still_goes_the_road(tmp_path, monkeypatch):
    """Unless a budget needs the times."""

    def fails(*args: object, **kwargs: object) -> None:
        raise EngineError("engine onnxruntime-cpu: does not run it")

    monkeypatch.setattr(Measured, "of", fails)
    found = priced(workbench(tmp_path, {"macs_ratio": 0.5}))
    assert [row.quantity for row in found.table] == ["channels", "macs", "params", "file_mib"]
    assert found.conditions is None and reach_text(found)
    with pytest.raises(EngineError):
        priced(workbench(tmp_path / "timed", {"latency_ratio": 0.5}))


def test_a_budget_of_another_machine_is_told(tmp_path, monkeypatch):
    said: list[str] = []
    work = workbench(tmp_path, {"latency_ratio": 0.9})
    found = priced(work)
    assert elsewhere(found) is None
    monkeypatch.setattr(price, "machine", lambda: {**found.machine, "cpu": "Another CPU"})
    other = elsewhere(found)
    assert other is not None and other.endswith("here Another CPU")
    heard = replace(work, display=SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    pipeline.priced(heard, pipeline.grouped(work))
    assert any(
        "warning: the budget was measured on another machine" in line and "--redo price" in line for line in said
    )


def test_conditions_of_a_price_are_those_that_were_timed(tmp_path):
    found = priced(workbench(tmp_path, {"macs_ratio": 0.5}, target={"threads": 2, "batch": 3, "form": "uint8"}))
    assert found.conditions == Conditions("onnxruntime-cpu", "cpu", "fp32", "uint8", 2, 3)
    assert found.target == "onnxruntime-cpu, 2 threads, batch 3, uint8 form"
