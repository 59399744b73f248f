"""The paper's comparison: a grid of methods, budgets and seeds from a TOML file, run by run, in one tidy table.

    uv run python benchmarks/paper.py run GRID.toml -o OUT [--only vpns,random] [--minutes 8] [--jobs 2] [--test]
    uv run python benchmarks/paper.py table GRID.toml -o OUT [--against vpns] [--test]
    uv run python benchmarks/paper.py times GRID.toml -o OUT      # of the first seed's networks; nothing else may run
    uv run python benchmarks/paper.py figures GRID.toml -o OUT [--test]

A grid holds ``epochs`` (of search and tuning together, the same for every method that does not say its own), ``seeds``,
``[budgets]``, a ``[recipe]`` that all runs share, and ``[methods.NAME]`` with dotted recipe keys over it. Rows go to
OUT/results.csv, and runs with a row there are done; a changed setting makes another run. What was cut off goes on after its last
epoch; no run begins after ``--minutes``. ``--jobs``: how many runs at once, each with its share of the cores. A dense network is
trained once for each seed, input, head and fit, and shared. Without ``--test`` the test split is not opened.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paper_grid import Cell, cells, dense_folder, read_grid, recipe_of
from paper_rows import Row, draw, hand_over, print_table, read_rows, take_over


def run_grid(grid_file: Path, out: Path, *, only: Sequence[str], minutes: float, jobs: int, test: bool) -> bool:
    """Run what is not done, ``jobs`` at once, until ``minutes`` are over. Whether all is done now."""
    began = time.monotonic()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    take_over(out)
    done = {row.name for row in read_rows(out) if not (test and math.isnan(row.top1_test))}
    left = [cell for cell in cells(read_grid(grid_file), only=only) if cell.name not in done]
    at = {cell: dense_folder(recipe_of(grid_file, cell), out) for cell in left}  # where its dense network lies
    running: dict[subprocess.Popen[bytes], Cell | Path] = {}
    failed: set[Cell | Path] = set()
    while True:
        for process in [process for process in running if process.poll() is not None]:
            work = running.pop(process)
            if process.returncode:
                failed.add(work)
            take_over(out)
            name = work.name if isinstance(work, Cell) else f"dense {work.name}"
            print(f"{name}: {f'failed ({process.returncode})' if process.returncode else 'done'}", flush=True)
        ready = (cell for cell in left if at[cell] not in failed and at[cell] not in running.values())
        cell = next(ready, None) if time.monotonic() - began < 60 * minutes else None
        if cell is None and not running:
            break
        if cell is None or len(running) == jobs:
            time.sleep(0.5)
            continue
        made = (at[cell] / "source.safetensors").exists()
        if made:
            left.remove(cell)
        command = [sys.executable, __file__, "cell" if made else "dense", str(grid_file), "-o", str(out)]
        threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
        with (out / "runs" / f"{cell.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--name", cell.name, *(["--test"] if test and made else [])],
                env={**os.environ, "OMP_NUM_THREADS": threads},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        running[process] = cell if made else at[cell]
    for cell in (*left, *(work for work in failed if isinstance(work, Cell))):
        print(f"{cell.name}: not run")
    return not left and not failed


def rows_of(grid_file: Path, out: Path, *, test: bool) -> list[Row]:
    """The rows of the grid as it is, in its order; what has none is named."""
    rows = {row.name: row for row in read_rows(out) if not (test and math.isnan(row.top1_test))}
    names = [cell.name for cell in cells(read_grid(grid_file))]
    if left := [name for name in names if name not in rows]:
        print(f"Not run: {len(left)} of {len(names)}: {', '.join(left)}", file=sys.stderr)
    return [rows[name] for name in names if name in rows]


def measure_times(grid_file: Path, out: Path, *, seconds: float) -> None:
    """Of the networks that the first seed left. Leaves out/times.json: name of the run -> dense over pruned, and its interval."""
    from paper_run import measure_time

    grid, path = read_grid(grid_file), out / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    for cell in cells({**grid, "seeds": grid["seeds"][:1]}):
        made = None if cell.name in times else measure_time(grid_file, cell, out, seconds=seconds)
        if made is None:
            continue
        times[cell.name] = made
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(times, indent=1))
        partial.rename(path)
        low, high = made["interval"]
        print(f"{cell.name}: {made['factor']:.2f}x ({low:.2f} to {high:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "cell", "dense", "table", "figures", "times"):
        command = commands.add_parser(name)
        command.add_argument("grid", type=Path)
        command.add_argument("-o", "--out", type=Path, required=True)
        if name not in ("dense", "times"):
            command.add_argument("--test", action="store_true", help="open the test split, or show what it gave")
        if name == "run":
            command.add_argument("--only", type=lambda text: text.split(","), default=[])
            command.add_argument("--minutes", type=float, default=8.0)
            command.add_argument("--jobs", type=int, default=1)
        elif name in ("cell", "dense"):
            command.add_argument("--name", required=True)
        elif name == "table":
            command.add_argument("--against")
        elif name == "times":
            command.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    if args.command == "table":
        print_table(rows_of(args.grid, args.out, test=args.test), against=args.against, test=args.test)
    elif args.command == "figures":
        draw(rows_of(args.grid, args.out, test=args.test), args.out, test=args.test)
    elif args.command == "times":
        measure_times(args.grid, args.out, seconds=args.seconds)
    elif args.command in ("cell", "dense"):
        from paper_run import make_dense, run_cell

        (cell,) = [cell for cell in cells(read_grid(args.grid)) if cell.name == args.name]
        if args.command == "dense":
            make_dense(recipe_of(args.grid, cell), args.out)
        else:
            hand_over(run_cell(args.grid, cell, args.out, test=args.test), args.out)
    else:
        whole = run_grid(args.grid, args.out, only=args.only, minutes=args.minutes, jobs=args.jobs, test=args.test)
        sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
