"""The command line: help that teaches, exit statuses, one message for what a user can mend, and no torch without need."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from integration.command_line import QUICKSTART, finished_run, fresh, here, settings
from integration.stand_ins import write_images
from PIL import Image
from torch import nn

from vpdeploy import cli

COMMANDS = ("run", "prune", "export", "bench", "report", "compare", "inspect", "predict", "verify", "check")


@pytest.fixture
def run(tmp_path_factory) -> Path:
    """A finished run; not to be changed."""
    return finished_run(tmp_path_factory)[0]


# --- help and usage -----------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_where_to_begin(capsys):
    for arguments in (["--help"], []):
        done = here(capsys, *arguments)
        assert done.status == (0 if arguments else 2)
        assert [name for name in COMMANDS if f" {name} " not in done.out + done.err] == []
        assert "vpdeploy run recipes/quickstart.toml" in done.out + done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_tells_what_it_does_and_takes(capsys, command):
    done = here(capsys, command, "--help")
    assert (done.status, done.err) == (0, "")
    assert f" {command} [OPTIONS]" in done.out
    summary = (getattr(cli, command, None) or getattr(cli, f"{command}_command")).__doc__.split(".")[0]
    assert summary in " ".join(done.out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["prun"],
        ["run"],
        ["check"],
        ["predict", "a.onnx"],
        ["run", "r.toml", "--sett", "a=1"],
        ["predict", "a", "b", "--top", "0"],
        ["report", "a", "--max-drop", "nan"],
        ["report", "a", "--min-speedup", "nan"],
        ["report", "a", "--max-latency-ms", "nan"],
        ["bench", "a.onnx", "--image-size", "16"],
        ["report", "run", "--min-speedup", "nan"],
        ["report", "run", "--max-drop", "inf"],
        ["report", "run", "--max-latency-ms", "-1"],
        ["report", "run", "--max-latency-ms", "inf"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(capsys, arguments):
    done = here(capsys, *arguments)
    assert (done.status, done.out) == (2, "")
    assert "Usage:" in done.err and "--help" in done.err


def test_redo_names_the_stages(capsys, tmp_path):
    done = here(capsys, "run", QUICKSTART, "-o", tmp_path / "run", "--redo", "tuning")
    assert (done.status, done.out) == (2, "")
    assert "Usage:" in done.err
    said = " ".join(done.err.replace("│", " ").split())
    assert (
        "Invalid value for '--redo': got 'tuning'; expected one of groups, price, fit, search, condense, cut, tune, export, bench"
        in said
    )
    assert not (tmp_path / "run").exists()


# --- without torch ------------------------------------------------------------------------------------------------------

IMPORTS = """
import contextlib, io, json, sys
from vpdeploy import cli
found = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["vpdeploy", *words]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            cli.main()
            status = 0
        except SystemExit as e:
            status = e.code
    assert status == 0, (words, status, said.getvalue())
    found[words[0]] = sorted({"torch", "torchvision", "torch_pruning", "onnxruntime"} & set(sys.modules))
print(json.dumps(found))
"""


def test_what_needs_no_torch_never_imports_it(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    orders = [
        ["--help"],
        ["run", "--help"],
        ["check", str(QUICKSTART)],
        ["report", str(copied)],
        ["predict", str(copied / "export" / "pruned.onnx"), str(image)],
        ["verify", str(copied)],
    ]
    done = fresh(json.dumps(orders), code=IMPORTS)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    before = dict.fromkeys(("--help", "run", "check", "report"), ())
    after = dict.fromkeys(("predict", "verify"), ("onnxruntime",))
    assert {name: tuple(modules) for name, modules in found.items()} == {**before, **after}


# --- one command after the other ----------------------------------------------------------------------------------------


def test_check_says_what_the_recipe_is(capsys):
    done = here(capsys, "check", QUICKSTART)
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        f"{QUICKSTART}: fine; cifar_resnet8 on digits, macs_ratio 0.5, arms dense, dense+prompt, pruned\n"
    )


def test_check_tells_every_problem_at_once(capsys):
    done = here(
        capsys, "check", QUICKSTART, *settings(["tune.epoch=3", "budget.macs_ratio=1.5", "prompt.pixels.kind=padd"])
    )
    assert (done.status, done.out) == (1, "")
    lines = done.err.splitlines()
    assert lines[0] == f"error: {QUICKSTART}: 3 problems"
    assert sorted(lines[1:]) == [
        "  budget.macs_ratio: got 1.5; expected at most 1.0",
        "  prompt.pixels.kind: got 'padd'; expected 'pad', 'fix', 'random' or 'none'; did you mean 'pad'?",
        "  tune.epoch: unknown key; did you mean 'epochs'?",
    ]


def test_verify_takes_the_run_and_its_export_folder(run, capsys):
    for folder in (run, run / "export"):
        done = here(capsys, "verify", folder)
        assert (done.status, done.err) == (0, "")
        assert "8 files: checksums agree" in done.out and "pruned.onnx: " in done.out


def test_predict_shows_a_line_an_image_in_their_order(run, tmp_path, capsys):
    images = [tmp_path / "[grey].png", tmp_path / "colour.jpg"]
    Image.new("L", (30, 20), 200).save(images[0])
    Image.new("RGB", (5, 9), (255, 0, 0)).save(images[1])
    done = here(capsys, "predict", run / "export" / "pruned.onnx", *images, "--top", "2")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(image) for image in images]
    assert [line.count("%") for line in lines] == [2, 2]


def test_predict_reports_bad_images_and_shows_the_others(run, tmp_path, capsys):
    Image.new("L", (30, 20), 200).save(tmp_path / "good.png")
    (tmp_path / "[page].png").write_text("no image")
    images = [tmp_path / name for name in ("[page].png", "good.png", "gone.png")]
    done = here(capsys, "predict", run / "export" / "pruned.onnx", *images, "--top", "1")
    assert done.status == 1
    assert done.out.startswith(f"{images[1]}: ") and done.out.count("\n") == 1
    page, gone = done.err.splitlines()
    assert page.startswith(f"error: {images[0]}: not a readable image (")
    assert gone.startswith(f"error: {images[2]}: cannot be read (")


def test_what_predict_and_verify_cannot_use(run, tmp_path, capsys):
    (tmp_path / "page.png").write_text("no image")
    (tmp_path / "cut.onnx").write_bytes((run / "export" / "pruned.onnx").read_bytes()[:1000])
    cases = [
        (["predict", run / "export" / "pruned.onnx", tmp_path / "page.png"], f"error: {tmp_path / 'page.png'}: "),
        (["predict", tmp_path / "cut.onnx", tmp_path / "page.png"], f"error: {tmp_path / 'cut.onnx'}: "),
        (["predict", tmp_path / "none.onnx", tmp_path / "page.png"], f"error: {tmp_path / 'none.onnx'}: "),
        (["verify", tmp_path], f"error: {tmp_path}: no manifest.json in it or in its export/ folder; expected "),
    ]
    for arguments, begins in cases:
        done = here(capsys, *arguments)
        assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1)
        assert done.err.startswith(begins)


def test_folders_that_hold_no_run(capsys, tmp_path):
    for command in ("export", "bench", "report"):
        done = here(capsys, command, tmp_path)
        assert (done.status, done.out) == (1, "")
        assert done.err == (
            f"error: {tmp_path}: got a folder without recipe.toml; expected a run folder, as `vpdeploy run RECIPE -o RUN` "
            "makes it\n"
        )
    assert here(capsys, "compare", tmp_path, tmp_path / "none").err.count("; expected a run folder") == 2
    (tmp_path / "a.txt").touch()
    for name, got in (("a.txt", "a file"), ("none", "nothing there")):
        assert here(capsys, "bench", tmp_path / name).err.startswith(
            f"error: {tmp_path / name}: got {got}; expected a run"
        )


# --- what is the user's to mend -----------------------------------------------------------------------------------------


FACTORIES = """
from torch import nn
def nothing():
    return 3
class Fixed(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, classes)
    def forward(self, x):
        return self.linear(x.flatten(1))
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with broken things of every kind."""
    (tmp_path / "code.py").write_text(FACTORIES)
    (tmp_path / "no.toml").write_text("[model\n")
    (tmp_path / "file").write_text("in the folder's place")
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one.zip", classes=["cat"], each=4, sizes=((8, 8),))
    for label in ("cat", "dog"):
        for i in range(8):
            path = tmp_path / "bare" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8)).save(path)
    shutil.copytree(tmp_path / "bare", tmp_path / "cut")
    for path in (tmp_path / "cut").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-30])
    torch.save(nn.Linear(1, 1), tmp_path / "objects.pt")
    torch.save({f"linear.{k}": v for k, v in nn.Linear(3 * 32 * 32, 7).state_dict().items()}, tmp_path / "seven.pt")
    return tmp_path


CASES = {
    "no such recipe": ("{}/none.toml", (), "none.toml: 1 problem\n  no such file; expected a recipe in TOML"),
    "a recipe that is no TOML": ("{}/no.toml", (), "no.toml: 1 problem\n  not valid TOML: "),
    "an unknown key": ("", ("tune.epoch=3",), "tune.epoch: unknown key; did you mean 'epochs'?"),
    "a budget of 0": ("", ("budget.macs_ratio=0.0",), "budget.macs_ratio: got 0.0; expected more than 0"),
    "a budget above 1": ("", ("budget.macs_ratio=1.5",), "budget.macs_ratio: got 1.5; expected at most 1"),
    "an unreachable budget": (
        "",
        ("budget.macs_ratio=0.001",),
        "budget.macs_ratio: got 0.001; the best reachable is 0.",
    ),
    "a model that cannot be imported": ("", ("model.name=nowhere.at:all",), "no module named 'nowhere'"),
    "a file that is not there": ("", ("model.name={}/gone.py:make",), "gone.py; expected path/to/file.py:factory"),
    "a model that is no module": ("", ("model.name={}/code.py:nothing",), "gave a int; expected an nn.Module: "),
    "a model of another input size": ("", ("model.name={}/code.py:Fixed",), "Fixed does not take 3x12x12 input: "),
    "a pickle of objects": ("", ("model.weights={}/objects.pt",), "objects.pt: holds pickled objects (torch.nn"),
    "a class count that disagrees": (
        "",
        ("model.name={}/code.py:Fixed", "model.weights={}/seven.pt", "model.head=keep"),
        "model.head: got 'keep', but the classifier 'linear' has 7 classes and the data 10; expected equal counts",
    ),
    "an empty data folder": (
        "",
        ("data.name=imagefolder", "data.root={}/empty"),
        "empty holds no images; expected train/",
    ),
    "one class": ("", ("data.name=imagefolder", "data.root={}/one.zip"), "one.zip holds one class only, 'cat'"),
    "no test split": ("", ("data.name=imagefolder", "data.root={}/bare"), "bare has no test split, only class folders"),
    "a truncated image": (
        "",
        ("data.name=imagefolder", "data.root={}/cut", "data.test_fraction=0.25", "data.val_fraction=0.25"),
        ".png: not a readable image (image file is truncated); expected a whole JPEG, PNG",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_users_mistake_is_one_message_on_stderr_and_status_1(place, capsys, name):
    recipe, values, message = CASES[name]
    path = recipe.format(place) if recipe else QUICKSTART
    done = here(capsys, "run", path, "-o", place / "run", *settings([value.format(place) for value in values]))
    assert (done.status, done.out) == (1, "")
    told = done.err.partition("error: ")[2]
    assert message in told and "Traceback" not in done.err
    assert not list(place.glob("run/*.safetensors"))


def test_two_budgets(place, capsys):
    path = place / "two.toml"
    path.write_text(QUICKSTART.read_text().replace("macs_ratio = 0.5", "macs_ratio = 0.5\nparams_ratio = 0.5"))
    done = here(capsys, "check", path)
    assert done.status == 1
    assert (
        "budget: got macs_ratio and params_ratio; expected exactly one of channel_ratio, macs_ratio, params_ratio"
        in done.err
    )


def test_a_run_folder_that_cannot_be_written(place, capsys):
    done = here(capsys, "run", QUICKSTART, "-o", place / "file")
    assert (done.status, done.out) == (1, "")
    assert (
        done.err.startswith(f"error: {place / 'file'}: cannot be written: ")
        and "choose another folder with -o" in done.err
    )
    assert (place / "file").read_text() == "in the folder's place"


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "load_recipe", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        here(capsys, "check", QUICKSTART)


def test_ctrl_c_is_130_and_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_recipe", interrupted)
    done = here(capsys, "check", QUICKSTART)
    assert (done.status, done.out) == (130, "")
    assert done.err == "interrupted; every finished epoch is on disk: the same command goes on from there\n"


def test_sigterm_cleans_up_and_says_how_to_go_on(monkeypatch, capsys):
    """As build servers and ``timeout`` send it."""
    cleaned = []

    def terminated(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(cli, "load_recipe", terminated)
    before = signal.getsignal(signal.SIGTERM)
    try:
        done = here(capsys, "check", QUICKSTART)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done.status, done.out, cleaned) == (143, "", [True])
    assert done.err == "interrupted; every finished epoch is on disk: the same command goes on from there\n"


def test_square_brackets_in_a_message_are_no_markup(capsys, tmp_path):
    done = here(capsys, "check", tmp_path / "[red]name.toml")
    assert f"{tmp_path}/[red]name.toml" in done.err
