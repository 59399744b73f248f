"""Where and how to train: what "auto" becomes, by a short measurement."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn
from torch.nn import functional as F

from vpdeploy.errors import VpdeployError
from vpdeploy.recipe.tables import Recipe
from vpdeploy.training.network import Compute, Prompted, build_canvas

GAIN = 0.9  # a change of precision or layout must save a tenth of the time, or plain float32 stays
SECONDS = 1.5  # of measurement for each candidate
STEPS, LEAST_STEPS = 12, 3
FEW = 4  # images that tell how many are timed


def find_device(name: str) -> torch.device:
    """The device that a recipe names; "auto" is the first GPU, or the CPU.

    Raises: VpdeployError when it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch built without CUDA asserts
        reason = str(e).splitlines()[0]
        raise VpdeployError(
            f"compute.device: got {name!r}, which is not usable here ({reason}); expected 'auto' or 'cpu'"
        ) from e
    return device


def choose_compute(backbone: nn.Module, *, recipe: Recipe) -> Compute:
    """The recipe's device, precision and layout, "auto" decided by timing training steps of ``backbone``."""
    table = recipe.compute
    device = find_device(table.device)
    precisions = {"auto": (False, True), "fp32": (False,), "bf16": (True,)}[table.precision]
    layouts = {"auto": (False, True), "no": (False,), "yes": (True,)}[table.channels_last]
    # bf16 is tried in the plain layout only when that is asked for: it paid together with channels_last (1.6x to 2.4x on
    # 2 EPYC cores), and every candidate costs SECONDS of measurement.
    candidates = [
        Compute(device, bf16, last) for bf16 in precisions for last in layouts if last or not bf16 or len(layouts) == 1
    ]
    if len(candidates) == 1:
        return candidates[0]
    batch = _batch_in_time(backbone, recipe, candidates[0])
    seconds = [_step_seconds(backbone, recipe, candidate, batch=batch) for candidate in candidates]
    best = min(range(len(candidates)), key=seconds.__getitem__)
    return candidates[best] if seconds[best] < GAIN * seconds[0] else candidates[0]


def _batch_in_time(backbone: nn.Module, recipe: Recipe, compute: Compute) -> int:
    """As many images of the tuning batch as let a few steps take SECONDS: a whole batch of large images takes a CPU minutes.
    A GPU is slow at few, and quick at all of them.
    """
    if compute.device.type != "cpu":
        return recipe.tune.batch_size
    few = min(FEW, recipe.tune.batch_size)
    per_image = _step_seconds(backbone, recipe, compute, batch=few, seconds=0.0) / few
    return max(few, min(recipe.tune.batch_size, int(SECONDS / LEAST_STEPS / per_image)))


def _step_seconds(
    backbone: nn.Module, recipe: Recipe, compute: Compute, *, batch: int, seconds: float = SECONDS
) -> float:
    """Median seconds of one training step of ``batch`` images, the first left out; of LEAST_STEPS at least."""
    network = Prompted(
        build_canvas(recipe, prompted=False), copy.deepcopy(backbone).requires_grad_(True), compute
    ).train()
    side = recipe.input.image_size
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(compute.device)
    labels = torch.zeros(batch, dtype=torch.int64, device=compute.device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LEAST_STEPS or (time.perf_counter() - began < seconds and len(times) < STEPS):
        start = time.perf_counter()
        F.cross_entropy(network(images), labels).backward()
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times[1:]) // 2]
