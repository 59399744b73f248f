"""Peak memory and cold start of one exported file, on ONNX Runtime's CPU provider."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vpdeploy.errors import VpdeployError
from vpdeploy.values import Memory

STATUS = Path("/proc/self/status")
CHILD = Path(__file__).with_name("memory_child.py")


def peak_rss_mib() -> float | None:
    """Of this process so far (VmHWM), MiB; None where /proc is missing."""
    lines = STATUS.read_text(errors="replace").splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def measure_memory(path: Path, *, form: str, image_shape: Sequence[int], batch: int, threads: int) -> Memory | None:
    """Peak resident set of a fresh process that opens the file and runs it five times, and how long it took to begin; None
    where /proc is missing.

    VmHWM and not ru_maxrss: a child inherits its parent's ru_maxrss (a trivial child of an 800 MiB parent reported 811
    MiB; its VmHWM was 9). image_shape: one image as the form takes it.

    Raises: VpdeployError when the process fails.
    """
    if not STATUS.is_file():
        return None
    # -P keeps the script's folder off the path: its statistics.py would stand before the standard library's.
    command = [sys.executable, "-P", str(CHILD), str(path), form, str(batch), str(threads), *map(str, image_shape)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise VpdeployError(
            f"{path}: the process that measures memory ended with status {done.returncode}; expected a model that "
            f"ONNX Runtime can run and enough memory for batch {batch}. It said: {lines[-1].strip()}"
        )
    read = json.loads(done.stdout.splitlines()[-1])
    return Memory(form, threads, batch, **read)
