"""The prompt as a picture, inline."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and what it shows."""

    uri: str
    caption: str


def prompt_picture(prompt: NDArray[Any]) -> Picture:
    """The learned delta around mid grey, stretched to full range. prompt: [3, C, C]."""
    strongest = float(np.abs(prompt).max())
    grey = 127.5 + (prompt / strongest * 127.5 if strongest > 0 else 0 * prompt)
    caption = (
        f"The learned prompt: grey is no change, full colour is {strongest:.3f} (pixels lie in [0, 1])."
        if strongest > 0
        else "The prompt, which is zero everywhere."
    )
    return Picture(_data_uri(np.rint(grey).astype(np.uint8).transpose(1, 2, 0)), caption)


def canvas_picture(canvas: NDArray[Any]) -> Picture:
    """An image as the backbone sees it, before normalisation. canvas: uint8 [C, C, 3]."""
    return Picture(_data_uri(canvas), "An image on its canvas with the prompt, as the backbone sees it.")


def _data_uri(pixels: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
