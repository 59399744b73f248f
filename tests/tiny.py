"""The smallest run that can learn: a recipe, images whose class shows, a network, and where training leaves its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.data.prepared import Images
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import with_values
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.select import build_selector
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.training.methods.task import SearchTask
from vpdeploy.training.network import Compute, TrainingData
from vpdeploy.values import ChannelGroups, Dense

SIZE, CANVAS, CLASSES = 8, 12, 3
COMPUTE = Compute(torch.device("cpu"), bf16=False, channels_last=False)
QUIET = Display(quiet=True)


def recipe(values: dict[str, Any] | None = None) -> Recipe:
    """``values``: dotted keys over the tiny recipe."""
    raw = {
        "model": {"name": "cifar_resnet20"},
        "data": {"name": "digits"},
        "input": {"image_size": SIZE, "canvas_size": CANVAS},
        "prompt": {"pixels": {"kind": "pad", "size": 2}},
        "fit": {"what": "all", "epochs": 2, "batch_size": 8, "weight_lr": 0.1},
        "search": {"method": "vpns", "epochs": 2, "batch_size": 8, "prompt_lr": 0.01},
        "budget": {"macs_ratio": 0.6, "round_to": 2},
        "tune": {"epochs": 2, "batch_size": 8, "distill": 0},
    }
    return with_values(parse_recipe(raw, where="tiny", folder=Path(".")), values or {})


def images(count: int, *, seed: int, classes: int = CLASSES) -> Images:
    """Noise in which the colour of the class is brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pixels = torch.randint(0, 128, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), labels % 3] += 96
    return Images(labels, tuple(f"{i}.png" for i in range(count)), (), pixels, None, workers=1)


def data() -> TrainingData:
    """Batches of 8 leave a smaller last one."""
    return TrainingData(train=images(28, seed=0), val=images(9, seed=1), classes=CLASSES)


class Network(nn.Module):
    """Two convolutions with norms, dropout, one linear layer ``linear``."""

    def __init__(self, *, classes: int, dropout: float):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.linear(self.dropout(F.relu(self.norm2(self.conv2(x))).mean((2, 3))))


def network(*, classes: int = CLASSES, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(classes=classes, dropout=dropout).eval()


def groups_of(backbone: nn.Module) -> ChannelGroups:
    return probe(backbone, find_groups(backbone, example_input(CANVAS)), example=example_input(CANVAS))


def task(
    backbone: nn.Module, settled: Recipe, *, prompted: bool = True, label_map: tuple[int, ...] | None = None
) -> SearchTask:
    groups = groups_of(backbone).prunable
    cost = build_cost_model(backbone, groups, example=example_input(CANVAS, batch=1))
    table = settled.budget
    selector = build_selector(
        groups,
        cost,
        budget=table.kind,
        requested=table.requested,
        round_to=table.round_to,
        max_removal=table.max_removal,
    )
    return SearchTask(Dense(backbone, label_map), groups, selector, prompted=prompted)


def journal(folder: Path, stage: str = "stage") -> Journal:
    return Journal(stage, "key", folder / f"{stage}.pt", folder / "history.jsonl")


def snapshot(network: nn.Module) -> dict[str, object]:
    """All that a stage could change of a network it was given: bits, types, flags, modes, hooks."""
    found: dict[str, object] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        found[name] = (
            tensor.dtype,
            tensor.requires_grad,
            tensor.grad is None,
            tensor.shape,
            tensor.detach().numpy().tobytes(),
        )
    for name, module in network.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._state_dict_hooks)
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | tuple)}
        found[f"module {name}"] = (type(module), plain, [len(h) for h in hooks])
    return found
