"""What single layers are after they lost channels: the attributes say what the tensors are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.layers import COUNTS, Integers, Loss, attributes_after
from vpdeploy.values import Side


def loss(leaf: str, axis: int, side: Side, *positions: int) -> Loss:
    return Loss(leaf, axis, side, positions)


def norm(*positions: int, leaves: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var")) -> list[Loss]:
    return [loss(leaf, 0, "both", *positions) for leaf in leaves]


AFFINE = ("weight", "bias")
CASES: dict[str, tuple[Callable[[], nn.Module], list[Loss], Integers]] = {
    "outputs of a convolution, and its bias": (
        lambda: nn.Conv2d(6, 8, 3),
        [loss("weight", 0, "out", 0, 7), loss("bias", 0, "both", 0, 7)],
        {"out_channels": 6},
    ),
    "inputs of a convolution": (lambda: nn.Conv2d(6, 8, 3), [loss("weight", 1, "in", 5)], {"in_channels": 5}),
    "both sides": (
        lambda: nn.Conv1d(6, 8, 3),
        [loss("weight", 1, "in", 1, 2), loss("weight", 0, "out", 0), loss("bias", 0, "both", 0)],
        {"in_channels": 4, "out_channels": 7},
    ),
    "a transposed convolution, whose axes are swapped": (
        lambda: nn.ConvTranspose2d(6, 8, 3),
        [loss("weight", 0, "in", 1), loss("weight", 1, "out", 2, 3, 4), loss("bias", 0, "both", 2, 3, 4)],
        {"in_channels": 5, "out_channels": 5},
    ),
    "a linear layer": (
        lambda: nn.Linear(6, 8),
        [loss("weight", 1, "in", 1), loss("weight", 0, "out", 2, 3), loss("bias", 0, "both", 2, 3)],
        {"in_features": 5, "out_features": 6},
    ),
    "a depthwise convolution": (
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        [loss("weight", 0, "both", 1, 4), loss("bias", 0, "both", 1, 4)],
        {"groups": 4, "in_channels": 4, "out_channels": 4},
    ),
    "a depthwise convolution with a multiplier": (
        lambda: nn.Conv2d(6, 12, 3, groups=6),
        [loss("weight", 0, "both", 2, 3), loss("bias", 0, "both", 2, 3)],
        {"groups": 5, "in_channels": 5, "out_channels": 10},
    ),
    "whole groups": (
        lambda: nn.Conv2d(8, 12, 3, groups=4),
        [loss("weight", 0, "both", 0, 1, 2, 6, 7, 8), loss("bias", 0, "both", 0, 1, 2, 6, 7, 8)],
        {"groups": 2, "in_channels": 4, "out_channels": 6},
    ),
    "whole groups of a transposed convolution": (
        lambda: nn.ConvTranspose2d(8, 12, 3, groups=4),
        [loss("weight", 0, "both", 2, 3), loss("bias", 0, "both", 3, 4, 5)],
        {"groups": 3, "in_channels": 6, "out_channels": 9},
    ),
    "positions of the inputs of each group": (
        lambda: nn.Conv2d(8, 12, 3, groups=2),
        [loss("weight", 1, "in", 3)],
        {"in_channels": 6},
    ),
    "positions of the outputs of each group": (
        lambda: nn.Conv2d(8, 12, 3, groups=2),
        [loss("weight", 0, "out", 0, 6), loss("bias", 0, "both", 0, 6)],
        {"out_channels": 10},
    ),
    "positions of each group of a transposed convolution": (
        lambda: nn.ConvTranspose2d(8, 12, 3, groups=2),
        [loss("weight", 0, "in", 0, 4), loss("weight", 1, "out", 5), loss("bias", 0, "both", 5, 11)],
        {"in_channels": 6, "out_channels": 10},
    ),
    "a batch norm, once though four tensors lose": (lambda: nn.BatchNorm2d(6), norm(0, 3), {"num_features": 4}),
    "a batch norm without parameters": (
        lambda: nn.BatchNorm2d(6, affine=False),
        norm(5, leaves=("running_mean", "running_var")),
        {"num_features": 5},
    ),
    "a layer norm": (lambda: nn.LayerNorm(6), norm(1, leaves=AFFINE), {"normalized_shape": (5,)}),
    "a group norm": (lambda: nn.GroupNorm(2, 6), norm(0, 3, leaves=AFFINE), {"num_channels": 4}),
    "a group norm of each channel by itself": (
        lambda: nn.GroupNorm(6, 6),
        norm(0, leaves=AFFINE),
        {"num_channels": 5, "num_groups": 5},
    ),
    "slopes": (lambda: nn.PReLU(6), [loss("weight", 0, "both", 2)], {"num_parameters": 5}),
    "both sides of a gather": (
        lambda: ChannelGather(4, 6, stride=1),
        [loss("source", 0, "in", 0), loss("target", 0, "out", 1, 5)],
        {"in_channels": 3, "out_channels": 4},
    ),
    "a module of the user's own": (lambda: Scale(), [loss("scale", 0, "both", 1)], {}),
}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.width = nn.Parameter(torch.ones(6)), 6


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_that_change(name):
    make, losses, expected = CASES[name]
    layer = make()
    before = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    tensors = {key: (tensor.shape, tensor.device.type, tensor.clone()) for key, tensor in layer.state_dict().items()}
    assert attributes_after(layer, losses) == expected
    # The layer itself is as it was.
    assert {key: value for key, value in vars(layer).items() if not key.startswith("_")} == before
    for key, tensor in layer.state_dict().items():
        shape, device, values = tensors[key]
        assert (tensor.shape, tensor.device.type) == (shape, device) and torch.equal(tensor, values)


@pytest.mark.parametrize("name", [name for name in CASES if type(CASES[name][0]()) in COUNTS and "gather" not in name])
def test_torch_pruning_says_the_same_of_layers_that_are_only_counted(name):
    make, losses, expected = CASES[name]
    layer = make()
    layer.__class__ = type("Made", (type(layer),), {})
    assert type(layer) not in COUNTS and attributes_after(layer, losses) == expected


RUNS = {name: case for name, case in CASES.items() if "user" not in name and "gather" not in name}


@pytest.mark.parametrize("name", RUNS)
def test_with_these_numbers_and_what_is_left_of_its_tensors_the_layer_is_one_made_anew(name):
    """Cut by hand: a layer with the new attributes takes an input of the new width and gives one of the new width."""
    make, losses, _ = RUNS[name]
    layer = make().eval()
    for key, value in attributes_after(layer, losses).items():
        setattr(layer, key, value)
    for one in losses:
        tensor = getattr(layer, one.leaf)
        stays = torch.tensor([i for i in range(tensor.shape[one.axis]) if i not in one.positions])
        tensor.data = tensor.data.index_select(one.axis, stays)
    if isinstance(layer, nn.modules.conv._ConvNd):
        groups, transposed = layer.groups, layer.transposed
        inputs, outputs = (0, 1) if transposed else (1, 0)
        assert layer.weight.shape[inputs] * (1 if transposed else groups) == layer.in_channels
        assert layer.weight.shape[outputs] * (groups if transposed else 1) == layer.out_channels
        x = torch.randn(2, layer.in_channels, *[7] * (layer.weight.ndim - 2))
        assert layer(x).shape[1] == layer.out_channels
        assert layer.bias is None or len(layer.bias) == layer.out_channels
    elif isinstance(layer, nn.Linear):
        assert layer(torch.randn(2, layer.in_features)).shape == (2, layer.out_features)
    elif isinstance(layer, nn.LayerNorm):
        assert layer(torch.randn(2, *layer.normalized_shape)).shape == (2, *layer.normalized_shape)
    else:
        width = next(tensor for tensor in layer.state_dict().values() if tensor.ndim).numel()
        assert layer(torch.randn(2, width, 3, 3)).shape == (2, width, 3, 3)


def test_no_memory_is_spent():
    """A layer of 40 GB in name only: the functions that remove channels run on its shape."""
    with torch.device("meta"):
        layer = nn.Linear(100_000, 100_000)
    assert attributes_after(layer, [loss("weight", 1, "in", *range(1000))]) == {"in_features": 99_000}
