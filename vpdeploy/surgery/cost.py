"""What given widths cost: MACs and parameters as closed forms, exact and quick enough for every search step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vpdeploy.surgery.groups import tensor_axes
from vpdeploy.values import ChannelGroup

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class CostModel:
    """For each parameter tensor: entries = rest * prod over axes of (constant + share @ widths); MACs = entries * positions,
    and ``other_macs`` on top: products that no convolution or linear layer makes, such as attention's. Parameters are all
    entries and ``other_params``, at most 0: a weight that is computed, or another layer's, counts no parameters of its own.

    ``told[i]``: whether the products of group i are those of its layers; otherwise some may be among ``other_macs``.

    ``share`` [2, t, g] and ``constant`` [2, t] describe two axes of each of the t tensors as a linear function of the g
    group widths; ``rest`` [t] is the product of all other axes, ``positions`` [t] how often each weight is used in one
    forward of one image (0 for what is not a product, such as biases and norms).
    """

    share: Array
    constant: Array
    rest: Array
    positions: Array
    dense_widths: Array
    other_macs: float = 0.0
    other_params: float = 0.0
    told: tuple[bool, ...] = ()

    def params(self, widths: Array) -> float:
        return float(self._entries(widths).sum()) + self.other_params

    def macs(self, widths: Array) -> float:
        return float(self._entries(widths) @ self.positions) + self.other_macs

    def channels(self, widths: Array) -> float:
        return float(widths.sum())

    def _entries(self, widths: Array) -> Array:
        axes = self.constant + self.share @ widths  # [2, t]
        return axes[0] * axes[1] * self.rest


def build_cost_model(backbone: nn.Module, groups: Sequence[ChannelGroup], *, example: Tensor) -> CostModel:
    """The cost of ``backbone`` as a function of the widths of ``groups``. example: [1, 3, C, C].

    MACs are the products of convolutions, linear layers and attention, as ``measure.macs`` counts them. Those made outside
    the modules (attention, functional calls on bare parameters) cannot be told from widths and stay as they are when dense:
    where they would shrink, the cut network costs less than is said here, never more.
    """
    twin = copy.deepcopy(backbone).cpu().float().eval()
    stored = {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()}
    positions, products = _products(twin, example)
    # Weights in use that are no parameters under this name: computed from others (parametrizations), or tied.
    shapes = stored | {name: tuple(_tensor(twin, name).shape) for name in positions if name not in stored}
    number = {name: i for i, name in enumerate(shapes)}
    share = np.zeros((len(shapes), 8, len(groups)))  # tensor, axis, group; no tensor has more than 8 axes
    length = np.ones((len(shapes), 8))
    for name, shape in shapes.items():
        length[number[name], : len(shape)] = shape
    for column, group in enumerate(groups):
        for member in group.members:
            for name, axis in tensor_axes(twin, member):
                if name in number:
                    divisor = _conv_groups(twin, name) if member.side == "in" else 1
                    share[number[name], axis, column] += len(member.indices) / divisor / group.width
    used = np.array([positions.get(name, 0) for name in shapes], float)
    cost = _compress(share, length, positions=used, groups=groups)
    other_macs = max(0.0, products - cost.macs(cost.dense_widths))
    other_params = sum(math.prod(shape) for shape in stored.values()) - cost.params(cost.dense_widths)
    told = tuple(other_macs == 0 or all(_is_told(twin, m.module, positions) for m in g.members) for g in groups)
    return replace(cost, other_macs=other_macs, other_params=other_params, told=told)


def _tensor(network: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(path), leaf)


def _is_told(network: nn.Module, name: str, positions: Mapping[str, int]) -> bool:
    """Whether no product of ``name`` can be outside the layers that were called: one on a bare weight can (attention)."""
    if f"{name}.weight".lstrip(".") in positions:
        return True
    module = dict(network.named_modules()).get(name)
    own = list(module.parameters()) if module is not None else [network.get_parameter(name)]
    return all(sum(size > 1 for size in tensor.shape) < 2 for tensor in own)  # a scale for each channel makes none


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


def _products(network: nn.Module, example: Tensor) -> tuple[dict[str, int], float]:
    """One forward: weight name -> how many products each entry takes part in for one image, and all products of one image."""
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                uses = output.numel() // output.shape[-1]
            else:  # a transposed convolution uses each weight once for every input position
                uses = (args[0] if isinstance(module, _ConvTransposeNd) else output)[:, 0].numel()
            weight = f"{name}.weight".lstrip(".")  # the network may be one layer
            found[weight] = found.get(weight, 0) + uses // len(example)

        return hook

    readers = [(n, m) for n, m in network.named_modules() if isinstance(m, _ConvNd | nn.Linear)]
    handles = [module.register_forward_hook(count(name)) for name, module in readers]
    network.requires_grad_(True)  # or nn.MultiheadAttention takes a fused path, whose products are not seen
    # As plain products, because torch 2.11 has no formula for the CPU's own attention.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _ProductCounter() as counter:
        network(example)
    for handle in handles:
        handle.remove()
    return found, counter.operations / 2 / len(example)  # torch counts a product and a sum as two


class _ProductCounter(TorchDispatchMode):
    """torch's formulas over every operation that runs, as its own FlopCounterMode does, without its seconds of imports."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; the wrapper that would hide this mode imports torch._dynamo, 5 s

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=output)
        return output
