"""Prompts as keys and values: what is read beside the tokens is what tokens in the sequence would have been read as."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import VITS, WIDTH, images, replaced, swin, torchvision_vit

from vpdeploy.models.attention.memory import ConstantMemory, PromptTokens
from vpdeploy.models.tokens.blocks import blocks_of

SAME_FLOAT64 = 1e-10  # of outputs of order 1, the same sums in another order
MATTERS = 0.1  # by how much prompts move the outputs: else a fold that drops them would pass
COUNTS = (4, 0, 7)


class InSequence(nn.Module):
    """VPT-deep as it was published: prompts stand in the sequence of one block, and what comes of them is dropped."""

    def __init__(self, block: nn.Module, tokens: Tensor):
        super().__init__()
        self.block, self.tokens = block, tokens

    def forward(self, x: Tensor) -> Tensor:
        there = torch.cat([x[:, :1], self.tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        out = self.block(there)
        return torch.cat([out[:, :1], out[:, 1 + len(self.tokens) :]], dim=1)


def prompts(counts: Sequence[int], width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [3 * torch.randn(count, width, generator=generator, dtype=torch.float64) for count in counts]


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_prompts_as_keys_and_values_are_prompts_in_the_sequence(name):
    plain, tokens = VITS[name](), prompts(COUNTS)
    folded, naive = replaced(plain), copy.deepcopy(plain)
    for block, of_block in zip(blocks_of(folded), tokens, strict=True):
        block.attention.memory = PromptTokens(of_block, block.norm)
    for block, of_block in zip(list(blocks_of(replaced(plain))), tokens, strict=True):
        holder, _, last = block.name.rpartition(".")
        setattr(naive.get_submodule(holder), last, InSequence(naive.get_submodule(block.name), of_block))
    x = images()
    expected = naive(x)
    assert (expected - plain(x)).abs().max() > MATTERS
    torch.testing.assert_close(folded(x), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@pytest.mark.parametrize("name", [*VITS, "swin"])
@torch.no_grad()
def test_constants_are_what_prompts_amount_to(name):
    network = replaced(swin() if name == "swin" else VITS[name]())
    x, blocks = images(), list(blocks_of(network))
    plain = network(x)
    for number, block in enumerate(blocks):
        (tokens,) = prompts([2 + number], block.norm.normalized_shape[0])
        block.attention.memory = PromptTokens(tokens, block.norm)
    expected = network(x)
    assert (expected - plain).abs().max() > MATTERS
    for block in blocks:
        assert block.attention.memory is not None
        block.attention.memory = ConstantMemory(*block.attention.memory(block.attention))
    torch.testing.assert_close(network(x), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@torch.no_grad()
def test_a_window_reads_prompts_as_tokens_that_have_no_position():
    """By hand: each window's tokens and the prompts in one sequence, with a bias of 0 where a prompt is read."""
    block = next(iter(blocks_of(replaced(swin()))))
    attention, (tokens,) = block.attention, prompts([3])
    x = torch.randn(5, 16, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attention.memory = PromptTokens(tokens, block.norm)
    found = attention(x)
    both = torch.cat([x, block.norm(tokens).expand(5, -1, -1)], dim=1)
    read = ((attention.q, x), (attention.k, both), (attention.v, both))
    read = ((attention.q, x), (attention.k, both), (attention.v, both))
    q, k, v = (layer(of).unflatten(-1, (3, 8)).transpose(1, 2) for layer, of in read)
    scores = q @ k.transpose(2, 3) * attention.scale
    scores[..., :16] += attention.position_bias()
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, attention.proj(out), rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


def test_a_copy_reads_its_own_norm():
    network = replaced(torchvision_vit())
    block = next(iter(blocks_of(network)))
    block.attention.memory = PromptTokens(prompts([2])[0], block.norm)
    twin = copy.deepcopy(network)
    block.norm.weight.data.zero_()
    copied = next(iter(blocks_of(twin)))
    keys, _ = copied.attention.memory(copied.attention)
    assert bool((keys[:, :, 0] != keys[:, :, 1]).any())
    assert not any("norm" in name for name, _ in copied.attention.memory.named_parameters())
