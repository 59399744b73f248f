"""The price stage: one export, measured at a few widths, tells what any widths cost."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from vpdeploy.errors import BudgetError, VpdeployError
from vpdeploy.measure.engines import check_engine
from vpdeploy.measure.environment import machine
from vpdeploy.measure.settings import setting_of
from vpdeploy.pricing.alignment import multiple_of
from vpdeploy.pricing.candidates import MIB, Candidates, target_text
from vpdeploy.pricing.network import Network
from vpdeploy.pricing.reach import reach_text, table_of, what_stops
from vpdeploy.pricing.settle import GLANCED, limits_in_practice
from vpdeploy.pricing.target import Measured, Target, opened, shape_of_image
from vpdeploy.recipe.tables import BudgetTable
from vpdeploy.scoring.select import MEASURED, Selector, build_selector, is_ratio, shown
from vpdeploy.surgery.cost import Array, quantity_of
from vpdeploy.values import ChannelGroups, Price, Term
from vpdeploy.workbench import Workbench

FORMULAS = frozenset(("channel_ratio", "macs_ratio", "params_ratio"))
MIXED = 6  # networks between the narrowest and the dense one from which times are fitted


def price(work: Workbench, groups: ChannelGroups) -> Price:
    """Export the network as it is, measure it at a few widths, and learn what any widths cost. Where that fails, and no budget
    asks for it, the other quantities are told alone.

    Raises: ModelError for a network that cannot be exported; EngineError for a target that is not here; BudgetError with the
    best reachable value.
    """
    began, recipe, network = time.perf_counter(), work.recipe, Network.of(work, groups)
    setting = setting_of(recipe.target)
    check_engine(setting)
    with opened(work, groups) as candidates:
        target = Target(candidates, setting, shape_of_image(recipe))
        candidates.check(network.narrowest(1))
        round_to, alignment = multiple_of(target, network)
        narrowest = network.narrowest(round_to)
        files, dense_mib = _file_terms(work, groups, candidates, network, narrowest)
        made = Price(
            round_to=round_to,
            costs={"file_mib": files},
            dense={"file_mib": dense_mib},
            limits={},
            alignment=alignment,
            table=(),
            target=target_text(recipe),
            conditions=None,
            machine=machine(),
            whole=tuple(
                g.root for g, width in zip(network.groups.prunable, narrowest, strict=True) if width == g.width
            ),
        )
        try:
            made = _with_ends(made, target, network)
        except VpdeployError as e:
            if recipe.budget.reads_target:
                raise
            work.display.say(f"latency and memory of narrower networks cannot be measured: {e}")
        # The same in the form that the budget speaks of: its prompt and certificate are as large.
        dense_file = dense_mib - candidates.whole.stat().st_size / MIB + candidates.dense_mib()
        made = replace(made, table=table_of(made, network, dense_file=dense_file))
        made = replace(made, table_seconds=round(time.perf_counter() - began, 2))
        work.display.say(reach_text(made))
        made = _with_costs(made, target, network)
        selector = selector_at(made, network)
        if recipe.budget.measured:
            made = replace(made, limits=limits_in_practice(selector, target, made, network))
    return replace(made, seconds=round(time.perf_counter() - began, 2))


def _with_ends(made: Price, target: Target, network: Network) -> Price:
    """``made`` with what the narrowest and the dense network have."""
    measured = Measured.of(target, _mixed(network, made.round_to, 0), layers=False, memory=True)
    dense = {**made.dense, "latency_ms": measured.dense_ms}
    least = {"latency_ms": float(measured.ms[0])}
    if measured.memory is not None:
        least["memory_mib"], dense["memory_mib"] = map(float, measured.memory)
    return replace(made, dense=dense, least=least, conditions=measured.conditions)


def _with_costs(made: Price, target: Target, network: Network) -> Price:
    """``made`` with what any widths cost in time and memory, where something is chosen by these."""
    budget, costs = network.recipe.budget, dict(made.costs)
    by_latency = budget.speed or "latency_ms" in budget.measured
    by_memory = "memory_mib" in budget.measured
    if by_latency or by_memory:
        widths = _mixed(network, made.round_to, MIXED)
        measured = Measured.of(target, widths, layers=by_latency, memory=by_memory)
        if by_latency:
            costs["latency_ms"] = measured.latency_terms(network.shapes)
        if measured.memory is not None:
            costs["memory_mib"] = measured.memory_terms(network.shapes, costs["file_mib"])
    return replace(made, costs=costs)


def _mixed(network: Network, round_to: int, between: int) -> Array:
    """Widths of the networks from which costs are fitted: [networks, groups]. The first is the narrowest, the last the dense one;
    in those ``between`` every group takes every level once, in an order of its own, so that inputs and outputs of a layer vary
    apart.
    """
    generator = np.random.default_rng(0)
    columns = []
    for group in network.groups.prunable:
        allowed = network.allowed(group, round_to)
        levels = [allowed[int((i + 0.5) / between * len(allowed))] for i in generator.permutation(between)]
        columns.append([allowed[0], *levels, allowed[-1]])
    return np.array(columns, float).T.reshape(between + 2, len(columns))


def _file_terms(
    work: Workbench, groups: ChannelGroups, candidates: Candidates, network: Network, narrowest: Array
) -> tuple[tuple[Term, ...], float]:
    """MiB of the file that ships, at most, and of the dense one; where a budget speaks of files, of the largest form."""
    budget, forms = work.recipe.budget, [candidates.form]
    if "file_mib" in (budget.kind, *budget.limits.given):
        forms = [candidates.form, *(form for form in work.recipe.export.forms if form != candidates.form)]
    found = []
    for form in forms:
        with tempfile.TemporaryDirectory() as folder:
            made = candidates
            if form != candidates.form:
                made = Candidates(work, groups, Path(folder), form=form, prompted=candidates.prompted)
                made.check(network.narrowest(1))
            size, terms = made.whole.stat().st_size, made.byte_terms(network.shapes, narrowest)
        fixed = size - network.shapes.sum_of(terms).at(network.shapes.dense_widths)
        found.append((size, [Term("", fixed + made.spare), *terms]))
    size, terms = max(found, key=lambda pair: pair[0])
    return tuple(replace(term, amount=term.amount / MIB) for term in terms), size / MIB


def selector_for(work: Workbench, groups: ChannelGroups, priced: Price) -> Selector:
    """The recipe's budget over the prunable groups, as ``priced`` on the target."""
    selector = selector_at(priced, Network.of(work, groups))
    for kind, limit in priced.limits.items():
        selector = selector.limited(kind, limit)
    return selector


def check_reachable(work: Workbench, groups: ChannelGroups, priced: Price, budget: BudgetTable) -> None:
    """Whether another budget than that which was ``priced`` can be reached, and asks for something: what formulas tell, exactly;
    of the rest, what the table tells of the narrowest and the dense network: of a file the form of the target, times and memory
    but for what a glance may be off.

    Raises: BudgetError.
    """
    asked = {budget.kind: budget.requested, **budget.limits.given}
    rows = {row.quantity: row for row in priced.table}
    for kind, amount in asked.items():
        row = rows.get(quantity_of(kind))
        if row is None or kind in FORMULAS:
            continue
        limit = amount * (row.dense if is_ratio(kind) else 1.0)
        enough = row.dense * (1 + GLANCED * (kind in (*MEASURED, "file_mib")))  # another form's file may be larger
        if kind == budget.kind and not is_ratio(kind) and limit >= enough:
            raise BudgetError(
                f"budget.{kind}: got {amount:g}; the dense network has {shown(row.dense)} already: ask for less"
            )
        if row.smallest > limit * (1 + GLANCED * (kind in MEASURED)):
            best = shown(row.smallest / (row.dense if is_ratio(kind) else 1.0))
            more = "no ratio can be met" if is_ratio(kind) and row.smallest > row.dense else "ask for more"
            key, network = (
                f"budget.{kind}" if kind == budget.kind else f"budget.limits.{kind}",
                Network.of(work, groups),
            )
            known = quantity_of(kind) in priced.costs
            made_of = what_stops(kind, network.narrowest(priced.round_to), priced, network) if known else ""
            raise BudgetError(
                f"{key}: got {amount:g}; the narrowest network has {best}, measured on {priced.target} (with round_to = "
                f"{priced.round_to}, max_removal = {budget.max_removal:g}){made_of}; {more}"
            )
    if FORMULAS.issuperset(asked):
        other = replace(work, recipe=work.recipe.model_copy(update={"budget": budget}))
        selector_at(priced, Network.of(other, groups))


def selector_at(priced: Price, network: Network) -> Selector:
    """Selection under the recipe's budget where its costs are as ``priced``."""
    table = network.recipe.budget
    if "memory_mib" in table.measured and "memory_mib" not in priced.costs:
        raise BudgetError("budget.memory_mib: memory is read from /proc, which is not here; expected Linux")
    measured = {name: network.shapes.sum_of(terms) for name, terms in priced.costs.items()}
    return build_selector(
        network.groups.prunable,
        replace(network.cost, measured=measured, dense=priced.dense),
        budget=table.kind,
        requested=table.requested,
        round_to=priced.round_to,
        max_removal=table.max_removal,
        caps=table.caps,
        limits=table.limits.given,
        steps=network.steps,
        speed="latency_ms" if table.speed else None,
        stops=lambda kind, widths: what_stops(kind, widths, priced, network),
    )


def elsewhere(priced: Price) -> str | None:
    """In what this machine differs from the one that ``priced`` was measured on; None where it does not."""
    here = machine()
    other = [f"{key} {value}, here {here.get(key)}" for key, value in priced.machine.items() if here.get(key) != value]
    return "; ".join(other) or None
