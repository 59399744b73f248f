"""Decide what every tensor loses, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.layers import Integers, Loss, attributes_after
from vpdeploy.values import ChannelGroup, ChannelMask, PrunePlan, Side

Flags = np.ndarray[Any, np.dtype[np.bool_]]


def plan(
    backbone: nn.Module,
    groups: Sequence[ChannelGroup],
    mask: ChannelMask,
    *,
    replacements: Mapping[str, str] = MappingProxyType({}),
) -> PrunePlan:
    """The cuts that leave what ``mask`` keeps; ``backbone`` is unchanged. ``replacements``: what was exchanged in it before.

    Raises: SurgeryError when an axis would be left empty, or a layer cannot lose what it has to.
    """
    shapes = tensor_shapes(backbone)
    lost: dict[tuple[str, int], tuple[Side, Flags]] = {}
    widths: dict[str, tuple[int, int]] = {}
    for group in groups:
        keep = np.array(mask.keep.get(group.root, (True,) * group.width))
        widths[group.root] = (group.width, int(keep.sum()))
        for member in group.members if not keep.all() else ():
            place = (member.tensor, member.axis)
            _, gone = lost.setdefault(place, (member.side, np.zeros(shapes[member.tensor][member.axis], bool)))
            gone[list(member.indices)] |= ~keep[list(member.channels)]
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (tensor, axis), (_, gone) in lost.items():
        if gone.all():
            raise SurgeryError(
                f"{tensor}: all {len(gone)} positions of axis {axis} would go; keep at least one channel"
            )
        kept.setdefault(tensor, {})[axis] = tuple(np.flatnonzero(~gone).tolist())
    return PrunePlan(
        fits=shapes, kept=kept, attributes=_attributes(backbone, lost), widths=widths, replacements=dict(replacements)
    )


def _attributes(backbone: nn.Module, lost: Mapping[tuple[str, int], tuple[Side, Flags]]) -> dict[str, Integers]:
    by_module: dict[str, list[Loss]] = {}
    for (tensor, axis), (side, gone) in lost.items():
        path, _, leaf = tensor.rpartition(".")
        by_module.setdefault(path, []).append(Loss(leaf, axis, side, tuple(np.flatnonzero(gone).tolist())))
    found = {path: attributes_of(backbone, path, losses) for path, losses in by_module.items()}
    return {path: changed for path, changed in found.items() if changed}


def attributes_of(backbone: nn.Module, path: str, losses: Sequence[Loss]) -> Integers:
    """``surgery.layers.attributes_after`` of the module ``path``. Raises: SurgeryError when it cannot lose that."""
    try:
        return attributes_after(backbone.get_submodule(path), losses)
    except Exception as e:  # torch-pruning raises whatever it meets
        raise SurgeryError(f"{path}: torch-pruning cannot remove its channels: {type(e).__name__}: {e}") from e


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, the ones that are not saved too; tied tensors once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def tensor_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors(network).items()}
