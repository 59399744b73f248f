"""Which of the prompts' tokens matter: Prompt Condensation (arXiv:2305.17223) by a first-order score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scope = Literal["global", "layer"]


def gradient_scores(
    tokens: Mapping[str, nn.Parameter], logits_of: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Mean over batches of |<p, dL/dp>| for each token p: what the loss would change, to first order, were it scaled away.
    The absolute value comes before the mean: where training has ended, the mean gradient is near zero.

    tokens: name of a block -> [N, c]; logits_of: (logits [n, k], labels [n]) of one batch after the other, each of a forward that
    reads the tokens. Gives name of a block -> [N].
    """
    total = {name: torch.zeros(len(rows), dtype=torch.float64) for name, rows in tokens.items()}
    count = 0
    for logits, labels in logits_of:
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(tokens.values()))
        for (name, rows), gradient in zip(tokens.items(), gradients, strict=True):
            total[name] += (rows.detach() * gradient).sum(dim=1).abs().double().cpu()
        count += 1
    return {name: sums / max(1, count) for name, sums in total.items()}


def norm_scores(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a block -> [N]: a baseline; norms of different blocks say nothing of each other."""
    return {name: rows.detach().double().norm(dim=1).cpu() for name, rows in tokens.items()}


def random_scores(tokens: Mapping[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
    """Name of a block -> [N], even over [0, 1): a baseline."""
    return {name: torch.rand(len(rows), generator=generator, dtype=torch.float64) for name, rows in tokens.items()}


def kept_tokens(scores: Mapping[str, Tensor], *, keep: float, scope: Scope) -> dict[str, Tensor]:
    """Which tokens stay, those with the highest scores: name of a block -> bool [N]. ``keep``: their share, of all together
    ("global": blocks may keep different numbers, or none) or of each block ("layer"); at least one. Ties keep the earlier one.
    """
    if scope == "layer":
        return {name: _highest(row, keep) for name, row in scores.items()}
    whole = _highest(torch.cat([torch.zeros(0, dtype=torch.float64), *scores.values()]), keep)
    return dict(zip(scores, whole.split([len(row) for row in scores.values()]), strict=True))


def count_kept(keep: float, count: int) -> int:
    """How many of ``count`` tokens a share of ``keep`` is: at least one, and no fraction of one is lost."""
    return min(count, max(1, math.ceil(keep * count - 1e-9)))


def _highest(row: Tensor, keep: float) -> Tensor:
    count = count_kept(keep, len(row)) if len(row) else 0
    stays = torch.zeros(len(row), dtype=torch.bool)
    stays[row.argsort(descending=True, stable=True)[:count]] = True
    return stays
