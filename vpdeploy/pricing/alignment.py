"""Which width multiples are fast on a target: found by a short sweep, and kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from vpdeploy import run_folder
from vpdeploy.errors import RunFolderError
from vpdeploy.measure.environment import machine
from vpdeploy.pricing.candidates import target_text
from vpdeploy.pricing.network import Network
from vpdeploy.pricing.target import Target
from vpdeploy.values import ChannelGroup

MULTIPLES = (1, 2, 4, 8, 16, 32)
NEARLY_BEST = 0.95  # of the best multiple's speed: the smallest that has it leaves the most choice


def multiple_of(target: Target, network: Network) -> tuple[int, dict[str, float]]:
    """The width multiple in use, and the speeds that it was chosen by."""
    given = network.recipe.budget.round_to
    if given != "auto":
        return given, {}
    alignment = speeds_of(target, network)
    return next(int(k) for k, speed in alignment.items() if speed >= NEARLY_BEST), alignment


def speeds_of(target: Target, network: Network) -> dict[str, float]:
    """Width multiple -> MACs per millisecond relative to the best, of networks at about half the width whose widths are odd
    multiples of it: no better ones by chance. Kept between runs, for the machine, the engine and the layers.
    """
    rows = {
        k: np.array([_odd_multiple(group, network, k) for group in network.groups.prunable], float) for k in MULTIPLES
    }
    about = [machine(), network.recipe.target.model_dump(), target.image_shape, [row.tolist() for row in rows.values()]]
    about.append([network.cost.macs(row) for row in rows.values()])
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "alignment" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        speeds = json.loads(path.read_bytes())["speeds"]
        if list(speeds) == [str(k) for k in MULTIPLES] and all(0 < float(speed) <= 1 for speed in speeds.values()):
            return {k: float(speed) for k, speed in speeds.items()}
    timed = target.glance({str(k): target.candidates.subject(row) for k, row in rows.items()})
    rates = {str(k): network.cost.macs(row) / timed[str(k)].p50_ms for k, row in rows.items()}
    speeds = {k: round(rate / max(rates.values()), 4) for k, rate in rates.items()}
    with suppress(RunFolderError, OSError):  # a home that cannot be written to: it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, {"speeds": speeds, "target": target_text(network.recipe), "machine": machine()})
    return speeds


def _odd_multiple(group: ChannelGroup, network: Network, round_to: int) -> int:
    """Of what a group may keep, the odd multiple of its step that is nearest to half its width."""
    allowed = network.allowed(group, round_to)
    step = allowed[1] - allowed[0] if len(allowed) > 2 else 1
    odd = [width for width in allowed[:-1] if width // step % 2] or allowed
    return min(odd, key=lambda width: abs(width - group.width / 2))


def cache_folder() -> Path:
    """Where measurements are kept between runs: $XDG_CACHE_HOME/vpdeploy, or ~/.cache/vpdeploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpdeploy"
