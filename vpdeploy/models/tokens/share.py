"""How much of the attention of each block goes to the tokens of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy.models.tokens.blocks import blocks_of
from vpdeploy.models.tokens.sequence import WithTokens


@torch.no_grad()
def attention_shares(network: nn.Module, canvas: Tensor) -> dict[str, float]:
    """Name of a block -> what the softmax gives to tokens of the prompt, the mean over images, heads and tokens that ask; blocks
    without any in their attention are absent. canvas: [n, 3, C, C]. ``network`` is not folded, and unchanged but for its mode.

    Each attention is asked twice: once as it is, and once with values that are 1 for the prompt's tokens and 0 for all others, so
    that what comes out is the share. No form of attention has to be known for that.
    """
    sequence = next((module for module in network.modules() if isinstance(module, WithTokens)), None)
    behind = 0 if sequence is None else len(sequence.tokens)
    shares: dict[str, list[float]] = {}
    hooks = [
        block.attention.register_forward_hook(_Asked(shares.setdefault(block.name, []), behind), with_kwargs=True)
        for block in blocks_of(network)
        if behind or block.attention.memory is not None
    ]
    try:
        network.eval()(canvas)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sum(row) / len(row) for name, row in shares.items() if row}


class _Asked:
    """A hook of an attention."""

    def __init__(self, found: list[float], behind: int):
        self.found, self.behind, self.asking = found, behind, False

    def __call__(self, attention: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self.asking:
            return
        memory, gate = attention.memory, getattr(attention, "gate", None)
        captured = attention.proj.register_forward_pre_hook(
            lambda proj, inputs: self.found.append(float(inputs[0].float().mean()))
        )
        own = attention.values

        def values(x: Tensor) -> Tensor:
            v = torch.zeros_like(own(x))
            if self.behind:
                v[:, :, -self.behind :] = 1.0
            return v

        self.asking, attention.values = True, values
        if memory is not None:
            attention.memory = _Ones(memory)
        if gate is not None:
            attention.gate = None
        try:
            attention(*args, **kwargs)
        finally:
            self.asking = False
            del attention.values
            attention.memory = memory
            if gate is not None:
                attention.gate = gate
            captured.remove()


class _Ones(nn.Module):
    """The keys of a memory, and values of 1."""

    def __init__(self, memory: nn.Module):
        super().__init__()
        self.memory = memory

    def forward(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        k, v = self.memory(attention)
        return k, torch.ones_like(v)
