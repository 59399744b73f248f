"""Class names of image files, by an exported file alone. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vpdeploy.data.images import decode
from vpdeploy.deploy.session import Contract, contract, metadata_of, open_session
from vpdeploy.errors import DataError, VpdeployError

TOO_LARGE = "resize it to fewer pixels first, or leave it out"


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first; ``probabilities`` are the softmax over all classes."""

    image: Path
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """What was made of several images; ``problems`` holds one message for each that cannot be read."""

    made: tuple[Prediction, ...]
    problems: tuple[str, ...]


def predict(path: Path, images: Sequence[Path], *, top: int = 5) -> Predictions:
    """What the exported file at ``path`` takes each image for, in the order given.

    Raises: VpdeployError when the file is missing, damaged or not from vpdeploy. Of an image that cannot be read, or has
    more pixels than the file's metadata allow, there is a problem instead: it keeps no other from its prediction.
    """
    session = open_session(path)
    expects = contract(metadata_of(session, path), path)
    made, problems = [], []
    for image in images:
        try:
            pixels = decode(image, str(image), max_pixels=expects.max_pixels, too_large=TOO_LARGE)
        except DataError as e:
            problems.append(str(e))
            continue
        logits = np.asarray(session.run(["logits"], {"image": _input(pixels, expects)})[0])[0]
        if len(logits) != len(expects.classes):
            raise VpdeployError(
                f"{path}: {len(logits)} outputs, but its metadata names {len(expects.classes)} classes; expected one "
                "each: export again"
            )
        made.append(_prediction(image, logits, expects.classes, top=top))
    return Predictions(tuple(made), tuple(problems))


def _prediction(image: Path, logits: np.ndarray, classes: tuple[str, ...], *, top: int) -> Prediction:
    """logits: [k]"""
    probabilities = _softmax(logits)
    order = np.argsort(-probabilities, kind="stable")[:top]
    return Prediction(image, tuple(classes[i] for i in order), tuple(float(probabilities[i]) for i in order))


def _input(pixels: np.ndarray, expects: Contract) -> np.ndarray:
    """uint8 [h, w, 3] -> the file's input, batch 1."""
    if expects.form == "uint8":
        return pixels[None]
    image = Image.fromarray(pixels)
    if expects.resize == "shorter-side-crop":
        w, h = image.size
        side = min(h, w)
        left, upper = (w - side) // 2, (h - side) // 2
        # Not resize(box=...): its filter would reach beyond the square.
        image = image.crop((left, upper, left + side, upper + side))
    s = expects.image_size
    resized = np.asarray(image.resize((s, s), Image.Resampling.BILINEAR), dtype=np.float32)
    return np.ascontiguousarray(resized.transpose(2, 0, 1)[None] / np.float32(255))


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()
