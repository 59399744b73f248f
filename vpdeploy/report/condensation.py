"""Fewer and fewer tokens of one search side by side: accuracy against tokens kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from markupsafe import Markup

from vpdeploy.report.figures import Mark, curves_figure
from vpdeploy.report.headline import describe
from vpdeploy.report.numbers import NOTHING, amount, percent, percent_range, points, points_range
from vpdeploy.report.render import Pages, both_pages
from vpdeploy.report.sheets import Cell, Sheet, sheet_of
from vpdeploy.values import AccuracyDifference, Condensation, CondensedPoint, Report

ARM = "pruned"


def condensation_of(
    reports: Mapping[str, Report], commands: Mapping[str, str], *, differences: Mapping[str, AccuracyDifference]
) -> Condensation:
    """reports: run -> its report, the first of all tokens, the others called SCORE-SHARE; commands: run -> how to get it again;
    differences: run -> of its accuracy against the first.
    """
    first = next(iter(reports.values()))
    found = tuple(_point(run, report, commands[run], differences.get(run)) for run, report in reports.items())
    return Condensation(first.title, found, first.environment)


def _point(run: str, report: Report, command: str, difference: AccuracyDifference | None) -> CondensedPoint:
    arm = report.arms[ARM]
    assert arm.tokens is not None, "a condensed arm ships tokens"
    score, _, share = run.partition("-")
    _, published, shipped = arm.tokens.costs
    return CondensedPoint(
        score=score if share else "",
        keep=float(share or 1),
        tokens=sum(block.count for block in arm.tokens.blocks),
        run=run,
        command=command,
        accuracy_top1=arm.accuracy_top1,
        accuracy_top1_interval=arm.accuracy_top1_interval,
        n=arm.n,
        difference=difference,
        published=published,
        shipped=shipped,
        conditions=arm.tokens.conditions,
    )


def condensation_sheet(found: Condensation) -> Sheet:
    """One row a point, in the order of the scores."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for point in found.points:
            change = point.difference
            yield (
                point.score or "all tokens",
                f"{100 * point.keep:g} %",
                str(point.tokens),
                Cell(percent(point.accuracy_top1, point.n), percent_range(point.accuracy_top1_interval, point.n)),
                NOTHING
                if change is None
                else Cell(points(change.difference, change.n), points_range(change.interval, change.n)),
                Cell(amount(point.published.macs), f"{point.published.times:.2f}x"),
                Cell(amount(point.shipped.macs), f"{point.shipped.times:.2f}x"),
            )

    first = found.points[0]
    caption = (
        f"n = {first.n}; intervals at 95 %, of this one run. Below MACs: the time over the same network without tokens, "
        f"{describe(first.conditions)}. scratch: from the start as few in every block, rounded up, trained as long."
    )
    columns = ("score", "kept", "tokens", "top-1", "against all, points", "MACs as published", "MACs as shipped")
    return sheet_of(caption, columns, rows())


def render_condensation(found: Condensation) -> Pages:
    """Both pages. The same runs give the same bytes; the HTML page fetches nothing."""
    contents = {"found": found, "points": condensation_sheet(found)}
    return both_pages("condensation", contents, curve_chart=Markup(_figure(found)))


def _figure(found: Condensation) -> str:
    whole, *fewer = found.points
    scores = list(dict.fromkeys(point.score for point in fewer)) or ["all tokens"]
    curves = {score: [_mark(whole), *(_mark(point) for point in fewer if point.score == score)] for score in scores}
    return curves_figure(curves, label="tokens", name="condensation")


def _mark(point: CondensedPoint) -> Mark:
    return Mark(point.tokens, point.accuracy_top1, point.accuracy_top1_interval)
