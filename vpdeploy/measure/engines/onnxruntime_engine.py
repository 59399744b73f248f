"""ONNX Runtime: on the CPU, CUDA and TensorRT."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vpdeploy.errors import VpdeployError
from vpdeploy.measure.engines.base import EngineError, Session, Setting, Subject, enough, only_device, only_fp32

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
# Where these run decides what a figure is of. Shapes and indices are computed on the CPU under every provider.
HEAVY = re.compile(r"Conv|Gemm|MatMul|Attention|Resize|Einsum")
CUDA_OPTIONS = {"cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"}


def open_onnxruntime(subject: Subject, setting: Setting) -> Session:
    """A session of ``setting.threads`` threads, one operation at a time.

    Raises: EngineError when the provider is not there, or ran something else; VpdeployError when the file cannot be run.
    """
    path, provider = subject.file(setting), PROVIDERS[setting.engine]
    only_fp32(setting)
    wanted = _wanted(setting, provider)
    session = ort_session(path, threads=setting.threads, providers=wanted)
    if provider not in session.get_providers():
        raise EngineError(
            f"engine {setting.engine}: ONNX Runtime {ort.__version__} fell back to {', '.join(session.get_providers())} for "
            f"{path.name}; expected {provider}: its own message above says why (most often a CUDA or cuDNN library that is "
            "missing, or of another version)"
        )
    name = session.get_inputs()[0].name
    about = {**about_onnxruntime(setting.engine), "device": setting.device or _device(setting.engine)}
    return Session(run=lambda images: session.run(None, {name: images})[0], about={**about, "threads": setting.threads})


def about_onnxruntime(engine: str = "onnxruntime-cpu") -> dict[str, Any]:
    """What its latencies depend on, for the report's environment."""
    own = {"onnxruntime-cuda": CUDA_OPTIONS, "onnxruntime-tensorrt": {"trt_fp16_enable": False, **CUDA_OPTIONS}}
    return {
        "engine": engine,
        "onnxruntime": ort.__version__,
        "providers": [PROVIDERS[engine]],
        "spinning": "while a run lasts",
        "execution": "sequential",
        "inter_op_threads": 1,
        **({"options": own[engine]} if engine in own else {}),
    }


def check_onnxruntime(setting: Setting) -> None:
    """Raises: EngineError when this ONNX Runtime has no such provider, or ``setting`` asks what it cannot do."""
    only_fp32(setting)
    _wanted(setting, PROVIDERS[setting.engine])


def _wanted(setting: Setting, provider: str) -> list[Any]:
    """Providers as ONNX Runtime takes them."""
    has = ort.get_available_providers()
    if setting.engine == "onnxruntime-cpu":
        only_device(setting, "cpu")
        return [provider]
    number = re.fullmatch(r"(?:cuda:(\d+))?", setting.device)
    if number is None:
        raise EngineError(
            f"engine {setting.engine}: got device {setting.device!r}; expected 'cuda:N', or none for the first"
        )
    if provider not in has:
        extra = "onnxruntime-gpu" + (" and TensorRT" if "tensorrt" in setting.engine else "")
        raise EngineError(
            f"engine {setting.engine}: this ONNX Runtime ({ort.__version__}) has no {provider}, only {', '.join(has)}; "
            f"install {extra} in place of onnxruntime, or choose another engine"
        )
    cuda = ("CUDAExecutionProvider", {"device_id": number[1] or "0", **CUDA_OPTIONS})
    return [cuda] if setting.engine == "onnxruntime-cuda" else [(provider, {"device_id": number[1] or "0"}), cuda]


def _device(engine: str) -> str:
    return "cpu" if engine == "onnxruntime-cpu" else "cuda:0"


def ort_session(
    path: Path, *, threads: int, providers: Sequence[Any] = ("CPUExecutionProvider",), profile: Path | None = None
) -> ort.InferenceSession:
    """Its threads spin while a run waits for them, as by default, and stop when the run ends: those of an idle session would take
    the cores from the session that is being timed.

    Raises: VpdeployError when the file is missing or is no model that ONNX Runtime can run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Without another provider to fall back to, what it logs is what it raises, and that is told in our own words.
    options.log_severity_level = 4 if list(providers) == ["CPUExecutionProvider"] else 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if not path.is_file():
        raise VpdeployError(f"{path}: no such file; expected an exported model: run `vpdeploy export` first")
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as e:  # ONNX Runtime's errors share no base class but Exception
        raise VpdeployError(
            f"{path}: ONNX Runtime {ort.__version__} cannot open it: {e}; expected a model that it can run; if vpdeploy made "
            "it, run `vpdeploy export` again"
        ) from e


# --- node by node -------------------------------------------------------------------------------------------------------


def profile(
    path: Path, images: np.ndarray, *, setting: Setting, runs: int, seconds: float = 0.0
) -> list[Mapping[str, Any]]:
    """What ONNX Runtime notes of every node in ``runs`` runs and ``seconds``, or more, after a first one: name, op, provider,
    milliseconds (median).

    Raises: as ``open_onnxruntime``.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = ort_session(
            path,
            threads=setting.threads,
            providers=_wanted(setting, PROVIDERS[setting.engine]),
            profile=Path(folder) / "p",
        )
        feed = {session.get_inputs()[0].name: images}
        for _ in enough(runs, seconds):
            session.run(None, feed)
        notes = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for note in notes:
        if note.get("cat") == "Node" and note["name"].endswith("_kernel_time"):
            name = note["name"].removesuffix("_kernel_time")
            times.setdefault(name, []).append(note["dur"] / 1e3)
            kinds[name] = (note["args"]["op_name"], note["args"]["provider"])
    return [
        {"name": name, "op": kinds[name][0], "provider": kinds[name][1], "ms": float(np.median(found[1:] or found))}
        for name, found in times.items()
    ]


def refuse_heavy_fall_back(nodes: Sequence[Mapping[str, Any]], setting: Setting) -> None:
    """Raises: EngineError when an operation that takes time did not run where it was meant to."""
    away = Counter(
        str(node["op"])
        for node in nodes
        if node["provider"] == "CPUExecutionProvider" and HEAVY.search(str(node["op"]))
    )
    if setting.engine != "onnxruntime-cpu" and away:
        told = ", ".join(f"{count} x {op}" for op, count in away.most_common())
        raise EngineError(
            f"engine {setting.engine}: ran {told} on the CPU; expected all on the GPU. The uint8 form's resize may be among "
            "them: measure the float form there"
        )
