"""``vpdeploy check`` tells at once what is wrong in a recipe and what it names that is not here; so does what trains."""

from __future__ import annotations

import json
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
import tomli_w
from integration.command_line import QUICKSTART, fresh, here, settings

from vpdeploy import cli
from vpdeploy.checking import outside_problems, own_input
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.recipe.writing import dump_recipe
from vpdeploy.stages import read_recipe

NET = """
raise SystemExit("nothing of it runs")
import json.decoder
from torchvision.models import resnet18 as small
if json:
    class anything: ...
else:
    f = anything
def g():
    print(h)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the quickstart recipe and some of what a recipe may name; the current folder, too."""
    shutil.copy(QUICKSTART, tmp_path / "r.toml")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "dynamic.py").write_text("globals()['f'] = dict\n")
    (tmp_path / "passes_on.py").write_text("from net import *\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "trained.pth").write_bytes(b"")
    (tmp_path / "images").mkdir()
    (tmp_path / "page.html").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/b.txt", "")
    with zipfile.ZipFile(tmp_path / "way_out.zip", "w") as archive:
        archive.writestr("../b.txt", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys, *values: str, command: str = "check") -> list[str]:
    """The problems that the command line tells of the recipe r.toml with ``values``."""
    done = here(capsys, command, "r.toml", *settings(values))
    assert (done.status, done.out) == (1, "")
    first, *lines = done.err.splitlines()
    assert first == f"error: r.toml: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


SETS = (
    "digits, imagefolder, cifar10, cifar100, flowers102, oxford_pets, dtd, food101, stanford_cars, svhn, gtsrb, eurosat"
)
FORMS = "expected a built-in network, 'torchvision:NAME', 'timm:NAME', 'path/to/file.py:factory' or 'package.module:factory'"
# values -> the one problem, or how it begins ("...")
CASES = [
    ("data.name=digitz", f"data.name: got 'digitz'; expected one of {SETS}; did you mean 'digits'?"),
    (
        "target.engine=onnxruntime-tensorrt",
        "target.engine onnxruntime-tensorrt: this ONNX Runtime (...",
    ),
    (
        "target.device=cuda:0",
        "target.engine onnxruntime-cpu: got device 'cuda:0'; expected 'cpu', or none",
    ),
    ("data.name=x", f"data.name: got 'x'; expected one of {SETS}; choose one of them"),
    (
        "model.name=cifar_resnet21",
        f"model.name: got 'cifar_resnet21'; {FORMS}; did you mean 'cifar_resnet32' or 'cifar_resnet20' or "
        "'cifar_resnet14'?",
    ),
    ("model.name=resnet18", f"model.name: got 'resnet18'; {FORMS}; did you mean 'torchvision:resnet18'?"),
    (
        "model.name=net.py",
        f"model.name: got 'net.py'; {FORMS}; did you mean 'net.py:factory', with the name of a class or function in "
        "that file?",
    ),
    ("model.name=:f", f"model.name: got ':f'; {FORMS}; built in: cifar_resnet8, ..."),
    (
        "model.name=torchvision:resnet19",
        "model.name: got 'torchvision:resnet19'; torchvision has no such classifier; did you mean 'torchvision:resnet...",
    ),
    (
        "model.name=other.py:f",
        "model.name: got '{}/other.py:f'; no such file {}/other.py; expected path/to/file.py:factory: check the path",
    ),
    (
        "model.name=nett.py:f",
        "model.name: got '{}/nett.py:f'; no such file {}/nett.py; expected path/to/file.py:factory; "
        "did you mean 'net.py', in that folder?",
    ),
    (
        "model.name=net.py:anythink",
        "model.name: got '{}/net.py:anythink'; {}/net.py defines no 'anythink'; expected a class or function that returns "
        "an nn.Module: did you mean 'anything'?",
    ),
    (
        "model.name=net.py:h",  # which it only reads
        "model.name: got '{}/net.py:h'; {}/net.py defines no 'h'; expected a class or function that returns an nn.Module: "
        "check the name",
    ),
    (
        "model.name=broken.py:f",
        "model.name: got '{}/broken.py:f', where {}/broken.py is no Python that can be read (invalid syntax (broken.py, ...",
    ),
    ("compute.device=cuda:99", "compute.device: got 'cuda:99', which is not usable here (..."),
    (
        "model.name=nowhere.at:all",
        "model.name: got 'nowhere.at:all'; no module named 'nowhere' in this environment or the current folder; "
        "expected 'torchvision:NAME', 'timm:NAME', 'path/to/file.py:factory' or 'package.module:factory': install it, or "
        "give the file",
    ),
    (
        "model.weights=nofile.th",
        "model.weights: no such file {}/nofile.th; expected a checkpoint (.pt, .pth, .th, .safetensors): check the path",
    ),
    (
        "model.weights=train.pth",
        "model.weights: no such file {}/train.pth; expected a checkpoint (.pt, .pth, .th, .safetensors); "
        "did you mean 'trained.pth', in that folder?",
    ),
    (
        "model.name=torchvision:resnet18 model.weights=IMAGENET1K_V9",
        "model.weights: got 'IMAGENET1K_V9'; torchvision's resnet18 has IMAGENET1K_V1, DEFAULT; use one of these, or ...",
    ),
    (
        "model.name=timm:resnet19",
        "model.name: got 'timm:resnet19'; timm has no such network; did you mean 'timm:resnet...",
    ),
    (
        "model.name=timm:resnet18 model.weights=a9_in1k",
        "model.weights: got 'a9_in1k'; timm's resnet18 has DEFAULT, a3_in1k, a2_in1k, a1_in1k and ...",
    ),
    ("data.root=nope", "data.root: {}/nope does not exist; 'digits' needs no root: remove it"),
    (
        "data.name=imagefolder data.root=nope",
        "data.root: {}/nope does not exist; expected a folder or .zip with train/CLASS/* and test/CLASS/*, or CLASS/*: "
        "check the path",
    ),
    (
        "data.name=imagefolder data.root=imags.zip",
        "data.root: {}/imags.zip does not exist; expected a folder or .zip with train/CLASS/* and test/CLASS/*, or "
        "CLASS/*: check the path; did you mean 'images.zip', in that folder?",
    ),
    (
        "data.name=imagefolder data.root=page.html",
        "data.root: {}/page.html is not a readable zip (File is not a zip file); expected a folder or a .zip: ...",
    ),
    ("data.name=imagefolder data.root=way_out.zip", "{}/way_out.zip: ..."),
    (
        "data.name=cifar10",
        "data.root: missing; torchvision's cifar10 needs the folder that holds it, or into which to download it: set it",
    ),
    (
        "data.name=cifar10 data.root=images",
        "data.root: {}/images does not hold cifar10; set data.download = true, or put torchvision's "
        "cifar-10-batches-py there",
    ),
    (
        "data.name=cifar10 data.download=true data.root=page.html",
        "data.root: {}/page.html is a file; expected the folder into which to download cifar10",
    ),
]


@pytest.mark.parametrize(("values", "message"), CASES, ids=[values for values, _ in CASES])
def test_what_is_not_here_is_told(place, capsys, values, message):
    (line,) = told(capsys, *values.split())
    expected = message.replace("{}", str(place))
    assert line == expected or (expected.endswith("...") and line.startswith(expected.removesuffix("...")))


ALL_AT_ONCE = (
    "data.name=digitz",
    "data.root=/nope",
    "model.name=cifar_resnet21",
    "model.weights=nofile.th",
    "input.mean=[123.7, 116.3, 103.5]",
    "compute.device=bogus",
    'export.forms=["uint8", "uint8"]',
    "tune.epoch=3",
    "prompt.pixels.size=60",
    "nonsense",
)


@pytest.mark.parametrize("command", ["check", "run", "prune", "inspect"])
def test_every_problem_is_told_at_once_and_nothing_is_begun(place, capsys, command):
    before = sorted(place.rglob("*"))
    lines = told(capsys, *ALL_AT_ONCE, command=command)
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        ["--set nonsense", *(value.partition("=")[0] for value in ALL_AT_ONCE[:-1])]
    )
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "values",
    [
        ("model.name=net.py:anything", "model.weights=trained.pth"),
        ("model.name=net.py:small",),
        ("model.name=net.py:f",),
        ("model.name=net.py:json",),
        ("model.name=dynamic.py:f",),
        ("model.name=passes_on.py:f",),
        ("model.name=json.decoder:JSONDecoder",),
        ("model.name=net:anything",),  # a module of the current folder
        ("model.name=__main__:anything",),
        ("model.name=torchvision:resnet18", "model.weights=ResNet18_Weights.IMAGENET1K_V1"),
        ("model.name=timm:resnet18.a1_in1k", "model.weights=DEFAULT"),
        ("data.name=imagefolder", "data.root=images"),
        ("data.name=imagefolder", "data.root=images.zip"),
        ("data.root=images",),
        ("data.name=svhn", "data.root=not_yet", "data.download=true"),
        ("data.name=svhn", "data.root=held"),
    ],
    ids=" ".join,
)
def test_what_is_here_is_fine(place, capsys, values):
    (place / "held").mkdir()
    (place / "held" / "train_32x32.mat").write_bytes(b"")
    done = here(capsys, "check", "r.toml", *settings(values))
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("r.toml: fine; ")


def test_the_placeholder_of_a_missing_name_is_not_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "r.toml").write_text(tomli_w.dumps({"model": {}, "budget": {"macs_ratio": 0.5}}))
    monkeypatch.chdir(tmp_path)
    assert [line.split(";")[0] for line in told(capsys)] == ["model.name: missing", "data: missing"]


def test_a_wrong_network_does_not_hide_its_weights_and_its_own_weights_are_not_blamed(place, capsys):
    for name in ("torchvision:resnet19", "timm:resnet19"):
        (line,) = told(capsys, f"model.name={name}", "model.weights=DEFAULT")
        assert line.startswith("model.name: ")
    lines = told(capsys, "model.name=torchvision:resnet19", "model.weights=no.pth")
    assert [line.split(":")[0] for line in lines] == ["model.name", "model.weights"]


def test_a_run_folder_is_read_though_its_files_are_gone(place):
    (place / "run").mkdir()
    recipe = load_recipe(
        place / "r.toml",
        ["model.weights=trained.pth", "model.name=net.py:f", "data.name=imagefolder", "data.root=images"],
    )
    (place / "run" / "recipe.toml").write_text(dump_recipe(recipe))
    for name in ("trained.pth", "net.py", "images"):
        (place / name).rename(place / f"moved_{name}")
    assert read_recipe(place / "run") == recipe
    assert [text.split(":")[0] for _, text in outside_problems(recipe)] == ["model.name", "model.weights", "data.root"]


def silent() -> str:
    """The quickstart recipe without its [input]."""
    raw = tomllib.loads(QUICKSTART.read_text())
    return tomli_w.dumps(
        {key: value for key, value in raw.items() if key != "input"} | {"prompt": {"pixels": {"size": 2}}}
    )


@pytest.mark.parametrize(("name", "size", "mean"), [
    ("cifar_resnet8", 32, 0.485), ("net.py:f", 224, 0.485), ("torchvision:inception_v3", 299, 0.485),
    ("timm:resnet10t", 176, 0.485), ("timm:vit_tiny_patch16_224", 224, 0.5),
])  # fmt: skip
def test_the_input_that_a_recipe_does_not_tell_is_the_networks_own(place, name, size, mean):
    (place / "r.toml").write_text(silent())
    chosen = [f"model.name={name}"]
    loaded = load_recipe(place / "r.toml", chosen, own_input=own_input, further=outside_problems)
    assert (loaded.input.image_size, loaded.input.canvas, loaded.input.mean[0]) == (size, size, mean)
    assert cli._load(place / "r.toml", chosen) == loaded
    (place / "run").mkdir()
    (place / "run" / "recipe.toml").write_text(dump_recipe(loaded))
    assert read_recipe(place / "run") == loaded


def test_what_follows_from_the_size_of_a_wrong_network_is_not_told(place, capsys):
    (place / "r.toml").write_text(silent())
    for wrong in ("torchvision:resnet19", "timm:resnet19"):
        (line,) = told(capsys, f"model.name={wrong}", "prompt.pixels.size=150")
        assert line.startswith("model.name: ")
    (line,) = told(capsys, "model.name=torchvision:resnet18", "prompt.pixels.size=150")
    assert line.startswith("prompt.pixels.size: got 150; a 'pad' prompt on a canvas of 224 takes at most 111")
    lines = told(capsys, "model.name=torchvision:resnet19", "prompt.pixels.size=150", "input.image_size=224")
    assert [line.split(":")[0] for line in lines] == ["prompt.pixels.size", "model.name"]  # a size that is told


IMPORTS = """
import json, sys
from vpdeploy import cli
sys.argv = ["vpdeploy", *json.loads(sys.argv[1])]
try:
    cli.main()
except SystemExit as e:
    print(e.code)
print(sorted({"torch", "torchvision", "timm", "sklearn"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("values", "heavy"),
    [
        (("model.name=net.py:f", "data.name=imagefolder", "data.root=images.zip", "model.weights=trained.pth"), False),
        (("model.name=cifar_resnet21", "data.name=digitz"), False),
        (("data.name=cifar10",), False),
        (("model.name=torchvision:resnet18",), True),
        (("model.name=timm_of_mine.py:f",), False),
        (("model.name=cifar_resnet8", "SILENT"), False),
        (("model.name=net.py:f", "SILENT"), False),
    ],
)
def test_only_torchvisions_names_need_torch(place, values, heavy):
    if "SILENT" in values:
        values = [value for value in values if value != "SILENT"]
        (place / "r.toml").write_text(silent())
    done = fresh(json.dumps(["check", str(place / "r.toml"), *settings(values)]), code=IMPORTS)
    assert done.out.splitlines()[-1] == ("['torch', 'torchvision']" if heavy else "[]"), done.err
