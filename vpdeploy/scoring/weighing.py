"""Importances made ready to be compared: for what a channel costs, and as ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpdeploy.scoring.select import Selector, prices
from vpdeploy.values import ChannelGroup

LEAST_PRICE = 1e-12  # a width that costs nothing is worth everything


def for_cost(scores: Mapping[str, Tensor], groups: Sequence[ChannelGroup], selector: Selector) -> dict[str, Tensor]:
    """Each importance over what one channel of its group adds to the budget: a wide stream that costs five layers would
    otherwise never give way to an inner width that costs two. float64.
    """
    price = prices(selector).clip(min=LEAST_PRICE)
    return {group.root: scores[group.root].double() / float(p) for group, p in zip(groups, price, strict=True)}


def ranked(scores: Mapping[str, Tensor], groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Each score's place among all channels, evenly over (0, 2], float32: importances of trained networks span orders of
    magnitude, and a search that moves every score by steps of one size would level the small ones. Equal ones keep their order.
    """
    row = torch.cat([scores[group.root] for group in groups])
    rank = torch.empty(len(row)).scatter_(0, row.argsort(stable=True), torch.arange(1, len(row) + 1).float())
    parts = (2 * rank / len(row)).split([group.width for group in groups])
    return {group.root: part for group, part in zip(groups, parts, strict=True)}
