"""What given widths cost: MACs and parameters as closed forms, exact and quick enough for every search step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from vpdeploy.surgery.groups import tensor_axes
from vpdeploy.values import ChannelGroup

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class CostModel:
    """For each parameter tensor: entries = rest * prod over axes of (constant + share @ widths); MACs = entries * positions.

    ``share`` [2, t, g] and ``constant`` [2, t] describe two axes of each of the t tensors as a linear function of the g
    group widths; ``rest`` [t] is the product of all other axes, ``positions`` [t] how often each weight is used in one
    forward of one image (0 for what is not a product, such as biases and norms).
    """

    share: Array
    constant: Array
    rest: Array
    positions: Array
    dense_widths: Array

    def params(self, widths: Array) -> float:
        return float(self._entries(widths).sum())

    def macs(self, widths: Array) -> float:
        return float(self._entries(widths) @ self.positions)

    def channels(self, widths: Array) -> float:
        return float(widths.sum())

    def _entries(self, widths: Array) -> Array:
        axes = self.constant + self.share @ widths  # [2, t]
        return axes[0] * axes[1] * self.rest


def build_cost_model(backbone: nn.Module, groups: Sequence[ChannelGroup], *, example: Tensor) -> CostModel:
    """The cost of ``backbone`` as a function of the widths of ``groups``. example: [1, 3, C, C].

    MACs are the products of convolutions and linear layers, as ``measure.macs`` counts them.
    """
    twin = copy.deepcopy(backbone).cpu().float().eval()
    parameters = dict(twin.named_parameters())
    positions = _positions(twin, example)
    number = {name: i for i, name in enumerate(parameters)}
    share = np.zeros((len(parameters), 8, len(groups)))  # tensor, axis, group; no tensor has more than 8 axes
    length = np.ones((len(parameters), 8))
    for name, parameter in parameters.items():
        length[number[name], : parameter.ndim] = parameter.shape
    for column, group in enumerate(groups):
        for member in group.members:
            for name, axis in tensor_axes(twin, member):
                if name in number:
                    divisor = _conv_groups(twin, name) if member.side == "in" else 1
                    share[number[name], axis, column] += len(member.indices) / divisor / group.width
    return _compress(
        share, length, positions=np.array([positions.get(name, 0) for name in parameters], float), groups=groups
    )


def _compress(share: Array, length: Array, *, positions: Array, groups: Sequence[ChannelGroup]) -> CostModel:
    """At most two axes of a tensor follow a width; the others are one factor."""
    widths = np.array([group.width for group in groups], float)
    moving = (share != 0).any(axis=2)  # [t, 8]
    assert moving.sum(axis=1).max(initial=0) <= 2, "a tensor follows widths along three axes"
    order = np.argsort(~moving, axis=1, kind="stable")[:, :2]  # moving axes first
    rows = np.arange(len(length))[:, None]
    share2, length2 = share[rows, order], length[rows, order]  # [t, 2, g], [t, 2]
    constant = length2 - share2 @ widths
    rest = length.prod(axis=1) / length2.prod(axis=1)
    return CostModel(share2.transpose(1, 0, 2).copy(), constant.T.copy(), rest, positions, widths)


def _conv_groups(network: nn.Module, tensor_name: str) -> int:
    module = network.get_submodule(tensor_name.rpartition(".")[0])
    return module.groups if isinstance(module, _ConvNd) else 1


def _positions(network: nn.Module, example: Tensor) -> dict[str, int]:
    """Weight name -> how many products each of its entries takes part in for one image, by hooks on one forward."""
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                uses = output.numel() // output.shape[-1]
            else:  # a transposed convolution uses each weight once for every input position
                uses = (args[0] if isinstance(module, _ConvTransposeNd) else output)[:, 0].numel()
            found[f"{name}.weight"] = found.get(f"{name}.weight", 0) + uses // len(example)

        return hook

    readers = [(n, m) for n, m in network.named_modules() if isinstance(m, _ConvNd | nn.Linear)]
    handles = [module.register_forward_hook(count(name)) for name, module in readers]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return found
