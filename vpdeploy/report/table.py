"""The comparison on the console."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vpdeploy.report.headline import describe, headline
from vpdeploy.report.sheets import comparison
from vpdeploy.values import Report

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
