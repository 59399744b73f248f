"""One run of ``paper.py``: from the shared dense network to a row; and the times of the networks that runs left."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_grid import Cell, dense_folder, folder_of, recipe_of
from paper_rows import Row, read_rows
from torch import nn

from vpdeploy import pipeline
from vpdeploy.benching import bench_files
from vpdeploy.data.prepared import Images, batches, prepare
from vpdeploy.deploy.bake import bake
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.session import describe
from vpdeploy.measure.environment import environment
from vpdeploy.measure.macs import count_macs
from vpdeploy.pricing.price import selector_for
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import BenchTable, Recipe
from vpdeploy.surgery.cut import cut
from vpdeploy.training.evaluate import accuracy
from vpdeploy.training.methods.task import with_tensors
from vpdeploy.training.network import Prompted, build_canvas, to_pixels
from vpdeploy.values import Dense, PrunePlan, Tuned
from vpdeploy.workbench import Workbench, open_workbench, read_dense, read_tuned


def make_dense(recipe: Recipe, out: Path) -> None:
    """Groups and fit of ``recipe``, in the folder that its runs start from."""
    work = open_workbench(recipe, dense_folder(recipe, out), redo=None, display=Display())
    pipeline.grouped(work)
    pipeline.fitted(work)


def run_cell(grid_file: Path, cell: Cell, out: Path, *, test: bool) -> Row:
    """One run, to its end from wherever it stopped. ``test``: open the test split too."""
    recipe, folder = recipe_of(grid_file, cell), folder_of(cell, out)
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(dense_folder(recipe, out), partial, ignore=shutil.ignore_patterns("*.lock", "state"))
        partial.rename(folder)
    anew = not _epochs(folder, "search:pruned") | _epochs(folder, "tune:pruned")
    began = time.perf_counter()
    work = open_workbench(recipe, folder, redo=None, display=Display())
    groups = pipeline.grouped(work)
    selector = selector_for(work, groups, pipeline.priced(work, groups))
    dense = pipeline.fitted(work)
    work.training_data()  # so that no stage's time is that of reading images
    clock = [time.process_time()]
    found = pipeline.searched(work, "pruned", dense, groups, selector)
    clock.append(time.process_time())
    plan = pipeline.planned(work, "pruned", dense, groups, selector, found)
    smaller = Dense(cut(with_tensors(dense, found), plan), found.label_map)
    clock.append(time.process_time())
    pipeline.tuned(work, "pruned", smaller, prompt=found.prompt, dense=dense, mask={})
    clock.append(time.process_time())
    searched, tuned, taken = clock[1] - clock[0], clock[3] - clock[2], time.perf_counter() - began
    result = read_tuned(work, "pruned")
    untuned, plain = Tuned(smaller.backbone, found.prompt, found.label_map), Tuned(dense.backbone, {}, dense.label_map)
    earlier = next((row for row in read_rows(out) if row.name == cell.name), None)
    minutes = (searched / 60, tuned / 60, taken / 60) if anew else (math.nan,) * 3  # a part is not what all took
    if earlier is not None:
        minutes = (earlier.cpu_minutes_search, earlier.cpu_minutes_tune, earlier.wall_minutes)
    return Row(
        **vars(cell),
        **_sizes(result, dense, plan, recipe),
        **_accuracies(plain, untuned, result, work, test=test),
        **_effort(work, prompted=bool(found.prompt)),
        cpu_minutes_search=minutes[0],
        cpu_minutes_tune=minutes[1],
        wall_minutes=minutes[2],
        threads=torch.get_num_threads(),
        machine=f"{environment()['machine']['cpu']}, torch {torch.__version__}",
        commit=_commit(),
    )


def _commit() -> str:
    """ "+" where files differ from it; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _sizes(result: Tuned, dense: Dense, plan: PrunePlan, recipe: Recipe) -> dict[str, Any]:
    def macs(net: nn.Module) -> int:
        return count_macs(net, canvas_size=recipe.input.canvas).macs

    def outputs(net: nn.Module) -> int:
        return sum(module.out_channels for module in net.modules() if isinstance(module, nn.Conv2d))

    def params(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    widths = np.array(list(plan.widths.values()))  # [groups, (dense, kept)]
    ratios = {
        name: count(result.backbone) / count(dense.backbone)
        for name, count in (("macs_ratio", macs), ("params_ratio", params), ("layer_ratio", outputs))
    }
    return {**ratios, "channel_ratio": float(widths[:, 1].sum() / widths[:, 0].sum())}


def _accuracies(plain: Tuned, untuned: Tuned, result: Tuned, work: Workbench, *, test: bool) -> dict[str, Any]:
    def top1(of: Tuned, images: Images) -> float:
        return accuracy(_network(of, work).eval(), images)

    val, tests = work.training_data().val, _test_images(work) if test else None
    return {
        "top1_dense_val": top1(plain, val),
        "top1_cut_val": top1(untuned, val),
        "top1_norms_val": top1(_with_norms(untuned, work), val),
        "top1_val": top1(result, val),
        "top1_dense_test": math.nan if tests is None else top1(plain, tests),
        "top1_test": math.nan if tests is None else top1(result, tests),
    }


def _effort(work: Workbench, *, prompted: bool) -> dict[str, Any]:
    recipe, count = work.recipe, len(work.training_data().train)
    searches = len(_epochs(work.run, "search:pruned"))
    twice = recipe.search.method == "bip" or (recipe.search.unprompted_step and prompted)
    each, tunes = math.ceil(count / recipe.search.batch_size) * (1 + twice), math.ceil(count / recipe.tune.batch_size)
    return {
        "epochs_search": searches,
        "epochs_tune": recipe.tune.epochs,
        "steps": searches * each + recipe.tune.epochs * tunes,
    }


def _epochs(folder: Path, stage: str) -> set[int]:
    """Which epochs of ``stage`` have been run; one that was cut off and run again is in the history twice."""
    path = folder / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["epoch"] for line in lines if line["stage"] == stage}


def _network(of: Tuned, work: Workbench) -> Prompted:
    canvas = build_canvas(work.recipe, prompted=bool(of.prompt))
    if canvas.prompt is not None:
        canvas.prompt.load_state_dict(of.prompt)
    return Prompted(canvas, of.backbone, work.compute(), label_map=of.label_map)


def _with_norms(of: Tuned, work: Workbench) -> Tuned:
    """With the mean statistics of 2,000 training images in every BatchNorm."""
    of = replace(of, backbone=copy.deepcopy(of.backbone))
    network, images = _network(of, work), work.training_data().train
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
    network.train()
    with torch.no_grad():
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:2000]
        for pixels, _ in batches(images, drawn, 250):
            network(to_pixels(pixels, network.compute.device))
    return of


def _test_images(work: Workbench) -> Images:
    table, workers = work.recipe.data, work.recipe.compute.workers
    assert isinstance(workers, int)
    return prepare(
        work.source.test, work.recipe.input, max_bad=table.on_bad_image, workers=workers, display=work.display,
        label="test images",
    )  # fmt: skip


def measure_time(grid_file: Path, cell: Cell, out: Path, *, seconds: float) -> dict[str, Any] | None:
    """The run's network, exported and timed beside its dense one, by ONNX Runtime on one thread at batch 1: dense over pruned,
    and its interval. None where the run is not done.
    """
    folder = folder_of(cell, out)
    if not (folder / "pruned.safetensors").exists():
        return None
    recipe = recipe_of(grid_file, cell)
    work = open_workbench(recipe, folder, redo=None, display=Display(quiet=True))
    dense = read_dense(work)
    networks = {"dense": Tuned(dense.backbone, {}, dense.label_map), "pruned": read_tuned(work, "pruned")}
    files = []
    for arm, network in networks.items():
        about = describe(recipe, arm=arm, form="float", classes=work.source.classes, version=version("vpdeploy"))
        files.append(folder / f"{arm}.float.onnx")
        deployable = bake(network, recipe=recipe, classifier=work.built.classifier, form="float")
        to_onnx(deployable, files[-1], opset=recipe.export.opset, metadata=about)
    made = bench_files(files, table=BenchTable(batches=(1,), threads=(1,), seconds=seconds), image_size=None)
    (row,) = made.files[str(files[1])].factors
    return {"factor": row.factor, "interval": row.interval}
