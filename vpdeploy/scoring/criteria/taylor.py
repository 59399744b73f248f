"""First-order Taylor importance: how much the loss would feel the loss of a channel, for what the channel costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vpdeploy.scoring.select import Selector, prices
from vpdeploy.values import ChannelGroup

LEAST_PRICE = 1e-12  # a width that costs nothing is worth everything


def taylor(gradients: Iterable[Tensor], groups: Sequence[ChannelGroup], *, selector: Selector) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float32: its place among all channels, evenly over (0, 2].

    gradients: of the loss of each small batch with respect to the gates of the whole network, [channels of all groups].
    The importance of a channel is the mean of their squares (Molchanov et al., arXiv:1906.10771, eq. 8, with the gate for
    the weight: removing a channel takes its gate from 1 to 0). All gates of a group share one value, so a residual stream
    with many readers weighs what all of them lose. Divided by what one channel adds to the budget, or a wide stream that
    costs five layers would never give way to an inner width that costs two. Ranks, because importances of trained networks
    span orders of magnitude, and a search that moves every score by steps of one size would level the small ones.
    """
    squares = [gradient.detach().double().square() for gradient in gradients]
    widths = [group.width for group in groups]
    price = torch.tensor(prices(selector)).clamp(min=LEAST_PRICE).repeat_interleave(torch.tensor(widths))
    worth = torch.stack(squares).mean(dim=0).cpu() / price
    rank = torch.empty(len(worth)).scatter_(0, worth.argsort(stable=True), torch.arange(1, len(worth) + 1).float())
    parts = (2 * rank / len(worth)).split(widths)
    return {group.root: part for group, part in zip(groups, parts, strict=True)}
