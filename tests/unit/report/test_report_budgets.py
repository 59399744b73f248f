"""What a report says of budgets: what could be reached, where time and MACs part and why, scenarios, fronts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.report.test_report_pages import example_report

from vpdeploy.report.budget import budget_lines, came_to
from vpdeploy.report.figures import pareto
from vpdeploy.report.headline import headline
from vpdeploy.report.render import render
from vpdeploy.report.sheets import latencies, proofs, reach, scenarios
from vpdeploy.report.sweep import render_sweep, sweep_of, sweep_sheet
from vpdeploy.report.verdict import partings, prompt_cost
from vpdeploy.values import Certificate, Conditions, LatencyFactor, Layer, Price, Reach, Report

AT = Conditions("onnxruntime-cpu", "cpu", "fp32", "uint8", 2, 8)


def priced(**changes: object) -> Price:
    table = (
        Reach("channels", 1000, None, 9000),
        Reach("macs", 1e7, 6.3e7, 125_485_706),
        Reach("latency_ms", 1.2, 3.1, 4.1),
        Reach("memory_mib", 60.0, None, 64.5),
    )
    made = Price(
        round_to=16,
        costs={},
        dense={"latency_ms": 4.1},
        limits={},
        alignment={},
        table=table,
        target="onnxruntime-cpu, 2 threads, batch 8, uint8 form",
        conditions=AT,
        machine={"cpu": "AMD EPYC"},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def with_factor(report: Report, arm: str, factor: float) -> Report:
    """The same but for the arm's times, all so much faster than dense."""
    rows = tuple(
        LatencyFactor(*row.conditions, factor, (0.98 * factor, 1.02 * factor))
        for row in report.factors[arm].latency_p50
    )
    return replace(report, factors={**report.factors, arm: replace(report.factors[arm], latency_p50=rows)})


def layers(**ms: tuple[float, float]) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """Of dense and pruned: three layers of 64 outputs, the middle one cut to 37, and the rest."""
    dense = (Layer("a", 64, 100, 1.0), Layer("b", 64, 200, 2.0), Layer("c", 64, 100, 1.0), Layer("", 0, 0, 0.5))
    pruned = (Layer("a", 64, 60, 0.6), Layer("b", 37, 100, 1.9), Layer("c", 64, 60, 0.6), Layer("", 0, 0, 0.5))
    return dense, pruned


def parted(alignment: dict[str, float]) -> Report:
    dense, pruned = layers()
    report = with_factor(example_report(), "pruned", 1.1)
    arms = dict(report.arms)
    arms["dense"], arms["pruned"] = replace(arms["dense"], layers=dense), replace(arms["pruned"], layers=pruned)
    return replace(report, arms=arms, price=priced(alignment=alignment))


def test_where_time_and_macs_part_the_layer_is_named():
    first = partings(parted({}))[0]
    assert first == (
        "float form, batch 1, 1 thread: 2.05x fewer MACs, 1.10x faster: most is lost in b (64 -> 37 outputs, 2.00x fewer MACs, "
        "1.05x faster) and what is no layer (14 % of the time)."
    )
    assert len(partings(parted({}))) == 8  # of every form, batch and thread count


def test_the_width_that_is_slow_here_is_named():
    speeds = {"1": 0.62, "8": 0.9, "16": 1.0}
    assert partings(parted(speeds))[0].endswith(
        "; b has 37 outputs, and multiples of 16 are 1.61x faster on this machine."
    )
    assert "outputs, and multiples" not in partings(parted({"1": 0.9, "8": 1.0}))[0]  # not by much
    report = parted(speeds)
    left = [replace(row, width=37) if row.module == "b" else row for row in report.arms["dense"].layers]
    same = replace(report.arms["dense"], layers=tuple(left))  # as classes are: nobody chose them
    assert "multiples" not in partings(replace(report, arms={**report.arms, "dense": same}))[0]


def test_nothing_is_said_where_time_follows_the_macs():
    assert partings(with_factor(example_report(), "pruned", 2.0)) == []
    assert partings(with_factor(example_report(), "pruned", 2.7))[0].endswith("2.70x faster: more than the MACs.")
    assert partings(with_factor(example_report(), "pruned", 0.9))[0].startswith(
        "float form, batch 1, 1 thread: 2.05x fewer MACs, 1.11x slower"
    )


def test_what_could_be_reached_stands_beside_what_it_came_to():
    report = example_report()
    report = replace(report, price=priced(alignment={"1": 0.5, "16": 1.0}))
    sheet = reach(report.price, came_to(report, "pruned"))
    assert sheet.columns == ("quantity", "smallest", "requested", "dense", "reached")
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in sheet.rows}
    assert rows["MACs"] == ["10.0 M", "63.0 M", "125 M", "61.2 M"]
    faster = next(row for row in report.factors["pruned"].latency_p50 if row.conditions == AT)
    assert rows["latency, ms"][:3] == ["1.20", "3.10", "4.10"]
    assert float(rows["latency, ms"][3]) == pytest.approx(
        4.1 / faster.factor, rel=0.01
    )  # of the dense one in the table
    assert rows["memory, MiB"][3] == "–"  # not measured there
    assert "multiples of 16" in sheet.caption and "1: 0.50, 16: 1.00" in sheet.caption
    assert reach(priced()).columns == ("quantity", "smallest", "requested", "dense")


def test_a_file_stands_beside_what_the_table_tells_of_files():
    """Of the target's form, or of the larger one where a budget speaks of files."""
    report = example_report()
    arm = replace(report.arms["pruned"], file_bytes={"float": 2**21, "uint8": 2**22})
    for form, budget, told in (("float", "macs_ratio", 2.0), ("uint8", "macs_ratio", 4.0), ("float", "file_mib", 4.0)):
        certificates = {"pruned": replace(report.certificates["pruned"], budget=budget)}
        price = priced(conditions=AT._replace(form=form))
        made = replace(report, arms={**report.arms, "pruned": arm}, certificates=certificates, price=price)
        assert came_to(made, "pruned")["file_mib"] == told


def timed(requested: float, **changes: object) -> Report:
    """Of a run under a budget in time, whose pruned arm was twice as fast in the end."""
    report = replace(with_factor(example_report(), "pruned", 2.0), price=priced())
    budget = {"budget": "latency_ratio", "requested": requested, **changes}
    return replace(report, certificates={"pruned": replace(report.certificates["pruned"], **budget)})


@pytest.mark.parametrize(
    ("requested", "verdict"),
    [
        (0.5, "met"),
        (0.495, "exceeded by 1.0 %, which is less than the measurement leaves open"),
        (0.4, "exceeded by 25.0 %"),
    ],
)
def test_whether_the_budget_holds_in_the_end_is_told(requested, verdict):
    (line,) = budget_lines(timed(requested))
    assert line == (
        f"pruned, latency_ratio: asked for at most {requested:g}, measured at the end 0.500 (95 % 0.490 to 0.510), uint8 form, "
        f"batch 8, 2 threads: {verdict}."
    )
    assert line in render(timed(requested)).markdown.replace("\\", "") and line in render(timed(requested)).html


def test_limits_are_told_beside_the_budget_and_what_formulas_tell_is_not():
    limits = {"latency_ms": (3.0, 2.9), "file_mib": (9.0, 8.9)}
    report = timed(0.5, budget="macs_ratio", limits=limits)
    time = next(row for row in report.arms["pruned"].latency if row.conditions == AT)
    assert came_to(report, "pruned")["latency_ms"] == time.p50_ms  # as it was asked for
    assert [line.split(":")[0] for line in budget_lines(report)] == ["pruned, latency_ms", "pruned, file_mib"]
    assert budget_lines(example_report()) == []


def test_a_latency_budget_gives_the_headline():
    report = replace(example_report(), price=priced())
    at = headline(report)
    assert at is not None and at.form == "float"
    timed = replace(report.certificates["pruned"], budget="latency_ratio")
    assert headline(replace(report, certificates={"pruned": timed})) == AT
    limited = replace(report.certificates["pruned"], limits={"latency_ms": (8.0, 7.5)})
    assert headline(replace(report, certificates={"pruned": limited})) == AT


def test_the_certificate_tells_budgets_limits_and_where_they_were_measured():
    base: Certificate = example_report().certificates["pruned"]
    made = replace(
        base,
        budget="latency_ms",
        requested=4.0,
        reached=3.91,
        limits={"file_mib": (10.0, 9.25)},
        measured_on="onnxruntime-cpu",
    )
    rows = [[cell.text for cell in row] for row in proofs(made).rows]
    assert rows[0] == ["latency ms", "3.91", "at most 4 requested, measured on onnxruntime-cpu"]
    assert rows[1][:2] == ["file mib (limit)", "9.25"]
    assert proofs(base).rows[0][0].text == "macs ratio (what remains)"


def test_scenarios_are_those_of_mlperf():
    report = example_report()
    rows = [[cell.text for cell in row] for row in scenarios(report).rows]
    assert [row[:4] for row in rows[:2]] == [
        ["onnxruntime-cpu", "backbone alone", "dense", "1"],
        ["onnxruntime-cpu", "backbone alone", "dense+prompt", "1"],
    ]
    assert len(rows) == 4 * 4 and {row[1] for row in rows} == {"backbone alone", "end to end"}
    dense = {row.conditions[3:]: row for row in report.arms["dense"].latency}
    single, offline = dense["float", 1, 1], dense["float", 1, 8]
    assert float(rows[0][4]) == pytest.approx(single.p90_ms, rel=0.01)
    assert float(rows[0][5]) == pytest.approx(offline.images_per_second, rel=0.01)
    assert scenarios(report).rows[0][5].note == "batch 8"


def test_theory_stands_beside_every_measured_factor():
    sheet = latencies(example_report())
    macs = sheet.columns.index("MACs")
    assert {row[macs].text for row in sheet.rows if row[2].text == "pruned"} == {"2.05x"}


def test_the_prompts_own_cost_is_told_with_its_interval():
    told = prompt_cost(with_factor(example_report(), "dense+prompt", 0.8))
    assert told is not None and told.startswith("In time: +")
    assert "(+22.5 to +27.6 %; dense+prompt against dense; float form, batch 1, 1 thread)." in told
    report = example_report()
    assert prompt_cost(replace(report, arms={"dense": report.arms["dense"]})) is None


def test_a_front_holds_what_nothing_beats():
    points = [(1.0, 0.9), (0.5, 0.8), (0.6, 0.79), (0.5, 0.8), (0.4, 0.5)]
    assert pareto(points) == [True, True, False, True, True]  # equal ones both stand
    assert pareto([]) == []


def test_the_page_shows_accuracy_against_cost():
    pages = render(replace(example_report(), price=priced()))
    assert "What could be reached, what was asked, what it came to" in pages.html
    assert "## What could be reached" in pages.markdown
    assert "Where time and MACs part" in render(parted({})).html


def test_a_sweep_is_drawn_from_the_reports_of_its_runs():
    good, bad = example_report(), with_factor(example_report(), "pruned", 1.2)
    made = sweep_of({"macs_ratio-0.5": good, "macs_ratio-0.6": bad}, {"macs_ratio-0.5": "a b", "macs_ratio-0.6": "c d"})
    dense, first, second = made.points
    assert dense.front == ("time", "macs", "file_bytes")  # the most accurate
    assert "time" in first.front and "time" not in second.front
    assert first.time == pytest.approx(1 / headline_factor(good))
    assert first.time_interval[0] < first.time < first.time_interval[1]
    pages = render_sweep(made)
    assert "a b" in pages.html and "a b" in pages.markdown and "<svg" in pages.html
    assert [row[0].text for row in sweep_sheet(made).rows] == ["dense", "macs_ratio 0.5", "macs_ratio 0.5"]


def headline_factor(report: Report) -> float:
    at = headline(report)
    return next(row.factor for row in report.factors["pruned"].latency_p50 if row.conditions == at)
