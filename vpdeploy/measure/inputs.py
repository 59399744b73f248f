"""What a file takes, and random images of that kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from vpdeploy.errors import VpdeployError

DTYPES = {"uint8": np.dtype(np.uint8), "float": np.dtype(np.float32)}  # of each form's input
FORMS: dict[int, str] = {onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.FLOAT: "float"}
MAX_BYTES = 4 * 2**30  # of one batch


@dataclass(frozen=True)
class FileInput:
    """The one input of a file: "uint8" or "float", and its axes, None where any length goes."""

    form: str
    axes: tuple[int | None, ...]


def input_of(path: Path) -> FileInput:
    """What the file at ``path`` takes: anybody's image classifier, read as data.

    Raises: VpdeployError when it is no ONNX file, or takes something else than one batch of images.
    """
    if path.is_dir():
        raise VpdeployError(
            f"{path}: a folder beside others; expected ONNX files, or one run: `vpdeploy compare` takes several"
        )
    if not path.is_file():
        raise VpdeployError(f"{path}: no such file; expected an ONNX file, or a run folder")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as e:  # protobuf's DecodeError and whatever its C++ half raises
        raise VpdeployError(f"{path}: is no ONNX file ({_first_line(e)}); expected one, or a run folder") from e
    constants = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in constants]
    if len(given) != 1:
        names = ", ".join(value.name for value in given) or "nothing"
        raise VpdeployError(f"{path}: takes {names}; expected one input, a batch of images")
    kind = given[0].type.tensor_type
    axes = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in kind.shape.dim)
    if kind.elem_type not in FORMS or len(axes) != 4:
        got = onnx.helper.tensor_dtype_to_string(kind.elem_type).removeprefix("TensorProto.").lower()
        raise VpdeployError(
            f"{path}: its input {given[0].name!r} is {got} {list(axes)}; expected uint8 [n, h, w, 3] or float [n, 3, h, w]"
        )
    return FileInput(FORMS[kind.elem_type], axes)


def image_shape_of(path: Path, taken: FileInput, size: tuple[int, int] | None) -> tuple[int, ...]:
    """One image as the file takes it. ``size``: height and width where the file leaves them open.

    Raises: VpdeployError when they are open and not given, or given and others.
    """
    places = (1, 2) if taken.form == "uint8" else (2, 3)
    fixed = tuple(taken.axes[place] for place in places)
    if size is None and None in fixed:
        raise VpdeployError(f"{path}: takes images of any size; expected --image-size HEIGHTxWIDTH to measure it at")
    if size is not None and any(axis not in (None, asked) for axis, asked in zip(fixed, size, strict=True)):
        raise VpdeployError(
            f"{path}: takes images of {fixed[0]} x {fixed[1]}, got --image-size {size[0]}x{size[1]}; leave it out"
        )
    height, width = size or fixed
    channels = taken.axes[3 if taken.form == "uint8" else 1] or 3
    assert height is not None and width is not None
    return (height, width, channels) if taken.form == "uint8" else (channels, height, width)


def check_batch(path: Path, taken: FileInput, batch: int) -> None:
    """Raises: VpdeployError when the file takes batches of another size only."""
    if taken.axes[0] not in (None, batch):
        raise VpdeployError(f"{path}: takes batches of {taken.axes[0]} only, got {batch}; ask for that with --batch")


def random_images(form: str, image_shape: Sequence[int], *, batch: int, seed: int) -> NDArray[Any]:
    """Input of the form's type and range: [batch, *image_shape]; uint8 [h, w, 3] or float32 [3, h, w] in [0, 1).

    Raises: VpdeployError beyond MAX_BYTES.
    """
    generator, shape = np.random.default_rng(seed), (batch, *image_shape)
    if (size := math.prod(shape) * DTYPES[form].itemsize) > MAX_BYTES:
        raise VpdeployError(
            f"bench: a batch of {batch} images of {' x '.join(map(str, image_shape))} takes {size / 2**30:.1f} GiB; expected at "
            f"most {MAX_BYTES // 2**30}: lower the batch or the image size"
        )
    if form == "uint8":
        return generator.integers(0, 256, shape, np.uint8)
    return generator.random(shape, np.float32)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
