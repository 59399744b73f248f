"""Label mapping: which source class stands for which target class (FLM, ILM; arXiv:2211.11635)."""

from __future__ import annotations

import torch
from torch import Tensor


def frequency_map(counts: Tensor) -> tuple[int, ...]:
    """One source class for each target class, one to one, greedily by frequency.

    counts: [source, target], how often images of a target class were predicted as a source class. The largest cell of all
    is taken first, then its row and column are struck out. Ties go to the lower source class, then the lower target class.
    """
    left = counts.to(torch.int64).clone()
    sources, targets = left.shape
    assert sources >= targets, "a one-to-one map needs at least as many source classes as target classes"
    chosen = [0] * targets
    for _ in range(targets):
        source, target = divmod(int(left.flatten().argmax()), targets)
        chosen[target] = source
        left[source, :] = -1
        left[:, target] = -1
    return tuple(chosen)


def count_pairs(predicted: Tensor, labels: Tensor, *, sources: int, targets: int) -> Tensor:
    """How often each (predicted source class, target class) occurs: int64 [source, target]."""
    cells = predicted * targets + labels
    return torch.bincount(cells, minlength=sources * targets).view(sources, targets)
