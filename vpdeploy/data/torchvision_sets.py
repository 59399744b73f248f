"""torchvision's data sets, opened without decoding. The only file of ``data`` that imports torchvision, when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpdeploy.data.folders import fingerprint_of, touched, walk
from vpdeploy.data.images import decode
from vpdeploy.data.refs import Files, ImageRefs, Opened
from vpdeploy.errors import DataError
from vpdeploy.recipe.tables import DataTable


@dataclass(frozen=True)
class SetSpec:
    """How one set is opened: class in torchvision, our split -> its arguments, and how a made data set is listed.

    ``listed`` gives (image or path, label) pairs and class names; ``files`` is what the set owns below root.
    """

    factory: str
    splits: dict[str, dict[str, Any]]
    listed: Callable[[Any], tuple[Sequence[Any], Sequence[int], Sequence[str]]]
    files: tuple[str, ...]
    takes_loader: bool = False


def _arrays(data: Any) -> tuple[Sequence[Any], Sequence[int], Sequence[str]]:
    return data.data, data.targets, data.classes


def _svhn(data: Any) -> tuple[Sequence[Any], Sequence[int], Sequence[str]]:
    return data.data.transpose(0, 2, 3, 1), data.labels.tolist(), [str(k) for k in range(10)]


def _by_loader(data: Any) -> tuple[Sequence[Any], Sequence[int], Sequence[str]]:
    items = [data[i] for i in range(len(data))]  # the loader gives the path back: nothing is decoded
    return [path for path, _ in items], [int(label) for _, label in items], data.classes


def _gtsrb(data: Any) -> tuple[Sequence[Any], Sequence[int], Sequence[str]]:
    samples = data._samples  # no public way to a label without decoding its image
    return [path for path, _ in samples], [label for _, label in samples], [f"{k:02d}" for k in range(43)]


def _pets(data: Any) -> tuple[Sequence[Any], Sequence[int], Sequence[str]]:
    return data._images, data._labels, data.classes  # as for GTSRB


TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
TRAIN_VAL_TEST = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
FLAGS = {"train": {"train": True}, "test": {"train": False}}

SETS: dict[str, SetSpec] = {
    "cifar10": SetSpec("CIFAR10", FLAGS, _arrays, ("cifar-10-batches-py",)),
    "cifar100": SetSpec("CIFAR100", FLAGS, _arrays, ("cifar-100-python",)),
    "flowers102": SetSpec("Flowers102", TRAIN_VAL_TEST, _by_loader, ("flowers-102",), takes_loader=True),
    "oxford_pets": SetSpec(
        "OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}, _pets, ("oxford-iiit-pet",)
    ),
    "dtd": SetSpec("DTD", TRAIN_VAL_TEST, _by_loader, ("dtd",), takes_loader=True),
    "food101": SetSpec("Food101", TRAIN_TEST, _by_loader, ("food-101",), takes_loader=True),
    "stanford_cars": SetSpec("StanfordCars", TRAIN_TEST, _by_loader, ("stanford_cars",), takes_loader=True),
    "svhn": SetSpec("SVHN", TRAIN_TEST, _svhn, ("train_32x32.mat", "test_32x32.mat")),
    "gtsrb": SetSpec("GTSRB", TRAIN_TEST, _gtsrb, ("gtsrb",)),
    "eurosat": SetSpec("EuroSAT", {"all": {}}, _by_loader, ("eurosat",), takes_loader=True),
}


def open_torchvision(table: DataTable) -> Opened:
    """One of ``SETS``, from ``table.root``; downloaded first when ``table.download`` says so.

    Raises: DataError when the data is not there, or cannot be downloaded or read.
    """
    spec = SETS[table.name]
    if not table.root:
        raise DataError(no_root(table.name))
    root = Path(table.root)
    made = {split: _made(spec, arguments, table, root=root) for split, arguments in spec.splits.items()}
    listed = {split: spec.listed(data) for split, data in made.items()}
    classes = tuple(str(name) for name in next(iter(listed.values()))[2])
    splits = {
        split: _refs(items, labels, f"{table.name}/{split}", max_pixels=table.max_pixels, root=root)
        for split, (items, labels, _) in listed.items()
    }
    marks = _marks(spec, root.resolve())
    files = Files(root.resolve(), tuple(sorted(marks)))
    return Opened(classes, splits, fingerprint_of(marks.items()), f"{table.name} in {root}", files)


def no_root(name: str) -> str:
    return (
        f"data.root: missing; torchvision's {name} needs the folder that holds it, or into which to download it: set it"
    )


def where_to_get(spec: SetSpec) -> str:
    return f"set data.download = true, or put torchvision's {', '.join(spec.files)} there"


def _made(spec: SetSpec, arguments: dict[str, Any], table: DataTable, *, root: Path) -> Any:
    import torchvision.datasets  # seconds to import, with torch

    loader = {"loader": str} if spec.takes_loader else {}
    try:
        if table.download:
            root.mkdir(parents=True, exist_ok=True)
        return getattr(torchvision.datasets, spec.factory)(root=root, download=table.download, **arguments, **loader)
    except MemoryError:
        raise
    except Exception as e:  # missing, damaged and unreachable data are told apart by text alone, if at all
        advice = "check the network, or put the data there yourself" if table.download else where_to_get(spec)
        raise DataError(f"data.root: {root} does not give {table.name} ({type(e).__name__}: {e}); {advice}") from e


def _refs(items: Sequence[Any], labels: Sequence[int], split: str, *, max_pixels: int, root: Path) -> ImageRefs:
    """``items`` are arrays [h, w, 3], or paths."""
    if isinstance(items, np.ndarray):
        names = tuple(f"{split}/{i:05d}" for i in range(len(items)))
        return ImageRefs(names, tuple(int(label) for label in labels), lambda i: items[i].copy(order="C"))
    paths = [Path(item) for item in items]
    names = tuple(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in paths)
    return ImageRefs(
        names, tuple(int(label) for label in labels), lambda i: decode(paths[i], names[i], max_pixels=max_pixels)
    )


def _marks(spec: SetSpec, root: Path) -> dict[str, tuple[int, ...]]:
    """What the set owns below root, marked as by ``walk``: root may hold other sets too."""
    marks: dict[str, tuple[int, ...]] = {}
    for name in spec.files:
        path = root / name
        if path.is_dir():
            marks |= {f"{name}/{inner}": mark for inner, mark in walk(path.resolve(), path.resolve())}
        elif path.is_file():
            marks[name] = touched(path.stat())
    return marks
