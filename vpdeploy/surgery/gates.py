"""Gates: multiply what every reader of a group reads by the group's mask.

A gate stands at the reader's input, hence after the last norm or affine of every path from writer to reader, and after
every activation. There it equals removal exactly, whatever the path does to a constant (a sigmoid, a norm's shift), and
its gradient reaches masked channels too: before a ReLU the gradient of a channel at zero would be zero, and no channel
could come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.groups import offsets
from vpdeploy.values import ChannelGroup, ChannelMask


class _Multiply(torch.autograd.Function):
    """x * mask with the mask's gradient summed in float32, and no gradient computed that nobody asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x * mask.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, mask = ctx.saved_tensors
        (grad,) = grad_outputs
        for_x = grad * mask.to(grad.dtype) if ctx.needs_input_grad[0] else None
        for_mask = None
        if ctx.needs_input_grad[1]:
            channel = x.ndim - mask.ndim  # the mask is [c] at the last axis, or [c, 1, 1] at axis 1
            others = [axis for axis in range(x.ndim) if axis != channel]
            dtype = torch.promote_types(mask.dtype, torch.float32)
            for_mask = (grad * x).sum(dim=others, dtype=dtype).view(mask.shape)
        return for_x, for_mask


class Gated(nn.Module):
    """``backbone`` with a gate at every reader of ``groups``. The backbone given is used as it is: hand in a copy.

    Calling it takes the backbone's input and one row of gate values [channels of all groups, in order].
    """

    def __init__(self, backbone: nn.Module, groups: Sequence[ChannelGroup]):
        super().__init__()
        self.backbone = backbone
        self._values: Tensor | None = None
        self._last: Tensor | None = None
        rows = offsets(groups)
        self.channels = total = sum(group.width for group in groups)
        places: dict[str, Tensor] = {}
        for group in groups:
            for member in group.members:
                if member.side != "in":
                    continue
                reader = backbone.get_submodule(member.module)
                # Inputs that belong to no group read the constant 1 that stands after the last channel.
                place = places.setdefault(member.module, torch.full((_positions(reader),), total))
                place[list(member.indices)] = torch.tensor(member.channels) + rows[group.root].start
        for number, (name, place) in enumerate(places.items()):
            reader = backbone.get_submodule(name)
            if isinstance(reader, _ConvNd) and not reader.transposed:
                # The weight's axis is what one group reads: all read the same positions.
                place = place.repeat(reader.groups)
            self.register_buffer(f"place_{number}", place, persistent=False)
            gate = partial(self._gate, number, isinstance(reader, nn.Linear))
            reader.register_forward_pre_hook(gate, with_kwargs=True)

    def _gate(
        self, number: int, last: bool, reader: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        values = self._values
        if values is None and torch._C._current_graph_task_id() != -1:
            values = self._last  # activation checkpointing runs it again, in the backward pass
        assert values is not None, "a gated network is called through Gated"
        x, *rest = args or kwargs.values()  # readers take one tensor, by place or by name
        mask = values[getattr(self, f"place_{number}")]
        shaped = mask if last else mask.view(-1, *(1,) * (x.ndim - 2))
        return (_Multiply.apply(x, shaped), *rest), {} if not args else kwargs  # type: ignore[return-value]

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        self._values = self._last = torch.cat([values, values.new_ones(1)])
        try:
            return self.backbone(x)
        finally:
            self._values = None


def _positions(reader: nn.Module) -> int:
    """How long the axis of its weight is that it reads along."""
    if isinstance(reader, nn.Linear):
        return reader.in_features
    if isinstance(reader, _ConvNd):
        return reader.in_channels if reader.transposed else reader.in_channels // reader.groups
    assert isinstance(reader, ChannelGather), f"{type(reader).__name__} is no reader"
    return reader.in_channels


def mask_row(groups: Sequence[ChannelGroup], mask: ChannelMask, *, dtype: torch.dtype) -> Tensor:
    """The mask as one row of gate values, groups that it does not name kept whole: [channels of all groups]."""
    kept = [k for group in groups for k in mask.keep.get(group.root, (True,) * group.width)]
    return torch.tensor(kept, dtype=dtype)


def mask_of(groups: Sequence[ChannelGroup], row: Tensor) -> ChannelMask:
    """The mask that a row of gate values amounts to, 0 for what goes."""
    parts = row.split([group.width for group in groups])
    return ChannelMask({group.root: tuple((part != 0).tolist()) for group, part in zip(groups, parts, strict=True)})
