"""scikit-learn's 8x8 handwritten digits: real data that is always there."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from vpdeploy.data.refs import ImageRefs, Opened


def open_digits() -> Opened:
    """1,797 grey images of 8x8 in ten classes, values 0..16 stretched to 0..255; without splits of its own."""
    import sklearn  # seconds to import, and only this data set needs it
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    grey = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)  # [n, 8, 8]
    images = np.repeat(grey[..., None], 3, axis=3)
    names = tuple(f"digits/{i:04d}" for i in range(len(images)))
    refs = ImageRefs(names, tuple(int(label) for label in digits.target), lambda i: images[i].copy())
    fingerprint = hashlib.sha256(f"digits, scikit-learn {sklearn.__version__}".encode()).hexdigest()
    return Opened(tuple(str(k) for k in range(10)), {"all": refs}, fingerprint, "digits")
