"""Image folders and zips: layouts, names, and everything that is refused."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpdeploy.data.archives import ZipLimits, list_zip
from vpdeploy.data.folders import open_imagefolder
from vpdeploy.errors import DataError

LIMIT = 1_000_000
SPLITS = tuple(f"{split}/{k}/{i}.png" for split in ("train", "test") for k in ("cat", "dog") for i in range(2))


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root: Path, names) -> str:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    root.mkdir(exist_ok=True)
    return str(root)


def packed(path: Path, names) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(zipfile.ZipInfo(name), picture(i))
    return str(path)


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    """Writes names as a folder or as a zip; picture i has red value i."""
    if request.param == "folder":
        return lambda names: folder(tmp_path / "data", names)
    return lambda names: packed(tmp_path / "data.zip", names)


def test_train_and_test(make):
    opened = open_imagefolder(make(SPLITS), max_pixels=LIMIT)
    assert opened.classes == ("cat", "dog")
    assert list(opened.splits) == ["train", "test"]
    assert opened.splits["test"].names == SPLITS[4:]
    assert opened.splits["test"].labels == (0, 0, 1, 1)
    image = opened.splits["test"].read(2)
    assert image.shape == (3, 2, 3) and image[0, 0, 0] == 6


def test_val_is_listed_beside_train_and_test(make):
    names = [f"{split}/{k}/a.png" for split in ("val", "test", "train") for k in "ab"]
    assert list(open_imagefolder(make(names), max_pixels=LIMIT).splits) == ["train", "val", "test"]


def test_order_and_classes_are_alphabetical_whatever_was_written_first(make):
    names = ["b/2.png", "b/10.png", "a b/1.png", "a/1.png", "a/0/9.png", "C/1.png"]
    opened = open_imagefolder(make(names), max_pixels=LIMIT)
    assert opened.classes == ("C", "a", "a b", "b")
    refs = opened.splits["all"]
    assert refs.names == ("C/1.png", "a/0/9.png", "a/1.png", "a b/1.png", "b/10.png", "b/2.png")
    assert refs.labels == (0, 1, 1, 2, 3, 3)
    assert [int(refs.read(i)[0, 0, 0]) for i in range(6)] == [names.index(name) for name in refs.names]


def test_hidden_files_and_other_suffixes_are_left_aside(make):
    extra = ["a/.x.png", ".cache/a/1.png", "a/notes.txt", "a/Thumbs.db", "__MACOSX/a/1.png", "stray.png"]
    kept = ["a/1.JPEG", "a/2.tiff", "b/3.WebP"]
    assert open_imagefolder(make(kept + extra), max_pixels=LIMIT).splits["all"].names == tuple(kept)


def test_a_class_may_be_called_train(make):
    opened = open_imagefolder(make(["train/1.png", "bus/1.png", "plane/1.png"]), max_pixels=LIMIT)
    assert opened.classes == ("bus", "plane", "train") and list(opened.splits) == ["all"]


def test_a_common_top_folder_of_a_zip_is_stripped(tmp_path):
    root = packed(tmp_path / "a.zip", [f"set/{name}" for name in SPLITS] + ["set/README.txt", "__MACOSX/set/._x.png"])
    refs = open_imagefolder(root, max_pixels=LIMIT).splits["train"]
    assert refs.names == SPLITS[:4]
    assert refs.read(1)[0, 0, 0] == 1


def test_backslashes_in_a_zip_are_slashes(tmp_path):
    root = packed(tmp_path / "a.zip", ["a\\1.png", "b\\1.png"])
    refs = open_imagefolder(root, max_pixels=LIMIT).splits["all"]
    assert refs.names == ("a/1.png", "b/1.png") and refs.read(1)[0, 0, 0] == 1


def test_fingerprint_changes_with_content_alone(tmp_path):
    one = packed(tmp_path / "one.zip", SPLITS)
    two = packed(tmp_path / "two.zip", SPLITS)
    with zipfile.ZipFile(two, "a") as archive:
        archive.writestr("README.txt", "no image")
    other = packed(tmp_path / "other.zip", SPLITS[::-1])
    marks = [open_imagefolder(root, max_pixels=LIMIT).fingerprint for root in (one, two, other)]
    assert marks[0] == marks[1] != marks[2]

    root = folder(tmp_path / "folder", SPLITS)
    before = open_imagefolder(root, max_pixels=LIMIT).fingerprint
    assert before == open_imagefolder(root, max_pixels=LIMIT).fingerprint
    os.utime(tmp_path / "folder" / SPLITS[0], ns=(1, 1))
    assert before != open_imagefolder(root, max_pixels=LIMIT).fingerprint


def test_nothing_is_decoded_on_opening(make):
    refs = open_imagefolder(make(SPLITS), max_pixels=1).splits["test"]  # every image is too large
    with pytest.raises(DataError, match=r"^test/cat/0\.png: 2 x 3 is 6 pixels; at most 1 are accepted"):
        refs.read(0)


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(root: str | None) -> str:
    with pytest.raises(DataError) as caught:
        open_imagefolder(root, max_pixels=LIMIT)
    return str(caught.value)


def test_missing_root(tmp_path):
    assert refused(None) == "data.root: missing; expected the folder or .zip that holds the images: set it"
    assert f"data.root: {tmp_path / 'no'} does not exist; expected a folder or .zip with train/CLASS/*" in refused(
        str(tmp_path / "no")
    )


def test_empty(make):
    assert " holds no images; expected train/CLASS/* and test/CLASS/*, or CLASS/*, with .jpg .jpeg" in refused(make([]))


def test_no_class_folders(make):
    assert " holds 2 images outside of any class folder; expected train/CLASS/*" in refused(make(["1.png", "2.png"]))


def test_one_class(make):
    assert " holds one class only, 'cat'; expected at least two" in refused(make(["cat/1.png", "cat/2.png"]))


def test_test_without_train(make):
    message = refused(make(["test/a/1.png", "test/b/1.png", "val/a/1.png", "val/b/1.png"]))
    assert " holds val, test but no train/; expected train/CLASS/*" in message


@pytest.mark.parametrize("split", ["test", "val"])
def test_splits_with_different_classes(make, split):
    message = refused(make(["train/a/1.png", "train/b/1.png", f"{split}/b/1.png", f"{split}/c/1.png"]))
    assert f"train and {split} hold different classes (only in train: a; only in {split}: c);" in message
    assert message.endswith("expected the same in both: add or remove class folders")


def test_links_must_stay_inside(tmp_path):
    root = tmp_path / "data"
    folder(root, SPLITS)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.png").write_bytes(picture(9))
    for target in (tmp_path / "secret", tmp_path / "secret" / "x.png"):
        link = root / "train" / "cat" / "link.png"
        link.symlink_to(target)
        message = refused(str(root))
        assert f"{link}: a symbolic link to {target}, outside of {root}; expected images inside data.root" in message
        link.unlink()
    link.symlink_to(root / "gone.png")
    assert f"{link}: a symbolic link that leads nowhere; expected a file or folder: remove it" == refused(str(root))
    link.unlink()
    link.symlink_to(root / "train")
    assert f"{link}: a symbolic link to a folder that it lies in; expected no circles" in refused(str(root))
    link.unlink()
    link.symlink_to(root / "test" / "dog" / "0.png")
    assert len(open_imagefolder(str(root), max_pixels=LIMIT).splits["train"]) == 5


def test_not_a_zip(tmp_path):
    path = tmp_path / "data.zip"
    path.write_bytes(b"not a zip")
    assert refused(str(path)).startswith(
        f"data.root: {path} is not a readable zip (File is not a zip file); expected a"
    )


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/a.png", "C:/a.png", "c:a.png", "..\\a.png", "\\a.png"]
)
def test_names_that_leave_the_zip(tmp_path, name):
    message = refused(packed(tmp_path / "a.zip", [*SPLITS, name]))
    assert f"a.zip: holds {name!r}, a name that leads out of the archive; expected names below it" in message


def test_a_name_held_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        root = packed(tmp_path / "a.zip", ["a/1.png", "b/1.png", "a/1.png"])
    assert refused(root).endswith("holds 'a/1.png' twice; expected every name once: pack it again")


def test_encrypted(tmp_path):
    path = Path(packed(tmp_path / "a.zip", SPLITS))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the first entry of the central directory
    path.write_bytes(content)
    assert "'train/cat/0.png' is encrypted; expected an archive without a password: pack it again" in refused(str(path))


def test_unknown_compression(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/1.png", picture(0))
    message = refused(str(path))
    assert message.endswith("'a/1.png' is compressed by method 12; expected 0 (stored) or 8 (deflate): pack it again")


def test_bounds_of_a_zip(tmp_path):
    path = Path(packed(tmp_path / "a.zip", SPLITS))
    size = max(len(picture(i)) for i in range(len(SPLITS)))
    total = sum(len(picture(i)) for i in range(len(SPLITS)))
    list_zip(path, limits=ZipLimits(entries=8, entry_bytes=size, total_bytes=total))
    for limits, text in (
        (ZipLimits(entries=7), "holds 8 entries; at most 7 are accepted"),
        (ZipLimits(entry_bytes=size - 1), f"unpacks to {size:,} bytes; at most {size - 1:,} are accepted: remove it"),
        (ZipLimits(total_bytes=total - 1), f"unpacks to {total:,} bytes; at most {total - 1:,} are accepted"),
    ):
        with pytest.raises(DataError) as caught:
            list_zip(path, limits=limits)
        assert text in str(caught.value)


def test_the_declared_size_bounds_what_is_unpacked(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", bytes(10_000_000))
        archive.writestr("b/1.png", picture(0))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):  # it says 100 bytes in both places
        at = content.index(signature) + offset
        content[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^a/1\.png: cannot be unpacked \(Bad CRC-32 .*\); expected an undam"):
        open_imagefolder(str(path), max_pixels=LIMIT).splits["all"].read(0)


def test_a_damaged_entry(tmp_path):
    path = Path(packed(tmp_path / "a.zip", ["a/1.png", "b/1.png"]))
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 6
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^a/1\.png: cannot be unpacked \(Bad CRC-32"):
        open_imagefolder(str(path), max_pixels=LIMIT).splits["all"].read(0)


def test_zip_reads_from_many_threads_are_whole(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    names = [f"{k}/{i:02d}.png" for k in "ab" for i in range(50)]
    refs = open_imagefolder(packed(tmp_path / "a.zip", names), max_pixels=LIMIT).splits["all"]
    with ThreadPoolExecutor(8) as pool:
        reds = list(pool.map(lambda i: int(refs.read(i % 100)[0, 0, 0]), range(800)))
    assert reds == [i % 100 for i in range(800)]
    assert np.unique(reds).size == 100
