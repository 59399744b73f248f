"""Random scores: the baseline of all criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def random(units: Mapping[str, Sequence[int]], *, generator: torch.Generator) -> dict[str, Tensor]:
    """Name -> scores of the shape that stands there, float32, uniform in [0, 1): all compete on equal terms."""
    return {name: torch.rand(tuple(shape), generator=generator) for name, shape in units.items()}
