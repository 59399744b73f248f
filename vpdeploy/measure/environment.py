"""The machine and the versions that a number depends on. No host name, no user name, no paths."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("vpdeploy", "torch", "torchvision", "torch-pruning", "onnx", "onnxruntime", "fvcore", "openvino", "numpy")
DRIVER = Path("/proc/driver/nvidia/gpus")
MEASURING = ("vpdeploy", "torch", "onnxruntime", "openvino")


def environment() -> dict[str, Any]:
    """Plain values for report.json. Reads package metadata and imports none of the packages."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores_logical": psutil.cpu_count(logical=True),
            "cores_physical": psutil.cpu_count(logical=False),
            "cores_usable": _usable_cores(),
            "cpu_mhz": _clock(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": _gpu(),
            "os": _operating_system(),
        },
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: _version(name) for name in PACKAGES},
    }


def machine() -> dict[str, str]:
    """What a measurement depends on beside the recipe and the files: elsewhere it has to be done again."""
    found = {"cpu": _cpu_model(), "cores": str(_usable_cores()), **{name: _version(name) for name in MEASURING}}
    return {**found, **({"gpu": gpus} if (gpus := _gpus_of_driver()) else {})}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def _clock() -> dict[str, float] | None:
    """Of the CPU now, and the range it moves in where that is told: MHz."""
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError):
        return None
    if found is None or not found.current:
        return None
    return {"current": round(found.current), **({"min": found.min, "max": found.max} if found.max else {})}


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()}, {platform.machine()}"


def _gpus_of_driver() -> str:
    """The models of NVIDIA's GPUs as their driver on Linux tells them, without an import; empty elsewhere."""
    told = (path.read_text(errors="replace") for path in sorted(DRIVER.glob("*/information")))
    models = (
        line.partition(":")[2].strip() for text in told for line in text.splitlines() if line.startswith("Model:")
    )
    return ", ".join(models)


def _gpu() -> str | None:
    """The GPU's name if torch is loaded already: naming it is not worth the seconds of an import."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
