"""Random shift and flip of whole batches, on the images as they are in memory, before canvas and prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(images: Tensor, how: str, *, generator: torch.Generator) -> Tensor:
    """Shift and flip every image on its own. images: uint8 [n, 3, s, s] -> a new uint8 [n, 3, s, s].

    ``how``: "crop" shifts by up to s / 8 (at least 1) on both axes with zero fill; "flip" mirrors left-right with
    probability 0.5; "crop-flip" does both; "none" gives ``images`` back. ``generator`` is a CPU generator whatever
    device the images are on, so that every device draws the same numbers.
    """
    n, _, s, _ = images.shape
    margin = max(1, s // 8) if "crop" in how else 0
    if margin:
        shift = torch.randint(-margin, margin + 1, (2, n), generator=generator)
    else:
        shift = torch.zeros(2, n, dtype=torch.int64)
    flip = torch.rand(n, generator=generator) < 0.5 if "flip" in how else None
    if n == 0 or (not margin and flip is None):
        return images
    return _gather(images, shift, flip=flip, margin=margin)


def _gather(images: Tensor, shift: Tensor, *, flip: Tensor | None, margin: int) -> Tensor:
    """Shift down and right by ``shift`` [2, n], then mirror where ``flip`` [n]. [n, 3, s, s] -> [n, 3, s, s]

    Each output row is s neighbouring bytes of the padded batch. A view in which every byte starts a row turns the whole
    batch into one index_select: 0.14 ms for 128 x 3 x 32 x 32 on one core, against 2.4 ms by indexing pixels.
    """
    n, c, s, _ = images.shape
    width = s + 2 * margin
    source = F.pad(images, (margin,) * 4).contiguous()  # [n, c, width, width]
    image, (down, right) = torch.arange(n), shift
    if flip is not None:
        source = torch.cat([source, source.flip(3)])
        image = image + n * flip
        right = torch.where(flip, -right, right)  # shift, then mirror = mirror, then shift the other way
    plane = (image.view(n, 1) * c + torch.arange(c)) * width**2  # [n, c]
    row = (margin - down.view(n, 1) + torch.arange(s)) * width + (margin - right).view(n, 1)  # [n, s]
    start = (plane.view(n, c, 1) + row.view(n, 1, s)).flatten().to(images.device)  # [n * c * s]
    rows = source.as_strided((source.numel() - s + 1, s), (1, 1))
    return rows.index_select(0, start).view(n, c, s, s)
