"""Act on a plan: a smaller network from the dense one, by selection alone. No tracing, no torch-pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vpdeploy.models.attention.multihead import MultiheadAttention
from vpdeploy.models.attention.replace import apply_replacements
from vpdeploy.models.copies import empty_parts, with_modes_of
from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.plan import tensors
from vpdeploy.surgery.plan_check import check_fit
from vpdeploy.values import PrunePlan

OURS = f"{MultiheadAttention.__module__.rpartition('.')[0]}."  # where the equals of attention modules are written


def cut(backbone: nn.Module, plan: PrunePlan) -> nn.Module:
    """A new network with only what ``plan`` keeps; ``backbone`` is unchanged. Replaying a stored plan gives the same bits.

    Raises: SurgeryError listing where names or shapes differ from those the plan was made for.
    """
    backbone = with_replacements(backbone, plan)
    check_fit(backbone, plan)
    memo = empty_parts(backbone)
    # What the copy takes in place of the tensors that lose something: no whole copy is made.
    originals = tensors(backbone)
    for name, axes in plan.kept.items():
        memo[id(originals[name])] = _selected(originals[name], axes)
    pruned = with_modes_of(backbone, copy.deepcopy(backbone, memo))
    for name, values in plan.attributes.items():
        module = pruned.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, value)
    for module in pruned.modules():
        if isinstance(module, ChannelGather):
            module.reindex()
    return pruned


@torch.no_grad()
def put_back(backbone: nn.Module, smaller: nn.Module, plan: PrunePlan) -> None:
    """Give the saved tensors of ``backbone`` the values of ``smaller``, which ``cut`` made of it by ``plan``: what went stays."""
    whole, saved = tensors(backbone), backbone.state_dict()
    for name, tensor in tensors(smaller).items():
        if name not in saved:
            continue  # what a cut computes anew
        axes = plan.kept.get(name, {})
        places = [torch.tensor(axes.get(axis, range(size))) for axis, size in enumerate(whole[name].shape)]
        device = whole[name].device
        if axes:
            grid = torch.meshgrid([place.to(device) for place in places], indexing="ij")
            whole[name][tuple(grid)] = tensor.to(device)
        else:
            whole[name].copy_(tensor)


def with_replacements(backbone: nn.Module, plan: PrunePlan) -> nn.Module:
    """``backbone`` with the modules exchanged that ``plan`` expects to be; itself where they are.

    Raises: ModelError when one is not there, is of another kind or cannot be replaced.
    """
    standing = {name for name, module in backbone.named_modules() if type(module).__module__.startswith(OURS)}
    if plan.replacements.keys() <= standing:
        return backbone
    return apply_replacements(backbone, plan.replacements)


def _selected(tensor: Tensor, axes: Mapping[int, Sequence[int]]) -> Tensor:
    left = tensor.detach()
    # The axis that loses most goes first: least memory in between.
    for axis, indices in sorted(axes.items(), key=lambda item: len(item[1]) / tensor.shape[item[0]]):
        left = left.index_select(axis, torch.tensor(indices, device=tensor.device))
    if _is_channels_last(tensor):
        left = left.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
