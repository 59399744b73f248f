"""Two ways to the same groups: where torch-pruning's dependency graph is right, it finds the partition that the labels do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_pruning
import torchvision
from strategies import FAMILIES, SIDE
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vpdeploy.surgery.groups import example_input, find_groups

Place = tuple[str, str, int]  # a layer, "out" or "in", and the position there
# Nothing but convolutions, batch norms, linear layers, sums, concatenations, scales and flattening.
PLAIN = ("residual", "dense-block", "separable", "pre-activation", "flattened")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (lambda name=name: FAMILIES[name]((4, 5, 6, 7), nn.ReLU), SIDE) for name in PLAIN},
    "resnet18": (torchvision.models.resnet18, 64),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 64),
    "densenet121": (torchvision.models.densenet121, 64),
}


def layers(network: nn.Module) -> dict[nn.Module, str]:
    """Those that write and read channels apart."""
    return {
        module: name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)
    }


def by_labels(network: nn.Module, example: Tensor) -> set[frozenset[Place]]:
    """Every channel of every group, the excluded ones too, as what it is in each layer."""
    names = set(layers(network).values())
    channels = set()
    for group in find_groups(network, example).groups:
        places: list[set[Place]] = [set() for _ in range(group.width)]
        for member in group.members:
            if member.module in names and member.tensor.endswith("weight"):
                for index, channel in zip(member.indices, member.channels, strict=True):
                    places[channel].add((member.module, member.side, index))
        channels |= {frozenset(place) for place in places}
    return channels


def by_dependencies(network: nn.Module, example: Tensor) -> set[frozenset[Place]]:
    """The same of torch-pruning's graph."""
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(network, example_inputs=example)
    named = layers(network)
    channels: set[frozenset[Place]] = set()
    for group in graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear)):
        places: dict[int, set[Place]] = {}
        for item in group:
            module = item.dep.target.module
            if module in named:
                side = "in" if graph.is_in_channel_pruning_fn(item.dep.handler) else "out"
                for index, root in zip(item.idxs, item.root_idxs, strict=True):
                    places.setdefault(root, set()).add((named[module], side, index))
        channels |= {frozenset(place) for place in places.values()}
    return channels


@pytest.mark.parametrize("name", NETWORKS)
def test_both_find_the_same_channels(name):
    make, side = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().eval()
    example = example_input(side, batch=1)
    ours, theirs = by_labels(network, example), by_dependencies(network, example)
    assert ours == theirs
    written = sum(module.weight.shape[0] for module in layers(network))  # type: ignore[index]
    assert sum(kind == "out" for channel in ours for _, kind, _ in channel) == written  # none is left out by both
