"""Several budgets of one search side by side: accuracy against time, MACs and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from vpdeploy.report.figures import ARM_COLOURS, Point, pareto, pareto_figure
from vpdeploy.report.headline import describe, factor_at, headline, main_arm
from vpdeploy.report.numbers import (
    NOTHING,
    amount,
    factor,
    factor_range,
    mebibytes,
    percent,
    percent_range,
    points,
    points_range,
)
from vpdeploy.report.render import Pages, both_pages
from vpdeploy.report.sheets import Cell, Sheet, sheet_of
from vpdeploy.values import Conditions, Report, Sweep, SweepPoint

COSTS = {"time": "run time, of dense", "macs": "MACs, millions", "file_bytes": "file, MiB"}
UNITS = {"time": 1.0, "macs": 1e6, "file_bytes": 2.0**20}


def sweep_of(reports: Mapping[str, Report], commands: Mapping[str, str]) -> Sweep:
    """reports: run -> its report, of runs that share the dense network; commands: run -> how to get it again."""
    first = next(iter(reports.values()))
    found = [_dense_point(first), *(_point(run, report, commands[run]) for run, report in reports.items())]
    fronts = {cost: pareto([(float(getattr(point, cost)), point.accuracy_top1) for point in found]) for cost in COSTS}
    marked = (
        replace(point, front=tuple(cost for cost in COSTS if fronts[cost][number]))
        for number, point in enumerate(found)
    )
    return Sweep(first.title, tuple(marked), first.environment)


def _dense_point(report: Report) -> SweepPoint:
    arm, at = report.arms["dense"], headline(report)
    return SweepPoint(
        budget="",
        requested=1.0,
        reached=1.0,
        run="",
        command="",
        accuracy_top1=arm.accuracy_top1,
        accuracy_top1_interval=arm.accuracy_top1_interval,
        n=arm.n,
        difference=None,
        macs=arm.macs,
        params=arm.params,
        file_bytes=_bytes(arm.file_bytes, at),
        time=1.0,
        time_interval=(1.0, 1.0),
        conditions=at,
    )


def _point(run: str, report: Report, command: str) -> SweepPoint:
    name, at = main_arm(report), headline(report)
    assert name is not None, "a run of a sweep has a pruned arm"
    arm, faster, certificate = report.arms[name], factor_at(report, name, at), report.certificates[name]
    assert faster is not None, "bench measures every arm under the same conditions"
    return SweepPoint(
        budget=certificate.budget,
        requested=certificate.requested,
        reached=certificate.reached,
        run=run,
        command=command,
        accuracy_top1=arm.accuracy_top1,
        accuracy_top1_interval=arm.accuracy_top1_interval,
        n=arm.n,
        difference=report.accuracy_difference[name],
        macs=arm.macs,
        params=arm.params,
        file_bytes=_bytes(arm.file_bytes, at),
        time=1 / faster.factor,
        time_interval=(1 / faster.interval[1], 1 / faster.interval[0]),
        conditions=at,
    )


def _bytes(sizes: Mapping[str, int], at: Conditions | None) -> int:
    return sizes[at.form] if at is not None and at.form in sizes else next(iter(sizes.values()))


def sweep_sheet(sweep: Sweep) -> Sheet:
    """One row a point, the cheapest last."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        dense = sweep.points[0]
        for point in sweep.points:
            name = f"{point.budget} {point.requested:g}" if point.budget else "dense"
            faster = (1 / point.time_interval[1], 1 / point.time_interval[0])
            change = point.difference
            yield (
                Cell(name, f"reached {point.reached:.4g}" if point.budget else ""),
                Cell(percent(point.accuracy_top1, point.n), percent_range(point.accuracy_top1_interval, point.n)),
                NOTHING
                if change is None
                else Cell(points(change.difference, change.n), points_range(change.interval, change.n)),
                Cell(factor(1 / point.time), factor_range(faster)) if point.budget else NOTHING,
                Cell(amount(point.macs), factor(dense.macs / point.macs) if point.budget else ""),
                Cell(amount(point.params), factor(dense.params / point.params) if point.budget else ""),
                Cell(mebibytes(point.file_bytes), factor(dense.file_bytes / point.file_bytes) if point.budget else ""),
                ", ".join(
                    "file" if cost == "file_bytes" else "MACs" if cost == "macs" else cost for cost in point.front
                )
                or NOTHING,
            )

    at = sweep.points[0].conditions
    caption = (
        f"n = {sweep.points[0].n}; intervals at 95 %. Latency: {describe(at) if at else 'not measured'}; each point against "
        "dense in its own run. On the front: no other point is as cheap and as accurate."
    )
    columns = ("budget", "top-1", "against dense, points", "faster", "MACs", "params", "file, MiB", "on the front of")
    return sheet_of(caption, columns, rows(), words=(0, 7))


def render_sweep(sweep: Sweep) -> Pages:
    """Both pages. The same sweep gives the same bytes; the HTML page fetches nothing."""
    contents = {"sweep": sweep, "points": sweep_sheet(sweep)}
    return both_pages("sweep", contents, pareto_chart=Markup(_figure(sweep.points)))


def _figure(found: Sequence[SweepPoint]) -> str:
    def plane(cost: str) -> list[Point]:
        return [
            Point(
                name=f"{point.requested:g}" if point.budget else "dense",
                cost=getattr(point, cost) / UNITS[cost],
                cost_interval=point.time_interval if cost == "time" else None,
                accuracy=point.accuracy_top1,
                accuracy_interval=point.accuracy_top1_interval,
                colour=ARM_COLOURS["pruned" if point.budget else "dense"],
                front=cost in point.front,
            )
            for point in found
        ]

    return pareto_figure({label: plane(cost) for cost, label in COSTS.items()}, name="sweep")
