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
COLOURS = (1, 3, 4)
MAX_BYTES = 4 * 2**30  # of one batch


@dataclass(frozen=True)
class FileInput:
    """The one input of a file: "uint8" or "float", and its axes, None where any length goes. ``file_bytes``: with the tensors
    that it keeps in files of their own.
    """

    form: str
    axes: tuple[int | None, ...]
    file_bytes: int

    @property
    def places(self) -> tuple[int, int, int]:
        """The axes of height, width and colours: where the colours are, or else as the form has them."""
        first, last = (self.axes[place] in COLOURS for place in (1, 3))
        return (1, 2, 3) if (last and not first) or (first == last and self.form == "uint8") else (2, 3, 1)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width."""
        height, width, _ = self.places
        return self.axes[height], self.axes[width]


def input_of(path: Path) -> FileInput:
    """What the file at ``path`` takes: anybody's image classifier, read as data.

    Raises: VpdeployError when it is no ONNX file, or takes something else than one batch of images.
    """
    if path.is_dir():
        raise VpdeployError(f"{path}: a folder; expected ONNX files, or one run: `vpdeploy compare` takes several")
    if not path.is_file():
        raise VpdeployError(f"{path}: no such file; expected an ONNX file, or a run folder")
    try:
        graph = onnx.load(path, format="protobuf", load_external_data=False).graph
    except Exception as e:  # protobuf's DecodeError and whatever its C++ half raises
        raise VpdeployError(f"{path}: is no ONNX file ({_first_line(e)}); expected one, or a run folder") from e
    if not graph.node:
        raise VpdeployError(f"{path}: is no ONNX file (it holds no operation); expected one, or a run folder")
    constants = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in constants]
    if len(given) != 1:
        names = ", ".join(value.name for value in given) or "nothing"
        raise VpdeployError(f"{path}: takes {names}; expected one input, a batch of images")
    kind = given[0].type.tensor_type
    lengths = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim]
    axes = tuple(None if length < 0 else length for length in lengths)  # -1: some exporters' "any", and runtimes'
    if kind.elem_type not in FORMS or len(axes) != 4 or 0 in axes:
        got = "no tensor"
        if kind.elem_type:
            name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
            shape = [("any" if axis is None else axis) for axis in axes] if kind.HasField("shape") else "of any shape"
            got = f"{name} {shape}"
        raise VpdeployError(
            f"{path}: its input {given[0].name!r} is {got}; expected uint8 or float, [n, h, w, 3] or [n, 3, h, w]"
        )
    return FileInput(FORMS[kind.elem_type], axes, path.stat().st_size + _bytes_beside(path, graph))


def _bytes_beside(path: Path, graph: onnx.GraphProto) -> int:
    """Of the files that hold the graph's tensors, each once.

    Raises: VpdeployError when one is not beside ``path``.
    """
    held = (attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t"))
    external = (t for t in (*graph.initializer, *held) if t.data_location == onnx.TensorProto.EXTERNAL)
    names = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    folder, total = path.resolve().parent, 0
    for name in sorted(names):
        beside = (folder / name).resolve()
        if not beside.is_relative_to(folder) or not beside.is_file():
            raise VpdeployError(
                f"{path}: keeps tensors in {name!r}, which is not beside it; expected that file there too"
            )
        total += beside.stat().st_size
    return total


def image_shape_of(path: Path, taken: FileInput, size: tuple[int, int] | None) -> tuple[int, ...]:
    """One image as the file takes it. ``size``: height and width where the file leaves them open.

    Raises: VpdeployError when they are open and not given, or given and others.
    """
    fixed = taken.size
    if size is None and None in fixed:
        raise VpdeployError(f"{path}: takes images of any size; expected --image-size HEIGHTxWIDTH to measure it at")
    if size is not None and any(axis not in (None, asked) for axis, asked in zip(fixed, size, strict=True)):
        raise VpdeployError(
            f"{path}: takes images of {fixed[0]} x {fixed[1]}, got --image-size {size[0]}x{size[1]}; leave it out"
        )
    height, width = size or fixed
    colours = taken.axes[taken.places[2]] or 3
    assert height is not None and width is not None
    return (height, width, colours) if taken.places[2] == 3 else (colours, height, width)


def check_batch(path: Path, taken: FileInput, batch: int) -> None:
    """Raises: VpdeployError when the file takes batches of another size only."""
    if taken.axes[0] not in (None, batch):
        raise VpdeployError(f"{path}: takes batches of {taken.axes[0]} only, got {batch}; ask for that with --batch")


def check_size(image_shape: Sequence[int], form: str, batch: int) -> None:
    """Raises: VpdeployError for a batch of more than MAX_BYTES."""
    if (size := batch * math.prod(image_shape) * DTYPES[form].itemsize) > MAX_BYTES:
        raise VpdeployError(
            f"bench: a batch of {batch} images of {' x '.join(map(str, image_shape))} takes {size / 2**30:.1f} GiB; expected at "
            f"most {MAX_BYTES // 2**30}: lower the batch or the image size"
        )


def random_images(form: str, image_shape: Sequence[int], *, batch: int, seed: int) -> NDArray[Any]:
    """Input of the form's type and range: [batch, *image_shape]; uint8, or float32 in [0, 1).

    Raises: VpdeployError beyond MAX_BYTES.
    """
    check_size(image_shape, form, batch)
    generator, shape = np.random.default_rng(seed), (batch, *image_shape)
    if form == "uint8":
        return generator.integers(0, 256, shape, np.uint8)
    return generator.random(shape, np.float32)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
