"""Small vision transformers of both libraries, whose attention differs from place to place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from vpdeploy.models.attention.replace import replace_attention

WIDTH, SIDE = 24, 16


def randomised(network: nn.Module) -> nn.Module:
    """Norms that are not ones and zeros, and weights that make attention differ from place to place, in float64."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = (
            parameter.data + 0.2 * drawn if parameter.ndim == 1 else 1.5 * drawn / parameter[0].numel() ** 0.5
        )
    return network.double().eval()


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return randomised(
        VisionTransformer(
            image_size=SIDE, patch_size=4, num_layers=3, num_heads=3, hidden_dim=WIDTH, mlp_dim=40, num_classes=5
        )
    )


def timm_vit(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return randomised(
        timm.models.vision_transformer.VisionTransformer(
            img_size=SIDE, patch_size=4, depth=3, num_heads=3, embed_dim=WIDTH, mlp_ratio=2, num_classes=5, **options
        )
    )


def swin() -> nn.Module:
    """Two stages, of windows that shift."""
    torch.manual_seed(0)
    return randomised(
        SwinTransformer(
            patch_size=[2, 2],
            embed_dim=WIDTH,
            depths=[2, 2],
            num_heads=[3, 6],
            window_size=[4, 4],
            num_classes=5,
            stochastic_depth_prob=0.0,
        )
    )


VITS = {
    "torchvision": torchvision_vit,
    "timm": timm_vit,
    "timm, norms of q and k": lambda: timm_vit(qk_norm=True),
    "timm, layer scale": lambda: timm_vit(init_values=0.3),
    "timm, mean of patches": lambda: timm_vit(global_pool="avg"),
    "timm, registers": lambda: timm_vit(reg_tokens=2),
}


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def replaced(network: nn.Module) -> nn.Module:
    """A copy with attention that has separate heads."""
    made = replace_attention(network, images(1))
    assert made.replaced and not made.left
    return copy.deepcopy(made.network)
