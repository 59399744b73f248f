"""What could be pruned, and what not and why: the answer before any training."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vpdeploy.data.sources import open_source
from vpdeploy.measure.macs import count_macs
from vpdeploy.models.build import build, check_forward
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.select import allowed_widths
from vpdeploy.surgery.cost import CostModel, build_cost_model
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.values import ChannelGroup, ChannelGroups


@dataclass(frozen=True)
class InspectedGroup:
    """One group. ``macs_share``: the share of all MACs that write or read its channels; ``narrowest``: its smallest width."""

    root: str
    members: tuple[str, ...]
    width: int
    narrowest: int
    macs_share: float
    status: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """Ratios are what remains, at most 1, at the narrowest widths that the recipe's budget table allows."""

    model: str
    macs: int
    params: int
    groups: tuple[InspectedGroup, ...]
    min_macs_ratio_exact: float
    min_params_ratio_exact: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_recipe(recipe: Recipe) -> Inspection:
    """Group and probe the recipe's network; nothing is trained, no image is decoded.

    Raises: DataError, ModelError, SurgeryError for what cannot be analysed.
    """
    began = time.perf_counter()
    source = open_source(recipe.data, seed=recipe.seed)
    built = build(recipe.model, classes=len(source.classes), seed=recipe.seed)
    canvas = recipe.input.canvas
    outputs = built.source_classes if built.head in ("flm", "ilm") else len(source.classes)
    check_forward(built.backbone, canvas_size=canvas, classes=outputs)
    groups = probe(built.backbone, find_groups(built.backbone, example_input(canvas)), canvas_size=canvas)
    cost = build_cost_model(built.backbone, groups.groups, example=example_input(canvas, batch=1))
    narrowest = np.array([_narrowest(group, recipe) for group in groups.groups], float)
    counted = count_macs(built.backbone, canvas_size=canvas)
    dense = cost.dense_widths
    return Inspection(
        model=recipe.model.name,
        macs=counted.macs,
        params=sum(p.numel() for p in built.backbone.parameters()),
        groups=tuple(_rows(groups, cost, narrowest)),
        min_macs_ratio_exact=cost.macs(narrowest) / cost.macs(dense),
        min_params_ratio_exact=cost.params(narrowest) / cost.params(dense),
        seconds=time.perf_counter() - began,
    )


def _narrowest(group: ChannelGroup, recipe: Recipe) -> int:
    if group.status == "excluded":
        return group.width
    table = recipe.budget
    return allowed_widths(group.width, unit=group.unit, round_to=table.round_to, max_removal=table.max_removal)[0]


def _rows(groups: ChannelGroups, cost: CostModel, narrowest: np.ndarray) -> list[InspectedGroup]:
    dense, total = cost.dense_widths, cost.macs(cost.dense_widths)
    rows = []
    for column, group in enumerate(groups.groups):
        without = dense.copy()
        without[column] = 0  # the MACs that go with the last of its channels are those of its writers and readers
        rows.append(
            InspectedGroup(
                root=group.root,
                members=tuple(member.module for member in group.members),
                width=group.width,
                narrowest=int(narrowest[column]),
                macs_share=1 - cost.macs(without) / total,
                status=group.status,
                reason=group.reason,
            )
        )
    return rows
