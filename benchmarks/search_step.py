"""A step of the search against a plain training step of the same batch: ResNet-18 at 224.

Both start from the same uint8 images. The plain step normalises them and trains every weight, without prompt and gates.
The search step adds the prompt, finds the budget's mask, gates every reader, and updates scores and prompt.

    uv run python benchmarks/search_step.py [--batch 16] [--seconds 60] [--precision fp32|bf16]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from side_by_side import print_machine, print_ratio
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.select import build_selector
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.training.compute import choose_compute
from vpdeploy.training.methods.learned import search_step
from vpdeploy.training.network import Compute, Prompted, build_canvas, to_pixels

SIDE, CLASSES, BOUND = 224, 1000, 0.9
Step = Callable[[Tensor, Tensor], None]


def plain_step(backbone: nn.Module, recipe: Recipe, compute: Compute) -> Step:
    """One step of SGD on every weight."""
    network = Prompted(build_canvas(recipe, prompted=False), copy.deepcopy(backbone), compute).train()
    optimizer = torch.optim.SGD(network.backbone.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(pixels: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(network(to_pixels(pixels, compute.device)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def searching_step(backbone: nn.Module, recipe: Recipe, compute: Compute) -> Step:
    """One step of Adam on scores and prompt, the weights frozen."""
    assert isinstance(recipe.budget.round_to, int)
    groups = probe(backbone, find_groups(backbone, example_input(SIDE)), example=example_input(SIDE)).prunable
    selector = build_selector(
        groups,
        build_cost_model(backbone, groups, example=example_input(SIDE, batch=1)),
        budget=recipe.budget.kind,
        requested=recipe.budget.requested,
        round_to=recipe.budget.round_to,
        max_removal=recipe.budget.max_removal,
    )
    frozen = copy.deepcopy(backbone).requires_grad_(False)
    network = Prompted(build_canvas(recipe, prompted=True), Gated(frozen, groups), compute).train()
    by_root = magnitude(backbone, groups)
    scores = torch.cat([by_root[group.root] for group in groups]).to(compute.device).requires_grad_(True)
    optimizer = torch.optim.Adam([scores, *network.canvas.parameters()], lr=1e-3)

    def step(pixels: Tensor, labels: Tensor) -> None:
        loss = search_step(network, scores, selector, to_pixels(pixels, compute.device), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--seconds", type=float, default=60, help="of each of the two")
    options.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    chosen = options.parse_args()
    recipe = Recipe.model_validate(
        {
            "model": {"name": "torchvision:resnet18"},
            "data": {"name": "digits"},
            "input": {"image_size": SIDE},
            "prompt": {"pixels": {"kind": "pad", "size": 16}},
            "budget": {"macs_ratio": 0.5},
            "tune": {"batch_size": chosen.batch},
            "compute": {"precision": chosen.precision},
        }
    )
    torch.manual_seed(0)
    backbone = resnet18(num_classes=CLASSES)
    compute = choose_compute(backbone, recipe=recipe)
    pixels = torch.randint(0, 256, (chosen.batch, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (chosen.batch,)).to(compute.device)
    plain, searching = (make(backbone, recipe, compute) for make in (plain_step, searching_step))
    print_machine()
    print(f"ResNet-18 at {SIDE}, batch {chosen.batch}, {compute}, {torch.get_num_threads()} threads")
    print_ratio(
        "search step / training step",
        lambda: searching(pixels, labels),
        lambda: plain(pixels, labels),
        bound=BOUND,
        seconds=chosen.seconds,
    )


if __name__ == "__main__":
    main()
