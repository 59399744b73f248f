"""Test vectors: inputs and ONNX Runtime's own outputs, kept beside an exported file so that any machine can compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERHEAD_BYTES = 1024  # two arrays' headers and two entries of the archive, names included


@dataclass(frozen=True)
class Vectors:
    """``batches``: (image, logits) in the shapes of the file's input and output; ``form`` "uint8" or "float"."""

    form: str
    batches: tuple[tuple[np.ndarray, np.ndarray], ...]


def choose_vectors(form: str, batches: Sequence[tuple[np.ndarray, np.ndarray]], *, max_bytes: int) -> Vectors:
    """The smallest of ``batches``, as many as ``max_bytes`` hold; none when the smallest is already too large."""
    chosen, total = [], 0
    for image, logits in sorted(batches, key=lambda batch: batch[0].nbytes):
        total += image.nbytes + logits.nbytes + OVERHEAD_BYTES
        if total > max_bytes:
            break
        chosen.append((image, logits))
    return Vectors(form, tuple(chosen))
