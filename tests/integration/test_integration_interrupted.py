"""Ctrl-C, kill -9 and a full disk in every stage: the same command finishes, and ends bit-equal to an undisturbed run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.command_line import Forks, finished_run, forks, smoke

from vpdeploy import run_folder

# stage -> the file at whose writing it is stopped, and which writing of it: the second epoch's state leaves the first
# one's to go on from.
PLACES = {
    "groups": ("groups.json", 1),
    "price": ("price.json", 1),
    "fit": ("state/fit.pt", 2),
    "tune:dense": ("state/tune.dense.pt", 2),
    "search:pruned": ("state/search.pruned.pt", 2),
    "cut:pruned": ("plan.json", 1),
    "tune:pruned": ("state/tune.pruned.pt", 2),
    "export": ("export/dense.onnx", 1),
    "bench": ("measured/dense.json", 1),
}
# kind -> exit status, and how the last line on stderr ends
ENDS = {
    "kill before": (-signal.SIGKILL, ""),
    "interrupt after": (130, "interrupted; every finished epoch is on disk: the same command goes on from there"),
    "full": (1, "the disk is full; nothing that was there is lost. Free some space and run the same command again"),
}
KILLED = [("kill before", stage) for stage in ("fit", "search:pruned", "tune:pruned", "export", "bench")]
INTERRUPTED_OR_FULL = [
    ("full", "groups"),
    ("interrupt after", "price"),
    ("interrupt after", "fit"),
    ("full", "tune:dense"),
    ("interrupt after", "search:pruned"),
    ("full", "cut:pruned"),
    ("interrupt after", "tune:pruned"),
    ("interrupt after", "export"),
    ("full", "export"),
    ("interrupt after", "bench"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("forks")) as runner:
        yield runner


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory)[0]


def unfinished(run: Path) -> list[str]:
    return [name for name, entry in json.loads((run / "stages.json").read_bytes()).items() if not entry["finished"]]


def results(run: Path) -> dict[str, bytes]:
    """What training and export gave: tensors, plans, ONNX files and what these predict."""
    patterns = ("*.safetensors", "*plan*.json", "groups.json", "export/*.onnx", "export/vectors.npz", "predictions.npz")
    return {str(p.relative_to(run)): p.read_bytes() for pattern in patterns for p in run.glob(pattern)}


def epochs(run: Path) -> list[tuple[str, int, float, float]]:
    history = run_folder.read_history(run / "history.jsonl")
    return [(r.stage, r.epoch, r.loss, r.accuracy_val) for r in history]


@pytest.mark.parametrize("stops", [KILLED, INTERRUPTED_OR_FULL], ids=["killed", "interrupted or full"])
def test_a_run_stopped_in_every_stage_ends_like_an_undisturbed_one(undisturbed, command, tmp_path, stops):
    run = tmp_path / "run"
    for what, stage in stops:
        (at, nth), (status, message) = PLACES[stage], ENDS[what]
        done = command(*smoke(run), at=f"/run/{at}", nth=nth, what=what)
        assert (done.status, unfinished(run)) == (status, [stage]), done.err
        assert done.out == "" and "Traceback" not in done.err
        assert done.err.splitlines()[-1].endswith(message)
    done = command(*smoke(run))
    assert done.status == 0, done.err
    assert unfinished(run) == []
    assert results(run) == results(undisturbed)
    assert epochs(run) == epochs(undisturbed)
    assert not [path for path in run.rglob("*.part")] and not list((run / "state").iterdir())


def test_a_stage_goes_on_after_its_last_finished_epoch(undisturbed, command, tmp_path):
    run = tmp_path / "run"
    command(*smoke(run), at="/run/state/fit.pt", nth=1, what="interrupt after")
    done = command("prune", *smoke(run)[1:], at="/run/dense.safetensors", what="interrupt after")
    said = [line for line in done.err.splitlines() if line.startswith("fit  epoch")]
    assert len(said) == 1 and said[0].startswith("fit  epoch 2/2")
    assert (run / "source.safetensors").read_bytes() == (undisturbed / "source.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["run", "prune", "export", "bench", "report"])
def test_a_second_process_on_the_same_run_is_refused(undisturbed, command, tmp_path, name):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    arguments = [name, *smoke(run)[1:]] if name in ("run", "prune") else [name, run]
    with run_folder.locked(run):
        done = command(*arguments)
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"error: {run}: another vpdeploy process works on this run; wait for it, or choose another folder with -o\n"
    )
