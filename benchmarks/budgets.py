"""Budgets against what is measured later: is the time, the file, the memory what was asked for?

    uv run python benchmarks/budgets.py [NETWORK...] [--engines onnxruntime-cpu,openvino-cpu] [--part latency|amounts|table]

Random weights, 224 pixels, exact groups alone, 1 thread, batch 1, float form. For each network and engine:

- the satisfiability table and what it took;
- how far the fitted sum is from the times of six networks of random widths that it was not fitted on;
- latency_ratio = 0.5: a mask of magnitude scores is settled, cut in torch, exported in earnest and, after everything else,
  measured in turns with the dense file by a session of its own.

And of the first network on ONNX Runtime file_mib and memory_mib at 0.6 of what the dense one has: the figures of the
exported file (the larger of its forms; the least and the largest of 32 processes), and of that of the next mask in the
order of the scores. And what the table of what can be reached takes on ONNX Runtime, each in a fresh process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from side_by_side import print_machine
from speed import recipe_of

from vpdeploy import pipeline
from vpdeploy.measure.engines import Setting, Subject
from vpdeploy.measure.factors import latency_factor
from vpdeploy.measure.inputs import random_images
from vpdeploy.measure.latency import measure_latency
from vpdeploy.measure.memory import measure_memory
from vpdeploy.pricing.candidates import Candidates
from vpdeploy.pricing.network import Network
from vpdeploy.pricing.price import selector_for
from vpdeploy.pricing.reach import reach_text
from vpdeploy.pricing.settle import next_above, settle
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.select import Selector
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroups, ChannelMask, Price, Selection
from vpdeploy.workbench import Workbench, open_workbench

NETWORKS = ("resnet50", "resnet18", "mobilenet_v2")
ENGINES = ("onnxruntime-cpu", "openvino-cpu")


class Case:
    """One network under one budget: priced, its scores, its mask."""

    def __init__(self, name: str, folder: Path, budget: dict[str, float], engine: str):
        recipe = recipe_of(name, folder, {"engine": engine}, speed=False, **budget)
        label = "-".join([name, engine, *budget])
        self.recipe: Recipe = recipe
        self.work: Workbench = open_workbench(recipe, folder / label, redo=None, display=Display(quiet=True))
        self.groups: ChannelGroups = pipeline.grouped(self.work)
        self.price: Price = pipeline.priced(self.work, self.groups)
        self.selector: Selector = selector_for(self.work, self.groups, self.price)
        found = magnitude(self.work.built.backbone, self.groups.prunable)
        self.scores = {root: scores.double().numpy() for root, scores in found.items()}
        files = folder / f"{label}-files"
        files.mkdir()
        self.files = Candidates(self.work, self.groups, files, form="float", prompted=False)

    def settled(self) -> Selection:
        return settle(self.selector, self.scores, self.work, self.groups, arm="pruned")

    def exported(self, mask: ChannelMask, name: str) -> Path:
        """The real thing: cut in torch, exported by torch."""
        path = self.files.folder / f"{name}.onnx"
        self.files.export(cut(self.files.backbone, plan(self.files.backbone, self.groups.prunable, mask)), path)
        return path

    def errors(self) -> Iterator[float]:
        """Predicted over measured, of widths that were not fitted."""
        network = Network.of(self.work, self.groups)
        cost, generator = network.shapes.sum_of(self.price.costs["latency_ms"]), np.random.default_rng(1)
        rows = []
        for share in (0.3, 0.3, 0.5, 0.5, 0.7, 0.7):
            row = [
                min(
                    network.allowed(g, self.price.round_to),
                    key=lambda w, s=wanted, g=g: abs(w - s * g.width),
                )
                for g, wanted in zip(
                    self.groups.prunable,
                    generator.uniform(share - 0.25, share + 0.25, len(self.groups.prunable)),
                    strict=True,
                )
            ]
            rows.append(np.array(row, float))
        timed = later({str(i): self.files.subject(row) for i, row in enumerate(rows)}, self.recipe.target.engine)
        yield from (cost.at(row) / timed[str(i)].p50_ms for i, row in enumerate(rows))


def later(subjects: dict[str, Subject], engine: str):
    images = random_images("float", (3, 224, 224), batch=1, seed=11)
    return measure_latency(subjects, images, form="float", setting=Setting(engine), seconds=1.5).latencies


def print_latency(cases: dict[tuple[str, str], tuple[Case, Selection, Path]]) -> None:
    print(
        "\n| network | engine | table, s | fitted / measured, six unseen | settled at | measured later | of the target |"
    )
    print("|---|---|---:|---|---:|---:|---:|")
    for (name, engine), (case, selection, path) in cases.items():
        timed = later({"dense": Subject(case.files.dense_without_prompt()), "pruned": Subject(path)}, engine)
        found = latency_factor(timed["dense"], timed["pruned"], seed=0)
        low, high = (1 / bound for bound in reversed(found.interval))
        errors = list(case.errors())
        unseen = f"{min(errors):.3f} to {max(errors):.3f}"
        print(
            f"| {name} | {engine} | {case.price.table_seconds:.1f} | {unseen} | {selection.reached:.3f} "
            f"| {1 / found.factor:.3f} ({low:.3f} to {high:.3f}) | {100 * (1 / found.factor / 0.5 - 1):+.1f} % |",
            flush=True,
        )


def next_mask(case: Case, selection: Selection, kind: str) -> ChannelMask:
    """The smallest mask above ``selection`` that the selection under a larger limit gives."""
    spent = case.selector.budget.cost(np.array([*selection.mask.widths().values()], float))
    above = next_above(case.selector.limited(kind, spent), case.scores, kind)
    assert above is not None, "less than the dense network was asked for"
    return above.selection.mask


def peaks(case: Case, mask: ChannelMask) -> str:
    """Peak resident MiB of PROCESSES processes, the least and the largest, and how many have more than was asked for."""
    path = case.exported(mask, "peak")
    rows = [measure_memory(path, form="float", image_shape=(3, 224, 224), batch=1, threads=1) for _ in range(PROCESSES)]
    found = [row.peak_rss_mib for row in rows if row is not None]
    over = sum(peak > case.selector.budget.requested for peak in found)
    return f"{min(found):.3f} to {max(found):.3f}, {over} of {len(found)} above"


def largest(case: Case, mask: ChannelMask) -> str:
    """MiB of the larger of the forms that would ship."""
    found = []
    for form in case.recipe.export.forms:
        (folder := case.files.folder / form).mkdir(exist_ok=True)
        files = Candidates(case.work, case.groups, folder, form=form, prompted=False)
        files.export(cut(files.backbone, plan(files.backbone, case.groups.prunable, mask)), folder / "cut.onnx")
        found.append((folder / "cut.onnx").stat().st_size / 2**20)
    return f"{max(found):.3f}"


def print_amounts(name: str, folder: Path) -> None:
    print("\n| network | budget | asked | the exported file | the next mask |")
    print("|---|---|---:|---:|---:|")
    dense = None
    for kind in ("file_mib", "memory_mib"):
        if dense is None:
            dense = {row.quantity: row.dense for row in Case(name, folder, {"macs_ratio": 0.5}, ENGINES[0]).price.table}
        asked = round(0.6 * dense[kind], 2)
        case = Case(name, folder, {kind: asked}, ENGINES[0])
        selection = case.settled()
        measured = peaks if kind == "memory_mib" else largest
        here, above = measured(case, selection.mask), measured(case, next_mask(case, selection, kind))
        print(f"| {name} | {kind} | {asked:g} | {here} | {above} |", flush=True)


PROCESSES = 32  # eight, as settling takes, missed once what the next mask's may have
TABLES = {
    "the defaults: macs_ratio, round_to = 8": {"macs_ratio": 0.5, "round_to": 8},
    "latency_ratio, round_to = 8": {"latency_ratio": 0.5, "round_to": 8},
    'latency_ratio, round_to = "auto", no sweep kept': {"latency_ratio": 0.5},
    'latency_ratio, round_to = "auto", the sweep kept': {"latency_ratio": 0.5},
}


def table_seconds(name: str, budget: dict[str, float]) -> float:
    """Of a fresh process: the exporter's own imports are part of it, as in a run."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        return Case(name, Path(folder), budget, ENGINES[0]).price.table_seconds


def print_tables(name: str, cache: str) -> None:
    """cache: a folder for what is kept between runs."""
    os.environ["XDG_CACHE_HOME"] = cache
    print("\n| network | budget | table, s |\n|---|---|---:|")
    for told, budget in TABLES.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(f"| {name} | {told} | {pool.apply(table_seconds, (name, budget)):.1f} |", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=ENGINES)
    parser.add_argument("--part", choices=("latency", "amounts", "table"), help="otherwise all")
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as root:
        cases = {}
        for name in args.networks if args.part in (None, "latency") else ():
            for engine in args.engines:
                case = Case(name, Path(root), {"latency_ratio": 0.5}, engine)
                if engine == args.engines[0]:
                    print(f"\n{name}:\n{reach_text(case.price)}", flush=True)
                selection = case.settled()
                cases[name, engine] = case, selection, case.exported(selection.mask, "settled")
        if cases:
            print_latency(cases)
        if args.part in (None, "amounts"):
            print_amounts(args.networks[0], Path(root))
        if args.part in (None, "table"):
            print_tables(args.networks[0], str(Path(root) / "cache"))


if __name__ == "__main__":
    main()
