"""Every accepted kind of image, and every refusal."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from vpdeploy.data.images import decode
from vpdeploy.errors import DataError

LIMIT = 50_000_000
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    image = Image.fromarray(array)
    return encoded(image if mode is None else image.convert(mode))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels_that_went_in(kind, tmp_path):
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(RGB), kind, **options)
    (tmp_path / "a").write_bytes(content)
    for source in (content, tmp_path / "a"):
        image = decode(source, "a", max_pixels=LIMIT)
        assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
        np.testing.assert_array_equal(image, RGB)


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_lossy_formats_come_near(kind):
    flat = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    image = decode(encoded(Image.fromarray(flat), kind), "a", max_pixels=LIMIT)
    assert np.abs(image.astype(int) - flat).max() <= 4


def test_one_pixel():
    np.testing.assert_array_equal(decode(png(RGB[:1, :1]), "a", max_pixels=1), RGB[:1, :1])


def test_grey_is_repeated():
    image = decode(png(RGB[..., 0]), "a", max_pixels=LIMIT)
    np.testing.assert_array_equal(image, np.repeat(RGB[..., :1], 3, axis=2))


def test_one_bit_is_black_and_white():
    bits = RGB[..., 0] > 127
    image = decode(encoded(Image.fromarray(bits)), "a", max_pixels=LIMIT)
    np.testing.assert_array_equal(image, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


def test_palette_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    np.testing.assert_array_equal(decode(encoded(image), "a", max_pixels=LIMIT), [[[10, 20, 30], [40, 50, 60]]])


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_transparent_palette_entries_are_black(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    got = decode(encoded(image, transparency=transparency), "a", max_pixels=LIMIT)
    np.testing.assert_array_equal(got, [[[10, 20, 30], [0, 0, 0]]])


def test_alpha_is_composited_on_black():
    alpha = np.array([[0, 128, 255]], dtype=np.uint8)
    rgba = np.dstack([np.full((1, 3, 3), 200, dtype=np.uint8), alpha])
    np.testing.assert_array_equal(decode(png(rgba), "a", max_pixels=LIMIT)[..., 0], [[0, 100, 200]])
    grey_alpha = Image.merge("LA", [Image.fromarray(np.full((1, 3), 200, dtype=np.uint8)), Image.fromarray(alpha)])
    np.testing.assert_array_equal(decode(encoded(grey_alpha), "a", max_pixels=LIMIT)[..., 2], [[0, 100, 200]])


def test_a_transparent_colour_is_black():
    content = encoded(Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)), transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(content, "a", max_pixels=LIMIT), [[[0, 0, 0], [9, 9, 9]]])


def test_cmyk_and_ycbcr_become_rgb():
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    readable = [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")]
    if int(PIL.__version__.partition(".")[0]) >= 13:  # earlier ones cannot read the YCbCr TIFF that they write
        readable.append(("YCbCr", "TIFF"))
    for mode, kind in readable:
        image = decode(encoded(flat.convert(mode), kind), "a", max_pixels=LIMIT)
        assert np.abs(image.astype(int) - (200, 100, 50)).max() <= 6, (mode, kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_by_257_and_rounded(kind):
    values = np.array([[0, 128, 129, 256, 257, 30000, 65406, 65407, 65535]], dtype=np.uint16)
    image = decode(encoded(Image.fromarray(values), kind), "a", max_pixels=LIMIT)
    np.testing.assert_array_equal(image[..., 1], np.rint(values / 257))
    assert image.shape == (1, 9, 3)


def png_16_bit_colour(values: np.ndarray) -> bytes:
    """uint16 [h, w, 3] as a PNG, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    h, w, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)  # filter 0: as they are
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_16_bit_colour_is_within_one_level_of_a_257th():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    colours = np.stack([values, values.T, values[::-1]], axis=2)
    scaled = np.rint(colours / 257).astype(int)
    assert np.abs(decode(png_16_bit_colour(colours), "a", max_pixels=LIMIT) - scaled).max() == 1  # the low byte is lost
    ppm = b"P6 256 256 65535\n" + colours.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(ppm, "a", max_pixels=LIMIT), scaled)


def test_16_bit_grey_with_a_transparent_value():
    content = encoded(Image.fromarray(np.array([[1000, 60000]], dtype=np.uint16)), transparency=60000)
    np.testing.assert_array_equal(decode(content, "a", max_pixels=LIMIT)[..., 0], [[4, 0]])


def test_more_than_16_bits_is_refused():
    content = encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF")
    with pytest.raises(DataError, match=r"^a\.tif: holds values from 0 to 70000; expected at most 16 bits: c"):
        decode(content, "a.tif", max_pixels=LIMIT)


def test_floating_point_is_refused():
    content = encoded(Image.fromarray(np.zeros((1, 1), dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match=r"a\.tif: holds floating-point pixels .* expected 8 or 16 bits: convert it"):
        decode(content, "a.tif", max_pixels=LIMIT)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    # Where each orientation stores the pixel that belongs at the top left, and which way its rows run (EXIF 2.3).
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    np.testing.assert_array_equal(decode(content, "a", max_pixels=LIMIT), RGB)


def test_too_many_pixels_are_refused_before_decoding():
    content = png(np.zeros((11, 10, 3), dtype=np.uint8))
    assert decode(content, "a.png", max_pixels=110).shape == (11, 10, 3)
    with pytest.raises(
        DataError, match=r"^a\.png: 10 x 11 is 110 pixels; at most 109 are accepted: .*raise data\.max_pixels$"
    ):
        decode(content[:50], "a.png", max_pixels=109)  # nothing but the header is there


def test_who_asks_says_what_helps_against_too_many():
    with pytest.raises(DataError, match=r"^a: 7 x 5 is 35 pixels; at most 34 are accepted: ask again$"):
        decode(png(RGB), "a", max_pixels=34, too_large="ask again")


def test_pillows_own_limit_neither_speaks_nor_blocks(monkeypatch):
    content = png(RGB)
    for limit in (20, 10):  # Pillow warns above its limit and raises above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(decode(content, "a", max_pixels=35), RGB)
        with pytest.raises(DataError, match="at most 34 are accepted"):
            decode(content, "a", max_pixels=34)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_threads_leave_pillows_limit_as_it_was():
    before = Image.MAX_IMAGE_PIXELS
    content = png(RGB)
    threads = [
        threading.Thread(target=lambda: [decode(content, "a", max_pixels=LIMIT) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_a_truncated_image_is_refused(kind):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    with pytest.raises(DataError, match=r"^a: not a readable image \(.+\); expected a whole JPEG, .* or leave it out$"):
        decode(content[: len(content) // 2], "a", max_pixels=LIMIT)


def test_pillow_says_nothing_beside_the_one_error(tmp_path):
    short_exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"  # five entries, of which two bytes are there
    whole = encoded(Image.fromarray(RGB), "JPEG", exif=short_exif)
    with pytest.warns(UserWarning), Image.open(io.BytesIO(whole)) as image:
        image.getexif()
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[:-40])
    # In a process of its own: pytest sets its own filters before every test.
    code = (
        "import sys; from pathlib import Path; from vpdeploy.data.images import decode\n"
        "from vpdeploy.errors import DataError\n"
        "print(decode(Path('whole.jpg'), 'whole.jpg', max_pixels=99).shape)\n"
        "try: decode(Path('cut.jpg'), 'cut.jpg', max_pixels=99)\n"
        "except DataError as e: print(e, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "(5, 7, 3)\n"
    assert done.stderr.startswith("cut.jpg: not a readable image (") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(DataError, match=r"^photo\.jpg: not a readable image \(no known image format\); expected"):
        decode(content, "photo.jpg", max_pixels=LIMIT)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^gone\.jpg: cannot be read \(No such file or directory\); expected an image"):
        decode(tmp_path / "gone.jpg", "gone.jpg", max_pixels=LIMIT)


def test_reading_data_without_torch():
    code = (
        "import sys, vpdeploy.data.images, vpdeploy.data.sources, vpdeploy.data.raw;"
        "print(sorted({'torch', 'torchvision', 'sklearn'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
