"""How much attention goes to tokens of a prompt, and what they cost where their authors have them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import VITS, images, replaced, swin, timm_vit, torchvision_vit

from vpdeploy.models.tokens.blocks import blocks_of
from vpdeploy.models.tokens.prompt import as_published, new_tokens, put_tokens, token_parameters
from vpdeploy.models.tokens.share import attention_shares
from vpdeploy.recipe.tables import TokensTable

SAME = 1e-6  # shares are read in float32
COUNT = 4


def prompted(network: Any, kind: str, *, counts: tuple[int, ...] = (COUNT, 2, COUNT)) -> Any:
    table, generator = TokensTable(kind=kind, count=COUNT), torch.Generator().manual_seed(3)  # type: ignore[arg-type]
    tokens = new_tokens(network, table, generator=generator)
    made = {
        name: torch.randn(rows.shape, generator=generator, dtype=torch.float64)[: counts[i % 3]]
        for i, (name, rows) in enumerate(tokens.items())
    }
    put_tokens(network, made, table)
    return network


@torch.no_grad()
def test_of_deep_tokens_it_is_what_the_softmax_gives_them():
    """By nn.MultiheadAttention's own weights, with the tokens in the sequence."""
    plain = torchvision_vit()
    network = prompted(replaced(plain), "vpt-deep")
    before = network(images())
    shares = attention_shares(network, images())
    vit: Any = plain
    x = vit._process_input(images())
    x = torch.cat([vit.class_token.expand(2, -1, -1), x], dim=1) + vit.encoder.pos_embedding
    length, expected = x.shape[1], []
    for block, tokens in zip(vit.encoder.layers, token_parameters(network).values(), strict=True):
        x = torch.cat([x, tokens.expand(2, -1, -1)], dim=1)
        y = block.ln_1(x)
        _, weights = block.self_attention(y, y, y)
        expected.append(float(weights[:, :length, length:].sum(-1).mean()))
        x = block(x)[:, :length]
    assert list(shares.values()) == pytest.approx(expected, abs=SAME) and len(set(expected)) == 3
    assert torch.equal(network(images()), before)


@torch.no_grad()
def test_of_tokens_in_the_sequence_it_is_of_those_that_ask_too():
    plain = timm_vit(qk_norm=True)
    network = prompted(replaced(plain), "vpt-shallow")
    (tokens,) = token_parameters(network).values()
    shares = attention_shares(network, images())
    vit: Any = plain
    x = vit._pos_embed(vit.patch_embed(images()))
    x = torch.cat([x, tokens.expand(2, -1, -1)], dim=1)
    expected = []
    for block in vit.blocks:
        attention, y = block.attn, block.norm1(x)
        q, k, _ = attention.qkv(y).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = attention.q_norm(q) * attention.scale @ attention.k_norm(k).transpose(-2, -1)
        expected.append(float(scores.softmax(-1)[..., -COUNT:].sum(-1).mean()))
        x = block(x)
    assert list(shares.values()) == pytest.approx(expected, abs=SAME)


@torch.no_grad()
def test_in_windows_tokens_that_are_like_all_others_get_their_share():
    """Queries of zero see no difference; the second block of a stage is shifted, and hides some tokens of a window."""
    network = replaced(swin())
    for block in blocks_of(network):
        block.attention.q.weight.zero_()
        block.attention.q.bias.zero_()
        for parameter in block.attention.position_bias.parameters():
            parameter.zero_()
    shares = list(attention_shares(prompted(network, "vpt-deep", counts=(COUNT,) * 3), images()).values())
    assert shares[0] == pytest.approx(COUNT / (16 + COUNT), abs=SAME)
    assert shares[1] > shares[0] + 0.01


def test_who_has_none_in_its_attention_has_no_share():
    network = prompted(replaced(torchvision_vit()), "vpt-deep", counts=(COUNT, 0, COUNT))
    names = [block.name for block in blocks_of(network)]
    assert list(attention_shares(network, images())) == [names[0], names[2]]
    assert attention_shares(prompted(replaced(torchvision_vit()), "cvpt"), images()) == {}


@pytest.mark.parametrize("name", [*VITS, "swin"])
@torch.no_grad()
def test_as_published_computes_the_same(name):
    network = prompted(replaced(swin() if name == "swin" else VITS[name]()), "vpt-deep")
    published = copy.deepcopy(network)
    as_published(published)
    assert (token_parameters(published) == {}) == (name != "swin")
    torch.testing.assert_close(published(images()), network(images()), rtol=1e-9, atol=1e-9)
