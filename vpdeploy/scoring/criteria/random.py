"""Random scores: the baseline of all criteria."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpdeploy.values import ChannelGroup


def random(groups: Sequence[ChannelGroup], *, generator: torch.Generator) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float32, uniform in [0, 1): every channel competes on equal terms."""
    return {group.root: torch.rand(group.width, generator=generator) for group in groups}
