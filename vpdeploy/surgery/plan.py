"""Decide what every tensor loses, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.layers import Loss, attributes_after
from vpdeploy.values import ChannelGroup, ChannelMask, PrunePlan, Side


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
    lost: dict[tuple[str, int], tuple[Side, set[int]]] = {}
    widths: dict[str, tuple[int, int]] = {}
    for group in groups:
        keep = mask.keep.get(group.root, (True,) * group.width)
        widths[group.root] = (group.width, sum(keep))
        for member in group.members if not all(keep) else ():
            gone = {index for index, channel in zip(member.indices, member.channels, strict=True) if not keep[channel]}
            lost.setdefault((member.tensor, member.axis), (member.side, set()))[1].update(gone)
    shapes = tensor_shapes(backbone)
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (tensor, axis), (_, gone) in lost.items():
        stays = tuple(index for index in range(shapes[tensor][axis]) if index not in gone)
        if not stays:
            raise SurgeryError(
                f"{tensor}: all {len(gone)} positions of axis {axis} would go; keep at least one channel"
            )
        kept.setdefault(tensor, {})[axis] = stays
    return PrunePlan(
        fits=shapes, kept=kept, attributes=_attributes(backbone, lost), widths=widths, replacements=dict(replacements)
    )


def _attributes(
    backbone: nn.Module, lost: dict[tuple[str, int], tuple[Side, set[int]]]
) -> dict[str, dict[str, int | tuple[int, ...]]]:
    by_module: dict[str, list[Loss]] = {}
    for (tensor, axis), (side, gone) in lost.items():
        path, _, leaf = tensor.rpartition(".")
        by_module.setdefault(path, []).append(Loss(leaf, axis, side, tuple(sorted(gone))))
    found = {}
    for path, losses in by_module.items():
        try:
            changed = attributes_after(backbone.get_submodule(path), losses)
        except Exception as e:  # torch-pruning raises whatever it meets
            raise SurgeryError(f"{path}: torch-pruning cannot remove its channels: {type(e).__name__}: {e}") from e
        if changed:
            found[path] = changed
    return found


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, the ones that are not saved too; tied tensors once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def tensor_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors(network).items()}
