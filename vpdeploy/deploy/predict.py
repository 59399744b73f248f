"""Class names of image files, by an exported file alone. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vpdeploy.data.images import decode
from vpdeploy.deploy.session import Contract, contract, metadata_of, open_session
from vpdeploy.errors import VpdeployError

MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first; ``probabilities`` are the softmax over all classes."""

    image: Path
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(path: Path, images: Sequence[Path], *, top: int = 5, max_pixels: int = MAX_PIXELS) -> list[Prediction]:
    """What the exported file at ``path`` takes each image for, in the order given.

    Raises: VpdeployError when the file is missing, damaged or not from vpdeploy; DataError when an image cannot be
    read.
    """
    session = open_session(path)
    expects = contract(metadata_of(session, path), path)
    results = []
    for image in images:
        pixels = decode(image, str(image), max_pixels=max_pixels)
        logits = np.asarray(session.run(["logits"], {"image": _input(pixels, expects)})[0])[0]
        if len(logits) != len(expects.classes):
            raise VpdeployError(
                f"{path}: {len(logits)} outputs, but its metadata names {len(expects.classes)} classes; expected one "
                "each: export again"
            )
        probabilities = _softmax(logits)
        order = np.argsort(-probabilities, kind="stable")[:top]
        names = tuple(expects.classes[i] for i in order)
        results.append(Prediction(image, names, tuple(float(probabilities[i]) for i in order)))
    return results


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
