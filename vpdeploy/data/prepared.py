"""What training walks over: every image square and uint8, decoded once into memory or again and again in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from vpdeploy.data.raw import failing
from vpdeploy.data.refs import ImageRefs, take
from vpdeploy.data.resize import resize
from vpdeploy.errors import DataError
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import InputTable

Batch = tuple[Tensor, Tensor]
CHUNK = 256  # images per task of a thread
TINY_PIXELS = 64 * 64
SMALL_PIXELS = 128 * 128  # below this, resizing many of one size at once is faster than one by one


@dataclass(frozen=True, eq=False)
class Images:
    """One split, ready to be walked over by ``batches``.

    ``labels``: int64 [n]; ``skipped``: the bad images that were left out, each "name: reason"; ``pixels``: uint8
    [n, 3, s, s], or None when they do not fit in memory: then ``square`` makes them from positions, again and again,
    in ``workers`` threads.
    """

    labels: Tensor
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    pixels: Tensor | None
    square: Callable[[Sequence[int]], Tensor] | None
    workers: int

    @property
    def in_memory(self) -> bool:
        return self.pixels is not None

    def __len__(self) -> int:
        return len(self.names)


def prepare(
    refs: ImageRefs,
    table: InputTable,
    *,
    max_bad: Literal["fail", "skip"],
    workers: int,
    display: Display,
    label: str,
    memory_fraction: float = 0.3,
) -> Images:
    """Decode and resize every image once, if all fit into ``memory_fraction`` of the free memory; otherwise on demand.

    Both give the same batches. Under "skip" every image is decoded here in either case, so that none proves bad later.

    Raises: DataError at a bad image under "fail" (streamed: when it is reached), or when every image is bad.
    """
    side, threads = table.image_size, _threads_that_pay(refs, workers)
    fits = len(refs) * 3 * side * side <= memory_fraction * psutil.virtual_memory().available
    pixels = torch.empty(len(refs), 3, side, side, dtype=torch.uint8) if fits else None
    bad: dict[int, str] = {}
    if fits or max_bad == "skip":
        visit = partial(_fill, refs, pixels, how=table.resize, max_bad=max_bad)
        bad = _visited(visit, len(refs), workers=threads, display=display, label=label)
    if bad and len(bad) == len(refs):
        raise DataError(f"{label}: all {len(refs)} images are bad, the first: {next(iter(bad.values()))}")
    kept = [i for i in range(len(refs)) if i not in bad]
    good = take(refs, kept) if bad else refs
    return Images(
        labels=torch.tensor(good.labels, dtype=torch.int64),
        names=good.names,
        skipped=tuple(bad.values()),
        pixels=pixels[torch.tensor(kept)] if pixels is not None and bad else pixels,
        square=None if fits else partial(_square, good, side=side, how=table.resize),
        workers=threads,
    )


def batches(images: Images, order: Tensor, batch_size: int) -> Iterator[Batch]:
    """Walk over ``order`` (int64 [m], positions): uint8 [b, 3, s, s] and int64 [b]; the last batch may be smaller.

    Raises: DataError at a bad image that is streamed.
    """
    parts = order.split(batch_size) if len(order) else ()
    if images.pixels is not None:
        for part in parts:
            yield images.pixels.index_select(0, part), images.labels.index_select(0, part)
        return
    assert images.square is not None
    with _decoding_threads(images.workers) as pool:
        ahead: deque[tuple[Tensor, Future[Tensor]]] = deque()
        for part in parts:
            ahead.append((part, pool.submit(images.square, part.tolist())))
            if len(ahead) > images.workers + 1:  # every thread busy and one batch waiting
                yield _taken(images, ahead)
        while ahead:
            yield _taken(images, ahead)


def _taken(images: Images, ahead: deque[tuple[Tensor, Future[Tensor]]]) -> Batch:
    part, future = ahead.popleft()
    return future.result(), images.labels.index_select(0, part)


def _threads_that_pay(refs: ImageRefs, workers: int) -> int:
    """One for tiny images, by the first of them: two threads then mostly wait for Python's lock.

    CIFAR-10 as JPEG on 2 cores: 8,900 images/s with one, 5,800 with two; equal at 96 x 96, more above.
    """
    try:
        h, w, _ = refs.read(0).shape
    except DataError:
        return max(1, workers)  # told, or skipped, when its turn comes
    return 1 if h * w <= TINY_PIXELS else max(1, workers)


def _visited(
    visit: Callable[[range], list[tuple[int, str]]], count: int, *, workers: int, display: Display, label: str
) -> dict[int, str]:
    """``visit`` every position in chunks, in threads; gives what was bad: position -> "name: reason", in order."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    bad: dict[int, str] = {}

    def positions(pool: ThreadPoolExecutor) -> Iterator[int]:
        for chunk, found in zip(chunks, pool.map(visit, chunks), strict=True):
            bad.update(found)
            yield from chunk

    with _decoding_threads(workers) as pool, display.bar(positions(pool), label=label, total=count) as items:
        for _ in items:
            pass
    return bad


@contextmanager
def _decoding_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch uses one core each; the caller's own thread keeps the number it had.

    Without it every thread would bring a team of its own as large as the machine. torch.set_num_threads acts on the
    calling thread and on threads that start using torch later, so all are started before the number is put back.
    """
    count = max(1, workers)
    before = torch.get_num_threads()
    started = Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="decode", initializer=start)
    try:
        try:
            for _ in range(count):
                pool.submit(int)  # a thread starts with its first task
            started.wait()
        except BaseException:
            started.abort()  # otherwise the threads that did start would wait for ever
            raise
        finally:
            torch.set_num_threads(before)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _fill(
    refs: ImageRefs, pixels: Tensor | None, chunk: range, *, how: str, max_bad: Literal["fail", "skip"]
) -> list[tuple[int, str]]:
    """Decode ``chunk`` and write its rows of ``pixels`` [n, 3, s, s], if there are any; gives what was bad."""
    bad: list[tuple[int, str]] = []

    def decoded() -> Iterator[tuple[int, np.ndarray]]:
        for i in chunk:
            try:
                yield i, refs.read(i)
            except DataError as e:
                if max_bad == "fail":
                    raise failing(e) from e
                bad.append((i, str(e)))

    if pixels is None:
        for _ in decoded():
            pass
    else:
        _resize_into(pixels, decoded(), how=how)
    return bad


def _square(refs: ImageRefs, positions: Sequence[int], *, side: int, how: str) -> Tensor:
    """-> uint8 [len(positions), 3, side, side]"""
    pixels = torch.empty(len(positions), 3, side, side, dtype=torch.uint8)

    def decoded() -> Iterator[tuple[int, np.ndarray]]:
        for row, i in enumerate(positions):
            try:
                yield row, refs.read(i)
            except DataError as e:
                raise failing(e) from e

    _resize_into(pixels, decoded(), how=how)
    return pixels


def _resize_into(pixels: Tensor, images: Iterator[tuple[int, np.ndarray]], *, how: str) -> None:
    """Resize ``images`` (row, uint8 [h, w, 3]) into their rows of ``pixels``; small ones of one size together."""
    together: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for row, image in images:
        if image.shape[0] * image.shape[1] <= SMALL_PIXELS:
            together.setdefault(image.shape, []).append((row, image))
        else:
            pixels[row] = _resized(image[None], pixels.shape[-1], how=how)[0]
    for group in together.values():
        rows = torch.tensor([row for row, _ in group])
        pixels[rows] = _resized(np.stack([image for _, image in group]), pixels.shape[-1], how=how)


def _resized(images: np.ndarray, side: int, *, how: str) -> Tensor:
    """uint8 [n, h, w, 3] -> uint8 [n, 3, side, side]"""
    return (resize(torch.from_numpy(images), side, how=how) * 255).round_().to(torch.uint8)
