"""The report's charts as inline SVG. Colours are CSS variables, so that one drawing serves light and dark pages."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vpdeploy.report.headline import describe, headline, latency_at
from vpdeploy.report.numbers import significant
from vpdeploy.values import BlockTokens, Certificate, EpochRecord, Interval, Latency, Report, Tokens

# Drawn in these colours, which the page exchanges for its own (style.css defines the variables).
INK, GRID, GHOST = "#1f2329", "#d8dce2", "#c9ced7"
ARM_COLOURS = {"dense": "#6b7480", "dense+prompt": "#c27a12", "pruned": "#2563d9", "pruned-prompt": "#9a3fc4"}
OTHER_COLOURS = ("#0f8a78", "#b3364b", "#5c6b1f", "#7a5230")
VARIABLES = {
    INK: "currentColor",
    GRID: "var(--grid)",
    GHOST: "var(--ghost)",
    **{colour: f"var(--arm-{name.replace('+', '-with-')})" for name, colour in ARM_COLOURS.items()},
}
WIDTH = 7.6  # inches; a page of 1100 pixels shows it at twice its size


def arm_colour(name: str, order: Sequence[str]) -> str:
    others = [arm for arm in order if arm not in ARM_COLOURS]
    return ARM_COLOURS.get(name) or OTHER_COLOURS[others.index(name) % len(OTHER_COLOURS)]


def accuracy_figure(history: Sequence[EpochRecord], arms: Sequence[str]) -> str | None:
    """Validation top-1 over the epochs of fit, search and tune, one line an arm; None without a history."""
    kinds = [kind for kind in ("fit", "search", "tune") if any(r.stage.split(":")[0] == kind for r in history)]
    if not kinds:
        return None
    longest = {kind: max(r.epochs for r in history if r.stage.split(":")[0] == kind) for kind in kinds}
    with _drawing(2.5, "accuracy") as (figure, svg):
        shares = [max(0.35 * max(longest.values()), longest[kind]) for kind in kinds]
        panels: Any = figure.subplots(1, len(kinds), sharey=True, squeeze=False, width_ratios=shares)[0]
        for kind, panel in zip(kinds, panels, strict=True):
            for stage in dict.fromkeys(r.stage for r in history if r.stage.split(":")[0] == kind):
                arm = stage.partition(":")[2] or "dense"
                rows = [r for r in history if r.stage == stage]
                x, y = [r.epoch for r in rows], [100 * r.accuracy_val for r in rows]
                colour = arm_colour(arm, arms)
                panel.plot(x, y, color=colour, marker="o", markersize=2.2, linewidth=1.2, label=arm)
            panel.set_title({"fit": "fit", "search": "search, weights frozen", "tune": "tune"}[kind])
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(
                integer=True, min_n_ticks=1, nbins=max(2, int(8 * shares[kinds.index(kind)] / sum(shares)))
            )
            panel.margins(x=0.08)
        panels[0].set_ylabel("validation top-1, %")
        for panel in panels[1:]:
            panel.spines["left"].set_visible(False)
            panel.tick_params(axis="y", length=0)
    return svg[0]


def widths_figure(certificate: Certificate, arm: str, arms: Sequence[str]) -> str | None:
    """Channels of each group, kept before dense; None without groups."""
    groups = certificate.groups
    if not groups:
        return None
    with _drawing(0.5 + 0.155 * len(groups), f"widths {arm}") as (figure, svg):
        panel: Any = figure.subplots()
        rows = np.arange(len(groups))
        panel.barh(rows, [g.width for g in groups], height=0.72, color=GHOST)
        panel.barh(rows, [g.kept for g in groups], height=0.72, color=arm_colour(arm, arms))
        longest = max(g.width for g in groups)
        for row, group in zip(rows, groups, strict=True):
            note = "" if group.status == "exact" else f"  {group.status}"
            panel.text(
                group.width + 0.008 * longest, row, f"{group.kept} / {group.width}{note}", va="center", fontsize=5.6
            )
        panel.set_yticks(rows, [_short(g.root) for g in groups])
        panel.set_ylim(len(groups) - 0.4, -0.6)
        panel.set_xlim(0, 1.15 * longest)
        panel.set_xlabel("channels")
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    return svg[0]


def tokens_figure(found: Tokens, arm: str, arms: Sequence[str]) -> str:
    """Tokens of each block, those that stayed before those that there were, with their share of attention."""
    with _drawing(0.5 + 0.155 * len(found.blocks), f"tokens {arm}") as (figure, svg):
        panel: Any = figure.subplots()
        rows = np.arange(len(found.blocks))
        had = [max(found.count, block.count) if _has_tokens(found, block) else 0 for block in found.blocks]
        panel.barh(rows, had, height=0.72, color=GHOST)
        panel.barh(rows, [block.count for block in found.blocks], height=0.72, color=arm_colour(arm, arms))
        for row, before, block in zip(rows, had, found.blocks, strict=True):
            share = "" if block.attention is None else f", {100 * block.attention:.1f} % of attention"
            panel.text(before + 0.008 * found.count, row, f"{block.count} / {before}{share}", va="center", fontsize=5.6)
        panel.set_yticks(rows, [_short(block.block) for block in found.blocks])
        panel.set_ylim(len(found.blocks) - 0.4, -0.6)
        panel.set_xlim(0, 1.35 * found.count)
        panel.set_xlabel("tokens")
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    return svg[0]


def _has_tokens(found: Tokens, block: BlockTokens) -> bool:
    """Tokens of vpt-shallow are the first block's."""
    return found.kind != "vpt-shallow" or block is found.blocks[0]


@dataclass(frozen=True)
class Point:
    """A network in a plane of cost and accuracy: both with intervals at 95 % where they have one."""

    name: str
    cost: float
    cost_interval: Interval | None
    accuracy: float
    accuracy_interval: Interval
    colour: str
    front: bool  # nothing else is as cheap and as accurate


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, accuracy): whether none other is at most as costly and at least as accurate, and better in one."""
    return [
        not any((c <= cost and a >= accuracy) and (c < cost or a > accuracy) for c, a in points)
        for cost, accuracy in points
    ]


def arms_figure(report: Report) -> str | None:
    """Accuracy against latency and MACs, a point an arm; None without latencies."""
    at = headline(report)
    times = {name: latency_at(arm, at) for name, arm in report.arms.items()}
    if at is None or None in times.values():
        return None
    arms, colours = list(report.arms.items()), {name: arm_colour(name, list(report.arms)) for name in report.arms}

    def plane(costs: Sequence[tuple[float, Interval | None]]) -> list[Point]:
        front = pareto([(cost, arm.accuracy_top1) for (cost, _), (_, arm) in zip(costs, arms, strict=True)])
        return [
            Point(name, cost, interval, arm.accuracy_top1, arm.accuracy_top1_interval, colours[name], on)
            for (name, arm), (cost, interval), on in zip(arms, costs, front, strict=True)
        ]

    planes = {
        f"p50, ms ({describe(at)})": plane([(row.p50_ms, _median_interval(row)) for row in times.values() if row]),
        "MACs, millions": plane([(arm.macs / 1e6, None) for _, arm in arms]),
    }
    return pareto_figure(planes, name="pareto")


def _median_interval(row: Latency) -> Interval:
    """From order statistics: between these ranks lies the median of the distribution in 95 of 100 samples."""
    times = np.sort(row.samples_ms)
    half = 0.98 * len(times) ** 0.5
    low, high = int(max(0, len(times) / 2 - half)), int(min(len(times) - 1, len(times) / 2 + half))
    return float(times[low]), float(times[high])


def pareto_figure(planes: Mapping[str, Sequence[Point]], *, name: str) -> str:
    """A panel for each cost: every network with its intervals, the front joined."""
    with _drawing(2.6, name) as (figure, svg):
        panels: Any = figure.subplots(1, len(planes), sharey=True, squeeze=False)[0]
        for (label, points), panel in zip(planes.items(), panels, strict=True):
            front = sorted((p.cost, 100 * p.accuracy) for p in points if p.front)
            panel.plot(*zip(*front, strict=True), color=GHOST, linewidth=1.2, drawstyle="steps-post", zorder=1)
            for point in points:
                low, high = (100 * bound for bound in point.accuracy_interval)
                panel.vlines(point.cost, low, high, color=point.colour, linewidth=0.8)
                if point.cost_interval is not None:
                    panel.hlines(100 * point.accuracy, *point.cost_interval, color=point.colour, linewidth=0.8)
                colour, y = point.colour, 100 * point.accuracy
                fill = colour if point.front else "none"
                panel.plot([point.cost], [y], marker="o", markersize=4, color=colour, markerfacecolor=fill)
                panel.annotate(point.name, (point.cost, y), (5, 4), textcoords="offset points", fontsize=5.6)
            panel.set_xlabel(label)
            panel.set_xlim(left=0)
            panel.margins(x=0.12)
        panels[0].set_ylabel("top-1, %")
    return svg[0]


@dataclass(frozen=True)
class Mark:
    """A point of a curve: accuracy with its interval at 95 %."""

    amount: float
    accuracy: float
    interval: Interval


def curves_figure(curves: Mapping[str, Sequence[Mark]], *, label: str, name: str) -> str:
    """Accuracy against an amount, a line for each curve."""
    colours = [*ARM_COLOURS.values(), *OTHER_COLOURS]
    with _drawing(2.6, name) as (figure, svg):
        panel: Any = figure.subplots()
        span = max(mark.amount for marks in curves.values() for mark in marks)
        for number, (curve, marks) in enumerate(curves.items()):
            colour, aside = (
                colours[(number + 2) % len(colours)],
                0.004 * span * number,
            )  # so that intervals stand side by side
            marks = sorted(marks, key=lambda mark: mark.amount)
            x, y = [mark.amount + aside for mark in marks], [100 * mark.accuracy for mark in marks]
            low, high = zip(*((100 * a, 100 * b) for a, b in (mark.interval for mark in marks)), strict=True)
            panel.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.1, label=curve)
            panel.vlines(x, low, high, color=colour, linewidth=0.6)
        panel.set_xlabel(label)
        panel.set_ylabel("top-1, %")
        panel.set_xlim(left=0)
        panel.legend(frameon=False, fontsize=5.8)
    return svg[0]


def latency_figure(report: Report) -> str | None:
    """Quantiles of every distribution, a panel for each form, thread count and batch; None without latencies."""
    rows = report.arms["dense"].latency
    if not rows:
        return None
    columns = 1 if len(rows) == 1 else 2
    lines = -(-len(rows) // columns)
    with _drawing(lines * (0.5 + 0.17 * len(report.arms)), "latency") as (figure, svg):
        panels: Any = figure.subplots(lines, columns, squeeze=False).flat
        for panel, row in zip(panels, rows, strict=False):
            found = {name: latency_at(arm, row.conditions) for name, arm in report.arms.items()}
            _quantiles(panel, {name: latency for name, latency in found.items() if latency})
            panel.set_title(describe(row.conditions))
            panel.set_xlabel("ms", labelpad=1)
        for panel in list(panels)[len(rows) :]:
            panel.set_visible(False)
    return svg[0]


def _quantiles(panel: Any, latencies: dict[str, Latency]) -> None:
    """One line an arm: thin from p1 to p99, thick from p25 to p75, a mark at the median and its figure."""
    for y, (name, latency) in enumerate(latencies.items()):
        p1, p10, p25, p50, p75, p90, p99 = np.percentile(latency.samples_ms, [1, 10, 25, 50, 75, 90, 99])
        colour = arm_colour(name, list(latencies))
        panel.hlines(y, p1, p99, color=colour, linewidth=0.7)
        panel.hlines(y, p10, p90, color=colour, linewidth=3, alpha=0.35)
        panel.hlines(y, p25, p75, color=colour, linewidth=5)
        panel.plot([p50], [y], marker="|", markersize=8, color=INK, markeredgewidth=1)
        panel.annotate(significant(p50), (p99, y), (4, 0), textcoords="offset points", va="center", fontsize=5.6)
    panel.set_yticks(range(len(latencies)), list(latencies))
    panel.set_ylim(len(latencies) - 0.4, -0.6)
    panel.set_xlim(0, 1.12 * max(np.percentile(latency.samples_ms, 99) for latency in latencies.values()))
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)


def _short(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]


STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vpdeploy",  # the same report gives the same bytes
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.size": 6.4,
    "axes.titlesize": 6.6,
    "axes.titlelocation": "left",
    "axes.labelsize": 6.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.5,
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.4,
    "ytick.major.width": 0.4,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "grid.color": GRID,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@contextmanager
def _drawing(height: float, name: str) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of the report's style; when the block ends, the list holds its SVG."""
    svg: list[str] = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser has fonts of its own; matplotlib only measures.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg.append(_inline(buffer.getvalue(), re.sub(r"[^a-z0-9]+", "-", name.lower())))


def _inline(document: str, prefix: str) -> str:
    """The <svg> element alone, its colours as variables and its ids unique on a page that holds several."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()
