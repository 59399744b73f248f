"""A run on a folder of images: files that were only touched or copied are the same data, changed ones are told."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.stand_ins import write_images

from vpdeploy import pipeline
from vpdeploy.errors import RunFolderError
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe

QUIET = Display(quiet=True)
IMAGE = "train/a/0.jpg"


def recipe_for(images: Path) -> Recipe:
    raw = {
        "model": {"name": "cifar_resnet8"},
        "data": {"name": "imagefolder", "root": str(images), "val_fraction": 0.25},
        "input": {"image_size": 8},
        "prompt": {"pixels": {"size": 1}},
        "fit": {"epochs": 1},
        "search": {"epochs": 1},
        "budget": {"macs_ratio": 0.6},
        "tune": {"epochs": 1},
        "compute": {"precision": "fp32", "channels_last": "no", "device": "cpu"},
        "compare": {"arms": ["dense", "pruned"]},
        "export": {"forms": ["uint8"]},
        "bench": {"batches": [1], "threads": [1], "seconds": 0.001, "image_size": [9, 9]},
    }
    return parse_recipe(raw, where="data", folder=images.parent)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of images, with a finished run beside it. Copy the images before changing them."""
    base = tmp_path_factory.mktemp("changed")
    write_images(base / "images.zip", classes=("a", "b"), each=16, sizes=((9, 9), (12, 10)), test_each=4)
    with zipfile.ZipFile(base / "images.zip") as archive:
        archive.extractall(base / "images")
    pipeline.run(recipe_for(base / "images"), base / "run", command="a test", display=QUIET)
    return base


@pytest.fixture
def images(finished) -> Iterator[Path]:
    """The images, put back afterwards: a run knows its data by place, too."""
    yield finished / "images"
    shutil.rmtree(finished / "images")
    with zipfile.ZipFile(finished / "images.zip") as archive:
        archive.extractall(finished / "images")


def touch(images: Path) -> None:
    os.utime(images / IMAGE, ns=(1, 1))


def copy(images: Path) -> None:
    shutil.copytree(images, images.parent / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(images)
    (images.parent / "copy").rename(images)


@pytest.mark.parametrize("change", [touch, copy])
def test_what_was_only_touched_is_the_same_data(change, finished, images, tmp_path):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    noted = (run / "inputs.json").read_bytes()
    change(images)
    pipeline.run(recipe_for(images), run, command="a test", display=QUIET)
    pipeline.export(run, display=QUIET)
    pipeline.bench(run, display=QUIET)
    results = [path for path in before if path.suffix in (".onnx", ".safetensors", ".npz", ".jsonl")]
    assert len(results) >= 8 and all(path.stat().st_mtime_ns == before[path] for path in results)
    assert (run / "inputs.json").read_bytes() != noted  # looked at once, so that the next command need not


def test_changed_bytes_are_told_though_size_and_time_are_as_before(finished, images, tmp_path):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    pipeline.export(run, display=QUIET)  # takes note of the times that the images now have
    noted, status = (run / "inputs.json").read_bytes(), (images / IMAGE).stat()
    while (images / IMAGE).stat().st_ctime_ns == status.st_ctime_ns:  # a clock may tick only every few milliseconds
        (images / IMAGE).write_bytes((images / IMAGE).read_bytes()[:-1] + b"!")
        os.utime(images / IMAGE, ns=(status.st_atime_ns, status.st_mtime_ns))
    for command in (pipeline.export, pipeline.bench):
        with pytest.raises(RunFolderError, match=r"holds another recipe's run: the contents of data changed\. "):
            command(run, display=QUIET)
    assert (run / "inputs.json").read_bytes() == noted  # what is refused leaves no trace
