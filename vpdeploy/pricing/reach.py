"""The satisfiability table: what can be reached, and what stops it from being less."""

from __future__ import annotations

from vpdeploy.pricing.network import Network
from vpdeploy.report.sheets import reach
from vpdeploy.scoring.select import is_ratio
from vpdeploy.surgery.cost import Array, quantity_of
from vpdeploy.values import Price, Reach, Term


def reach_text(priced: Price) -> str:
    """The satisfiability table, for the console."""
    sheet = reach(priced)
    rows = [sheet.columns, *((cell.text for cell in row) for row in sheet.rows)]
    lines = (f"  {name:<16}" + "".join(f"{text:>14}" for text in texts) for name, *texts in rows)
    return "\n".join([f"what can be reached on {priced.target}:", *lines, f"  ({sheet.caption})"])


def table_of(priced: Price, network: Network) -> tuple[Reach, ...]:
    budget, cost = network.recipe.budget, network.cost
    amounts, narrowest = budget.limits.given, network.narrowest(priced.round_to)
    if not is_ratio(budget.kind):
        amounts[budget.kind] = budget.requested
    asked = {"channel_ratio": "channels", "macs_ratio": "macs", "params_ratio": "params", "latency_ratio": "latency_ms"}
    formulas = {
        "channels": cost.channels,
        "macs": cost.macs,
        "params": cost.params,
        "file_mib": network.shapes.sum_of(priced.costs["file_mib"]).at,
    }
    rows = {name: (formula(narrowest), formula(cost.dense_widths)) for name, formula in formulas.items()}
    rows |= {name: (least, priced.dense[name]) for name, least in priced.least.items()}
    of_ratio = asked.get(budget.kind)
    return tuple(
        Reach(name, least, budget.requested * dense if name == of_ratio else amounts.get(name), dense)
        for name, (least, dense) in rows.items()
    )


def what_stops(kind: str, widths: Array, priced: Price, network: Network) -> str:
    """What the cost is made of where widths can get no narrower, largest first."""
    terms = priced.costs.get(quantity_of(kind))
    if terms is None:
        return ""
    by_module: dict[str, list[Term]] = {}
    for term in terms:
        by_module.setdefault(term.module, []).append(term)
    parts = {module: network.shapes.sum_of(of_it).at(widths) for module, of_it in by_module.items()}
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    nothing = {
        "latency_ms": "what is no layer (sums, pools, layouts)",
        "latency_ratio": "what is no layer (sums, pools, layouts)",
        "file_mib": "the graph, its metadata and the prompt",
        "memory_mib": "the runtime itself",
    }[kind]
    told = ", ".join(f"{module or nothing} {value / total:.0%}" for module, value in largest)
    held = [group.root for group in network.groups.groups if group.status == "excluded"]
    more = f"; {len(held)} groups are excluded, {held[0]} among them: `vpdeploy inspect` says why" if held else ""
    return f"; there it is made of {told}{more}"
