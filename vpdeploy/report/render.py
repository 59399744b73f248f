"""A report as pages: Markdown to keep beside the code, and HTML in one self-contained file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from vpdeploy.report import figures, sheets, tokens
from vpdeploy.report.budget import budget_lines, came_to
from vpdeploy.report.headline import describe, factor_at, headline, main_arm
from vpdeploy.report.numbers import factor, factor_range, percent, points, points_range
from vpdeploy.report.pictures import canvas_picture, prompt_picture
from vpdeploy.report.verdict import ARMS, partings, prompt_effect, verdicts
from vpdeploy.values import Report

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Pages:
    markdown: str
    html: str


@dataclass(frozen=True)
class Tile:
    """One large figure at the top of the page."""

    label: str
    value: str
    note: str
    tone: str = ""  # "good" or "bad" where the interval says so


def render(report: Report, *, prompt: NDArray[Any] | None = None, canvas_example: NDArray[Any] | None = None) -> Pages:
    """Both pages. prompt: the learned delta, float [3, C, C]; canvas_example: a prompted canvas, uint8 [C, C, 3].

    The same report gives the same bytes. The HTML page fetches nothing.
    """
    pictures = [] if prompt is None else [prompt_picture(np.asarray(prompt, np.float64))]
    pictures += [] if canvas_example is None else [canvas_picture(canvas_example)]
    return both_pages(
        "report",
        _contents(report),
        **_charts(report),
        tiles=_tiles(report),
        pictures=pictures,
        all_epochs=sheets.epochs(report.history, caption="Every epoch."),
    )


def both_pages(name: str, contents: Mapping[str, Any], **of_html: Any) -> Pages:
    """By the templates called ``name``: what both pages say, and what the HTML page alone shows."""
    css = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    plain, safe = (
        pages_environment(autoescape=escaped).get_template(f"{name}.{kind}.j2")
        for kind, escaped in (("md", False), ("html", True))
    )
    return Pages(markdown=plain.render(**contents), html=safe.render(**contents, **of_html, css=css))


def pages_environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markdown_text
    environment.filters["fenced"] = fenced
    return environment


def _contents(report: Report) -> dict[str, Any]:
    """What both pages say."""
    return {
        "report": report,
        "comparison": sheets.comparison(report),
        "verdicts": [*verdicts(report), *budget_lines(report)],
        "arms": {name: ARMS.get(name, "") for name in report.arms},
        "prompt_effect": prompt_effect(report),
        "certificates": {
            name: {
                "proofs": sheets.proofs(certificate),
                "widths": sheets.widths(certificate),
                "excluded": sheets.excluded(certificate),
            }
            for name, certificate in report.certificates.items()
        },
        "folds": tokens.folds(report),
        "tokens": {
            name: {"costs": tokens.costs(found), "blocks": tokens.blocks(found)}
            for name, found in tokens.tokens_of(report).items()
        },
        "partings": partings(report),
        "reach": _reach(report),
        "scenarios": sheets.scenarios(report),
        "accuracies": sheets.accuracies(report),
        "latencies": sheets.latencies(report),
        "layers": sheets.layers(report),
        "memories": sheets.memories(report),
        "last_epochs": sheets.epochs(sheets.last_epochs(report.history), caption="The last epochs of each stage."),
        "uncounted": sheets.uncounted(report),
        "environment": sheets.environment(report),
    }


def _reach(report: Report) -> sheets.Sheet | None:
    arm = main_arm(report)
    return None if report.price is None else sheets.reach(report.price, came_to(report, arm) if arm else None)


def _charts(report: Report) -> dict[str, Any]:
    arms = list(report.arms)
    accuracy = figures.accuracy_figure(report.history, arms)
    latency, pareto = figures.latency_figure(report), figures.arms_figure(report)
    widths = {name: figures.widths_figure(c, name, arms) for name, c in report.certificates.items()}
    return {
        # matplotlib escapes the text inside; the rest is its own.
        "accuracy_chart": Markup(accuracy) if accuracy else None,
        "pareto_chart": Markup(pareto) if pareto else None,
        "latency_chart": Markup(latency) if latency else None,
        "token_charts": {
            name: Markup(figures.tokens_figure(found, name, arms)) for name, found in tokens.tokens_of(report).items()
        },
        "width_charts": {name: Markup(svg) for name, svg in widths.items() if svg},
        "colours": {name: figures.VARIABLES.get(c, c) for name in arms for c in [figures.arm_colour(name, arms)]},
    }


def _tiles(report: Report) -> list[Tile]:
    """The main arm against dense, at a glance."""
    name, at = main_arm(report), headline(report)
    if name is None:
        return []
    factors, difference, faster = report.factors[name], report.accuracy_difference[name], factor_at(report, name, at)
    arm, n = report.arms[name], report.arms[name].n
    tiles = [Tile("MACs", factor(factors.macs), "fewer than dense", _tone((factors.macs, factors.macs), 1))]
    if faster is not None and at is not None:
        note = f"{factor_range(faster.interval)}; {describe(at)}"
        tiles.append(Tile("latency p50", factor(faster.factor), f"faster; {note}", _tone(faster.interval, 1)))
    tone, bounds = _tone(difference.interval, 0), points_range(difference.interval, n)
    tiles.append(Tile("top-1 against dense", f"{points(difference.difference, n)} points", bounds, tone))
    low, high = arm.accuracy_top1_interval
    note = f"{percent(low, n)} to {percent(high, n)}; n = {n}"
    return [*tiles, Tile(f"top-1 of {name}", percent(arm.accuracy_top1, n), note)]


def _tone(interval: tuple[float, float], neutral: float) -> str:
    return "good" if interval[0] > neutral else "bad" if interval[1] < neutral else ""


def markdown_text(text: str) -> str:
    """``text`` as it is, whatever it holds: no markup, no HTML, no new cell or line of a table."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def fenced(text: str) -> str:
    """``text`` in a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"
