"""What an exported file predicts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpdeploy.measure.engine import DTYPES, open_session


def predictions_of_file(
    path: Path, form: str, batches: Iterable[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]], *, n: int, threads: int
) -> NDArray[np.int64]:
    """Predicted class of every image: [n] int64, at the positions that the batches name.

    batches: (images as the form takes them [b, ...], labels [b], positions [b]). Labels are carried along by the data's
    iterators and are not looked at here.

    Raises: VpdeployError when the file cannot be run.
    """
    session = open_session(path, threads=threads)
    name = session.get_inputs()[0].name
    predictions = np.full(n, -1, np.int64)
    for images, _labels, positions in batches:
        assert images.dtype == DTYPES[form], f"the {form} form takes {DTYPES[form]}, got {images.dtype}"
        (logits,) = session.run(None, {name: np.ascontiguousarray(images)})
        predictions[positions] = np.asarray(logits).argmax(axis=1)
    assert (predictions >= 0).all(), f"{int((predictions < 0).sum())} of {n} positions came in no batch"
    return predictions
