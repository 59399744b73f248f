"""Batches of undecoded sizes, as a caller would send them to the exported file. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

import numpy as np

from vpdeploy.data.refs import ImageRefs
from vpdeploy.errors import DataError

MAX_WAITING_BYTES = 256 * 2**20

RawBatch = tuple[np.ndarray, np.ndarray, np.ndarray]


def raw_batches(
    refs: ImageRefs, *, max_bad: Literal["fail", "skip"], batch_size: int, bad: list[str]
) -> Iterator[RawBatch]:
    """Batches of images of one size: uint8 [b, h, w, 3], labels int64 [b], positions in ``refs`` int64 [b].

    Images wait by size until a batch is full; the rest come at the end, smaller, as they do when too much waits.
    Every image comes once; under "skip" bad ones do not come at all, and are added to ``bad`` as "name: reason".

    Raises: DataError at a bad image under "fail".
    """
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    waiting_bytes = 0
    for i, image in _readable(refs, range(len(refs)), max_bad=max_bad, bad=bad):
        waiting.setdefault(image.shape, []).append((i, image))
        waiting_bytes += image.nbytes
        full = len(waiting[image.shape]) >= batch_size
        if full or waiting_bytes > MAX_WAITING_BYTES:
            shape = image.shape if full else max(waiting, key=lambda s: len(waiting[s]) * int(np.prod(s)))
            batch = _batch(waiting.pop(shape), refs)
            waiting_bytes -= batch[0].nbytes
            yield batch
    for bucket in waiting.values():
        yield _batch(bucket, refs)


def some_images(refs: ImageRefs, count: int, *, max_bad: Literal["fail", "skip"]) -> list[np.ndarray]:
    """At most ``count`` images, uint8 [h, w, 3] each, evenly over ``refs``; under "skip" others stand in for bad ones.

    Raises: DataError at a bad image under "fail".
    """
    spread = np.unique(np.linspace(0, len(refs) - 1, min(len(refs), count)).round()).astype(int).tolist()
    others = sorted(set(range(len(refs))) - set(spread))
    images = _readable(refs, [*spread, *others], max_bad=max_bad, bad=[])
    return [image for _, image in islice(images, len(spread))]


def _readable(
    refs: ImageRefs, positions: Iterable[int], *, max_bad: Literal["fail", "skip"], bad: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    for i in positions:
        try:
            image = refs.read(i)
        except DataError as e:
            if max_bad == "fail":
                raise failing(e) from e
            bad.append(str(e))
            continue
        yield i, image


def failing(error: DataError) -> DataError:
    """The error of one bad image, as the end of a run."""
    return DataError(f'{error}; or set data.on_bad_image = "skip" to leave bad images out')


def _batch(bucket: list[tuple[int, np.ndarray]], refs: ImageRefs) -> RawBatch:
    positions = np.array([i for i, _ in bucket], dtype=np.int64)
    labels = np.array([refs.labels[i] for i, _ in bucket], dtype=np.int64)
    return np.stack([image for _, image in bucket]), labels, positions
