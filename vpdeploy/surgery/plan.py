"""Decide what every tensor loses, as data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.graph import analysable_copy, build_graph, remove
from vpdeploy.values import ChannelGroup, ChannelMask, PrunePlan


def plan(backbone: nn.Module, groups: Sequence[ChannelGroup], mask: ChannelMask, *, example: Tensor) -> PrunePlan:
    """The cuts that leave what ``mask`` keeps. example: float32 [n, 3, h, w]; ``backbone`` is unchanged.

    torch-pruning removes the channels from a shadow of the network whose tensors hold their own positions, 0, 1, 2, ...:
    what is left says which original index of every tensor and axis stays, whatever torch-pruning did to get there.

    Raises: SurgeryError when a group cannot be cut as the mask says.
    """
    shadow = analysable_copy(backbone)
    before = _integers(shadow)
    fits = tensor_shapes(shadow)
    graph = build_graph(shadow, example)
    _number_positions(shadow)
    widths: dict[str, tuple[int, int]] = {}
    for group in groups:
        keep = mask.keep.get(group.root, (True,) * group.width)
        widths[group.root] = (group.width, sum(keep))
        removed = [channel for channel, stays in enumerate(keep) if not stays]
        if removed:
            remove(graph, shadow.get_submodule(group.root), removed)
    kept = {name: axes for name, tensor in tensors(shadow).items() if (axes := _kept(name, tensor, fits[name]))}
    after = _integers(shadow)
    attributes = {
        module: changed
        for module, values in after.items()
        if (changed := {key: value for key, value in values.items() if before[module].get(key) != value})
    }
    _check_widths(shadow, groups, widths)
    return PrunePlan(fits=fits, kept=kept, attributes=attributes, widths=widths)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, the ones that are not saved too; tied tensors once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def tensor_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors(network).items()}


def _number_positions(shadow: nn.Module) -> None:
    for tensor in tensors(shadow).values():
        dtype = torch.float64 if tensor.is_floating_point() else torch.int64  # float64 counts exactly to 2^53
        tensor.data = torch.arange(tensor.numel(), dtype=dtype).view(tensor.shape)


def _kept(name: str, left: Tensor, shape: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Axis -> original indices still there, for the axes that lost some. left: positions in the original tensor."""
    if tuple(left.shape) == shape:
        return {}
    if left.ndim != len(shape) or left.numel() == 0:
        raise SurgeryError(f"{name}: {shape} became {tuple(left.shape)}; expected a smaller tensor of the same rank")
    positions = torch.unravel_index(left.detach().long(), shape)
    kept: dict[int, tuple[int, ...]] = {}
    for axis, position in enumerate(positions):
        rows = position.movedim(axis, 0).reshape(left.shape[axis], -1)
        if not bool((rows == rows[:, :1]).all()):
            raise SurgeryError(f"{name}: what is left along axis {axis} is not a choice of whole slices")
        if left.shape[axis] != shape[axis]:
            kept[axis] = tuple(int(i) for i in rows[:, 0])
    return kept


def _integers(network: nn.Module) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Every module's own whole numbers (and tuples of them): out_channels, groups, num_features, normalized_shape."""

    def plain(value: object) -> bool:
        return type(value) is int or (type(value) is tuple and all(type(item) is int for item in value))

    return {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_") and plain(value)}
        for name, module in network.named_modules()
    }


def _check_widths(shadow: nn.Module, groups: Sequence[ChannelGroup], widths: dict[str, tuple[int, int]]) -> None:
    """Requested against achieved: what torch-pruning skips it skips in silence."""
    for group in groups:
        root, (dense, wanted) = shadow.get_submodule(group.root), widths[group.root]
        got = getattr(root, "out_channels", None) or getattr(root, "out_features", None)
        if got != wanted:
            raise SurgeryError(f"{group.root}: {wanted} of {dense} channels were to stay, but {got} did")
