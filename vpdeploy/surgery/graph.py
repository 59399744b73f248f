"""The one door to torch-pruning: its dependency graph finds what must go together and removes it.

``DependencyGraph``, ``get_pruning_group`` and ``group.prune`` are used, never ``BasePruner``: its mutable default
arguments leak between models and keep them alive.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.models.gather import ChannelGather
from vpdeploy.values import Side


class _GatherPruner(tp.BasePruningFunc):
    """How torch-pruning cuts a ChannelGather: each side by plain selection, so the two streams stay independent."""

    def prune_out_channels(self, layer: ChannelGather, idxs: Sequence[int]) -> nn.Module:
        layer.target = _without(layer.target, idxs)
        layer.out_channels = len(layer.target)
        return layer

    def prune_in_channels(self, layer: ChannelGather, idxs: Sequence[int]) -> nn.Module:
        layer.source = _without(layer.source, idxs)
        layer.in_channels = len(layer.source)
        return layer

    def get_out_channels(self, layer: ChannelGather) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: ChannelGather) -> int:
        return layer.in_channels


def _without(tensor: Tensor, indices: Sequence[int]) -> Tensor:
    stays = torch.ones(len(tensor), dtype=torch.bool)
    stays[list(indices)] = False
    return tensor[stays.to(tensor.device)]


def analysable_copy(backbone: nn.Module) -> nn.Module:
    """A float32 CPU copy in eval mode that torch-pruning can trace: frozen parameters would be skipped in silence."""
    twin = copy.deepcopy(backbone).cpu().float().eval()
    return twin.requires_grad_(True)


def build_graph(twin: nn.Module, example: Tensor) -> tp.DependencyGraph:
    """torch-pruning's graph of ``twin`` (see ``analysable_copy``). example: float32 [n, 3, h, w].

    Raises: SurgeryError when torch-pruning cannot trace the network.
    """
    try:
        with torch.enable_grad():
            return tp.DependencyGraph().build_dependency(
                twin, example_inputs=example, customized_pruners={ChannelGather: _GatherPruner()}, verbose=False
            )
    except Exception as e:  # torch-pruning raises whatever its tracing meets
        raise SurgeryError(f"{_describe(twin)}: torch-pruning cannot analyse it: {type(e).__name__}: {e}") from e


def _describe(network: nn.Module) -> str:
    return f"network {type(network).__name__}"


def _pruner(graph: tp.DependencyGraph, module: nn.Module) -> tp.BasePruningFunc:
    pruner = graph.get_pruner_of_module(module)
    assert pruner is not None, f"torch-pruning has no rule for {type(module).__name__}"
    return pruner


def side_of(graph: tp.DependencyGraph, module: nn.Module, handler: Callable[..., object]) -> Side:
    """Whether pruning ``module`` by ``handler`` touches its outputs, its inputs or, for what passes channels through, both."""
    pruner = _pruner(graph, module)
    if pruner.prune_out_channels == pruner.prune_in_channels:
        return "both"
    return "out" if handler == pruner.prune_out_channels else "in"


def remove(graph: tp.DependencyGraph, root: nn.Module, channels: Sequence[int]) -> None:
    """Remove output channels of ``root`` and all that depends on them, in place.

    Raises: SurgeryError when that would empty a layer.
    """
    group = graph.get_pruning_group(root, _pruner(graph, root).prune_out_channels, list(channels))
    if not graph.check_pruning_group(group):
        raise SurgeryError(f"removing {len(channels)} channels would empty a layer")
    group.prune()
