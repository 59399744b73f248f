"""The comparison on the console."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vpdeploy.report.headline import describe, headline
from vpdeploy.report.numbers import NOTHING, factor, factor_range, mebibytes, significant
from vpdeploy.report.sheets import comparison
from vpdeploy.values import FileBench, Report

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


def bench_tables(bench: FileBench) -> list[Table]:
    """The times of files, and what they take: bytes, memory and the start."""
    caption = "the same random images, interleaved round by round; faster: the first file over this one, 95 % interval"
    times = _table(
        caption, *("file", "engine", "batch", "threads", "p50 ms", "p90", "p95", "p99", "images/s", "faster")
    )
    takes = _table(
        "a fresh process with ONNX Runtime on the CPU", *("file", "MiB", "batch", "peak MiB", "load ms", "first ms")
    )
    for name, figures in bench.files.items():
        faster = {row.conditions: row for row in figures.factors}
        for row in figures.latency:
            factored = faster.get(row.conditions)
            times.add_row(
                _text(name, "" if row.steady else "unsteady"), row.engine, str(row.batch), str(row.threads),
                *(significant(ms) for ms in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms, row.images_per_second)),
                NOTHING if factored is None else _text(factor(factored.factor), factor_range(factored.interval)),
            )  # fmt: skip
        for row in figures.memory:
            took = (row.peak_rss_mib, row.load_ms, row.first_run_ms)
            takes.add_row(name, mebibytes(figures.file_bytes), str(row.batch), *(significant(value) for value in took))
    return [times, takes]


def _table(caption: str, *columns: str) -> Table:
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("file", "engine") else "right")
    return table
