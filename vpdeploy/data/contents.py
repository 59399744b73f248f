"""What the files of a data set hold, whatever their times say: all are read once, then only asked whether they were
touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vpdeploy.data.folders import fingerprint_of
from vpdeploy.data.refs import DataSource, Files
from vpdeploy.progress import Display
from vpdeploy.run_folder import SCHEMA, write_json

THREADS = 8  # more than cores: they wait for the disk, and hashing lets go of the interpreter
CHUNK = 64  # files a task: a million tasks of one file each would cost more than reading


def fingerprint_of_contents(source: DataSource, *, cache: Path, display: Display) -> str:
    """A hash of names and bytes. Read from ``cache`` when no file was touched since ``remember`` wrote it."""
    if source.files is None:
        return source.fingerprint
    return _remembered(source, cache) or _read_through(source.files, display=display)


def remember(source: DataSource, contents: str, *, cache: Path) -> None:
    """Keep ``contents`` beside what tells that no file was touched. A source that needs no reading leaves no file."""
    if source.files is not None and _remembered(source, cache) != contents:
        write_json(cache, {"schema": SCHEMA, "data": {"touched": source.fingerprint, "contents": contents}})


def _remembered(source: DataSource, cache: Path) -> str | None:
    try:
        data = json.loads(cache.read_bytes())["data"]
        known = data["contents"] if data["touched"] == source.fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged: the files themselves still say it
        return None
    return known if isinstance(known, str) else None


def _read_through(files: Files, *, display: Display) -> str:
    chunks = [files.names[start : start + CHUNK] for start in range(0, len(files.names), CHUNK)]

    def digests(pool: ThreadPoolExecutor) -> Iterator[tuple[str, tuple[str]]]:
        for found in pool.map(lambda chunk: [(name, (_digest(files.root / name),)) for name in chunk], chunks):
            yield from found

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
    try:
        with display.bar(digests(pool), label="reading data", total=len(files.names)) as items:
            return fingerprint_of(items)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the files that nobody has begun


def _digest(path: Path) -> str:
    """sha256 of a file, or a word for one that cannot be read: whoever needs that image says so, or skips it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"
