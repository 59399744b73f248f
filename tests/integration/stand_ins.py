"""Small images and random weights that take the place of real ones."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(
    path: Path, *, classes: Sequence[str], each: int, sizes: Sequence[tuple[int, int]], test_each: int = 6
) -> None:
    """A zip of train/CLASS/*.jpg and test/CLASS/*.jpg: noise around the class's own colour. sizes: (height, width)."""
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for label in classes:
            colour = draw.integers(0, 256, 3)
            for split, count in (("train", each), ("test", test_each)):
                for i in range(count):
                    noise = draw.integers(-60, 61, (*sizes[i % len(sizes)], 3))
                    buffer = io.BytesIO()
                    Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
                    archive.writestr(f"{split}/{label}/{i}.jpg", buffer.getvalue())
