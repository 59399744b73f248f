"""A small vision transformer for small images, as a recipe names it: ``benchmarks/small_vit.py:small_vit``."""

from __future__ import annotations

from torch import nn
from torchvision.models import VisionTransformer

SIDE = 32


def small_vit(num_classes: int = 5) -> nn.Module:
    """Six blocks of width 192 with three heads each; patches of 4 x 4 pixels of 32 x 32: 64 tokens and one for the class."""
    return VisionTransformer(
        image_size=SIDE, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=num_classes
    )
