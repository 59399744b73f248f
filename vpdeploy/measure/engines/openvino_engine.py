"""OpenVINO on the CPU: Intel's runtime reads the same ONNX files."""

from __future__ import annotations

import importlib
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from vpdeploy.errors import VpdeployError
from vpdeploy.measure.engines.base import EngineError, Session, Setting, Subject, enough, only_device


def _openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as e:
        raise EngineError(
            "engine openvino-cpu: OpenVINO is not installed; install vpdeploy[openvino], or choose another engine"
        ) from e


def check_openvino(setting: Setting) -> None:
    """Raises: EngineError without OpenVINO, or for what it cannot do."""
    only_device(setting, "cpu")
    core = _openvino().Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if setting.precision != "fp32" and setting.precision.upper() not in able:
        raise EngineError(
            f"engine openvino-cpu: this CPU has no {setting.precision} (OpenVINO lists {', '.join(able)}); expected fp32"
        )


def open_openvino(subject: Subject, setting: Setting) -> Session:
    """One stream, tuned for latency, in the precision asked for: by default OpenVINO takes bf16 where the CPU has it.

    Raises: EngineError without OpenVINO; VpdeployError when it cannot run the file.
    """
    ov, compiled = _openvino(), _compiled(subject.file(setting), setting)
    request = compiled.create_infer_request()
    devices = list(compiled.get_property("EXECUTION_DEVICES"))
    if devices != ["CPU"]:
        raise EngineError(f"engine openvino-cpu: ran on {', '.join(devices)}; expected CPU")

    def run(images: Any) -> Any:
        request.infer({0: images}, share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    about = {
        "engine": setting.engine,
        "openvino": ov.__version__,
        "device": "cpu",
        "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
        "streams": int(compiled.get_property("NUM_STREAMS")),
        "precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
    }
    return Session(run=run, about=about, result=lambda logits: logits.copy())


def profile_openvino(
    subject: Subject, images: NDArray[Any], setting: Setting, *, runs: int, seconds: float = 0.0
) -> list[dict[str, Any]]:
    """What OpenVINO notes of every operation that it executes in ``runs`` runs and ``seconds``, or more, after a first one:
    name, op, provider, milliseconds (median).

    Raises: as ``open_openvino``.
    """
    request = _compiled(subject.file(setting), setting, PERF_COUNT="YES").create_infer_request()
    times: dict[tuple[str, str], list[float]] = {}
    for _ in enough(runs, seconds):
        request.infer({0: images}, share_inputs=True)
        for note in request.profiling_info:
            if note.real_time:  # none of what was folded into another
                times.setdefault((note.node_name, note.node_type), []).append(note.real_time.total_seconds() * 1e3)
    return [
        {"name": name, "op": op, "provider": "CPU", "ms": median(found[1:] or found)}
        for (name, op), found in times.items()
    ]


def _compiled(path: Path, setting: Setting, **more: str) -> Any:
    ov = _openvino()
    check_openvino(setting)
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(setting.threads),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[setting.precision],
        **more,
    }
    try:
        return ov.Core().compile_model(str(path), "CPU", config)
    except RuntimeError as e:
        raise VpdeployError(
            f"{path}: OpenVINO {ov.__version__} cannot open it: {_first_line(e)}; expected a whole "
            "ONNX file of operations that it has"
        ) from e


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
