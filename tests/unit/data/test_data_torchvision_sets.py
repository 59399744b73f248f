"""torchvision's data sets, on small stand-ins laid out as the real ones are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as sets
from PIL import Image
from scipy.io import savemat

from vpdeploy.data.sources import open_source
from vpdeploy.errors import DataError
from vpdeploy.recipe.tables import DataTable


def opened(name: str, root: Path, **values: object):
    return open_source(
        DataTable.model_validate({"name": name, "root": str(root), "val_fraction": 0.5, **values}), seed=0
    )


def picture(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 3), (red, 0, 0)).save(path, "PNG")  # by content, whatever the suffix says


def reds(refs) -> list[tuple[int, int]]:
    return [(label, int(refs.read(i)[0, 0, 0])) for i, label in enumerate(refs.labels)]


def test_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 0, 0, 0, 1, 1, 1, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car"]}))
    monkeypatch.setattr(sets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(sets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(sets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    source = opened("cifar10", tmp_path)
    assert source.classes == ("plane", "car")
    assert [len(refs) for refs in (source.train, source.val, source.test)] == [4, 4, 8]
    assert source.test.names[5] == "cifar10/test/00005" and source.test.labels[5] == 1
    np.testing.assert_array_equal(source.test.read(5), data[5].reshape(3, 32, 32).transpose(1, 2, 0))
    before = source.fingerprint
    (tmp_path / "another set").touch()
    assert opened("cifar10", tmp_path).fingerprint == before
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "cars"]}))
    assert opened("cifar10", tmp_path).fingerprint != before


def test_svhn(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)
    y = np.repeat(np.arange(1, 11), 4)  # SVHN calls the digit 0 "10"
    files = {split: ["", f"{split}_32x32.mat", None] for split in ("train", "test")}
    for _, name, _ in files.values():
        savemat(tmp_path / name, {"X": x, "y": y[:, None]})
    monkeypatch.setattr(sets.SVHN, "split_list", files)
    source = opened("svhn", tmp_path)
    assert source.classes == tuple("0123456789") and source.test.labels[-1] == 0
    np.testing.assert_array_equal(source.test.read(7), x[..., 7])


def test_dtd_keeps_its_own_val_split(tmp_path):
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for k, split in enumerate(("train", "val", "test")):
        (base / "labels" / f"{split}1.txt").write_text(f"dotted/{split}.jpg\nbanded/{split}.jpg\n")
        for j, name in enumerate(("banded", "dotted")):
            picture(base / "images" / name / f"{split}.jpg", 10 * k + j)
    source = opened("dtd", tmp_path)
    assert source.classes == ("banded", "dotted")
    assert [reds(refs) for refs in (source.train, source.val, source.test)] == [
        [(1, 1), (0, 0)],
        [(1, 11), (0, 10)],
        [(1, 21), (0, 20)],
    ]
    assert source.test.names[0] == "dtd/dtd/images/dotted/test.jpg"


def test_food101(tmp_path):
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        listed = {name: [f"{name}/{split}{i}" for i in range(2)] for name in ("ramen", "waffles")}
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for k, names in enumerate(listed.values()):
            for name in names:
                picture(base / "images" / f"{name}.jpg", k)
    source = opened("food101", tmp_path)
    assert source.classes == ("ramen", "waffles") and reds(source.test) == [(0, 0), (0, 0), (1, 1), (1, 1)]


def test_gtsrb(tmp_path):
    base = tmp_path / "gtsrb"
    for k in (0, 1):
        for i in (0, 1):
            picture(base / "GTSRB" / "Training" / f"{k:05d}" / f"{i}.ppm", k)
            picture(base / "GTSRB" / "Final_Test" / "Images" / f"{k}{i}.ppm", k)
    rows = "".join(f"{k}{i}.ppm;{k}\n" for k in (0, 1) for i in (0, 1))
    (base / "GT-final_test.csv").write_text(f"Filename;ClassId\n{rows}")
    with pytest.raises(DataError, match="class '02' has 0 images"):  # the real set has 43 classes
        opened("gtsrb", tmp_path)
    for k in range(2, 43):
        for i in (0, 1):
            picture(base / "GTSRB" / "Training" / f"{k:05d}" / f"{i}.ppm", k)
    source = opened("gtsrb", tmp_path)
    assert len(source.classes) == 43 and reds(source.test) == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert reds(source.train) == [(k, k) for k in range(43)]


def test_oxford_pets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, first in (("trainval", 0), ("test", 2)):
        lines = [
            f"{name}_{first + i} {k + 1} 1 1\n"
            for k, name in enumerate(("Abyssinian", "german_shorthaired"))
            for i in (0, 1)
        ]
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
        for line in lines:
            image, label, *_ = line.split()
            picture(base / "images" / f"{image}.jpg", int(label) - 1)
    source = opened("oxford_pets", tmp_path)
    assert source.classes == ("Abyssinian", "German Shorthaired")
    assert reds(source.train) == [(0, 0), (1, 1)] and reds(source.test) == [(0, 0), (0, 0), (1, 1), (1, 1)]


def test_stanford_cars(tmp_path):
    base = tmp_path / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi A4", "BMW M3"], dtype=object)})
    kind = [("fname", object), ("class", np.uint8)]
    rows = np.array([(f"{i}.jpg", 1 + i // 2) for i in range(4)], dtype=kind)
    for split, path in (
        ("train", base / "devkit" / "cars_train_annos.mat"),
        ("test", base / "cars_test_annos_withlabels.mat"),
    ):
        savemat(path, {"annotations": rows})
        for i in range(4):
            picture(base / f"cars_{split}" / f"{i}.jpg", i)
    source = opened("stanford_cars", tmp_path)
    assert source.classes == ("Audi A4", "BMW M3") and reds(source.test) == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_flowers102(tmp_path, monkeypatch):
    base = tmp_path / "flowers-102"
    monkeypatch.setattr(sets.Flowers102, "_file_dict", {k: (f"{k}.mat", None) for k in ("label", "setid")})
    for i in range(1, 7):
        picture(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "label.mat", {"labels": np.array([[1, 102, 1, 102, 1, 102]])})
    savemat(base / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    source = opened("flowers102", tmp_path)
    assert len(source.classes) == 102 and source.classes[0] == "pink primrose"
    assert [reds(refs) for refs in (source.train, source.val, source.test)] == [
        [(0, 1), (101, 2)],
        [(0, 3), (101, 4)],
        [(0, 5), (101, 6)],
    ]


def test_eurosat_needs_a_test_fraction(tmp_path):
    for k, name in enumerate(("Forest", "River")):
        for i in range(8):
            picture(tmp_path / "eurosat" / "2750" / name / f"{i}.jpg", k)
    source = opened("eurosat", tmp_path, test_fraction=0.25)
    assert source.classes == ("Forest", "River") and reds(source.test) == [(0, 0)] * 2 + [(1, 1)] * 2
    with pytest.raises(
        DataError, match=r"^data: eurosat in .* brings no test split; set data\.test_fraction \(0\.2, say\)"
    ):
        opened("eurosat", tmp_path)


@pytest.mark.parametrize("name", ["cifar100", "flowers102", "oxford_pets", "stanford_cars", "gtsrb", "svhn"])
def test_absent_data(name, tmp_path):
    with pytest.raises(DataError) as caught:
        opened(name, tmp_path)
    assert f"data.root: {tmp_path} does not give {name} (RuntimeError: Dataset not found" in str(caught.value)
    assert "set data.download = true, or put torchvision's " in str(caught.value)


def test_a_download_that_fails(tmp_path):
    with pytest.raises(
        DataError, match=r"does not give stanford_cars \(ValueError: .*\); check the network, or put the data"
    ):
        opened("stanford_cars", tmp_path, download=True)


def test_root_is_needed():
    with pytest.raises(
        DataError, match=r"^data\.root: missing; torchvision's dtd needs the folder that holds it, or into"
    ):
        open_source(DataTable.model_validate({"name": "dtd"}), seed=0)
