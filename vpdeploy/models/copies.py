"""Copies of networks that share their tensors, or hold other ones."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Convert = Callable[[Tensor], Tensor]


def copied(network: nn.Module, convert: Convert = lambda tensor: tensor) -> nn.Module:
    """A copy of ``network`` that shares its parameters, but for those that ``convert`` makes anew.

    Hooks and modes of the copy do not reach ``network``, nor do buffers that its forward writes; a large network is not in
    memory twice.

    Raises: whatever a part of the network that is no module, parameter or buffer raises when it is copied.
    """
    memo = empty_parts(network)
    for parameter in network.parameters():
        values = parameter.detach()
        changed = convert(values)
        own = changed is not values
        memo[id(parameter)] = nn.Parameter(changed, requires_grad=parameter.requires_grad) if own else parameter
    for buffer in network.buffers():
        values = buffer.detach()
        changed = convert(values)
        memo[id(buffer)] = values.clone() if _same_memory(changed, values) else changed
    return with_modes_of(network, copy.deepcopy(network, memo))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or a.untyped_storage()._cdata == b.untyped_storage()._cdata


def with_modes_of(network: nn.Module, twin: nn.Module) -> nn.Module:
    """``twin`` with every module in training or eval mode as in ``network``: a module of torch.fx forgets its own when it is
    copied.
    """
    modes = {name: module.training for name, module in network.named_modules()}
    for name, module in twin.named_modules():
        module.training = modes.get(name, module.training)
    return twin


def empty_parts(network: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy: copies of what every module holds a dozen of, empty. It takes half the time with them."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for value in vars(module).values():
            if type(value) in (OrderedDict, set) and not value:
                memo[id(value)] = type(value)()
    return memo


def on_meta(tensor: Tensor) -> Tensor:
    """For ``copied``: shapes and types alone, without numbers or memory."""
    return torch.empty_like(tensor, device="meta")


def on_cpu(dtype: torch.dtype) -> Convert:
    """For ``copied``: every tensor on the CPU, floating ones of ``dtype``, and none the network's own: a forward may write
    its parameters.
    """
    return lambda tensor: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
