"""Image folders, on disk or in a zip: SPLIT/CLASS/... or CLASS/..."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from vpdeploy.data.archives import list_zip
from vpdeploy.data.images import SUFFIXES, decode
from vpdeploy.data.refs import Files, ImageRefs, Opened
from vpdeploy.errors import DataError

LAYOUT = "train/CLASS/* and test/CLASS/*, or CLASS/*"


def open_imagefolder(root: str | None, *, max_pixels: int) -> Opened:
    """A folder or zip with one sub-folder per class. Names relative to it; classes and images in alphabetical order.

    train/ and test/ (or val/) make splits; otherwise the top folders are the classes, as split "all". Hidden files,
    other suffixes, and images outside of any class folder are left aside.

    Raises: DataError when there is nothing to read, one class only, splits of different classes, or a way out of root.
    """
    if not root:
        raise DataError("data.root: missing; expected the folder or .zip that holds the images: set it")
    path = Path(root)
    if path.is_dir():
        top = path.resolve()
        marks = {name: mark for name, mark in walk(top, top) if _is_image(name)}
        opened = _opened(marks, _from_disk(top, max_pixels=max_pixels), where=str(path))
        return replace(opened, files=Files(top, tuple(sorted(marks))))
    if not path.exists():
        raise DataError(no_such_root(path))
    entries, read = list_zip(path)
    marks = {name: mark for name, mark in entries.items() if _is_image(name)}
    prefix = _common_top(marks)
    stripped = {name[len(prefix) :]: mark for name, mark in marks.items()}
    return _opened(stripped, _from_zip(read, prefix, max_pixels=max_pixels), where=str(path))


def no_such_root(path: Path) -> str:
    return f"data.root: {path} does not exist; expected a folder or .zip with {LAYOUT}: check the path"


def walk(folder: Path, root: Path, *, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every file that is not hidden, as (name relative to root, how ``touched`` marks it).

    Raises: DataError at a symbolic link that leaves ``root``, leads nowhere or goes in a circle.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as e:
        raise DataError(
            f"{folder}: cannot be listed ({e.strerror or e}); expected a readable folder: check its rights"
        ) from e
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            _check_link(path, root, above=(*above, folder.resolve()))
        if entry.is_dir():
            yield from walk(path, root, above=(*above, folder.resolve()))
        elif entry.is_file():
            yield path.relative_to(root).as_posix(), touched(entry.stat())


def touched(status: os.stat_result) -> tuple[int, ...]:
    """What differs once a file was written, or only touched: (bytes, mtime_ns, ctime_ns). The last cannot be set back."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def fingerprint_of(marks: Iterable[tuple[str, tuple[int | str, ...]]]) -> str:
    """sha256 over sorted names and their marks: ``touched`` or a hash on disk, (CRC, bytes) in a zip."""
    digest = hashlib.sha256()
    for name, mark in sorted(marks):
        digest.update("\0".join((name, *map(str, mark))).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _check_link(path: Path, root: Path, *, above: tuple[Path, ...]) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop, before Python 3.13
        raise DataError(f"{path}: a symbolic link that leads nowhere; expected a file or folder: remove it") from e
    if not target.is_relative_to(root):
        raise DataError(
            f"{path}: a symbolic link to {target}, outside of {root}; expected images inside data.root: copy them there"
        )
    if target in above:
        raise DataError(f"{path}: a symbolic link to a folder that it lies in; expected no circles: remove it")


def _opened(marks: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], *, where: str) -> Opened:
    """Splits and classes from the names of the images. ``read`` decodes one by name."""
    splits = _layout(marks)
    if not splits:
        found = f"{len(marks)} images outside of any class folder" if marks else "no images"
        raise DataError(
            f"data.root: {where} holds {found}; expected {LAYOUT}, with {' '.join(SUFFIXES)}:"
            " check the path and its folders"
        )
    if "train" not in splits and "all" not in splits:
        raise DataError(f"data.root: {where} holds {', '.join(splits)} but no train/; expected {LAYOUT}: add train/")
    classes = _same_classes({split: {label for _, label in images} for split, images in splits.items()}, where)
    if len(classes) < 2:
        raise DataError(
            f"data.root: {where} holds one class only, {classes[0]!r}; expected at least two, as {LAYOUT}:"
            " add another, or point data.root at the folder that holds the class folders"
        )
    index = {label: k for k, label in enumerate(classes)}
    refs = {split: _refs(images, index, read) for split, images in splits.items()}
    return Opened(tuple(classes), refs, fingerprint_of(marks.items()), where)


def _layout(names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Split -> its images as (name, class); "all" when the top folders are classes.

    train/ is a split when class folders lie in it and test/ or val/ stands beside it, or nothing at all: otherwise it
    is a class of that name ("train", "bus", "plane").
    """
    paths = sorted(name.split("/") for name in names if "/" in name)
    tops, deep = {path[0] for path in paths}, {path[0] for path in paths if len(path) > 2}
    named = deep & {"train", "val", "test"}
    if ("train" in named and (len(named) > 1 or tops == named)) or (named and tops <= {"val", "test"}):
        inside = [path for path in paths if len(path) > 2]
        return {
            split: [("/".join(path), path[1]) for path in inside if path[0] == split]
            for split in ("train", "val", "test")
            if split in named
        }
    return {"all": [("/".join(path), path[0]) for path in paths]} if paths else {}


def _same_classes(classes: Mapping[str, set[str]], where: str) -> list[str]:
    """The classes of every split, in alphabetical order. Raises: DataError when they differ from train's."""
    reference, *others = sorted(classes, key=lambda split: split not in ("train", "all"))
    for split in others:
        differences = (
            (reference, sorted(classes[reference] - classes[split])),
            (split, sorted(classes[split] - classes[reference])),
        )
        told = [f"only in {name}: {', '.join(only)}" for name, only in differences if only]
        if told:
            raise DataError(
                f"data.root: {where}: {reference} and {split} hold different classes ({'; '.join(told)});"
                " expected the same in both: add or remove class folders"
            )
    return sorted(classes[reference])


def _refs(images: list[tuple[str, str]], index: Mapping[str, int], read: Callable[[str], np.ndarray]) -> ImageRefs:
    names = tuple(name for name, _ in images)
    return ImageRefs(names, tuple(index[label] for _, label in images), lambda i: read(names[i]))


def _is_image(name: str) -> bool:
    parts = name.split("/")
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _common_top(names: Iterable[str]) -> str:
    """The one folder around every image, as "top/", when class folders still remain below it; else ""."""
    paths = [name.split("/") for name in names]
    tops = {path[0] for path in paths}
    return f"{tops.pop()}/" if len(tops) == 1 and all(len(path) > 2 for path in paths) else ""


def _from_disk(top: Path, *, max_pixels: int) -> Callable[[str], np.ndarray]:
    return lambda name: decode(top / name, name, max_pixels=max_pixels)


def _from_zip(read: Callable[[str], bytes], prefix: str, *, max_pixels: int) -> Callable[[str], np.ndarray]:
    def read_image(name: str) -> np.ndarray:
        try:
            encoded = read(prefix + name)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as e:
            raise DataError(f"{name}: cannot be unpacked ({e}); expected an undamaged archive: pack it again") from e
        return decode(encoded, name, max_pixels=max_pixels)

    return read_image
