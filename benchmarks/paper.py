"""The paper's comparison: a grid of methods, budgets and seeds from a TOML file, run by run, in one tidy table.

    uv run python benchmarks/paper.py run GRID.toml -o OUT [--only vpns,random] [--minutes 8] [--jobs 2] [--test]
    uv run python benchmarks/paper.py table OUT [--against vpns] [--test]
    uv run python benchmarks/paper.py times GRID.toml -o OUT      # of the first seed's networks; nothing else may run
    uv run python benchmarks/paper.py figures OUT [--test]

A grid holds ``epochs`` (of search and tuning together, the same for every method), ``seeds``, ``[budgets]``, a ``[recipe]`` that
all runs share, and ``[methods.NAME]`` with dotted recipe keys over it. Rows go to OUT/results.csv, and runs with a row there are
done; what was cut off goes on after its last epoch; no run begins after ``--minutes``. ``--jobs``: how many runs at once,
each with its share of the cores. A dense network is trained once for each seed, input, head and fit, and shared. Without
``--test`` the test split is not opened.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from paper_rows import Row, draw, hand_over, print_table, read_rows, take_over

if TYPE_CHECKING:
    from vpdeploy.data.prepared import Images
    from vpdeploy.recipe.tables import Recipe
    from vpdeploy.training.network import Prompted
    from vpdeploy.values import Tuned
    from vpdeploy.workbench import Workbench

ONCE = ("random", "magnitude", "taylor", "snip", "grasp", "synflow")  # methods that search without epochs


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    budget: str
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.budget}-{self.ratio:g}-{self.seed}"


def read_grid(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def cells(grid: Mapping[str, Any], *, only: Sequence[str] = ()) -> Iterator[Cell]:
    """Seed by seed, so that a grid that is cut off has whole seeds."""
    for seed in grid["seeds"]:
        for budget, ratios in grid["budgets"].items():
            for ratio in ratios:
                for method in grid["methods"]:
                    if not only or method in only:
                        yield Cell(method, budget, float(ratio), int(seed))


def raw_recipe(grid: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """The recipe of one run, as a file would hold it."""
    raw = json.loads(json.dumps(grid["recipe"]))
    given = dict(grid["methods"][cell.method])
    searches = 0 if given.get("search.method", "vpns") in ONCE else given.get("search.epochs", 5)
    given.setdefault("tune.epochs", grid["epochs"] - searches)
    for key, value in {**given, "seed": cell.seed, f"budget.{cell.budget}": cell.ratio}.items():
        *path, last = key.split(".")
        table = raw
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    raw.setdefault("compare", {}).setdefault("arms", ["dense", "pruned"])
    return raw


def folder_of(cell: Cell, out: Path) -> Path:
    return out / "runs" / cell.name


def dense_folder(recipe: Recipe, out: Path) -> Path:
    """Where the dense network lies that ``recipe`` starts from: one for each seed, input, head and fit."""
    from vpdeploy.stages import Stage, values_read

    read = json.dumps(values_read(Stage("fit"), recipe), sort_keys=True)
    return out / "dense" / f"{recipe.seed}-{hashlib.sha256(read.encode()).hexdigest()[:8]}"


def make_dense(recipe: Recipe, out: Path) -> None:
    """Groups and fit of ``recipe``, in the folder that its runs start from."""
    from vpdeploy import pipeline
    from vpdeploy.progress import Display
    from vpdeploy.workbench import open_workbench

    work = open_workbench(recipe, dense_folder(recipe, out), redo=None, display=Display())
    pipeline.grouped(work)
    pipeline.fitted(work)


def recipe_of(grid_file: Path, cell: Cell) -> Recipe:
    from vpdeploy.recipe.reading import parse_recipe

    return parse_recipe(raw_recipe(read_grid(grid_file), cell), where=grid_file.name, folder=grid_file.parent)


def run_cell(grid_file: Path, cell: Cell, out: Path, *, test: bool) -> Row:
    """One run, from the shared dense network to a row."""
    import torch

    from vpdeploy import pipeline
    from vpdeploy.measure.environment import environment
    from vpdeploy.measure.macs import count_macs
    from vpdeploy.pricing.price import selector_for
    from vpdeploy.progress import Display
    from vpdeploy.surgery.cut import cut
    from vpdeploy.training.methods.task import with_tensors
    from vpdeploy.values import Dense, Tuned
    from vpdeploy.workbench import open_workbench, read_tuned

    recipe, folder = recipe_of(grid_file, cell), folder_of(cell, out)
    if not folder.exists():
        partial = folder.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(dense_folder(recipe, out), partial, ignore=shutil.ignore_patterns("*.lock", "state"))
        partial.rename(folder)
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
    result = read_tuned(work, "pruned")
    untuned, plain = Tuned(smaller.backbone, found.prompt, found.label_map), Tuned(dense.backbone, {}, dense.label_map)
    macs, whole = (count_macs(net, canvas_size=recipe.input.canvas).macs for net in (result.backbone, dense.backbone))
    widths = np.array(list(plan.widths.values()))  # [groups, (dense, kept)]
    count, table = len(work.training_data().train), recipe.search
    searches = sum(line["stage"] == "search:pruned" for line in _history(folder))
    twice = table.method == "bip" or (table.unprompted_step and bool(found.prompt))
    val = work.training_data().val
    tests = _test_images(work) if test else None
    return Row(
        method=cell.method,
        budget=cell.budget,
        ratio=cell.ratio,
        seed=cell.seed,
        macs_ratio=macs / whole,
        params_ratio=_ratio(result.backbone, dense.backbone, lambda net: sum(p.numel() for p in net.parameters())),
        channel_ratio=float(widths[:, 1].sum() / widths[:, 0].sum()),
        layer_ratio=_ratio(
            result.backbone,
            dense.backbone,
            lambda net: sum(m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d)),
        ),
        top1_dense_val=_top1(plain, val, work),
        top1_cut_val=_top1(untuned, val, work),
        top1_norms_val=_top1(_with_norms(untuned, work), val, work),
        top1_val=_top1(result, val, work),
        top1_dense_test=math.nan if tests is None else _top1(plain, tests, work),
        top1_test=math.nan if tests is None else _top1(result, tests, work),
        epochs_search=searches,
        epochs_tune=recipe.tune.epochs,
        steps=searches * math.ceil(count / table.batch_size) * (1 + twice)
        + recipe.tune.epochs * math.ceil(count / recipe.tune.batch_size),
        cpu_minutes_search=(clock[1] - clock[0]) / 60,
        cpu_minutes_tune=(clock[3] - clock[2]) / 60,
        wall_minutes=(time.perf_counter() - began) / 60,
        threads=torch.get_num_threads(),
        machine=f"{environment()['machine']['cpu']}, torch {torch.__version__}",
    )


def _history(folder: Path) -> list[dict[str, Any]]:
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _ratio(pruned: Any, dense: Any, count: Callable[[Any], int]) -> float:
    return count(pruned) / count(dense)


def _top1(of: Tuned, images: Images, work: Workbench) -> float:
    from vpdeploy.training.evaluate import accuracy

    return accuracy(_network(of, work).eval(), images)


def _network(of: Tuned, work: Workbench) -> Prompted:
    from vpdeploy.training.network import Prompted, build_canvas

    canvas = build_canvas(work.recipe, prompted=bool(of.prompt))
    if canvas.prompt is not None:
        canvas.prompt.load_state_dict(of.prompt)
    return Prompted(canvas, of.backbone, work.compute(), label_map=of.label_map)


def _with_norms(of: Tuned, work: Workbench) -> Tuned:
    """With the mean statistics of 2,000 training images in every BatchNorm."""
    import torch

    from vpdeploy.data.prepared import batches
    from vpdeploy.training.network import to_pixels

    of = replace(of, backbone=copy.deepcopy(of.backbone))
    network, images = _network(of, work), work.training_data().train
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
    network.train()
    with torch.no_grad():
        for pixels, _ in batches(images, torch.arange(min(2000, len(images))), 250):
            network(to_pixels(pixels, network.compute.device))
    return of


def _test_images(work: Workbench) -> Images:
    from vpdeploy.data.prepared import prepare

    table, workers = work.recipe.data, work.recipe.compute.workers
    assert isinstance(workers, int)
    return prepare(
        work.source.test, work.recipe.input, max_bad=table.on_bad_image, workers=workers, display=work.display,
        label="test images",
    )  # fmt: skip


# --- times ------------------------------------------------------------------------------------------------------------


def measure_times(grid_file: Path, out: Path, *, seconds: float) -> None:
    """Of the networks that the first seed left: each exported and timed beside its dense one, by ONNX Runtime on one thread
    at batch 1. Leaves out/times.json: name of the run -> dense over pruned, and its interval.
    """
    from importlib.metadata import version

    from vpdeploy.benching import bench_files
    from vpdeploy.deploy.bake import bake
    from vpdeploy.deploy.onnx_file import to_onnx
    from vpdeploy.deploy.session import describe
    from vpdeploy.progress import Display
    from vpdeploy.recipe.tables import BenchTable
    from vpdeploy.values import Tuned
    from vpdeploy.workbench import open_workbench, read_dense, read_tuned

    grid, path = read_grid(grid_file), out / "times.json"
    times: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for cell in cells({**grid, "seeds": grid["seeds"][:1]}):
        folder = folder_of(cell, out)
        if cell.name in times or not (folder / "pruned.safetensors").exists():
            continue
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
        table = BenchTable(batches=(1,), threads=(1,), seconds=seconds)
        made = bench_files(files, table=table, image_size=None)
        (row,) = made.files[str(files[1])].factors
        times[cell.name] = {"factor": row.factor, "interval": row.interval}
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(times, indent=1))
        partial.rename(path)
        print(f"{cell.name}: {row.factor:.2f}x ({row.interval[0]:.2f} to {row.interval[1]:.2f})", flush=True)


# --- the grid ---------------------------------------------------------------------------------------------------------


def run_grid(grid_file: Path, out: Path, *, only: Sequence[str], minutes: float, jobs: int, test: bool) -> bool:
    """Run what is not done, ``jobs`` at once, until ``minutes`` are over. Whether all is done now."""
    began = time.monotonic()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    take_over(out)
    done = {row.name for row in read_rows(out, test=test)}
    left = [cell for cell in cells(read_grid(grid_file), only=only) if cell.name not in done]
    at = {cell: dense_folder(recipe_of(grid_file, cell), out) for cell in left}  # where its dense network lies
    running: dict[subprocess.Popen[bytes], Cell | Path] = {}
    failed: set[Cell | Path] = set()
    while True:
        for process in [process for process in running if process.poll() is not None]:
            work = running.pop(process)
            if process.returncode:
                failed.add(work)
            take_over(out)
            name = work.name if isinstance(work, Cell) else f"dense {work.name}"
            print(f"{name}: {f'failed ({process.returncode})' if process.returncode else 'done'}", flush=True)
        ready = (cell for cell in left if at[cell] not in failed and at[cell] not in running.values())
        cell = next(ready, None) if time.monotonic() - began < 60 * minutes else None
        if cell is None and not running:
            break
        if cell is None or len(running) == jobs:
            time.sleep(0.5)
            continue
        made = (at[cell] / "source.safetensors").exists()
        if made:
            left.remove(cell)
        command = [sys.executable, __file__, "cell" if made else "dense", str(grid_file), "-o", str(out)]
        threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
        with (out / "runs" / f"{cell.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--name", cell.name, *(["--test"] if test and made else [])],
                env={**os.environ, "OMP_NUM_THREADS": threads},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        running[process] = cell if made else at[cell]
    for cell in (*left, *(work for work in failed if isinstance(work, Cell))):
        print(f"{cell.name}: not run")
    return not left and not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "cell", "dense"):
        command = commands.add_parser(name)
        command.add_argument("grid", type=Path)
        command.add_argument("-o", "--out", type=Path, required=True)
        if name != "dense":
            command.add_argument("--test", action="store_true", help="open the test split")
        if name == "run":
            command.add_argument("--only", type=lambda text: text.split(","), default=[])
            command.add_argument("--minutes", type=float, default=8.0)
            command.add_argument("--jobs", type=int, default=1)
        else:
            command.add_argument("--name", required=True)
    for name in ("table", "figures"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--test", action="store_true")
        if name == "table":
            command.add_argument("--against")
    command = commands.add_parser("times")
    command.add_argument("grid", type=Path)
    command.add_argument("-o", "--out", type=Path, required=True)
    command.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    if args.command == "table":
        print_table(read_rows(args.out, test=args.test), against=args.against, test=args.test)
    elif args.command == "figures":
        draw(read_rows(args.out, test=args.test), args.out, test=args.test)
    elif args.command == "times":
        measure_times(args.grid, args.out, seconds=args.seconds)
    elif args.command in ("cell", "dense"):
        (cell,) = [cell for cell in cells(read_grid(args.grid)) if cell.name == args.name]
        if args.command == "dense":
            make_dense(recipe_of(args.grid, cell), args.out)
        else:
            hand_over(run_cell(args.grid, cell, args.out, test=args.test), args.out)
    else:
        whole = run_grid(args.grid, args.out, only=args.only, minutes=args.minutes, jobs=args.jobs, test=args.test)
        sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
