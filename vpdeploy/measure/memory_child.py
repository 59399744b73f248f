"""Run one exported file in a process of its own; print its peak memory and cold start as JSON. Needs numpy, onnxruntime.

Started by ``memory.py`` as a script, never imported: python memory_child.py FILE FORM BATCH THREADS AXIS AXIS AXIS
"""

import json
import sys
import time

import numpy as np
import onnxruntime as ort


def high_water_mark_mib() -> float:
    """VmHWM: the peak resident set of this process image alone."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    raise SystemExit("/proc/self/status holds no VmHWM")


def main(path: str, form: str, batch: str, threads: str, *axes: str) -> None:
    generator = np.random.default_rng(0)
    shape = (int(batch), *(int(axis) for axis in axes))
    images = generator.integers(0, 256, shape, np.uint8) if form == "uint8" else generator.random(shape, np.float32)
    before = high_water_mark_mib()
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    began = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    name = session.get_inputs()[0].name
    session.run(None, {name: images})
    ran = time.perf_counter()
    for _ in range(4):
        session.run(None, {name: images})
    found = {
        "before_rss_mib": before,
        "peak_rss_mib": high_water_mark_mib(),
        "load_ms": round(1000 * (loaded - began), 3),
        "first_run_ms": round(1000 * (ran - loaded), 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
