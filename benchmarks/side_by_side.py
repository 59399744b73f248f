"""Two ways of doing the same work, timed in turns within one run: what every benchmark here prints."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from vpdeploy.measure.environment import environment
from vpdeploy.measure.latency import time_rounds, warm_up
from vpdeploy.measure.statistics import bootstrap_factor


def print_machine() -> None:
    """The machine and the versions, two lines."""
    about = environment()
    machine, packages = about["machine"], about["packages"]
    print(
        f"{machine['cpu']}, {machine['cores_usable']} usable cores, {machine['memory_gib']} GiB, GPU: {machine['gpu']}"
    )
    names = ("torch", "torchvision", "onnxruntime", "numpy")
    print(f"{about['python']}, " + ", ".join(f"{name} {packages[name]}" for name in names))


def print_ratio(
    label: str, ours: Callable[[], object], reference: Callable[[], object], *, bound: float, seconds: float
) -> None:
    """Time both in turns, ``seconds`` each, and print ours / reference with its 95 % interval beside the ``bound``."""
    runs = {"reference": _synchronised(reference), "ours": _synchronised(ours)}
    for run in runs.values():
        warm_up(run, clock=time.perf_counter_ns)
    times_ms = time_rounds(runs, seconds=seconds, clock=time.perf_counter_ns)
    ratio, (low, high) = bootstrap_factor(times_ms["ours"], times_ms["reference"], seed=0)
    p50 = {name: sorted(times)[len(times) // 2] for name, times in times_ms.items()}
    print(
        f"{label}: {p50['ours']:.3f} ms against {p50['reference']:.3f} ms (medians of {len(times_ms['ours'])} rounds); "
        f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}], bound {bound}: {'met' if ratio <= bound else 'NOT met'}"
    )


def _synchronised(run: Callable[[], object]) -> Callable[[], object]:
    def synchronised() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return synchronised
