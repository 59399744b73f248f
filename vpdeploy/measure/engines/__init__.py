"""Engines by name. Each is imported when it is asked for: a file runs without torch, and without OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args

from numpy.typing import NDArray

from vpdeploy.measure.engines.base import EngineError, Session, Setting, Subject, only_device, only_fp32
from vpdeploy.recipe.tables import EngineName

ENGINES: tuple[str, ...] = get_args(EngineName)


def check_engine(setting: Setting) -> None:
    """Raises: EngineError when ``setting`` cannot be had here; nothing is opened."""
    family = _family(setting.engine)
    if setting.engine == "onnxruntime-cpu":  # which is always here
        only_fp32(setting)
        only_device(setting, "cpu")
    elif family == "onnxruntime":
        from vpdeploy.measure.engines.onnxruntime_engine import check_onnxruntime

        check_onnxruntime(setting)
    elif family == "openvino":
        from vpdeploy.measure.engines.openvino_engine import check_openvino

        check_openvino(setting)
    else:
        from vpdeploy.measure.engines.torch_engine import check_torch

        check_torch(setting)


def check_subject(subject: Subject, setting: Setting) -> None:
    """Raises: EngineError for a file of itself where the engine runs torch modules; nothing is opened."""
    if _family(setting.engine) == "torch":
        subject.check_module(setting)


def settings_kept(setting: Setting) -> AbstractContextManager[None]:
    """Within it sessions may be opened and run; what an engine sets for the whole process is as it was afterwards."""
    if _family(setting.engine) != "torch":
        return nullcontext()
    from vpdeploy.measure.engines.torch_engine import settings_of_torch

    return settings_of_torch(setting)


def open_session(subject: Subject, setting: Setting) -> Session:
    """``subject`` under ``setting``.

    Raises: EngineError when it cannot be had here, or would fall back to something else; VpdeployError for a file that
    cannot be run.
    """
    family = _family(setting.engine)
    if family == "onnxruntime":
        from vpdeploy.measure.engines.onnxruntime_engine import open_onnxruntime

        return open_onnxruntime(subject, setting)
    if family == "openvino":
        from vpdeploy.measure.engines.openvino_engine import open_openvino

        return open_openvino(subject, setting)
    from vpdeploy.measure.engines.torch_engine import open_torch

    return open_torch(subject, setting)


def node_times(
    path: Path, images: NDArray[Any], setting: Setting, *, runs: int, seconds: float = 0.0
) -> Sequence[Mapping[str, Any]] | None:
    """Of every operation of a file: name, op, provider, milliseconds (median of ``runs`` and ``seconds``, or more, after a first
    one); None of engines that do not tell.

    On a GPU ONNX Runtime notes when an operation was launched, not how long it ran.
    """
    if setting.engine == "onnxruntime-cpu":
        from vpdeploy.measure.engines.onnxruntime_engine import profile

        return profile(path, images, setting=setting, runs=runs, seconds=seconds)
    if setting.engine == "openvino-cpu":
        from vpdeploy.measure.engines.openvino_engine import profile_openvino

        return profile_openvino(Subject(path), images, setting, runs=runs, seconds=seconds)
    return None


def check_all_ran_there(subject: Subject, images: NDArray[Any], setting: Setting) -> None:
    """Raises: EngineError when ONNX Runtime gave operations that take time to another provider than the GPU's."""
    if setting.engine in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        from vpdeploy.measure.engines.onnxruntime_engine import profile, refuse_heavy_fall_back

        refuse_heavy_fall_back(profile(subject.file(setting), images, setting=setting, runs=1), setting)


def _family(engine: str) -> str:
    if engine not in ENGINES:
        raise EngineError(f"engine: got {engine!r}; expected one of {', '.join(ENGINES)}")
    return engine.partition("-")[0]
