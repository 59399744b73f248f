"""The command line: parse, call the pipeline, print. Heavy modules are imported inside the commands that need them."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vpdeploy.errors import VpdeployError, of_each
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.recipe.tables import Recipe

if TYPE_CHECKING:
    from vpdeploy.values import Latency, Report

app = typer.Typer(
    name="vpdeploy",
    help="From a trained image classifier to a smaller, faster ONNX file that is proved to compute the same thing.",
    epilog="Begin with: vpdeploy run recipes/quickstart.toml",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
# A pipe has no width: 80 columns would cut the figures out of the table.
# And ":factory:" in a message is a name and a colon, not an emoji.
out = Console(width=None if sys.stdout.isatty() else 120, emoji=False)
err = Console(stderr=True, emoji=False)


def _known_stage(redo: str | None) -> str | None:
    if redo is not None:
        from vpdeploy.stages import ORDER

        if redo not in ORDER:
            raise typer.BadParameter(f"got {redo!r}; expected one of {', '.join(ORDER)}")
    return redo


RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="a recipe in TOML, such as recipes/quickstart.toml")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, as `vpdeploy run` or `prune` made it")]
RunOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="RUN", help="the run folder; otherwise runs/ and the recipe's name"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as tune.epochs=3; repeatable"),
]
RedoOption = Annotated[
    str | None,
    typer.Option(
        "--redo",
        metavar="STAGE",
        callback=_known_stage,
        help="do this stage and all after it again: groups, price, fit, search, condense, cut, tune, export or bench",
    ),
]
OUT_OF_BOUNDS, UNSTEADY = 3, 4
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT and 128 + SIGTERM, as shells have it


def main() -> None:
    """The entry point. Exit status 0: done; 1: an error that the user can mend; 2: usage; 3: a bound that is not met; 4: it was
    measured, but not steadily; 130, 143: interrupted.
    """
    signal.signal(signal.SIGTERM, _terminated)
    with _user_errors():
        app()


def _terminated(number: int, frame: object) -> None:
    """What build servers and ``timeout`` send: as Ctrl-C, so that temporary files are removed."""
    raise SystemExit(128 + number)


@contextmanager
def _user_errors() -> Iterator[None]:
    """A user's error is one message without a traceback; a bug keeps its own."""
    try:
        yield
    except VpdeployError as e:
        _say_error(str(e))
        sys.exit(1)
    except SystemExit as e:
        if e.code in (INTERRUPTED, TERMINATED):  # the first is what typer makes of Ctrl-C, without a word
            err.print(
                "interrupted; every finished epoch is on disk: the same command goes on from there", soft_wrap=True
            )
        raise


def _say_error(message: str) -> None:
    err.print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _folder(recipe: Path, run: Path | None) -> Path:
    return run or Path("runs") / recipe.stem


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    """The recipe, once nothing is wrong with it nor with the files and names that it needs here."""
    from vpdeploy.checking import outside_problems, own_input

    return load_recipe(recipe, overrides or [], own_input=own_input, further=outside_problems)


def _print_comparison(report: Report) -> None:
    from vpdeploy.report.budget import budget_lines
    from vpdeploy.report.table import comparison_table

    out.print(comparison_table(report))
    for line in budget_lines(report):
        out.print(line, soft_wrap=True, highlight=False)


def _command() -> str:
    return shlex.join(["vpdeploy", *sys.argv[1:]])


@app.command(name="run", rich_help_panel="The road")
def run_command(
    recipe: RecipeArgument, output: RunOption = None, set_: SetOption = None, redo: RedoOption = None
) -> None:
    """Do everything: prune, export, bench, report. Interrupted, the same command goes on where it stopped."""
    loaded, folder = _load(recipe, set_), _folder(recipe, output)
    from vpdeploy.pipeline import run

    report = run(loaded, folder, redo=redo, command=_command(), display=Display(err))
    _print_comparison(report)
    out.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    out.print(f"file:   {folder / 'export'}", soft_wrap=True, highlight=False)


Amounts = Annotated[str | None, typer.Option(help="what may remain of the dense network, such as 0.7,0.5,0.3")]
Sizes = Annotated[str | None, typer.Option(help="at most, such as 8,6,4")]


@app.command(rich_help_panel="The road")
def sweep(
    recipe: RecipeArgument,
    output: RunOption = None,
    set_: SetOption = None,
    macs_ratio: Amounts = None,
    params_ratio: Amounts = None,
    channel_ratio: Amounts = None,
    latency_ratio: Amounts = None,
    latency_ms: Sizes = None,
    file_mib: Sizes = None,
    memory_mib: Sizes = None,
) -> None:
    """Search once, then cut, tune, export and measure at several budgets: the front of accuracy against cost."""
    given = {
        "macs_ratio": macs_ratio, "params_ratio": params_ratio, "channel_ratio": channel_ratio, "latency_ratio": latency_ratio,
        "latency_ms": latency_ms, "file_mib": file_mib, "memory_mib": memory_mib,
    }  # fmt: skip
    given = {kind: text for kind, text in given.items() if text is not None}
    if len(given) != 1:
        raise typer.BadParameter(
            f"got {' and '.join(given) or 'no budget'}; expected one, such as --macs-ratio 0.7,0.5,0.3"
        )
    ((kind, text),) = given.items()
    try:
        amounts = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--{kind.replace('_', '-')}: got {text!r}; expected numbers with ',' between them"
        ) from None
    loaded, folder = _load(recipe, set_), _folder(recipe, output)
    from vpdeploy.report.sweep import sweep_sheet
    from vpdeploy.report.table import sheet_table
    from vpdeploy.sweeping.budgets import sweep as run_sweep

    again = ["vpdeploy", "run", str(recipe), *(word for text in set_ or [] for word in ("--set", text))]
    made = run_sweep(loaded, folder, kind=kind, amounts=amounts, again=again, display=Display(err))
    out.print(sheet_table(sweep_sheet(made)))
    for point in made.points[1:]:
        out.print(f"{point.budget} {point.requested:g}: {point.command}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"sweep: {folder / 'sweep.html'}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel="The road")
def condense(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE_OR_RUN", help="a recipe with prompt.tokens, or a run of one, whose search is taken"
        ),
    ],
    output: RunOption = None,
    set_: SetOption = None,
    keep: Annotated[str, typer.Option(help="shares of the tokens")] = "1,0.7,0.5,0.3,0.2,0.1",
    score: Annotated[
        str,
        typer.Option(help="what decides which stay; random, norm and scratch (as few from the start) are baselines"),
    ] = "gradient,random,norm,scratch",
) -> None:
    """Search once, then keep fewer and fewer of a transformer's tokens: accuracy against tokens kept, with baselines."""
    try:
        shares = [float(part) for part in keep.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--keep: got {keep!r}; expected numbers with ',' between them") from None
    trained = what if what.is_dir() else None
    if trained is not None and set_:
        raise typer.BadParameter("--set goes with a recipe; a run has its own")
    recipe = what if trained is None else what / "recipe.toml"
    folder = _folder(recipe, output) if trained is None else output or what.with_name(f"{what.name}-condensed")
    loaded = _load(recipe, set_)
    from vpdeploy.report.condensation import condensation_sheet
    from vpdeploy.report.table import sheet_table
    from vpdeploy.sweeping.condensation import condense as run_condense

    again = ["vpdeploy", "run", str(recipe), *(word for text in set_ or [] for word in ("--set", text))]
    made = run_condense(
        loaded, folder, trained=trained, shares=shares, scores=score.split(","), again=again, display=Display(err)
    )
    out.print(sheet_table(condensation_sheet(made)))
    out.print(f"condensation: {folder / 'condensation.html'}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel="The road")
def prune(recipe: RecipeArgument, output: RunOption = None, set_: SetOption = None, redo: RedoOption = None) -> None:
    """Fit, search, select, cut and tune; the dense baseline too."""
    loaded, folder = _load(recipe, set_), _folder(recipe, output)
    from vpdeploy import pipeline

    pipeline.prune(loaded, folder, redo=redo, command=_command(), display=Display(err))
    out.print(f"pruned: {folder}; next: vpdeploy export {folder}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel="The road")
def export(run: RunArgument) -> None:
    """Bake prompt and preprocessing in, write the ONNX files, check that torch and ONNX Runtime agree."""
    from vpdeploy import pipeline

    pipeline.export(run, display=Display(err))
    out.print(f"exported: {run / 'export'}; next: vpdeploy bench {run}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel="The road")
def bench(
    what: Annotated[list[Path], typer.Argument(metavar="RUN_OR_ONNX...", help="a run folder, or anybody's ONNX files")],
    engine: Annotated[str | None, typer.Option(help="such as onnxruntime-cpu,openvino-cpu,torch-compile")] = None,
    batch: Annotated[str | None, typer.Option(help="batch sizes, such as 1,8")] = None,
    threads: Annotated[str | None, typer.Option(help="thread counts, such as 1,2")] = None,
    device: Annotated[str | None, typer.Option(help="cuda:N; otherwise each engine's first")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16, of torch and OpenVINO")] = None,
    seconds: Annotated[float | None, typer.Option(help="of measurement for each file, batch and thread count")] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", help="of the images, where a file leaves it open")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table; of ONNX files")] = False,
) -> None:
    """Measure a run's exported files: accuracy on the test split, MACs, parameters, bytes, latency, memory.

    With options: latencies under these conditions, added to the run's report. ONNX files are measured against the first of
    them. Exit status 4: done, but the machine was not steady.
    """
    size = _numbers("--image-size", image_size, between="x")
    if size is not None and len(size) != 2:
        raise typer.BadParameter(f"--image-size: got {image_size!r}; expected HEIGHTxWIDTH, such as 224x224")
    given = {
        "engines": None if engine is None else tuple(engine.split(",")),
        "batches": _numbers("--batch", batch),
        "threads": _numbers("--threads", threads),
        "device": device,
        "precision": precision,
        "seconds": seconds,
        "image_size": size,
    }
    given = {key: value for key, value in given.items() if value is not None}
    files = len(what) > 1 or what[0].suffix.lower() == ".onnx"
    if as_json and not files:
        raise typer.BadParameter("--json goes with ONNX files; a run has report.json")
    if image_size and not files:
        raise typer.BadParameter(
            "--image-size goes with ONNX files; a run's images are as large as bench.image_size says"
        )
    shaky = _bench_files(what, given, as_json=as_json) if files else _bench_run(what[0], given)
    if shaky:
        from vpdeploy.measure.latency import told_unsteady

        _say_error(told_unsteady(shaky))
        raise typer.Exit(UNSTEADY)


def _numbers(option: str, text: str | None, *, between: str = ",") -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(between))
    except ValueError:
        raise typer.BadParameter(
            f"{option}: got {text!r}; expected whole numbers with {between!r} between them"
        ) from None


def _bench_run(run: Path, given: dict[str, Any]) -> list[Latency]:
    from vpdeploy import pipeline

    if not given:
        shaky = pipeline.bench(run, display=Display(err))
        out.print(f"measured: {run}; next: vpdeploy report {run}", soft_wrap=True, highlight=False)
        return shaky
    from vpdeploy.report.table import times_table

    report, shaky = pipeline.bench_more(run, given, display=Display(err))
    factors = {name: report.factors[name].latency_p50 if name in report.factors else () for name in report.arms}
    out.print(times_table({name: (arm.latency, factors[name]) for name, arm in report.arms.items()}, first="arm"))
    out.print(f"added to: {run / 'report.html'}", soft_wrap=True, highlight=False)
    return shaky


def _bench_files(files: list[Path], given: dict[str, Any], *, as_json: bool) -> list[Latency]:
    from vpdeploy.benching import bench_files
    from vpdeploy.recipe.reading import bench_table
    from vpdeploy.recipe.tables import BenchTable
    from vpdeploy.report.table import bench_tables

    size = given.get("image_size")
    made = bench_files(files, table=bench_table(given, base=BenchTable()), image_size=size, say=Display(err).say)
    if as_json:
        from vpdeploy.run_folder import dump

        sys.stdout.write(dump(made).decode() + "\n")
    else:
        for table in bench_tables(made):
            out.print(table)
    return made.unsteady


def _a_number(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"got {value:g}; expected a finite number")
    return value


def _not_negative(value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"got {value:g}; expected a finite number of at least 0")
    return value


@app.command(rich_help_panel="The road")
def report(
    run: RunArgument,
    min_speedup: Annotated[
        float | None, typer.Option(callback=_not_negative, help="dense p50 over pruned p50, at least")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(callback=_a_number, help="top-1 below dense, percentage points, at most")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(callback=_not_negative, help="p90 of the pruned file, at most")
    ] = None,
) -> None:
    """Write report.json, report.md and report.html from what was measured.

    With bounds, for build servers: one line each, and exit status 3 when one is not met.
    """
    from vpdeploy.report.bounds import bounds
    from vpdeploy.reporting import write_report
    from vpdeploy.run_folder import locked
    from vpdeploy.stages import read_recipe

    read_recipe(run)
    with locked(run):
        made = write_report(run)
    _print_comparison(made)
    out.print(f"report: {run / 'report.html'}", soft_wrap=True, highlight=False)
    asked = bounds(made, min_speedup=min_speedup, max_drop=max_drop, max_latency_ms=max_latency_ms)
    for bound in asked:
        out.print(bound.line, soft_wrap=True, highlight=False)
    if not all(bound.met for bound in asked):
        raise typer.Exit(OUT_OF_BOUNDS)


@app.command(rich_help_panel="After")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders that have a report")],
) -> None:
    """Put runs side by side: the pruned arm of each, at conditions that all were measured under."""
    from vpdeploy.report.table import runs_table
    from vpdeploy.reporting import read_report

    common = os.path.commonpath([run.absolute().parent for run in runs])
    names = [os.path.relpath(run, common) if len(set(runs)) > 1 else str(run) for run in runs]
    out.print(runs_table(dict(zip(names, of_each(runs, read_report), strict=True))))


@app.command(rich_help_panel="Before")
def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Tell every problem of a recipe at once, with the key and what to do. Nothing is run."""
    loaded = _load(recipe, set_)
    arms, budget = ", ".join(loaded.arms), f"{loaded.budget.kind} {loaded.budget.requested:g}"
    out.print(
        f"{recipe}: fine; {loaded.model.name} on {loaded.data.name}, {budget}, arms {arms}",
        soft_wrap=True,
        highlight=False,
    )


@app.command(rich_help_panel="Before")
def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RECIPE",
            help="torchvision:NAME, timm:NAME, file.py:factory, package.module:factory, a built-in network, or a recipe.toml",
        ),
    ],
    set_: SetOption = None,
    size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="side of the model's input, pixels; otherwise its own")
    ] = None,
    limit_seconds: Annotated[float, typer.Option(min=0.0, help="how long the analysis may take")] = 600.0,
    limit_gib: Annotated[
        float | None, typer.Option(min=0.0, help="what memory it may take; otherwise 24, or 0.9 of a smaller machine's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Show what can be removed, what is excluded and why, and how small the network can get. Nothing is trained."""
    from vpdeploy.surgery.limit import Limit

    limit = Limit(limit_seconds) if limit_gib is None else Limit(limit_seconds, limit_gib)
    if what.endswith(".toml"):
        if size is not None:
            raise typer.BadParameter("--size goes with a model; a recipe has input.canvas_size (--set)")
        loaded = _load(Path(what), set_)
        from vpdeploy.inspection import inspect_recipe

        found = inspect_recipe(loaded, limit=limit)
    else:
        if set_:
            raise typer.BadParameter("--set goes with a recipe; a model has --size")
        from vpdeploy.inspection import inspect_model

        found = inspect_model(what, size=size, limit=limit)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=1) + "\n")
    else:
        _print_inspection(found)


def _print_inspection(found) -> None:
    table = Table("stage", "group", "width", "share of MACs", "narrowest", "status", "reason", title=found.model)
    stage = None
    for row in found.groups:
        first = row.root.partition(".")[0]
        status = {"exact": "[green]exact[/]", "approximate": "[yellow]approximate[/]"}.get(
            row.status, f"[red]{row.status}[/]"
        )
        share = f"{row.macs_share:.1%}"
        shown, reason = "" if first == stage else first, _plain(row.reason)
        if row.status == "approximate" and row.difference is not None:
            reason = f"{row.difference:.2g} of the largest logit: {reason}"
        table.add_row(shown, _plain(row.root), str(row.width), share, str(row.narrowest), status, reason)
        stage = first
    out.print(table)
    replaced = [name for name, kind in found.attention.items() if kind.startswith("heads:")]
    if replaced:
        out.print(
            f"attention: {len(replaced)} modules stand replaced by equal ones, so that whole heads can be removed"
        )
    for name, reason in found.attention.items():
        if name not in replaced:
            out.print(f"attention: {_plain(name)} keeps its heads: {_plain(reason)}", soft_wrap=True, highlight=False)
    memory = "" if found.peak_rss_mib is None else f", {found.peak_rss_mib:.0f} MiB at most"
    out.print(
        f"{found.macs:,} MACs, {found.params:,} parameters; exact groups can reach macs_ratio {found.min_macs_ratio_exact:.3f}, "
        f"params_ratio {found.min_params_ratio_exact:.3f}; input {found.size} x {found.size}; {found.seconds:.1f} s{memory}",
        soft_wrap=True,
        highlight=False,
    )


@app.command(rich_help_panel="After")
def predict(
    onnx: Annotated[Path, typer.Argument(metavar="ONNX", help="an exported file")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="image files")],
    top: Annotated[int, typer.Option(min=1, help="how many classes to show")] = 5,
) -> None:
    """Classify image files by the exported file alone. One that cannot be read is an error, after all the others."""
    from vpdeploy.deploy.predict import predict as predict_images

    predictions = predict_images(onnx, images, top=top)
    for found in predictions.made:
        shown = "  ".join(f"{name} {p:.1%}" for name, p in zip(found.names, found.probabilities, strict=True))
        out.print(f"{found.image}: {shown}", soft_wrap=True, highlight=False, markup=False)
    for problem in predictions.problems:
        _say_error(problem)
    if predictions.problems:
        raise typer.Exit(1)


@app.command(rich_help_panel="After")
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FOLDER", help="a run folder, or its export folder anywhere")
    ],
) -> None:
    """Check the exported files on this machine, without torch: checksums, and outputs on the stored test vectors."""
    from vpdeploy.deploy.verify import VerifyError
    from vpdeploy.deploy.verify import verify as verify_folder

    try:
        lines = verify_folder(folder)
    except VerifyError as e:
        raise VpdeployError(str(e)) from e
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False, markup=False)
