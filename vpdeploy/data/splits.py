"""Which images go where: stratified by class, drawn from the seed alone."""

from __future__ import annotations

import math

import numpy as np

from vpdeploy.data.refs import ImageRefs, take
from vpdeploy.errors import DataError


def split_off(
    refs: ImageRefs, fraction: float, *, seed: tuple[int, int], key: str, part: str, classes: tuple[str, ...]
) -> tuple[ImageRefs, ImageRefs]:
    """``refs`` as (what stays, what is split off), each class in proportion; ``key`` and ``part`` name it in messages.

    Raises: DataError when a class would have no image on one of the two sides.
    """
    labels = np.asarray(refs.labels, dtype=np.int64)
    sizes = np.bincount(labels, minlength=len(classes))
    taken = proportional(sizes, max(1, round(len(labels) * fraction)))
    for name, size, count in zip(classes, sizes.tolist(), taken.tolist(), strict=True):
        if not 0 < count < size:
            raise DataError(_impossible(name, size, count, fraction=fraction, key=key, part=part))
    chosen = _draw(labels, taken, seed=seed)
    stays = np.setdiff1d(np.arange(len(labels)), chosen)
    return take(refs, stays.tolist()), take(refs, chosen.tolist())


def limit(refs: ImageRefs, count: int, *, seed: tuple[int, int]) -> ImageRefs:
    """Exactly ``count`` images, each class in proportion; all of them for 0 or when there are no more."""
    if count == 0 or count >= len(refs):
        return refs
    labels = np.asarray(refs.labels, dtype=np.int64)
    return take(refs, _draw(labels, proportional(np.bincount(labels), count), seed=seed).tolist())


def proportional(sizes: np.ndarray, total: int) -> np.ndarray:
    """``total`` shared out in proportion to ``sizes``, by largest remainder; ties go to the first. int64 [k] -> [k]"""
    quotient, remainder = np.divmod(sizes.astype(np.int64) * total, max(1, int(sizes.sum())))
    missing = total - int(quotient.sum())
    quotient[np.argsort(-remainder, kind="stable")[:missing]] += 1
    return quotient


def _draw(labels: np.ndarray, counts: np.ndarray, *, seed: tuple[int, int]) -> np.ndarray:
    """Sorted positions with ``counts[k]`` of class k. The second number of ``seed`` keeps the streams independent."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == k))[:count] for k, count in enumerate(counts.tolist())]
    return np.sort(np.concatenate(chosen))


def _impossible(name: str, size: int, count: int, *, fraction: float, key: str, part: str) -> str:
    found = f"{key}: class {name!r} has {size} image{'s' * (size != 1)}, of which {fraction:g} puts {count} into {part}"
    expected = f"expected at least 1 in {part} and 1 in train"
    if size < 2:
        return f"{found}; {expected}: add images of that class"
    if count == 0:
        return f"{found}; {expected}: raise it to {math.ceil(1000 / size) / 1000:g}, or add images of that class"
    return f"{found}; {expected}: lower it, or add images of that class"
