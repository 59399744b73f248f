"""From the bytes of one image file to uint8 RGB. Without torch, because ``vpdeploy predict`` uses it on any machine."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# The plugins are imported for what they register: otherwise the first .webp or .tif makes Pillow load every one it has.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vpdeploy.errors import DataError

# Named, because some of Pillow's other formats run external programs (EPS) on what they are given.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SHRINK_OR_RAISE = "shrink it, leave it out or raise data.max_pixels"
ORIENTATION = 0x0112  # EXIF tag
_PILLOW_LIMIT = threading.Lock()
# "Corrupt EXIF data" and its like are said of images that decode well, and beside the real error of those that do not.
# Here for good and not around each decoding: threads share the filters, and catch_warnings in one undoes another's.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def decode(source: bytes | Path, name: str, *, max_pixels: int, too_large: str = SHRINK_OR_RAISE) -> np.ndarray:
    """One image as RGB. -> uint8 [h, w, 3], EXIF orientation applied, transparency on black, 16-bit grey over 257.

    The first frame of an animation. 16-bit colour is reduced by Pillow as it loads: PPM is scaled as grey is; of PNG and
    TIFF the low byte is dropped, at most one level of 255 from 1/257 rounded, and a PNG's one transparent colour (tRNS)
    is not recognised. ``name`` stands in messages, ``too_large`` in the one on ``max_pixels``.

    Raises: DataError when it is no image, truncated, of a mode without a fixed range, or has more than ``max_pixels``.
    """
    try:
        encoded = source.read_bytes() if isinstance(source, Path) else source
    except OSError as e:
        raise DataError(
            f"{name}: cannot be read ({e.strerror or e}); expected an image file: check path and rights"
        ) from e
    try:
        with _open(encoded) as image:
            w, h = image.size
            if w * h > max_pixels:
                raise DataError(
                    f"{name}: {w} x {h} is {w * h:,} pixels; at most {max_pixels:,} are accepted: {too_large}"
                )
            _load(image)
            # After loading: Pillow applies a TIFF's orientation itself and then takes the tag away.
            orientation = image.getexif().get(ORIENTATION, 1)
            return np.ascontiguousarray(_turn(_rgb(image, name), orientation))
    except (DataError, MemoryError):
        raise
    except Exception as e:  # Pillow's decoders raise a dozen unrelated types on damaged files
        reason = "no known image format" if isinstance(e, Image.UnidentifiedImageError) else str(e) or type(e).__name__
        raise DataError(
            f"{name}: not a readable image ({reason}); expected a whole JPEG, PNG, BMP, WebP, GIF, TIFF or PPM file:"
            " replace it or leave it out"
        ) from e


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's process-wide limit, which would warn below ``max_pixels`` or refuse it; ours is checked instead."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open(encoded: bytes) -> Image.Image:
    with _without_pillow_limit():
        return Image.open(io.BytesIO(encoded), formats=FORMATS)


def _load(image: Image.Image) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        with _without_pillow_limit():  # one by one: some plugins check again while they decode
            image.load()
    else:
        image.load()


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """-> uint8 [h, w, 3]"""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey16(image, name)
    if image.mode == "F":
        raise DataError(f"{name}: holds floating-point pixels without a fixed range; expected 8 or 16 bits: convert it")
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.uint16)
        return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    return np.array(image.convert("RGB"))


def _grey16(image: Image.Image, name: str) -> np.ndarray:
    """16-bit grey, scaled here because Pillow's own conversion turns all above 255 white. -> uint8 [h, w, 3]"""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{name}: holds values from {values.min()} to {values.max()}; expected at most 16 bits: convert it"
        )
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255, rounded to nearest; 257 is odd: no ties
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 0
    return np.repeat(grey[..., None], 3, axis=2)


def _turn(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Upright, by EXIF's eight cases. [h, w, 3] -> [h, w, 3] or [w, h, 3]"""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return rgb
