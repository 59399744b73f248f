"""Images by name and label, not yet decoded: what the openers of data sets give and everything after them reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class ImageRefs:
    """One split. ``read(i)`` decodes image i to uint8 [h, w, 3], from any thread; DataError on a bad image."""

    names: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Files:
    """What a data set consists of on disk; ``names`` lie below ``root``."""

    root: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class Opened:
    """A data set as it lies on disk. ``splits``: "train", "test" and perhaps "val", or "all" where it has none.

    ``where`` names it in messages; ``fingerprint`` and ``files`` are as in DataSource.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, ImageRefs]
    fingerprint: str
    where: str
    files: Files | None = None


@dataclass(frozen=True)
class DataSource:
    """A data set with its three splits.

    ``fingerprint`` changes when the files do. Where ``files`` are given it is made of their sizes and times, and changes
    too when one is only touched: their bytes are what counts, and have not been read yet.
    """

    classes: tuple[str, ...]
    train: ImageRefs
    val: ImageRefs
    test: ImageRefs
    fingerprint: str
    files: Files | None = None


def take(refs: ImageRefs, positions: Sequence[int]) -> ImageRefs:
    """The images at ``positions``, in that order."""
    kept = tuple(int(i) for i in positions)
    return ImageRefs(
        tuple(refs.names[i] for i in kept), tuple(refs.labels[i] for i in kept), lambda i: refs.read(kept[i])
    )
