"""Condensed prompts of a small transformer, trained for real: accuracy against tokens kept, over seeds, with baselines.

    uv run python benchmarks/vit_prompts.py prepare -o OUT --images cifar10-jpeg.zip [--epochs 12]
    uv run python benchmarks/vit_prompts.py run -o OUT [--seeds 0,1,2] [--keep 1,0.7,0.5,0.3,0.2,0.1] [--set KEY=VALUE]
    uv run python benchmarks/vit_prompts.py table -o OUT [--page docs/results/vit-prompts]

``prepare`` parts the classes in two (by name, every second), trains ``small_vit`` on one half, and keeps the other for prompts.
``run`` is ``vpdeploy condense`` with each seed; it goes on where it stopped. ``table`` gives means and deviations over the seeds,
and each score's difference from random and from as few tokens from the start, paired by seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as MatplotlibFigure
from safetensors.torch import save_file
from side_by_side import print_machine
from small_vit import SIDE, small_vit
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vpdeploy.data.augment import augment
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.report.condensation import condensation_sheet
from vpdeploy.run_folder import read_value
from vpdeploy.sweeping.condensation import SCORES, condense
from vpdeploy.values import Condensation, CondensedPoint

HERE = Path(__file__).parent
HEAD = "no tokens, the head alone"
WRITTEN_OUT = SDPBackend.MATH  # attention to so few tokens: on a CPU a sixth of a training step faster than one kernel


# --- prepare ----------------------------------------------------------------------------------------------------------------


def part_classes(images: Path, out: Path) -> None:
    """``first.zip`` and ``others.zip``: every second class each, entries as they are."""
    with zipfile.ZipFile(images) as whole:
        entries = [name for name in whole.namelist() if name.count("/") == 2 and not name.endswith("/")]
        classes = sorted({name.split("/")[1] for name in entries})
        for part, of in (("first", classes[::2]), ("others", classes[1::2])):
            unfinished = out / f".{part}.zip"
            with zipfile.ZipFile(unfinished, "w") as archive:
                for name in entries:
                    if name.split("/")[1] in of:
                        archive.writestr(name, whole.read(name))
            unfinished.rename(out / f"{part}.zip")
            print(f"{part}: {', '.join(of)}")


def pictures(archive: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, 3, 32, 32] and the number of each one's class."""
    from PIL import Image

    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.startswith(f"{split}/"))
        classes = sorted({name.split("/")[1] for name in names})
        pixels = torch.empty(len(names), SIDE, SIDE, 3, dtype=torch.uint8)
        for number, name in enumerate(names):
            with opened.open(name) as file, Image.open(file) as image:
                data = bytearray(image.convert("RGB").tobytes())
            pixels[number] = torch.frombuffer(data, dtype=torch.uint8).view(SIDE, SIDE, 3)
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor([classes.index(name.split("/")[1]) for name in names])


def pretrain(out: Path, *, epochs: int) -> None:
    """AdamW, a cosine after one epoch of warm-up, label smoothing; in bfloat16."""
    torch.manual_seed(0)
    images, labels = pictures(out / "first.zip", "train")
    network = small_vit()
    nn.init.trunc_normal_(network.get_submodule("heads.head").get_parameter("weight"), std=0.02)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    generator, batch = torch.Generator().manual_seed(0), 128
    steps = epochs * (len(images) // batch)
    done = 0
    for epoch in range(epochs):
        began = time.perf_counter()
        for places in torch.randperm(len(images), generator=generator).split(batch):
            if len(places) < batch:
                continue
            warm = min(1.0, done * epochs / steps)
            optimizer.param_groups[0]["lr"] = 1e-3 * warm * 0.5 * (1 + math.cos(math.pi * done / steps))
            shown = normalised(augment(images[places], "crop-flip", generator=generator))
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(WRITTEN_OUT):
                loss = F.cross_entropy(network(shown).float(), labels[places], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done += 1
        print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    test, told = pictures(out / "first.zip", "test")
    network.eval()
    with torch.inference_mode():
        found = torch.cat([network(normalised(part)).argmax(1) for part in test.split(250)])
    print(f"top-1 on the test images of its classes: {(found == told).float().mean():.4f}")
    save_file(network.state_dict(), out / "vit.safetensors")


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - 0.5) / 0.5


def prepare(out: Path, images: Path, *, epochs: int) -> None:
    print_machine()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("small_vit.py", "vit_prompts.toml"):
        shutil.copy(HERE / name, out / name)
    if not (out / "others.zip").exists():
        part_classes(images, out)
    if not (out / "vit.safetensors").exists():
        pretrain(out, epochs=epochs)


# --- run --------------------------------------------------------------------------------------------------------------------


def run(out: Path, *, seeds: Sequence[int], shares: Sequence[float], given: Sequence[str]) -> None:
    print_machine()
    for seed in seeds:
        overrides = [*given, f"seed={seed}"]
        again = ["vpdeploy", "run", "vit_prompts.toml", *(word for text in overrides for word in ("--set", text))]
        with sdpa_kernel(WRITTEN_OUT):
            made = condense(
                load_recipe(out / "vit_prompts.toml", overrides),
                out / f"seed-{seed}",
                trained=None,
                shares=shares,
                scores=SCORES,
                again=again,
                display=Display(),
            )
        for row in condensation_sheet(made).rows:
            print("  ".join(cell.text for cell in row), flush=True)


# --- table ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One score and share over the seeds: top-1 in per cent. ``score``: "" for all tokens, HEAD for none."""

    score: str
    keep: float
    tokens: float
    top1: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1.values())

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else math.nan

    def against(self, other: Figure | None) -> str:
        """Mean and deviation of the differences, paired by seed."""
        differences = [self.top1[seed] - other.top1[seed] for seed in self.top1 if seed in other.top1] if other else []
        if len(differences) < 2 or other is self:
            return "–"
        return f"{statistics.mean(differences):+.2f} ± {statistics.stdev(differences):.2f}"


def figures_of(out: Path) -> list[Figure]:
    points: dict[tuple[str, float], dict[int, CondensedPoint]] = {}
    untouched: dict[int, float] = {}
    for path in sorted(out.glob("seed-*/condensation.json")):
        seed = int(path.parent.name.removeprefix("seed-"))
        for point in read_value(path, Condensation).points:
            points.setdefault((point.score, point.keep), {})[seed] = point
        arms = json.loads((path.parent / "all" / "report.json").read_bytes())["arms"]
        untouched[seed] = 100 * arms["dense"]["accuracy_top1"]
    return [
        Figure(HEAD, 0.0, 0, untouched),
        *(
            Figure(
                score,
                keep,
                statistics.mean(point.tokens for point in of.values()),
                {seed: 100 * point.accuracy_top1 for seed, point in of.items()},
            )
            for (score, keep), of in sorted(points.items(), key=lambda of: -of[0][1])
        ),
    ]


def lines(found: Sequence[Figure]) -> Iterator[str]:
    by = {(figure.score, figure.keep): figure for figure in found}
    yield "| score | kept | tokens | top-1, % | seeds | against all | against random | against from the start |"
    yield "|---|---:|---:|---:|---|---:|---:|---:|"
    for figure in found:
        others = (by.get(("", 1.0)), by.get(("random", figure.keep)), by.get(("scratch", figure.keep)))
        seeds = ", ".join(f"{top1:.2f}" for _, top1 in sorted(figure.top1.items()))
        yield (
            f"| {figure.score or 'all tokens'} | {100 * figure.keep:g} % | {figure.tokens:.0f} | {figure.mean:.2f} ± "
            f"{figure.deviation:.2f} | {seeds} | " + " | ".join(figure.against(other) for other in others) + " |"
        )


def write_page(found: Sequence[Figure], page: Path) -> None:
    """The rows as CSV, and the curve: means, and one deviation to both sides."""
    page.mkdir(parents=True, exist_ok=True)
    with (page / "results.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["score", "keep", "tokens", "seed", "top1_test"])
        for figure in found:
            table.writerows(
                [figure.score, figure.keep, figure.tokens, seed, top1] for seed, top1 in sorted(figure.top1.items())
            )
    drawn = MatplotlibFigure(figsize=(6.4, 4), layout="constrained")
    axes: Any = drawn.subplots()
    whole = next(figure for figure in found if not figure.score)
    for number, score in enumerate(dict.fromkeys(figure.score for figure in found if figure.score not in ("", HEAD))):
        line = sorted((whole, *(f for f in found if f.score == score)), key=lambda figure: figure.tokens)
        x = [figure.tokens * (1 + 0.012 * number) for figure in line]  # so that deviations stand side by side
        y, spread = [figure.mean for figure in line], [figure.deviation for figure in line]
        axes.errorbar(x, y, yerr=spread, label=score, marker="o", markersize=3, linewidth=1.2, capsize=2)
    head = next(figure for figure in found if figure.score == HEAD)
    axes.axhline(head.mean, label=HEAD, color="grey", linewidth=1, linestyle=":")
    axes.set_xlabel("tokens, of all blocks")
    axes.set_ylabel("top-1 on test, %: mean and deviation over seeds")
    axes.legend(frameon=False)
    drawn.savefig(page / "curve.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run", "table"):
        command = commands.add_parser(name)
        command.add_argument("-o", "--out", type=Path, required=True)
        if name == "prepare":
            command.add_argument("--images", type=Path, required=True)
            command.add_argument("--epochs", type=int, default=12)
        elif name == "run":
            command.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
            shares = [1.0, 0.7, 0.5, 0.3, 0.2, 0.1]
            command.add_argument("--keep", type=lambda text: [float(n) for n in text.split(",")], default=shares)
            command.add_argument("--set", action="append", default=[])
        else:
            command.add_argument("--page", type=Path)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.out, args.images, epochs=args.epochs)
    elif args.command == "run":
        run(args.out, seeds=args.seeds, shares=args.keep, given=args.set)
    else:
        found = figures_of(args.out)
        print("\n".join(lines(found)))
        if args.page is not None:
            write_page(found, args.page)


if __name__ == "__main__":
    main()
