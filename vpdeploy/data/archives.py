"""Image folders inside a zip, read in place. Whatever the archive says of itself is checked before it is believed."""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpdeploy.errors import DataError


@dataclass(frozen=True)
class ZipLimits:
    """What an archive may hold at most."""

    entries: int = 5_000_000
    entry_bytes: int = 512 * 2**20
    total_bytes: int = 200 * 2**30


LIMITS = ZipLimits()


def list_zip(path: Path, *, limits: ZipLimits = LIMITS) -> tuple[dict[str, tuple[int, int]], Callable[[str], bytes]]:
    """Every file in the archive, name -> (CRC, size), and a function that reads one, from any thread.

    Raises: DataError when it is no zip, encrypted, too large, or holds a name that is absolute or leads out of it.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise DataError(
            f"data.root: {path} is not a readable zip ({e}); expected a folder or a .zip: check that it is complete"
        ) from e
    entries = archive.infolist()
    if len(entries) > limits.entries:
        raise DataError(
            f"{path}: holds {len(entries):,} entries; at most {limits.entries:,} are accepted: split it or use a folder"
        )
    infos: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in entries:
        name = _checked(info, path, limits=limits)
        if info.is_dir():
            continue
        if name in infos:
            raise DataError(f"{path}: holds {name!r} twice; expected every name once: pack it again")
        infos[name] = info
        total += info.file_size
    if total > limits.total_bytes:
        raise DataError(
            f"{path}: unpacks to {total:,} bytes; at most {limits.total_bytes:,} are accepted: split it or use a folder"
        )
    return {name: (info.CRC, info.file_size) for name, info in infos.items()}, _reader(archive, infos)


def _checked(info: zipfile.ZipInfo, path: Path, *, limits: ZipLimits) -> str:
    """The entry's name with forward slashes (some Windows tools write the others)."""
    name = info.filename.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise DataError(
            f"{path}: holds {info.filename!r}, a name that leads out of the archive; expected names below it:"
            " pack it again"
        )
    if info.flag_bits & 0x1:
        raise DataError(f"{path}: {name!r} is encrypted; expected an archive without a password: pack it again")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{path}: {name!r} is compressed by method {info.compress_type}; expected 0 (stored) or 8 (deflate):"
            " pack it again"
        )
    if info.file_size > limits.entry_bytes:
        raise DataError(
            f"{path}: {name!r} unpacks to {info.file_size:,} bytes; at most {limits.entry_bytes:,} are accepted:"
            " remove it"
        )
    return name


def _reader(archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo]) -> Callable[[str], bytes]:
    # ZipFile counts its open handles without a lock. One read takes 10 us, a small JPEG's decoding 70 us.
    lock = threading.Lock()

    def read(name: str) -> bytes:
        with lock:
            return archive.read(infos[name])

    return read
