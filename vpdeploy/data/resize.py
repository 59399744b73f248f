"""The one resize of training, evaluation and deployment: antialiased bilinear, from the caller's bytes to a square."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(image: Tensor, image_size: int, *, how: str) -> Tensor:
    """Make images square. image: uint8 [n, h, w, 3], any h and w -> float32 [n, 3, image_size, image_size] in [0, 1].

    ``how``: "stretch" ignores the aspect ratio; "shorter-side-crop" keeps the central square. Antialiased, because
    without it a reduction differs from Pillow's by up to 112 grey levels.
    """
    x = image.permute(0, 3, 1, 2).to(torch.float32)  # [n, h, w, 3] -> [n, 3, h, w]
    if how == "shorter-side-crop":
        x = _central_square(x)
    x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True, align_corners=False)
    return (x / 255).clamp(0, 1)


def _central_square(x: Tensor) -> Tensor:
    h, w = x.shape[-2], x.shape[-1]
    side = torch.sym_min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return x[..., top : top + side, left : left + side]
