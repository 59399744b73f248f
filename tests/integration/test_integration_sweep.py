"""One search cut at several budgets: what it leaves, what it shares, and each point again by its own command."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from integration.command_line import QUICKSTART, SMOKE, Done, fresh, here, settings

from vpdeploy import run_folder
from vpdeploy.errors import BudgetError
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.stages import read_recipe
from vpdeploy.sweeping import budgets
from vpdeploy.sweeping.budgets import at_budget
from vpdeploy.sweeping.points import begin_from
from vpdeploy.values import Report, Sweep

BUDGETS = ("--macs-ratio", "0.7,0.4")


def sweep_into(folder: Path) -> tuple[str, ...]:
    return "sweep", str(QUICKSTART), "-o", str(folder), *settings(SMOKE), *BUDGETS


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("sweep") / "points"
    return folder, fresh(*sweep_into(folder))


def test_a_sweep_searches_once_and_cuts_at_every_budget(swept):
    folder, done = swept
    assert done.status == 0, done.err
    assert sum("search:pruned  epoch" in line for line in done.err.splitlines()) == 2  # two epochs, of one search
    assert sum("tune:dense  epoch" in line for line in done.err.splitlines()) == 2  # the dense arm is shared, too
    found = (folder / "search" / "found.safetensors").read_bytes()
    for name, most in (("macs_ratio-0.7", 0.7), ("macs_ratio-0.4", 0.4)):
        assert (folder / name / "found.safetensors").read_bytes() == found
        certificate = run_folder.read_value(folder / name / "report.json", Report).certificates["pruned"]
        assert certificate.reached <= certificate.requested == most


def test_its_page_holds_every_point_the_front_and_the_commands(swept):
    folder, done = swept
    made = run_folder.read_value(folder / "sweep.json", Sweep)
    dense, first, second = made.points
    assert (dense.budget, first.requested, second.requested) == ("", 0.7, 0.4)
    assert dense.macs > first.macs > second.macs and dense.file_bytes > first.file_bytes > second.file_bytes
    assert "macs" in second.front  # the cheapest is always on its front
    page = (folder / "sweep.html").read_text()
    for point in (first, second):
        assert point.command in done.out and f"{point.run}/report.html" in page
        assert (folder / point.run / "report.html").is_file()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    assert "macs\\_ratio 0.7" in (folder / "sweep.md").read_text()


def test_the_same_sweep_again_trains_nothing(swept, capsys):
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    done = here(capsys, *sweep_into(folder))
    assert done.status == 0, done.err
    assert "epoch" not in done.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_a_sweep_that_was_moved_goes_on_where_it_is(swept, tmp_path, capsys):
    """Its points name the scores by their place, which is another now; that these are the same is what counts."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(swept[0], folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    done = here(capsys, *sweep_into(folder))
    assert done.status == 0, done.err
    assert "epoch" not in done.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_a_point_comes_again_by_its_command(swept, tmp_path, capsys):
    folder, _ = swept
    point = run_folder.read_value(folder / "sweep.json", Sweep).points[2]
    words = shlex.split(point.command)[1:]
    words[words.index("-o") + 1] = str(tmp_path / "again")
    done = here(capsys, *words)
    assert done.status == 0, done.err
    for name in ("pruned.safetensors", "plan.json", "export/pruned.onnx"):
        if name.endswith(".onnx"):  # whose metadata hold the recipe's hash, and so the folder of what was found
            continue
        assert (tmp_path / "again" / name).read_bytes() == (folder / point.run / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 2, "got no budget; expected one, such as --macs-ratio 0.7,0.5,0.3"),
        (["--macs-ratio", "0.5", "--latency-ms", "3"], 2, "got macs_ratio and latency_ms; expected one"),
        (["--macs-ratio", "half"], 2, "--macs-ratio: got 'half'; expected numbers"),
        (["--macs-ratio", "1.5,0.5,0.5"], 1, "--macs-ratio: got 1.5; expected above 0 and at most 1"),
        (["--macs-ratio", "1.5,0.5,0.5"], 1, "--macs-ratio: got 0.5 twice; expected each once"),
        (["--latency-ms", "3,inf"], 1, "--latency-ms: got inf; expected a finite number above 0"),
        (["--file-mib", "0.2", "--set", "budget.limits.file_mib=0.25"], 1, "got 0.25 beside budget.file_mib"),
    ],
)
def test_wrong_budgets_are_told(capsys, tmp_path, words, status, told):
    done = here(capsys, "sweep", QUICKSTART, "-o", tmp_path / "none", *words)
    assert done.status == status and told in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "none").exists()


def test_a_point_out_of_reach_is_told_before_anything_is_trained(capsys, tmp_path):
    words = list(sweep_into(tmp_path / "points"))
    words[words.index("0.7,0.4")] = "0.7,0.001"
    done = here(capsys, *words)
    assert done.status == 1 and "budget.macs_ratio: got 0.001; the best reachable is " in done.err
    assert "epoch" not in done.err


def test_a_point_that_only_measuring_refuses_leaves_the_others(swept, capsys, monkeypatch):
    folder, original = swept[0], budgets.run
    pages = {path: path.read_bytes() for path in folder.glob("sweep.*")}

    def run(recipe, path, **values):
        if recipe.budget.requested == 0.7:
            raise BudgetError("budget.macs_ratio: got 0.7; the best reachable is 0.9")
        return original(recipe, path, **values)

    monkeypatch.setattr(budgets, "run", run)
    try:
        done = here(capsys, *sweep_into(folder))
        points = json.loads((folder / "sweep.json").read_bytes())["points"]
    finally:
        for path, content in pages.items():  # other tests read them
            path.write_bytes(content)
    assert done.status == 1 and done.out == ""
    assert f"--macs-ratio: 1 of 2 could not be reached; the others are in {folder / 'sweep.html'}" in done.err
    assert "0.7: budget.macs_ratio: got 0.7; the best reachable is 0.9" in done.err
    assert [point["requested"] for point in points if point["budget"] == "macs_ratio"] == [0.4]


def test_a_point_that_was_stopped_as_it_began_goes_on(swept, tmp_path):
    """What it begins from knows of no other budget's search, and keeps the dense arm."""
    shared = swept[0] / "search"
    begin_from(shared, tmp_path / "point", recipe=read_recipe(shared))
    begun = json.loads((tmp_path / "point" / "stages.json").read_bytes())
    assert {"groups", "fit", "tune:dense"} <= begun.keys() and "search:pruned" not in begun


def test_a_sweep_holds_its_folder(swept, capsys):
    """Two would write one sweep.json."""
    with run_folder.held(swept[0]):
        done = here(capsys, *sweep_into(swept[0]))
    assert done.status == 1 and "another vpdeploy process works on this run" in done.err


def test_points_in_time_of_a_recipe_with_speed_leave_it_out(tmp_path):
    recipe = parse_recipe(
        {
            "model": {"name": "cifar_resnet8"},
            "data": {"name": "digits"},
            "input": {"image_size": 8, "canvas_size": 12},
            "prompt": {"pixels": {"size": 2}},
            "budget": {"macs_ratio": 0.5, "speed": True},
            "search": {"epochs": 1},
        },
        where="r",
        folder=tmp_path,
    )
    (tmp_path / "found.safetensors").touch()
    speeds = {
        kind: at_budget(recipe, kind, 0.5, tmp_path / "found.safetensors").budget.speed
        for kind in ("latency_ratio", "latency_ms", "macs_ratio", "file_mib")
    }
    assert speeds == {"latency_ratio": False, "latency_ms": False, "macs_ratio": True, "file_mib": True}


def test_scores_of_another_network_are_refused(swept, tmp_path, capsys):
    folder, _ = swept
    found = folder / "search" / "found.safetensors"
    more = settings([f"search.found={found}", "model.name=cifar_resnet14"])
    done = here(capsys, "prune", QUICKSTART, "-o", tmp_path / "other", *settings(SMOKE), *more)
    assert done.status == 1 and f"search.found: {found} is of another network" in done.err
    more = settings([f"search.found={tmp_path / 'none.safetensors'}"])
    done = here(capsys, "prune", QUICKSTART, "-o", tmp_path / "other2", *settings(SMOKE), *more)
    assert done.status == 1 and "search.found: no such file" in done.err
