"""The comparison on the console."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vpdeploy.report.headline import describe, engine_of, factor_at, headline, latency_at, main_arm
from vpdeploy.report.numbers import (
    NOTHING,
    amount,
    factor,
    factor_range,
    mebibytes,
    percent,
    points,
    points_range,
    significant,
)
from vpdeploy.report.sheets import Sheet, comparison
from vpdeploy.values import FileBench, Latency, LatencyFactor, Report

# n and peak memory stand in the report: ten columns do not fit on a terminal of 100.
SHOWN = {
    "arm": "arm",
    "top-1": "top-1",
    "against dense, points": "Δ points",
    "MACs": "MACs",
    "params": "params",
    "file, MiB": "MiB",
    "p50, ms": "p50 ms",
    "faster": "faster",
}


def comparison_table(report: Report) -> Table:
    """One row an arm; intervals and factors in a second line of each cell."""
    sheet, at = comparison(report), headline(report)
    caption = f"n = {report.arms['dense'].n}; 95 % intervals" + (f"; latency: {describe(at)}" if at else "")
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown = [i for i, column in enumerate(sheet.columns) if column in SHOWN]
    for i in shown:
        table.add_column(SHOWN[sheet.columns[i]], justify="left" if i in sheet.words else "right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*(_text(row[i].text, row[i].note) for i in shown))
    return table


def _text(text: str, note: str) -> Text:
    """Text, not markup: "[x]" in a name stays as it is."""
    return Text.assemble(text, ("\n" + note, "dim")) if note else Text(text)


def sheet_table(sheet: Sheet) -> Table:
    """Any table of the report, for the console."""
    table = Table(caption=sheet.caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if number in sheet.words else "right")
    for row in sheet.rows:
        table.add_row(*(_text(cell.text, cell.note) for cell in row))
    return table


def bench_tables(bench: FileBench) -> list[Table]:
    """The times of files, and what they take: bytes, memory and the start."""
    times = times_table(
        {name: (figures.latency, figures.factors) for name, figures in bench.files.items()}, first="file"
    )
    takes = _table(
        "a fresh process with ONNX Runtime on the CPU", *("file", "MiB", "batch", "peak MiB", "load ms", "first ms")
    )
    for name, figures in bench.files.items():
        for row in figures.memory:
            took = (row.peak_rss_mib, row.load_ms, row.first_run_ms)
            takes.add_row(name, mebibytes(figures.file_bytes), str(row.batch), *(significant(value) for value in took))
    return [times, takes]


def times_table(rows: Mapping[str, tuple[Iterable[Latency], Iterable[LatencyFactor]]], *, first: str) -> Table:
    """Every distribution, by name and conditions, and how much faster it is than the first name's."""
    caption = f"the same images, interleaved round by round; faster: the first {first} over this one, 95 % interval"
    columns = (first, "engine", "form", "batch", "threads", "p50 ms", "p90", "p95", "p99", "images/s", "faster")
    table = _table(caption, *columns)
    for name, (latencies, factors) in rows.items():
        faster = {row.conditions: row for row in factors}
        for row in latencies:
            factored = faster.get(row.conditions)
            table.add_row(
                _text(name, "" if row.steady else "unsteady"),
                engine_of(row.conditions), row.form, str(row.batch), str(row.threads),
                *(significant(value) for value in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms, row.images_per_second)),
                NOTHING if factored is None else _text(factor(factored.factor), factor_range(factored.interval)),
            )  # fmt: skip
    return table


def _table(caption: str, *columns: str) -> Table:
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        words = column in ("file", "engine", "form", "run", "arm")
        # A name that is too long goes on in the next line: its end is what tells folders of one sweep apart.
        table.add_column(column, justify="left" if words else "right", overflow="fold" if words else "ellipsis")
    return table


def _data_of(report: Report) -> tuple[str, str]:
    """The name of the data set, and where it is."""
    table = tomllib.loads(report.recipe).get("data", {})
    return str(table.get("name", "")), str(table.get("root", ""))


def runs_table(reports: Mapping[str, Report]) -> Table:
    """The main arm of each run, at the first run's headline conditions where all were measured under them."""
    shared = set.intersection(
        *({row.conditions for row in report.arms["dense"].latency} for report in reports.values())
    )
    first = next(iter(reports.values()))
    at = next((row.conditions for row in first.arms["dense"].latency if row.conditions in shared), None)
    at = headline(first) if headline(first) in shared else at
    cpus = {str(report.environment.get("machine", {}).get("cpu")) for report in reports.values()}
    tests = {(*_data_of(report), report.arms["dense"].n) for report in reports.values()}
    where = "no conditions that all were measured under" if at is None else describe(at)
    caption = f"latency: {where}"
    if len(cpus) > 1:
        caption += f"; measured on different machines: {', '.join(sorted(cpus))}"
    if len(tests) > 1:
        told = ", ".join(f"{n} of {' '.join(filter(None, data))}" for *data, n in sorted(tests))
        caption += f"; accuracies are of different test images ({told}) and cannot be compared"
    table = _table(caption, *("run", "arm", "top-1", "Δ points", "MACs", "params", "MiB", "p50 ms", "faster"))
    for name, report in reports.items():
        arm = main_arm(report)
        if arm is None:
            continue
        measured, saved, against = report.arms[arm], report.factors[arm], report.accuracy_difference[arm]
        time, faster = latency_at(measured, at), factor_at(report, arm, at)
        form = next(iter(measured.file_bytes)) if at is None else at.form
        size = measured.file_bytes.get(form)
        table.add_row(
            _text(name, ""), arm,
            _text(percent(measured.accuracy_top1, measured.n), f"n = {measured.n}"),
            _text(points(against.difference, against.n), points_range(against.interval, against.n)),
            _text(amount(measured.macs), factor(saved.macs)),
            _text(amount(measured.params), factor(saved.params)),
            NOTHING if size is None else mebibytes(size),
            NOTHING if time is None else significant(time.p50_ms),
            NOTHING if faster is None else _text(factor(faster.factor), factor_range(faster.interval)),
        )  # fmt: skip
    return table
