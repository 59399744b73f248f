"""Act on a plan: a smaller network from the dense one, by selection alone. No tracing, no torch-pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.models.attention.replace import apply_replacements
from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.plan import tensor_shapes, tensors
from vpdeploy.values import PrunePlan


def cut(backbone: nn.Module, plan: PrunePlan) -> nn.Module:
    """A new network with only what ``plan`` keeps; ``backbone`` is unchanged. Replaying a stored plan gives the same bits.

    Raises: SurgeryError listing where names or shapes differ from those the plan was made for.
    """
    if plan.replacements and tensor_shapes(backbone).keys() != plan.fits.keys():  # as it came, with its own attention
        backbone = apply_replacements(backbone, plan.replacements)
    _check_fit(backbone, plan)
    memo: dict[int, Any] = {}  # what the copy takes in place of the tensors that lose something: no whole copy is made
    originals = tensors(backbone)
    for name, axes in plan.kept.items():
        memo[id(originals[name])] = _selected(originals[name], axes)
    pruned = copy.deepcopy(backbone, memo)
    for name, values in plan.attributes.items():
        module = pruned.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, value)
    for module in pruned.modules():
        if isinstance(module, ChannelGather):
            module.reindex()
    return pruned


def _check_fit(backbone: nn.Module, plan: PrunePlan) -> None:
    have, want = tensor_shapes(backbone), plan.fits
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not in the plan" for name in have if name not in want]
    wrong += [
        f"{n} is {have[n]}, planned for {tuple(want[n])}" for n in want if n in have and have[n] != tuple(want[n])
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise SurgeryError(
            f"the plan does not fit network {type(backbone).__name__}: {'; '.join(wrong[:5])}{more}; "
            "use the network that the plan was made from"
        )


def _selected(tensor: Tensor, axes: Mapping[int, Sequence[int]]) -> Tensor:
    left = tensor.detach()
    for axis, indices in axes.items():
        left = left.index_select(axis, torch.tensor(indices, device=tensor.device))
    if _is_channels_last(tensor):
        left = left.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
