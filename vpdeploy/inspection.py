"""What could be pruned, and what not and why: the answer before any training."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from vpdeploy.data.sources import open_source
from vpdeploy.errors import ModelError
from vpdeploy.measure.memory import peak_rss_mib
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.build import build, check_forward
from vpdeploy.models.named import model_from
from vpdeploy.recipe.tables import BudgetTable, Recipe
from vpdeploy.scoring.select import allowed_widths, most_removed
from vpdeploy.surgery.cost import CostModel, cost_of
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, groups_of
from vpdeploy.surgery.limit import Limit
from vpdeploy.surgery.trace import look
from vpdeploy.values import ChannelGroup, ChannelGroups


@dataclass(frozen=True)
class InspectedGroup:
    """One group. ``macs_share``: the share of all MACs that write or read its channels; ``narrowest``: its smallest width;
    ``difference``: of masked and removed, relative, as probed.
    """

    root: str
    members: tuple[str, ...]
    width: int
    narrowest: int
    macs_share: float
    status: str
    reason: str
    difference: float | None


@dataclass(frozen=True)
class Inspection:
    """Ratios are what remains, at most 1, with every exact group at the narrowest width that the budget table allows.

    ``attention``: modules exchanged for equal ones whose heads can be removed, and those that could not be, with the reason.
    ``peak_rss_mib``: of the whole process; None where the system does not tell.
    """

    model: str
    size: int
    macs: int
    params: int
    groups: tuple[InspectedGroup, ...]
    attention: Mapping[str, str]
    min_macs_ratio_exact: float
    min_params_ratio_exact: float
    seconds: float
    peak_rss_mib: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_recipe(recipe: Recipe, *, limit: Limit | None = None) -> Inspection:
    """Group and probe the recipe's network; nothing is trained, no image is decoded.

    Raises: DataError, ModelError, SurgeryError for what cannot be analysed; LimitError for what takes too much.
    """
    source = open_source(recipe.data, seed=recipe.seed)
    built = build(recipe.model, classes=len(source.classes), seed=recipe.seed)
    outputs = built.source_classes if built.head in ("flm", "ilm") else len(source.classes)
    size = recipe.input.canvas
    with _analysis(limit) as limit:
        check_forward(built.backbone, canvas_size=size, classes=outputs)
        return _inspected(recipe.model.name, built.backbone, size=size, budget=recipe.budget, limit=limit)


def inspect_model(name: str, *, size: int | None = None, limit: Limit | None = None) -> Inspection:
    """Group and probe the network ``name`` with random weights, as ``model.name`` of a recipe takes it.

    ``size``: side of its input, pixels; None: what the network was published for.

    Raises: ModelError, SurgeryError for what cannot be analysed; LimitError for what takes too much.
    """
    try:
        named = model_from(name)
        side = size or named.input.image_size
        with _analysis(limit) as limit:
            check_forward(named.backbone, canvas_size=side, classes=named.classes, by_name=True)
            return _inspected(name, named.backbone, size=side, budget=BudgetTable(macs_ratio=0.5), limit=limit)
    except ModelError as e:
        raise ModelError(str(e).removeprefix("model.name: ")) from e  # there is no recipe that has this key


@contextmanager
def _analysis(limit: Limit | None) -> Iterator[Limit]:
    """The limit, begun and enforced. What a user's forward prints goes to stderr, as what the factory prints does."""
    with (limit or Limit()).enforced() as begun, redirect_stdout(sys.stderr):
        yield begun


def _inspected(name: str, backbone: nn.Module, *, size: int, budget: BudgetTable, limit: Limit) -> Inspection:
    began, example = time.perf_counter(), example_input(size, batch=1)
    attention = replace_attention(backbone, example, share=True)
    backbone = attention.network
    seen = look(backbone, example, limit=limit)
    found = groups_of(seen, backbone)
    groups = probe(backbone, found, example=example, allow_approximate=budget.allow_approximate, limit=limit)
    cost = cost_of(seen, backbone, groups.groups)
    narrowest = np.array([_narrowest(group, budget) for group in groups.groups], float)
    dense = cost.dense_widths
    exact = np.where([group.status == "exact" for group in groups.groups], narrowest, dense)
    return Inspection(
        model=name,
        size=size,
        macs=round(cost.macs(dense)),
        params=sum(p.numel() for p in backbone.parameters()),
        groups=tuple(_rows(groups, cost, narrowest)),
        attention={**attention.replaced, **attention.left},
        min_macs_ratio_exact=cost.macs(exact) / cost.macs(dense),
        min_params_ratio_exact=cost.params(exact) / cost.params(dense),
        seconds=time.perf_counter() - began,
        peak_rss_mib=peak_rss_mib(),
    )


def _narrowest(group: ChannelGroup, budget: BudgetTable) -> int:
    if group.status == "excluded":
        return group.width
    round_to = 1 if budget.round_to == "auto" else budget.round_to  # the narrowest that any multiple allows
    most = most_removed(group.root, max_removal=budget.max_removal, caps=budget.caps)
    return allowed_widths(group.width, unit=group.unit, round_to=round_to, max_removal=most)[0]


def _rows(groups: ChannelGroups, cost: CostModel, narrowest: np.ndarray) -> list[InspectedGroup]:
    dense, total = cost.dense_widths, cost.macs(cost.dense_widths)
    rows = []
    for column, group in enumerate(groups.groups):
        without = dense.copy()
        without[column] = 0  # the MACs that go with the last of its channels are those of its writers and readers
        rows.append(
            InspectedGroup(
                root=group.root,
                members=tuple(dict.fromkeys(member.module or member.tensor for member in group.members)),
                width=group.width,
                narrowest=int(narrowest[column]),
                macs_share=1 - cost.macs(without) / total if total else 0.0,
                status=group.status,
                reason=group.reason,
                difference=group.difference,
            )
        )
    return rows
