"""Learned tokens in a transformer: put in, taken out, and folded to the constants that they amount to.

"vpt-deep" (arXiv:2203.12119): before every block its own tokens. What comes of a token behind its block is dropped, so that
a token is a key and a value, and nothing else (``models.attention.memory``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vpdeploy.errors import ModelError
from vpdeploy.models.attention.memory import ConstantMemory, PromptTokens
from vpdeploy.models.blocks import Block, blocks_of

PREFIX = "tokens."  # in the state of a prompt, before a block's name


def token_blocks(network: nn.Module) -> list[Block]:
    """Where tokens go. Raises: ModelError when there is nowhere."""
    blocks = list(blocks_of(network))
    if not blocks:
        raise ModelError(
            f"prompt.tokens: {type(network).__name__} has no block that tokens can be put before; expected a vision transformer "
            "or a Swin of torchvision or timm, whose attention can be replaced (`vpdeploy inspect` says where not, and why)"
        )
    return blocks


def split_prompt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A prompt's state: that of its pixels, and name of a block -> its tokens."""
    tokens = {name.removeprefix(PREFIX): rows for name, rows in state.items() if name.startswith(PREFIX)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}, tokens


def uniform_tokens(network: nn.Module, count: int, *, generator: torch.Generator) -> dict[str, Tensor]:
    """``count`` tokens for each block, even over (-v, v) with v = sqrt(6 / (3 p^2 + c)), p the side of a patch, as VPT's code
    draws them: name of the block -> [count, c].
    """
    patch = next(module.kernel_size[0] for module in network.modules() if isinstance(module, nn.Conv2d))
    made = {}
    for block in token_blocks(network):
        bound = math.sqrt(6 / (3 * patch**2 + block.width))
        made[block.name] = bound * (2 * torch.rand(count, block.width, generator=generator) - 1)
    return made


def put_tokens(network: nn.Module, tokens: Mapping[str, Tensor], *, dropout: float = 0.0) -> None:
    """Change ``network``: before each block named, its tokens [N, c], as parameters of it; before others, and where N is 0, none.

    Raises: ModelError for a block that is not there, or of another width.
    """
    take_tokens(network)
    if not tokens:
        return
    blocks = {block.name: block for block in token_blocks(network)}
    for name, rows in tokens.items():
        if name not in blocks:
            raise ModelError(f"prompt.tokens: got tokens for {name!r}; expected one of {', '.join(blocks)}")
        if rows.ndim != 2 or rows.shape[1] != blocks[name].width:
            raise ModelError(
                f"prompt.tokens: got {list(rows.shape)} for {name!r}; expected [count, {blocks[name].width}], the block's width"
            )
        if len(rows):
            block = blocks[name]
            block.attention.memory = PromptTokens(rows.detach().clone(), block.norm, dropout=dropout)


def take_tokens(network: nn.Module) -> None:
    """Change ``network``: as it was before ``put_tokens``."""
    for block in blocks_of(network):
        block.attention.memory = None


def token_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name of a block -> its tokens [N, c], as they stand in ``network``; blocks without any are absent."""
    return {
        block.name: block.attention.memory.tokens
        for block in blocks_of(network)
        if isinstance(block.attention.memory, PromptTokens)
    }


@torch.no_grad()
def fold_tokens(network: nn.Module) -> None:
    """Change ``network``: each block's tokens become the keys and values that its attention, with its weights, reads of them."""
    for block in blocks_of(network):
        if isinstance(block.attention.memory, PromptTokens):
            block.attention.memory = ConstantMemory(*block.attention.memory.eval()(block.attention))
