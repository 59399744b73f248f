"""ONNX Runtime on the CPU, as every measurement uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vpdeploy.errors import VpdeployError

ENGINE = "onnxruntime-cpu"
PROVIDERS = ("CPUExecutionProvider",)
DTYPES = {"uint8": np.dtype(np.uint8), "float": np.dtype(np.float32)}  # of each form's input


def open_session(path: Path, *, threads: int) -> ort.InferenceSession:
    """A session of ``threads`` threads, one operation at a time.

    Its threads do not spin while they wait: by default those of an idle session would take the cores from the session
    that is being timed.

    Raises: VpdeployError when the file is missing or is no model that ONNX Runtime can run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not path.is_file():
        raise VpdeployError(f"{path}: no such file; expected an exported model: run `vpdeploy export` first")
    try:
        return ort.InferenceSession(str(path), options, providers=list(PROVIDERS))
    except Exception as e:  # ONNX Runtime's errors share no base class but Exception
        raise VpdeployError(
            f"{path}: ONNX Runtime {ort.__version__} cannot open it: {e}; expected an exported model: "
            "run `vpdeploy export` again"
        ) from e


def engine_versions() -> dict[str, Any]:
    """What the latencies depend on, for the report's environment."""
    return {
        "engine": ENGINE,
        "onnxruntime": ort.__version__,
        "providers": list(PROVIDERS),
        "spinning": False,
        "execution": "sequential",
        "inter_op_threads": 1,
    }


def random_images(form: str, image_shape: Sequence[int], *, batch: int, seed: int) -> NDArray[Any]:
    """Input of the form's type and range: [batch, *image_shape]; uint8 [h, w, 3] or float32 [3, h, w] in [0, 1)."""
    generator = np.random.default_rng(seed)
    shape = (batch, *image_shape)
    if form == "uint8":
        return generator.integers(0, 256, shape, np.uint8)
    return generator.random(shape, np.float32)
