"""The one door to torch-pruning: it removes channels from single layers, and knows which of their attributes say so.

Which channels go together is not asked of it: its dependency graph does not end on window attention and misreads
shuffles (docs/adr/0008). Its functions run on a copy without contents: shapes and attributes come out, no memory is spent. Of the
most common layers the attributes are counted here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning.ops import module2type
from torch_pruning.pruner.function import PrunerBox

from vpdeploy.models.gather import ChannelGather
from vpdeploy.values import Side

Integers = dict[str, int | tuple[int, ...]]
# Attributes that count inputs and outputs, of layers in which nothing else changes: of these types, not of types made from them.
# A network has a hundred of them, and torch-pruning, which cuts their tensors too, takes a millisecond for each.
COUNTS: dict[type[nn.Module], tuple[str, str]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, ChannelGather), ("in_channels", "out_channels")),
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("num_features", "num_features")),
}


@dataclass(frozen=True)
class Loss:
    """The positions that one axis of a layer's tensor ``leaf`` loses."""

    leaf: str
    axis: int
    side: Side
    positions: tuple[int, ...]


def attributes_after(module: nn.Module, losses: Sequence[Loss]) -> Integers:
    """The whole numbers of ``module`` that change with ``losses``, such as out_channels or normalized_shape."""
    layer = copy.copy(module)
    if not _is_counted(module):
        layer._parameters = {key: _empty(tensor) for key, tensor in module._parameters.items()}  # type: ignore[assignment]
        layer._buffers = {key: _empty(tensor) for key, tensor in module._buffers.items()}
    before = _integers(layer)
    if isinstance(layer, _ConvNd | nn.Linear):
        losses = [loss for loss in losses if loss.leaf == "weight"]  # the bias follows
    elif not isinstance(layer, ChannelGather):
        losses = losses[:1]  # a norm's tensors all lose the same
    for loss in losses:
        _remove(layer, loss)
    return {key: value for key, value in _integers(layer).items() if before.get(key) != value}


def _is_counted(layer: nn.Module) -> bool:
    return type(layer) in COUNTS and getattr(layer, "groups", 1) == 1


def _empty(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else empty


def _integers(module: nn.Module) -> Integers:
    """A module's own whole numbers, and tuples of them."""

    def plain(value: object) -> bool:
        return type(value) is int or (type(value) is tuple and all(type(item) is int for item in value))

    return {key: value for key, value in vars(module).items() if not key.startswith("_") and plain(value)}


def _remove(layer: nn.Module, loss: Loss) -> None:
    if _is_counted(layer):
        side = COUNTS[type(layer)][loss.side != "in"]
        setattr(layer, side, getattr(layer, side) - len(loss.positions))
    elif isinstance(layer, _ConvNd) and layer.groups > 1:
        _remove_grouped(layer, loss)
    else:
        pruner = PrunerBox.get(module2type(layer))
        by_itself = isinstance(layer, nn.GroupNorm) and layer.num_groups == layer.num_channels
        if pruner is not None:
            (pruner.prune_in_channels if loss.side == "in" else pruner.prune_out_channels)(layer, list(loss.positions))
        if isinstance(layer, nn.GroupNorm) and by_itself:
            layer.num_groups = layer.num_channels


def _remove_grouped(layer: _ConvNd, loss: Loss) -> None:
    """torch-pruning knows depthwise convolutions alone. Here each group loses the same positions of its inputs or of its
    outputs, or (side "both") whole groups go, with inputs and outputs.
    """
    inputs, outputs, count = layer.in_channels // layer.groups, layer.out_channels // layer.groups, len(loss.positions)
    if loss.side == "both":
        gone = count // (inputs if layer.transposed else outputs)
        layer.groups -= gone
        layer.in_channels -= gone * inputs
        layer.out_channels -= gone * outputs
    else:
        # Axis 1 holds what one group reads, or writes if transposed.
        lost = count * (layer.groups if loss.axis == 1 else 1)
        side = "in_channels" if loss.side == "in" else "out_channels"
        setattr(layer, side, getattr(layer, side) - lost)
