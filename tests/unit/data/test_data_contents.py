"""Contents decide, not times: every byte of a folder is read once, and again only after a file was touched."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from vpdeploy import checking, inspection
from vpdeploy.data import contents
from vpdeploy.data.contents import fingerprint_of_contents, remember
from vpdeploy.data.refs import DataSource
from vpdeploy.data.sources import open_source
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import DataTable

QUIET = Display(quiet=True)
NAMES = tuple(f"{split}/{label}/{i}.bmp" for split in ("train", "test") for label in ("cat", "dog") for i in range(40))


def opened(root: Path) -> DataSource:
    return open_source(
        DataTable.model_validate({"name": "imagefolder", "root": str(root), "val_fraction": 0.5}), seed=0
    )


def contents_of(root: Path, cache: Path) -> str:
    """As a run does it: looked up or read, then kept."""
    source = opened(root)
    found = fingerprint_of_contents(source, cache=cache, display=QUIET)
    remember(source, found, cache=cache)
    return found


@pytest.fixture
def root(tmp_path) -> Path:
    """160 files that nobody decodes, all of 100 bytes."""
    for i, name in enumerate(NAMES):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]) * 100)
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "run" / "inputs.json"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    digest = contents._digest
    monkeypatch.setattr(contents, "_digest", lambda path: names.append(path.name) or digest(path))
    return names


def test_a_folder_is_read_once(root, cache, read):
    first = contents_of(root, cache)
    assert len(read) == len(NAMES)
    written = cache.stat().st_mtime_ns
    assert contents_of(root, cache) == first
    assert len(read) == len(NAMES) and cache.stat().st_mtime_ns == written


def test_a_touched_file_changes_nothing_and_is_forgotten_after_one_reading(root, cache, read):
    first = contents_of(root, cache)
    os.utime(root / NAMES[3], ns=(1, 1))
    assert [contents_of(root, cache) for _ in range(2)] == [first, first]
    assert len(read) == 2 * len(NAMES)


def test_a_copy_is_the_same_data(root, cache):
    first = contents_of(root, cache)
    shutil.copytree(root, root.parent / "copy", copy_function=shutil.copyfile)  # with times of its own
    assert contents_of(root.parent / "copy", cache) == first
    shutil.rmtree(root)
    shutil.move(root.parent / "copy", root)
    assert contents_of(root, cache) == first


def test_a_byte_that_changed_under_the_old_size_and_time_is_seen(root, cache):
    first, path = contents_of(root, cache), root / NAMES[3]
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # a clock may tick only every few milliseconds
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert contents_of(root, cache) != first


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / NAMES[0]).rename(root / "train/cat/a.bmp"),
        lambda root: (root / NAMES[0]).unlink(),
        lambda root: (root / "train/cat/a.bmp").write_bytes(b""),
        lambda root: shutil.copyfile(root / NAMES[0], root / NAMES[1]),
    ],
    ids=["renamed", "removed", "added", "another's"],
)
def test_names_count_as_bytes_do(root, cache, change):
    first = contents_of(root, cache)
    change(root)
    assert contents_of(root, cache) != first


def test_what_is_no_image_of_the_set_does_not_count(root, cache):
    first = contents_of(root, cache)
    (root / "train" / "notes.txt").write_text("not read by any stage")
    assert contents_of(root, cache) == first


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"data": 3}', b'{"data": {"touched": 1}}', b"\xff"])
def test_a_damaged_cache_is_made_anew(root, cache, content, read):
    first = contents_of(root, cache)
    whole = cache.read_bytes()
    cache.write_bytes(content)
    assert contents_of(root, cache) == first
    assert cache.read_bytes() == whole and len(read) == 2 * len(NAMES)


def test_a_damaged_hash_is_made_anew(root, cache):
    first = contents_of(root, cache)
    noted = json.loads(cache.read_bytes())
    cache.write_text(json.dumps({**noted, "data": {**noted["data"], "contents": None}}))
    assert contents_of(root, cache) == first


def test_a_file_that_cannot_be_read_is_left_to_whoever_needs_it(root, cache, monkeypatch):
    first = contents_of(root, cache)
    really, locked = Path.open, root / NAMES[3]

    def refuse(path: Path, *arguments):
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return really(path, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    source = opened(root)
    cache.unlink()
    assert fingerprint_of_contents(source, cache=cache, display=QUIET) != first


def test_data_that_identifies_itself_leaves_no_file(cache, read):
    source = open_source(DataTable.model_validate({"name": "digits"}), seed=0)
    assert fingerprint_of_contents(source, cache=cache, display=QUIET) == source.fingerprint
    remember(source, source.fingerprint, cache=cache)
    assert read == [] and not cache.exists()


def test_reading_shows_how_far_it_is(root, cache):
    said = io.StringIO()
    display = Display(Console(file=said, force_terminal=True, width=100))
    fingerprint_of_contents(opened(root), cache=cache, display=display)
    assert "reading data" in said.getvalue() and f"{len(NAMES)}/{len(NAMES)}" in said.getvalue()


def test_torchvisions_sets_are_read_where_they_lie(tmp_path, cache, read):
    for k, name in enumerate(("Forest", "River")):
        for i in range(8):
            path = tmp_path / "eurosat" / "2750" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([k, i]))
    table = DataTable.model_validate(
        {"name": "eurosat", "root": str(tmp_path), "val_fraction": 0.5, "test_fraction": 0.25}
    )

    def now() -> str:
        return fingerprint_of_contents(open_source(table, seed=0), cache=cache, display=QUIET)

    first = now()
    assert len(read) == 16
    (tmp_path / "eurosat/2750/River/0.jpg").touch()
    (tmp_path / "another set").write_text("of no concern")
    assert now() == first
    (tmp_path / "eurosat/2750/River/0.jpg").write_bytes(b"?!")
    assert now() != first


def test_looking_at_a_recipe_reads_no_data(root, read):
    recipe = parse_recipe(
        {
            "model": {"name": "cifar_resnet8"},
            "data": {"name": "imagefolder", "root": str(root), "val_fraction": 0.5},
            "input": {"image_size": 8},
            "prompt": {"pixels": {"size": 1}},
            "budget": {"macs_ratio": 0.6},
        },
        where="r.toml",
        folder=root.parent,
    )
    assert list(checking.outside_problems(recipe)) == []
    assert inspection.inspect_recipe(recipe).macs > 0
    assert read == []
