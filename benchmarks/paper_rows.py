"""What the runs of ``paper.py`` left, a row each, and what the rows say: tables, ranks, paired differences, figures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Row:
    """What one run gave. Accuracies are fractions; ``top1_cut``: before tuning; ``top1_norms``: the same with norm statistics
    taken anew; ``top1_test``: nan while test is closed.

    ``recipe``: a hash of the run's settings. ``channel_ratio`` counts each group's channels once, ``layer_ratio`` the outputs of
    every layer that writes one (as the paper's code does). ``cpu_minutes``: of search and tuning, all threads, nan where a run
    was cut off and went on; ``steps``: gradient steps of both; ``commit``: of the code, as git names it.
    """

    method: str
    budget: str
    ratio: float
    seed: int
    recipe: str
    macs_ratio: float
    params_ratio: float
    channel_ratio: float
    layer_ratio: float
    top1_dense_val: float
    top1_cut_val: float
    top1_norms_val: float
    top1_val: float
    top1_dense_test: float
    top1_test: float
    epochs_search: int
    epochs_tune: int
    steps: int
    cpu_minutes_search: float
    cpu_minutes_tune: float
    wall_minutes: float
    threads: int
    machine: str
    commit: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.budget}-{self.ratio:g}-{self.seed}-{self.recipe}"

    @property
    def cpu_minutes(self) -> float:
        return self.cpu_minutes_search + self.cpu_minutes_tune


def hand_over(row: Row, out: Path) -> None:
    """Leave ``row`` for ``take_over``: runs side by side do not write to one table."""
    path = out / "runs" / f"{row.name}.row.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(asdict(row)))
    partial.rename(path)


def take_over(out: Path) -> None:
    """Put the rows that runs handed over into out/results.csv, in place of older ones of the same runs."""
    found = sorted((out / "runs").glob("*.row.json"))
    rows = {row.name: row for row in (*read_rows(out), *(Row(**json.loads(path.read_text())) for path in found))}
    partial = out / "results.part"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows.values())
    partial.rename(out / "results.csv")
    for path in found:
        path.unlink()


def read_rows(out: Path) -> list[Row]:
    """The rows of out/results.csv."""
    path = out / "results.csv"
    if not path.exists():
        return []
    kinds = {field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def print_table(rows: Sequence[Row], *, against: str | None, test: bool) -> None:
    """Mean and deviation over seeds, mean rank, and paired differences to ``against`` with 95 % intervals (Student's t)."""
    top1 = (lambda row: row.top1_test) if test else (lambda row: row.top1_val)
    points = sorted({(row.budget, row.ratio) for row in rows}, key=lambda point: (point[0], -point[1]))
    methods = list(dict.fromkeys(row.method for row in rows))
    by = {(row.method, row.budget, row.ratio, row.seed): row for row in rows}
    ranks: dict[str, list[float]] = {method: [] for method in methods}
    for budget, ratio in points:
        print(f"\n{budget} = {ratio:g}\n")
        print(
            "| method | seeds | top-1 | before tuning | with norms anew | MACs ratio | channel ratio | CPU minutes |"
            + (f" against {against} |" if against else "")
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|" + ("---:|" if against else ""))
        here = {
            method: {row.seed: row for row in rows if (row.method, row.budget, row.ratio) == (method, budget, ratio)}
            for method in methods
        }
        here = {method: of_seed for method, of_seed in here.items() if of_seed}
        common = set.intersection(*(set(of_seed) for of_seed in here.values()))
        for method, of_seed in here.items():
            own = list(of_seed.values())
            values = 100 * np.array([top1(row) for row in own])
            deviation = f" ± {values.std(ddof=1):.2f}" if len(own) > 1 else ""
            cells_ = [
                method,
                str(len(own)),
                f"{values.mean():.2f}{deviation}",
                f"{100 * np.mean([row.top1_cut_val for row in own]):.1f}",
                f"{100 * np.mean([row.top1_norms_val for row in own]):.1f}",
                f"{np.mean([row.macs_ratio for row in own]):.3f}",
                f"{np.mean([row.channel_ratio for row in own]):.3f}",
                f"{known_mean([row.cpu_minutes for row in own]):.1f}",
            ]
            if against:
                pairs = [
                    100 * (top1(row) - top1(other))
                    for row in own
                    if (other := by.get((against, budget, ratio, row.seed))) is not None
                ]
                cells_.append(difference(pairs) if method != against else "–")
            print(f"| {' | '.join(cells_)} |")
        if common:  # places are of the same seeds
            means = [-float(np.mean([top1(of_seed[seed]) for seed in common])) for of_seed in here.values()]
            for method, rank in zip(here, ranked(means), strict=True):
                ranks[method].append(rank)
    print("\n| method | mean rank |\n|---|---:|")
    for method in sorted((m for m in methods if ranks[m]), key=lambda m: np.mean(ranks[m])):
        print(f"| {method} | {np.mean(ranks[method]):.2f} |")


def known_mean(values: Sequence[float]) -> float:
    """Of those that are numbers; nan of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def ranked(values: Sequence[float]) -> list[float]:
    """Places from 1, the least first; equal ones share the mean of theirs."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def difference(pairs: Sequence[float]) -> str:
    if len(pairs) < 2:
        return f"{pairs[0]:+.2f}" if pairs else "–"
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * np.std(pairs, ddof=1) / math.sqrt(len(pairs))
    return f"{np.mean(pairs):+.2f} ({np.mean(pairs) - half:+.2f} to {np.mean(pairs) + half:+.2f})"


def draw(rows: Sequence[Row], out: Path, *, test: bool) -> None:
    """Accuracy against MACs ratio, both channel ratios and measured time; what each method took. Means and deviations over seeds;
    svg files in ``out``/figures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    top1 = (lambda row: row.top1_test) if test else (lambda row: row.top1_val)
    path = out / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    methods = list(dict.fromkeys(row.method for row in rows))
    (out / "figures").mkdir(exist_ok=True)

    def faster(row: Row) -> float:
        return times[row.name]["factor"] if row.name in times else math.nan  # the first seed's networks were timed

    axes: dict[str, tuple[str, Callable[[Row], float]]] = {
        "macs": ("MACs ratio (what remains)", lambda row: row.macs_ratio),
        "channels": ("channel ratio, each group's channels once", lambda row: row.channel_ratio),
        "layers": ("channel ratio, the outputs of all layers", lambda row: row.layer_ratio),
        "time": ("times faster than dense", faster),
        "cost": ("CPU minutes of search and tuning", lambda row: row.cpu_minutes),
    }
    for name, (label, of) in axes.items():
        figure, panel = pyplot.subplots(figsize=(6, 4))
        for number, method in enumerate(methods):
            points = []
            for budget, ratio in sorted({(row.budget, row.ratio) for row in rows if row.method == method}):
                own = [row for row in rows if (row.method, row.budget, row.ratio) == (method, budget, ratio)]
                values = [100 * top1(row) for row in own]
                points.append(
                    (
                        known_mean([of(row) for row in own]),
                        np.mean(values),
                        np.std(values, ddof=1) if len(own) > 1 else 0,
                    )
                )
            x, y, spread = np.array(sorted(points)).T
            panel.errorbar(
                x, y, yerr=spread, label=method, marker="osD^vPX*"[number % 8], markersize=4, capsize=2, lw=1
            )
        panel.set_xlabel(label)
        panel.set_ylabel(f"top-1 on {'test' if test else 'validation'} images, %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, ncols=2)
        figure.tight_layout()
        figure.savefig(out / "figures" / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
