"""What an exported file predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpdeploy.measure.engines.onnxruntime_engine import ort_session
from vpdeploy.measure.inputs import DTYPES


def predictor(path: Path, form: str, *, threads: int) -> Callable[[NDArray[Any]], NDArray[np.int64]]:
    """A function from images as ``form`` takes them, [b, ...], to what the file predicts for each, [b].

    Raises: VpdeployError when the file cannot be run.
    """
    session = ort_session(path, threads=threads)
    name = session.get_inputs()[0].name

    def predict(images: NDArray[Any]) -> NDArray[np.int64]:
        assert images.dtype == DTYPES[form], f"the {form} form takes {DTYPES[form]}, got {images.dtype}"
        (logits,) = session.run(None, {name: np.ascontiguousarray(images)})
        return np.asarray(logits).argmax(axis=1)

    return predict


def walk(
    batches: Iterable[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]],
    *,
    predictors: Mapping[str, Callable[[NDArray[Any]], NDArray[np.int64]]],
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Show every batch to every predictor, decoding each image once: labels [n], and name -> predictions [n].

    batches: (images uint8 [b, h, w, 3], labels [b], positions [b]), each image once; results are in order of position.
    """
    labels: list[NDArray[Any]] = []
    positions: list[NDArray[Any]] = []
    predictions: dict[str, list[NDArray[np.int64]]] = {name: [] for name in predictors}
    for images, truth, place in batches:
        labels.append(truth)
        positions.append(place)
        for name, predict in predictors.items():
            predictions[name].append(predict(images))
    if not positions:
        return np.empty(0, np.int64), {name: np.empty(0, np.int64) for name in predictors}
    order = np.argsort(np.concatenate(positions), kind="stable")
    return np.concatenate(labels)[order], {name: np.concatenate(parts)[order] for name, parts in predictions.items()}
