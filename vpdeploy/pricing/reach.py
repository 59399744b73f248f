"""The satisfiability table: what can be reached, and what stops it from being less."""

from __future__ import annotations

import numpy as np

from vpdeploy.pricing.network import Network
from vpdeploy.report.sheets import reach
from vpdeploy.scoring.select import is_ratio
from vpdeploy.surgery.cost import Array, quantity_of
from vpdeploy.surgery.shapes import Shapes
from vpdeploy.values import Price, Reach, Term


def reach_text(priced: Price) -> str:
    """The satisfiability table, for the console."""
    sheet = reach(priced)
    rows = [sheet.columns, *((cell.text for cell in row) for row in sheet.rows)]
    lines = (f"  {name:<16}" + "".join(f"{text:>14}" for text in texts) for name, *texts in rows)
    return "\n".join([f"what can be reached on {priced.target}:", *lines, f"  ({sheet.caption})"])


def table_of(priced: Price, network: Network, *, dense_file: float) -> tuple[Reach, ...]:
    """dense_file: MiB of the dense network's file as it ships."""
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
    dense = cost.dense_widths
    rows = {name: (formula(narrowest), formula(dense)) for name, formula in formulas.items()}
    rows["file_mib"] = (rows["file_mib"][0], dense_file)
    rows |= {name: (least, priced.dense[name]) for name, least in priced.least.items()}
    if (narrowest == dense).all():  # measured twice, or with room for what an export may add
        rows = {name: (whole, whole) for name, (_, whole) in rows.items()}
    of_ratio = asked.get(budget.kind)
    return tuple(
        Reach(name, least, budget.requested * dense if name == of_ratio else amounts.get(name), dense)
        for name, (least, dense) in rows.items()
    )


REST = {
    "macs_ratio": "products that no layer makes (attention's, a bare parameter's)",
    "params_ratio": "biases, norms and the like",
    "latency_ms": "what is no layer (sums, pools, layouts)",
    "file_mib": "the graph, its metadata and the prompt",
    "memory_mib": "the runtime itself",
}


def what_stops(kind: str, widths: Array, priced: Price, network: Network) -> str:
    """What the cost is made of where widths can get no narrower, largest first."""
    parts = _parts(kind, widths, priced, network)
    total, rest = sum(parts.values()), REST.get(quantity_of(kind), "")
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    told = ", ".join(f"{module or rest} {value / total:.0%}" for module, value in largest if value > 0)
    held = [g for g in network.groups.groups if g.status == "excluded" and any(m.side == "in" for m in g.members)]
    widest = max(held, key=lambda group: group.width, default=None)
    count = f"{len(held)} {'group is' if len(held) == 1 else 'groups are'} excluded"
    more = f"; {count}, {widest.root} the widest: `vpdeploy inspect` says why" if widest else ""
    return f"; there it is made of {told}{more}"


def _parts(kind: str, widths: Array, priced: Price, network: Network) -> dict[str, float]:
    """Module -> what it costs; "" is the rest."""
    shapes, cost = network.shapes, network.cost
    if kind == "channel_ratio":
        return {f"the group of {g.root}": width for g, width in zip(network.groups.prunable, widths, strict=True)}
    if kind in ("macs_ratio", "params_ratio"):
        counted = {"macs_ratio": lambda layer: layer.macs, "params_ratio": lambda layer: layer.entries}[kind]
        dense, total = shapes.dense_widths, cost.of(kind)(widths)
        of_layers = {
            layer.module: counted(layer) * float(np.prod(layer.lengths(widths) / layer.lengths(dense)))
            for layer in shapes.layers
        }
        if kind == "params_ratio":
            of_layers |= _bare(shapes, widths, most=total - sum(of_layers.values()))
        return {**of_layers, "": total - sum(of_layers.values())}
    by_module: dict[str, list[Term]] = {}  # of a file, what no width changes has a name of its own
    for term in priced.costs[quantity_of(kind)]:
        by_module.setdefault(term.module, []).append(term)
    return {module: shapes.sum_of(terms).at(widths) for module, terms in by_module.items()}


def _bare(shapes: Shapes, widths: Array, *, most: float) -> dict[str, float]:
    """Entries of tensors of two axes or more that are no layer's weight, by name; none that holds more than ``most`` (a buffer is
    no parameter).
    """
    weights = {layer.weight for layer in shapes.layers}
    entries = {
        name: float(np.prod([constant + float(share @ widths) for share, constant in axes]))
        for name, axes in shapes.tensors.items()
        if len(axes) > 1 and name not in weights
    }
    return {name: count for name, count in entries.items() if count <= most}
