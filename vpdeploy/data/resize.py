"""The one resize of training, evaluation and deployment: antialiased bilinear, from the caller's bytes to a square."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

PIXEL_SCALE = 1 / 255
"""What a byte is multiplied with, in training and in deployment: a product, because it takes half a division's time."""

ROWS_TOGETHER = 4
"""Neighbouring output rows that share one window of input rows. More of them copy less and multiply more zeros: on a
CPU with AVX-512 (500x375 to 224, 1 thread) 4 took 0.57 ms, 8 took 0.62 and 16 took 0.76."""


def resize(image: Tensor, image_size: int, *, how: str) -> Tensor:
    """Make images square. image: uint8 [n, h, w, 3], any h and w -> float32 [n, 3, image_size, image_size] in [0, 1].

    ``how``: "stretch" ignores the aspect ratio; "shorter-side-crop" first cuts out the central square, whose side is
    the shorter side, and resizes that (first, because 1 x 700 resized to a height of 224 would be 156,800 wide).
    Antialiased, because without it a reduction differs from Pillow's by up to 112 grey levels.
    """
    if how == "shorter-side-crop":
        image = _central_square(image)
    n, h, w, _ = image.shape
    s = image_size
    rows = _resize_rows(image.reshape(n, h, w * 3), s)  # [n, s, w * 3]
    # The columns become rows, so that they are resized by the same copies of whole rows.
    columns = rows.transpose(1, 2).reshape(n, w, 3 * s)  # [n, w, 3 * s (colour, y)]
    x = _resize_rows(columns, s, scale=PIXEL_SCALE).transpose(1, 2).reshape(n, 3, s, s)
    # Contiguous, because with other strides a later flatten would be exported as a gather; clamped, because a mean in
    # float32 may lie one unit in the last place above its largest term.
    return x.contiguous().clamp(0, 1)


def window(m: int, size: int) -> int:
    """Input rows that ROWS_TOGETHER neighbouring output rows read, of ``m`` rows that become ``size``.

    An output row reads the pixels whose centre lies within r = max(1, m / size) of its own, and the next row's centre
    is m / size further on.
    """
    span = (ROWS_TOGETHER - 1) * m + 2 * _larger(m, size)  # in 1 / size pixels
    return cast(int, torch.sym_min(m, (span + size - 1) // size))


def _resize_rows(x: Tensor, size: int, *, scale: float = 1.0) -> Tensor:
    """Antialiased bilinear along axis 1, times ``scale``: [n, m, width] of any dtype -> float32 [n, size, width].

    Row i of the output is the mean of the rows j of the input under the weights max(0, 1 - |c_j - c_i| / r), with the
    centres c_j = j + 1/2 and c_i = (i + 1/2) m / size, and r = max(1, m / size): Pillow's bilinear filter, and torch's
    with ``antialias=True``. It is written as products of small matrices over windows of rows, which every runtime
    multiplies fast, while ONNX's antialiased Resize takes twice as long on ONNX Runtime's CPU and exists on few others.
    """
    n, m, width = x.shape
    blocks = -(-size // ROWS_TOGETHER)
    taps = window(m, size)
    # Positions are whole numbers of 1 / (2 * size) pixels in int64, so that no image is too large for the precision;
    # float32 holds the distances within a window exactly.
    reach = 2 * _larger(m, size)
    centres = (2 * torch.arange(blocks * ROWS_TOGETHER).view(blocks, ROWS_TOGETHER) + 1) * m
    start = (2 * ROWS_TOGETHER * torch.arange(blocks) + 1) * m - reach  # where the first row of a block begins to read
    first = ((start + size).clamp(min=0).to(torch.float64) / (2 * size)).to(torch.int64).clamp(max=m - taps)
    inside = (centres - 2 * size * first[:, None]).to(torch.float32)  # [blocks, ROWS_TOGETHER]
    distance = ((2 * torch.arange(taps) + 1) * size).to(torch.float32) - inside[:, :, None]
    weights = (reach - distance.abs()).relu()  # [blocks, ROWS_TOGETHER, taps]
    weights = weights * (scale / weights.sum(-1, keepdim=True))  # rows past ``size`` hold anything: they are cut off
    rows = first[:, None] + torch.arange(taps)  # [blocks, taps]
    windows = x.index_select(1, rows.flatten()).reshape(n, blocks, taps, width)
    resized = torch.matmul(weights, windows.to(torch.float32))  # [n, blocks, ROWS_TOGETHER, width]
    return resized.reshape(n, blocks * ROWS_TOGETHER, width)[:, :size]


def _larger(m: int, size: int) -> int:
    """max(m, size), where torch.export knows ``m`` by a symbol only."""
    return cast(int, torch.sym_max(m, size))


def _central_square(image: Tensor) -> Tensor:
    """[n, h, w, 3] -> [n, s, s, 3] with s = min(h, w), from ((h - s) // 2, (w - s) // 2).

    Two slices of bytes take a third of the time of gathering rows and columns by computed indices.
    """
    h, w = image.shape[1], image.shape[2]
    side = torch.sym_min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = image[:, top : top + side, left : left + side]
    # Without these torch.export cannot tell the slices from empty ones: "Could not guard on ... u0 > 0".
    torch._check(square.shape[1] > 0)
    torch._check(square.shape[2] > 0)
    return square
