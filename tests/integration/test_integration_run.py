"""The quickstart recipe in smoke size through the real command line: what it leaves, and what a second call does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from integration.command_line import QUICKSTART, Done, finished_run, fresh, here, settings, smoke
from PIL import Image
from sklearn.datasets import load_digits

from vpdeploy import run_folder
from vpdeploy.cli import UNSTEADY
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.stages import read_recipe
from vpdeploy.values import Price, Report

# design.md section 6, for the arms and forms of the smoke run, and what the stages hand on beside it.
DESIGNED = [
    "recipe.toml",
    "environment.json",
    "history.jsonl",
    "source.safetensors",
    "found.safetensors",
    "plan.json",
    "dense.safetensors",
    "pruned.safetensors",
    "export/dense.onnx",
    "export/pruned.onnx",
    "export/dense.float.onnx",
    "export/pruned.float.onnx",
    "export/labels.txt",
    "export/vectors.npz",
    "export/manifest.json",
    "export/README.md",
    "export/verify.py",
    "report.json",
    "report.md",
    "report.html",
]
HANDED_ON = [
    ".lock",
    "stages.json",
    "groups.json",
    "price.json",
    "certificate.json",
    "skipped.training.txt",
    "skipped.test.txt",
    "parity.json",
    "parity.dense.json",
    "prompt.npz",
    "measured/dense.json",
    "measured/pruned.json",
    "measured/environment.json",
    "predictions.npz",
]
WITHOUT_TORCH = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
program, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = program
runpy.run_module(program, run_name="__main__") if program == "vpdeploy" else runpy.run_path(program, run_name="__main__")
"""


@pytest.fixture
def run(tmp_path_factory) -> Path:
    """The finished run; not to be changed."""
    return finished_run(tmp_path_factory)[0]


@pytest.fixture
def said(tmp_path_factory) -> Done:
    """What its command said."""
    return finished_run(tmp_path_factory)[1]


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def files_of(run: Path) -> dict[str, int]:
    """Every file in the folder, and when it was last written."""
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}


def rewritten(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_what_the_design_says_and_nothing_else(run):
    assert set(files_of(run)) == {*DESIGNED, *HANDED_ON}


def test_the_command_prints_the_comparison_and_the_places(run, said):
    assert [word for word in ("dense", "pruned", "top-1", "faster") if word not in said.out] == []
    assert f"report: {run / 'report.html'}" in said.out and f"file:   {run / 'export'}" in said.out


def test_without_a_terminal_every_epoch_is_one_plain_line(said):
    lines = said.err.splitlines()
    for stage in ("fit", "tune:dense", "search:pruned", "tune:pruned"):
        for epoch in (1, 2):
            assert len([line for line in lines if line.startswith(f"{stage}  epoch {epoch}/2  loss ")]) == 1
    assert "\x1b" not in said.err


def test_report_json_is_a_report_of_this_run(run):
    report = run_folder.read_value(run / "report.json", Report)
    assert list(report.arms) == ["dense", "pruned"]
    assert report.arms["pruned"].n == 60
    assert report.arms["pruned"].macs <= 0.5 * report.arms["dense"].macs
    assert report.certificates["pruned"].reached <= report.certificates["pruned"].requested == 0.5
    assert report.command.startswith(f"vpdeploy run {QUICKSTART} -o {run} --set fit.epochs=2")
    assert [(r.stage, r.epoch) for r in report.history if r.stage == "tune:pruned"] == [
        ("tune:pruned", 1),
        ("tune:pruned", 2),
    ]
    assert report.recipe == (run / "recipe.toml").read_text()


def test_the_table_before_training_told_the_size_of_the_dense_file_that_ships(run):
    """To the few bytes by which metadata and constants of other widths differ."""
    price = run_folder.read_value(run / "price.json", Price)
    assert price.target.endswith("float form")
    told = next(row.dense for row in price.table if row.quantity == "file_mib") * 2**20
    assert told == pytest.approx((run / "export/dense.float.onnx").stat().st_size, abs=256)


def test_the_settled_recipe_means_the_same_from_its_run_folder(run):
    settled = read_recipe(run)
    asked = load_recipe(QUICKSTART, smoke(run)[5::2])
    assert settled.tune == asked.tune.model_copy(update={"distill": 0.9})  # the head is the network's own
    assert settled.bench == asked.bench and settled.data == asked.data
    assert (settled.fit.what, settled.model.head, settled.compute.device) == ("all", "keep", settled.compute.device)
    assert "auto" not in (settled.compute.precision, settled.compute.device, settled.compute.workers)


# --- elsewhere ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(run, tmp_path) -> Path:
    """The export folder's files in an otherwise empty folder."""
    return Path(shutil.copytree(run / "export", tmp_path / "alone"))


@pytest.mark.parametrize("program", ["vpdeploy", "verify.py"])
def test_an_export_verifies_anywhere_without_torch(alone, program):
    arguments = ("vpdeploy", "verify", alone) if program == "vpdeploy" else (alone / "verify.py",)
    done = fresh(*arguments, code=WITHOUT_TORCH)
    assert (done.status, done.err) == (0, "")
    assert "8 files: checksums agree" in done.out
    for name in ("dense.onnx", "dense.float.onnx", "pruned.onnx", "pruned.float.onnx"):
        assert f"{name}: " in done.out and "top-1 agrees" in done.out


def test_a_damaged_file_is_one_message(alone, capsys):
    path = alone / "pruned.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = here(capsys, "verify", alone)
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith(f"error: {path}: damaged: sha256 ") and "copy it again" in done.err


def test_predict_names_the_class_that_the_file_computes(run, tmp_path, capsys):
    digit = load_digits().images[3]
    pixels = np.repeat((digit * 255 / 16).astype(np.uint8)[:, :, None], 3, axis=2)
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    session = onnxruntime.InferenceSession(str(run / "export" / "pruned.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"image": pixels[None]})[0][0]
    for file in ("pruned.onnx", "pruned.float.onnx"):
        done = here(capsys, "predict", run / "export" / file, tmp_path / "digit.png", "--top", "3")
        assert done.status == 0
        name, shown = done.out.strip().split(": ")
        assert name == str(tmp_path / "digit.png")
        assert [pair.split()[0] for pair in shown.split("  ")] == [str(k) for k in np.argsort(-logits)[:3]]
        assert shown.count("%") == 3


# --- again --------------------------------------------------------------------------------------------------------------

NOTED = {"recipe.toml", "environment.json", ".lock"}  # written anew by every run, with what it was called by
PAGES = {"report.json", "report.md", "report.html"}


def test_the_same_command_again_redoes_nothing(copied, capsys):
    before = files_of(copied)
    done = here(capsys, *smoke(copied))
    assert (done.status, done.err) == (0, "")
    assert rewritten(before, files_of(copied)) <= {*NOTED, *PAGES}


def test_a_changed_bench_redoes_bench_alone(copied, capsys):
    before = files_of(copied)
    done = here(capsys, *smoke(copied), *settings(["bench.seconds=0.02"]))
    assert done.status in (0, UNSTEADY) and done.err.splitlines()[0] == "bench ..."
    changed = rewritten(before, files_of(copied))
    arms = {"measured/dense.json", "measured/pruned.json", "measured/environment.json"}
    measured = {*arms, "predictions.npz", "skipped.test.txt", "stages.json"}
    assert measured <= changed <= {*measured, *NOTED, *PAGES}


def test_a_change_that_would_train_again_is_refused_and_redone_when_asked(copied, capsys):
    before = files_of(copied)
    changed = (*smoke(copied), *settings(["tune.epochs=1"]))
    done = here(capsys, *changed)
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"error: {copied}: holds another recipe's run: tune.epochs was 2, is 1. Going on would train 'tune:dense' again: "
        "choose another folder with -o, or train again from there with --redo tune\n"
    )
    assert rewritten(before, files_of(copied)) <= {".lock"}  # which some versions of filelock touch
    asked = here(capsys, "prune", *changed[1:], "--redo", "tune")
    assert asked.status == 0
    assert [line for line in asked.err.splitlines() if line.endswith(" ...")] == ["tune:dense ...", "tune:pruned ..."]
    trained = {"dense.safetensors", "pruned.safetensors", "history.jsonl", "stages.json"}
    assert trained <= rewritten(before, files_of(copied)) <= {*trained, *NOTED, "skipped.training.txt"}
    epochs = [(r.stage, r.epoch, r.epochs) for r in run_folder.read_history(copied / "history.jsonl")]
    assert epochs[-2:] == [("tune:dense", 1, 1), ("tune:pruned", 1, 1)]


def test_another_recipes_run_is_refused(copied, tmp_path, capsys):
    before = files_of(copied)
    other = tmp_path / "other.toml"
    other.write_text(QUICKSTART.read_text().replace("cifar_resnet8", "cifar_resnet14"))
    done = here(capsys, "run", other, *smoke(copied)[2:])
    assert (done.status, done.out) == (1, "")
    assert "holds another recipe's run: model.name was 'cifar_resnet8', is 'cifar_resnet14'" in done.err
    assert "choose another folder with -o" in done.err
    assert rewritten(before, files_of(copied)) <= {".lock"}  # which some versions of filelock touch


def test_a_removed_result_is_made_again_and_nothing_before_it(run, copied, capsys):
    (copied / "measured" / "pruned.json").unlink()
    before = files_of(copied)
    done = here(capsys, "bench", copied)
    assert done.status in (0, UNSTEADY) and done.err.splitlines()[0] == "bench ..."
    assert (copied / "predictions.npz").read_bytes() == (run / "predictions.npz").read_bytes()
    changed = rewritten(before, files_of(copied))
    assert "measured/pruned.json" in changed
    assert not {name for name in changed if name.endswith((".safetensors", "history.jsonl")) or "export" in name}


def test_commands_one_by_one_give_what_run_gives(copied, capsys):
    """export, bench and report of a run that is done say so and where its files are, and leave them."""
    before = files_of(copied)
    for command, says in (("export", "exported:"), ("bench", "measured:"), ("report", "report:")):
        done = here(capsys, command, copied)
        told = f"{command}: done before, and nothing that it reads has changed; to do it again: vpdeploy run "
        assert done.status in (0, UNSTEADY if command == "bench" else 0) and (
            command == "report" or done.err.startswith(told)
        )
        assert says in done.out
    assert rewritten(before, files_of(copied)) <= {*NOTED, *PAGES}
