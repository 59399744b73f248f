"""Pixel prompts: a few learned pixels, added to the canvas in [0, 1] pixel space before normalisation.

The three shapes are those of VPNs (arXiv:2312.01397) and of the visual-prompting work before it. delta starts at zero and is
added as it is (no sigmoid), so the first step sees the unprompted image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PadPrompt(nn.Module):
    """A frame of width p around a canvas of side C: 4p(C - p) learned values per colour."""

    def __init__(self, canvas_size: int, size: int):
        super().__init__()
        c, p = canvas_size, size
        self.size = size
        self.top = nn.Parameter(torch.zeros(3, p, c))
        self.bottom = nn.Parameter(torch.zeros(3, p, c))
        self.left = nn.Parameter(torch.zeros(3, c - 2 * p, p))
        self.right = nn.Parameter(torch.zeros(3, c - 2 * p, p))

    def forward(self) -> Tensor:
        """The prompt on its canvas: [3, C, C], zero inside the frame."""
        middle = F.pad(self.left, (0, self.top.shape[2] - self.size)) + F.pad(
            self.right, (self.top.shape[2] - self.size, 0)
        )
        return torch.cat([self.top, middle, self.bottom], dim=1)


class FixPrompt(nn.Module):
    """A learned square in the top-left corner: size^2 values per colour."""

    def __init__(self, canvas_size: int, size: int):
        super().__init__()
        self.canvas_size = canvas_size
        self.square = nn.Parameter(torch.zeros(3, size, size))

    def forward(self) -> Tensor:
        """[3, C, C], zero outside the square."""
        rest = self.canvas_size - self.square.shape[-1]
        return F.pad(self.square, (0, rest, 0, rest))


class RandomPrompt(nn.Module):
    """A learned square whose place is redrawn at every training forward; evaluation and export use one place.

    ``place`` [2] is that place (top, left), drawn from the seed. ``stream`` draws the training places: a training loop
    sets it at the start of every epoch, so that a resumed run draws the same ones.
    """

    place: Tensor

    def __init__(self, canvas_size: int, size: int, *, seed: int):
        super().__init__()
        self.canvas_size = canvas_size
        self.square = nn.Parameter(torch.zeros(3, size, size))
        self.stream = torch.Generator().manual_seed(seed)
        self.register_buffer("place", self._draw())

    def _draw(self) -> Tensor:
        return torch.randint(0, self.canvas_size - self.square.shape[-1] + 1, (2,), generator=self.stream)

    def forward(self) -> Tensor:
        """[3, C, C], zero outside the square."""
        place = self._draw() if self.training else self.place
        top, left = (int(v) for v in place)
        rest = self.canvas_size - self.square.shape[-1]
        return F.pad(self.square, (left, rest - left, top, rest - top))


def build_prompt(kind: str, *, canvas_size: int, size: int, seed: int) -> nn.Module | None:
    """The prompt module of a recipe's kind, at zero; None for "none". Calling it gives [3, C, C]."""
    if kind == "pad":
        return PadPrompt(canvas_size, size)
    if kind == "fix":
        return FixPrompt(canvas_size, size)
    if kind == "random":
        return RandomPrompt(canvas_size, size, seed=seed)
    return None
