"""Training as a recipe does it against a bare loop over tensors in memory, in images per second.

Ours is stage 2 itself: order, augmentation, prompt, learning rates and the epoch's state on disk, from the recipe's own
images, decoded and resized as they are deployed. The bare loop runs the same network in the same precision and layout over
normalised float32 images in memory, with neither prompt nor augmentation, on the same batches of images. Whole epochs take
turns; validation is not counted.

    uv run python benchmarks/training_throughput.py [RECIPE] [--images 6400] [--rounds 4] [--set KEY=VALUE]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from side_by_side import print_machine
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.data.prepared import Images, batches, prepare
from vpdeploy.data.refs import take
from vpdeploy.data.sources import open_source
from vpdeploy.models.build import build
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal, read_history
from vpdeploy.training.compute import choose_compute
from vpdeploy.training.network import Compute, Prompted, TrainingData, build_canvas, to_pixels
from vpdeploy.training.tune import tune
from vpdeploy.values import Dense

BOUND = 0.85
QUIET = Display(quiet=True)


def training_rate(backbone: nn.Module, data: TrainingData, recipe: Recipe, compute: Compute) -> float:
    """Images per second of one epoch of stage 2, with the prompt."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal("tune", "", Path(folder) / "state.pt", Path(folder) / "history.jsonl")
        tune(
            backbone,
            data,
            prompt={},
            dense=Dense(backbone),
            classifier="fc",
            mask={},
            label_map=None,
            recipe=recipe,
            compute=compute,
            journal=journal,
            display=QUIET,
        )
        return read_history(journal.history_file)[0].images_per_second


def bare_rate(backbone: nn.Module, pixels: Tensor, labels: Tensor, recipe: Recipe, compute: Compute) -> float:
    """Images per second of SGD on the bare backbone over ``pixels``, float32 [n, 3, C, C]."""
    network = Prompted(build_canvas(recipe, prompted=False), copy.deepcopy(backbone), compute).train().backbone
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.tune.weight_lr, momentum=0.9, weight_decay=5e-4)
    began = time.perf_counter()
    for x, y in zip(pixels.split(recipe.tune.batch_size), labels.split(recipe.tune.batch_size), strict=True):
        with torch.autocast(compute.device.type, dtype=torch.bfloat16, enabled=compute.bf16):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return len(pixels) / (time.perf_counter() - began)


def in_memory(images: Images, recipe: Recipe, compute: Compute) -> Tensor:
    """Every image normalised: float32 [n, 3, C, C], in the layout in which the network trains."""
    canvas = build_canvas(recipe, prompted=False)
    (pixels,) = [x for x, _ in batches(images, torch.arange(len(images)), len(images))]
    shown = canvas(to_pixels(pixels, torch.device("cpu"))).to(compute.device)
    return shown.contiguous(memory_format=torch.channels_last) if compute.channels_last else shown


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/cifar10-resnet20.toml"))
    options.add_argument("--images", type=int, default=6400)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen = options.parse_args()
    recipe = load_recipe(
        chosen.recipe, [*chosen.set, f"data.limit_train={chosen.images}", "tune.epochs=1", "tune.distill=0"]
    )
    source = open_source(recipe.data, seed=recipe.seed)
    built = build(recipe.model, classes=len(source.classes), seed=recipe.seed, with_weights=True)
    train = prepare(source.train, recipe.input, max_bad="fail", workers=1, display=QUIET, label="training images")
    few = prepare(
        take(source.val, range(100)), recipe.input, max_bad="fail", workers=1, display=QUIET, label="validation images"
    )
    compute = choose_compute(built.backbone, recipe=recipe)
    pixels, labels = in_memory(train, recipe, compute), train.labels.to(compute.device)
    print_machine()
    print(f"{chosen.recipe.name}, {len(train)} images, batch {recipe.tune.batch_size}, {compute}")
    data, ours, bare = TrainingData(train, few, len(source.classes)), [], []
    for _ in range(chosen.rounds):
        ours.append(training_rate(built.backbone, data, recipe, compute))
        bare.append(bare_rate(built.backbone, pixels, labels, recipe, compute))
    shares = [a / b for a, b in zip(ours, bare, strict=True)]
    share = statistics.median(shares)
    print(
        f"{statistics.median(ours):.0f} images/s against {statistics.median(bare):.0f} (medians of {chosen.rounds} rounds); "
        f"share {share:.3f} (rounds {min(shares):.3f} to {max(shares):.3f}), bound {BOUND}: "
        f"{'met' if share >= BOUND else 'NOT met'}"
    )


if __name__ == "__main__":
    main()
