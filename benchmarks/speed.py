"""MACs against milliseconds: networks cut by vpdeploy beside ones laid out by hand, and beside Torch-Pruning's plain pruner.

    uv run python benchmarks/speed.py [NETWORK...] [--threads 1,2] [--batches 1,8] [--engine onnxruntime-cpu] [--precision fp32]
    uv run python benchmarks/speed.py --engine torch-cudagraphs --threads 1 --batches 1,32,256   # on a GPU; fp16, bf16

Random weights, 224 pixels, exact groups alone. Of each network and MACs ratio:

- ours: the budget macs_ratio with round_to = "auto" and speed = true, priced at the row's thread count and batch 1;
  importances are drawn from a log-normal of sigma 1 (untrained networks have none of their own), as
  ``search.score_init = "taylor"`` weighs them;
- by hand: every group at the same share of its width, rounded to 8, 16 or 32, at our MACs (to 3 %): the fastest of the three;
- Torch-Pruning: its MagnitudePruner at a uniform ratio, nothing rounded, at our MACs.

All are exported and run in turns with the dense network; factors are medians of dense over medians of theirs.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch_pruning
import torchvision
from side_by_side import print_machine
from torch import nn

from vpdeploy import pipeline
from vpdeploy.measure.arms import image_shape
from vpdeploy.measure.engines import Setting, Subject
from vpdeploy.measure.environment import environment
from vpdeploy.measure.factors import latency_factor
from vpdeploy.measure.inputs import random_images
from vpdeploy.measure.latency import measure_latency
from vpdeploy.measure.macs import count_macs
from vpdeploy.pricing.candidates import Candidates
from vpdeploy.pricing.network import Network
from vpdeploy.pricing.price import selector_at
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.select import Selector, allowed_widths, prices, select
from vpdeploy.surgery.cost import Array, CostModel
from vpdeploy.values import ChannelGroup, ChannelGroups, Price
from vpdeploy.workbench import Workbench, open_workbench

NETWORKS = ("mobilenet_v2", "resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16")
RATIOS = (0.5, 0.25)
BY_HAND = (8, 16, 32)


def recipe_of(name: str, folder: Path, target: Mapping[str, object] = MappingProxyType({}), **budget: object) -> Recipe:
    raw = {
        "model": {"name": f"torchvision:{name}"},
        "data": {"name": "digits"},
        "input": {"image_size": 224},
        "prompt": {"pixels": {"kind": "none"}},
        "search": {"method": "vpns", "score_init": "taylor"},
        "budget": {"round_to": "auto", "speed": True, **budget},
        "target": dict(target),
        "compute": {"precision": "fp32", "channels_last": "no"},
    }
    return parse_recipe(raw, where="benchmark", folder=folder)


def our_widths(selector: Selector) -> Array:
    """Of importances that are drawn, and ranked for their price."""
    generator = np.random.default_rng(0)
    scores, price = {}, np.maximum(prices(selector), 1e-12)
    for root, width, cost in zip(selector.roots, selector.dense_widths, price, strict=True):
        scores[root] = np.log(generator.lognormal(sigma=1.0, size=int(width)) / cost)
    kept = select(selector, scores).mask.widths()
    return np.array([kept[root] for root in selector.roots], float)


def hand_widths(groups: tuple[ChannelGroup, ...], cost: CostModel, macs: float, round_to: int) -> Array:
    """The same share of every group, rounded, whose MACs are nearest to ``macs``."""
    allowed = [
        np.array(allowed_widths(g.width, unit=g.unit, round_to=round_to, max_removal=0.9, steps=1), float)
        for g in groups
    ]
    rows = [
        np.array([row[np.abs(row - share * row[-1]).argmin()] for row in allowed]) for share in np.linspace(0.1, 1, 400)
    ]
    return min(rows, key=lambda row: abs(cost.macs(row) - macs))


def plain_torch_pruning(network: nn.Module, macs: float) -> nn.Module:
    """Its pruner at the uniform ratio that comes nearest to ``macs``, found by bisection; nothing is rounded."""
    low, high, best = 0.0, 0.95, (np.inf, network)
    for _ in range(10):
        middle = (low + high) / 2
        pruned = _pruned(network, middle)
        left = count_macs(pruned, canvas_size=224).macs
        best = min(best, (abs(left - macs), pruned), key=lambda pair: pair[0])
        low, high = (middle, high) if left > macs else (low, middle)
    return best[1]


def _pruned(network: nn.Module, ratio: float) -> nn.Module:
    small, example = copy.deepcopy(network).requires_grad_(True), torch.zeros(1, 3, 224, 224)
    last = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    heads: dict[nn.Module, int] = {
        module: module.num_heads for module in small.modules() if isinstance(module, nn.MultiheadAttention)
    }
    pruner = torch_pruning.pruner.MagnitudePruner(
        small,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
        num_heads=heads,
        root_module_types=[nn.Conv2d, nn.Linear],
    )
    pruner.step()
    return small.eval().requires_grad_(False)


def subjects_of(name: str, folder: Path, settings: list[Setting]) -> Iterator[tuple[str, Subject, float]]:
    """("dense", "ours 0.5 for 1", ..., what runs, its MACs). Ours are priced at the thread count that they are for."""
    priced = {setting.threads: _priced(name, folder, setting) for setting in settings}
    work, groups, _ = next(iter(priced.values()))
    (files := folder / f"{name}-files").mkdir()
    candidates = Candidates(work, groups, files, form="float", prompted=False)
    network = Network.of(work, groups)
    candidates.check(network.narrowest(8))
    macs_at = network.cost.macs
    dense = network.cost.dense_widths
    yield "dense", candidates.subject(dense), macs_at(dense)
    for ratio in RATIOS:
        asked = replace(network, recipe=recipe_of(name, folder, macs_ratio=ratio))
        macs = 0.0
        for count, (_, _, price) in priced.items():
            widths = our_widths(selector_at(price, asked))
            macs = macs or macs_at(widths)
            yield f"ours {ratio:g} for {count}", candidates.subject(widths), macs_at(widths)
        for round_to in BY_HAND:
            row = hand_widths(groups.prunable, network.cost, macs, round_to)
            yield f"hand {ratio:g} ({round_to})", candidates.subject(row), macs_at(row)
        yield from _torch_pruning_subject(work, candidates, macs, ratio)


def _priced(name: str, folder: Path, setting: Setting) -> tuple[Workbench, ChannelGroups, Price]:
    recipe = recipe_of(name, folder, macs_ratio=min(RATIOS), target=asdict(setting))
    work = open_workbench(recipe, folder / f"{name}-{setting.threads}", redo=None, display=Display(quiet=True))
    groups = pipeline.grouped(work)
    return work, groups, pipeline.priced(work, groups)


def _torch_pruning_subject(
    work: Workbench, candidates: Candidates, macs: float, ratio: float
) -> Iterator[tuple[str, Subject, float]]:
    name = work.recipe.model.name.partition(":")[2]
    plain = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    try:
        pruned = plain_torch_pruning(plain, macs)
        path = candidates.folder / f"torch-pruning-{ratio:g}.onnx"
        candidates.export(pruned, path)
        module = partial(candidates.deployable, pruned, prompted=False)
        yield f"torch-pruning {ratio:g}", Subject(path, module), float(count_macs(pruned, canvas_size=224).macs)
    except Exception as e:  # whatever it raises is its answer
        print(f"{name}, {ratio:g}: Torch-Pruning: {type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''}")


def rows_of(name: str, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    settings = [Setting(args.engine, threads=threads, precision=args.precision) for threads in args.threads]
    found = list(subjects_of(name, folder, settings))
    macs = {label: count for label, _, count in found}
    for setting in settings:
        for batch in args.batches:
            shape = image_shape("float", recipe_of(name, folder, macs_ratio=0.5))
            timed = measure_latency(
                {label: subject for label, subject, _ in found},
                random_images("float", shape, batch=batch, seed=0),
                form="float",
                setting=replace(setting, batch=batch),
                seconds=args.seconds,
            ).latencies
            dense = timed["dense"]
            for label, row in timed.items():
                factor = latency_factor(dense, row, seed=0)
                yield {
                    "network": name, "what": label, "engine": args.engine, "precision": args.precision,
                    "threads": setting.threads, "batch": batch,
                    "macs_factor": macs["dense"] / macs[label], "p50_ms": row.p50_ms, "factor": factor.factor,
                    "interval": factor.interval,
                }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown: a line for each network, ratio, threads and batch."""
    lines = [
        "| network | MACs ratio | threads | batch | dense, ms | ours, ms | MACs | measured | share of theory | by hand "
        "| ours / by hand | Torch-Pruning | ours / Torch-Pruning |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    keys = dict.fromkeys((r["network"], r["threads"], r["batch"]) for r in rows)
    for network, threads, batch in keys:
        here = {r["what"]: r for r in rows if (r["network"], r["threads"], r["batch"]) == (network, threads, batch)}
        for ratio in RATIOS:
            ours = here[f"ours {ratio:g} for {threads}"]
            hand = fastest([r for k, r in here.items() if k.startswith(f"hand {ratio:g} ")], ours["macs_factor"])
            plain = here.get(f"torch-pruning {ratio:g}")
            low, high = ours["interval"]
            lines.append(
                f"| {network} | {ratio:g} | {threads} | {batch} | {here['dense']['p50_ms']:.2f} "
                f"| {ours['p50_ms']:.2f} | {ours['macs_factor']:.2f}x "
                f"| {ours['factor']:.2f}x ({low:.2f} to {high:.2f}) | {ours['factor'] / ours['macs_factor']:.2f} "
                f"| {hand['factor']:.2f}x ({hand['macs_factor']:.2f}x MACs) | {ours['factor'] / hand['factor']:.2f} | "
                + (
                    f"{plain['factor']:.2f}x ({plain['macs_factor']:.2f}x MACs) | {ours['factor'] / plain['factor']:.2f} |"
                    if plain
                    else "does not run | |"
                )
            )
    return "\n".join(lines)


def fastest(rows: list[dict], macs_factor: float) -> dict:
    """Of networks with the same MACs, to 3 %; where rounding leaves none of these, the one that comes nearest."""
    alike = [row for row in rows if abs(row["macs_factor"] / macs_factor - 1) <= 0.03]
    if not alike:
        return min(rows, key=lambda row: abs(row["macs_factor"] / macs_factor - 1))
    return max(alike, key=lambda row: row["factor"])


def main() -> None:
    warnings.simplefilter("ignore")
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print_machine()
    rows: list[dict] = []
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(name, args, Path(folder))
        if args.out:
            args.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
        print(table([row for row in rows if row["network"] == name]), flush=True)


if __name__ == "__main__":
    main()
