"""From an image to what the backbone sees. One module serves training, evaluation and deployment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.prompts.clamp import clamp


class Canvas(nn.Module):
    """Zero-pad to the canvas, add the prompt, clamp to [0, 1], normalise; always in float32 (or the input's float64).

    image: [n, 3, image_size, image_size] in [0, 1] -> [n, 3, C, C], normalised per colour.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(
        self,
        image_size: int,
        canvas_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        prompt: nn.Module | None,
    ):
        super().__init__()
        before = (canvas_size - image_size) // 2
        after = canvas_size - image_size - before
        self.padding = (before, after, before, after)
        self.prompt = prompt
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        # A product takes half the time of a division, in every forward that ships.
        self.register_buffer("inverse_std", 1 / torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.normalise(self.place(image))

    def place(self, image: Tensor, *, prompted: bool = True) -> Tensor:
        """The canvas before normalisation, in [0, 1]: [n, 3, C, C]."""
        x = F.pad(image, self.padding) if any(self.padding) else image
        return clamp(x + self.prompt()) if self.prompt is not None and prompted else x

    def normalise(self, canvas: Tensor) -> Tensor:
        return (canvas - self.mean) * self.inverse_std
