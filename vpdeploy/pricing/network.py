"""What widths are of: a recipe's groups, which of their widths are allowed, and what formulas tell of any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vpdeploy.models.tokens.fold import as_shipped
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.select import STEPS, allowed_widths, most_removed
from vpdeploy.surgery.cost import Array, CostModel, cost_of
from vpdeploy.surgery.groups import example_input
from vpdeploy.surgery.shapes import Shapes, shapes_of
from vpdeploy.surgery.trace import look
from vpdeploy.values import ChannelGroup, ChannelGroups
from vpdeploy.workbench import Workbench


@dataclass(frozen=True)
class Network:
    """What widths are of: a recipe's groups, and what formulas tell of any widths of the network that ships, without tokens."""

    recipe: Recipe
    groups: ChannelGroups
    shapes: Shapes
    cost: CostModel

    @staticmethod
    def of(work: Workbench, groups: ChannelGroups) -> Network:
        canvas_size, prunable = work.recipe.input.canvas, groups.prunable
        backbone = as_shipped(work.built.backbone, canvas_size=canvas_size)
        seen = look(backbone, example_input(canvas_size, batch=1))
        return Network(work.recipe, groups, shapes_of(seen, backbone, prunable), cost_of(seen, backbone, prunable))

    def narrowest(self, round_to: int) -> Array:
        return np.array([self.allowed(group, round_to)[0] for group in self.groups.prunable], float)

    def allowed(self, group: ChannelGroup, round_to: int) -> list[int]:
        """The widths that ``group`` may have, ascending."""
        budget = self.recipe.budget
        most = most_removed(group.root, max_removal=budget.max_removal, caps=budget.caps)
        return allowed_widths(group.width, unit=group.unit, round_to=round_to, max_removal=most, steps=self.steps)

    def typical_step(self, round_to: int) -> float:
        """The share of the dense network's MACs that goes with the first step of a group: the median of all groups. 1 of a group
        that can take none.
        """
        dense, shares = self.cost.dense_widths, []
        for place, group in enumerate(self.groups.prunable):
            narrower = dense.copy()
            narrower[place] = [0, *self.allowed(group, round_to)][-2]
            shares.append(1 - self.cost.macs(narrower) / self.cost.macs(dense) if narrower[place] else 1.0)
        return float(np.median(shares))

    @property
    def steps(self) -> int:
        """Of widths that a group must have before it takes smaller ones. Where speed decides the multiple, narrow groups have it
        too.
        """
        return 1 if self.recipe.budget.round_to == "auto" else STEPS
