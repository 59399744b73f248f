"""Opening an exported file in ONNX Runtime, and what its metadata says. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vpdeploy.errors import VpdeployError
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import recipe_hash

if TYPE_CHECKING:
    import onnxruntime

REQUIRED = ("vpdeploy_version", "form", "classes", "image_size", "resize")
INPUTS = {
    "uint8": "image: uint8 [n, h, w, 3], RGB, any n, h and w from 1; resized, padded and normalised inside",
    "float": "image: float32 [n, 3, {s}, {s}], RGB in [0, 1], any n from 1; padded and normalised inside",
}
MAX_PIXELS = 50_000_000  # where a file's metadata name no limit


@dataclass(frozen=True)
class Contract:
    """What a caller must know of an exported file. ``form`` is "uint8" or "float".

    ``resize`` and ``max_pixels``, of one image, are as in the recipe.
    """

    form: str
    classes: tuple[str, ...]
    image_size: int
    resize: str
    max_pixels: int


def describe(recipe: Recipe, *, arm: str, form: str, classes: Sequence[str], version: str) -> dict[str, str]:
    """The metadata of one exported file of a run, all text."""
    table = recipe.input
    about = describe_input(
        form=form, classes=classes, image_size=table.image_size, canvas_size=table.canvas, resize=table.resize,
        mean=table.mean, std=table.std, version=version,
    )  # fmt: skip
    return {**about, "recipe_sha256": recipe_hash(recipe), "arm": arm, "max_pixels": str(recipe.data.max_pixels)}


def describe_input(
    *,
    form: str,
    classes: Sequence[str],
    image_size: int,
    canvas_size: int,
    resize: str,
    mean: Sequence[float],
    std: Sequence[float],
    version: str,
) -> dict[str, str]:
    """What a caller must know of an exported file, all text."""
    return {
        "vpdeploy_version": version,
        "form": form,
        "classes": json.dumps(list(classes)),
        "image_size": str(image_size),
        "canvas_size": str(canvas_size),
        "resize": resize,
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "input": INPUTS[form].replace("{s}", str(image_size)),
        "output": f"logits: float32 [n, {len(classes)}], one column per class",
    }


def open_session(path: Path, *, threads: int = 0) -> onnxruntime.InferenceSession:
    """``path`` in ONNX Runtime on the CPU; ``threads`` 0 leaves their number to it.

    Raises: VpdeployError when there is no such file or it cannot be loaded.
    """
    import onnxruntime  # 0.4 s: not needed for --help

    if not path.is_file():
        raise VpdeployError(f"{path}: no such file; expected an .onnx file that `vpdeploy export` wrote")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said once, below
    options.intra_op_num_threads = threads
    # Threads that spin between runs would take the cores from torch, which runs in turn with the session in parity.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
        raise VpdeployError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it ({_first_line(e)}); expected an .onnx file "
            "that `vpdeploy export` wrote: copy it again, or export again"
        ) from e


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that ``describe`` wrote into ``path``.

    Raises: VpdeployError when the file is missing, damaged or not from vpdeploy.
    """
    return metadata_of(open_session(path), path)


def metadata_of(session: onnxruntime.InferenceSession, path: Path) -> dict[str, str]:
    """As ``read_metadata``, of a session that is already open; ``path`` is for the message.

    Raises: VpdeployError when the file is not from vpdeploy.
    """
    metadata = dict(sorted(session.get_modelmeta().custom_metadata_map.items()))
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise VpdeployError(
            f"{path}: an ONNX file without vpdeploy's metadata ({', '.join(missing)} missing); expected a file that "
            "`vpdeploy export` wrote: give that one, or export again"
        )
    return metadata


def contract(metadata: Mapping[str, str], path: Path) -> Contract:
    """The metadata that a caller acts upon, as values.

    Raises: VpdeployError when an entry cannot be understood.
    """
    try:
        classes = json.loads(metadata["classes"])
        if not isinstance(classes, list) or metadata["form"] not in INPUTS:
            raise ValueError("classes is no list, or form is unknown")
        names = tuple(str(name) for name in classes)
        return Contract(
            form=metadata["form"],
            classes=names,
            image_size=int(metadata["image_size"]),
            resize=metadata["resize"],
            max_pixels=int(metadata.get("max_pixels", MAX_PIXELS)),
        )
    except ValueError as e:
        raise VpdeployError(
            f"{path}: its metadata cannot be understood ({e}); expected what vpdeploy {metadata['vpdeploy_version']} "
            "wrote: export again, or use that version of vpdeploy"
        ) from e


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
