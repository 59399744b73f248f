"""The replacement of nn.MultiheadAttention answers every call as its original does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vpdeploy.models.attention.replace import replace_attention

SAME_FLOAT64 = 1e-12
L, S, N = 5, 7, 3

CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.arange(S) >= torch.tensor([[7], [4], [6]])  # no row is hidden whole
PER_HEAD = torch.randn(N * 4, L, S, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(16, 4, dtype=torch.float64, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return module


def equal(old: nn.Module) -> nn.Module:
    return replace_attention(old, torch.zeros(1)).network


def same(old: nn.Module, new: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> None:
    expected, expected_weights = old(*inputs, **options)
    out, weights = new(*inputs, **options)
    assert out.shape == expected.shape and (out - expected).abs().max() <= SAME_FLOAT64 * expected.abs().max()
    if expected_weights is None:
        assert weights is None
    else:
        assert weights.shape == expected_weights.shape and (weights - expected_weights).abs().max() <= SAME_FLOAT64


def inputs(old: nn.MultiheadAttention, *, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def some(tokens: int, width: int) -> Tensor:
        x = torch.randn(N, tokens, width, generator=generator, dtype=torch.float64)
        if not batched:
            return x[0]
        return x if old.batch_first else x.transpose(0, 1)

    return some(L, 16), some(S, old.kdim), some(S, old.vdim)


MASKS = [
    {},
    {"key_padding_mask": PADDING},
    {"attn_mask": PER_HEAD},
    {"attn_mask": PER_HEAD[0]},
    {"attn_mask": PER_HEAD[0] > 1},
    {"attn_mask": PER_HEAD > 1, "key_padding_mask": PADDING},
    {"attn_mask": PER_HEAD[0], "key_padding_mask": PADDING.double().mul(-2)},
]


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bias": False}, {"kdim": 6, "vdim": 9}])
def test_every_call(options: dict[str, Any], masks: dict[str, Tensor], weights: dict[str, bool]):
    old = made(**options)
    new = equal(old)
    same(old, new, inputs(old), **masks, **weights)
    masks = {name: mask[0] if name == "key_padding_mask" else mask for name, mask in masks.items()}
    if masks.get("attn_mask") is not None and masks["attn_mask"].dim() == 3:
        masks["attn_mask"] = masks["attn_mask"][:4]
    same(old, new, inputs(old, batched=False), **masks, **weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_causal_self_attention(need_weights: bool, grad: bool):
    old = made(batch_first=True)
    new = equal(old)
    x = torch.randn(N, L, 16, dtype=torch.float64)
    with torch.set_grad_enabled(grad):  # without it the original takes its fused kernel
        same(old, new, (x, x, x), need_weights=need_weights, attn_mask=CAUSAL, is_causal=True)


def test_causal_is_only_a_hint():
    new = equal(made())
    x = torch.randn(L, N, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="is_causal: got True without attn_mask"):
        new(x, x, x, is_causal=True)


def test_weights_are_dropped_in_training_only():
    old = made(dropout=0.5)
    new = equal(old)
    x = torch.randn(L, N, 16, dtype=torch.float64)
    same(old, new, (x, x, x))
    _, weights = new.train()(x, x, x, average_attn_weights=False)
    assert weights.shape == (N, 4, L, L) and 0.2 < (weights == 0).double().mean() < 0.8
    assert not torch.equal(*(new(x, x, x, need_weights=False)[0] for _ in range(2)))
