"""Which width multiples are fast on a target: found by a short sweep, and kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from vpdeploy import run_folder
from vpdeploy.errors import RunFolderError
from vpdeploy.measure.environment import machine
from vpdeploy.pricing.candidates import target_text
from vpdeploy.pricing.network import Network
from vpdeploy.pricing.target import Target
from vpdeploy.surgery.cost import Array
from vpdeploy.values import ChannelGroup

MULTIPLES = (1, 4, 8, 16, 32)
COARSE = 0.1  # of the MACs in one step of half of the groups: budgets in between would hardly be met
NEARLY_BEST = 0.97  # of the best multiple's speed: the smallest that has it leaves the most choice
MOST_BYTES = 2**16  # of a file in the cache
SWEPT = 0.1  # seconds of each network: multiples differ by hundredths


def multiple_of(target: Target, network: Network) -> tuple[int, dict[str, float]]:
    """The width multiple in use, and the speeds that it was chosen by: the smallest that is nearly as fast as the best of those
    that are fine enough for the network.
    """
    given = network.recipe.budget.round_to
    if given != "auto":
        return given, {}
    if not network.groups.prunable:
        return 1, {}
    alignment = speeds_of(target, network)
    fine = {k: speed for k, speed in alignment.items() if network.typical_step(int(k)) <= COARSE}
    fine = fine or {"1": alignment["1"]}
    return next(int(k) for k, speed in fine.items() if speed >= NEARLY_BEST * max(fine.values())), alignment


def speeds_of(target: Target, network: Network) -> dict[str, float]:
    """Width multiple -> MACs per millisecond relative to the best, of two networks at about half the width whose widths are odd
    multiples of it: no better ones by chance. Kept between runs, for the machine, the engine and the layers, where all were
    steady.
    """
    rows = {f"{k} {half}": row for k in MULTIPLES for half, row in enumerate(_about_half(network, k))}
    about = [machine(), network.recipe.target.model_dump(), target.image_shape, [row.tolist() for row in rows.values()]]
    about.append([network.cost.macs(row) for row in rows.values()])
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "alignment" / f"{key}.json"
    of = {"target": target_text(network.recipe), "machine": machine()}
    if (kept := _kept(path, of)) is not None:
        return kept
    with ThreadPoolExecutor(2) as pool:  # one is planned while another is written
        subjects = dict(zip(rows, pool.map(target.candidates.subject, rows.values()), strict=True))
    timed = target.glance(subjects, seconds=SWEPT)
    rates = {}
    for k in MULTIPLES:
        both = [name for name in rows if name.split()[0] == str(k)]
        rates[str(k)] = sum(network.cost.macs(rows[name]) for name in both) / sum(timed[name].p50_ms for name in both)
    speeds = {k: round(rate / max(rates.values()), 4) for k, rate in rates.items()}
    if not all(row.steady for row in timed.values()):
        return speeds
    with suppress(RunFolderError, OSError):  # a home that cannot be written to: it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, {"speeds": speeds, **of})
    return speeds


def _kept(path: Path, of: Mapping[str, object]) -> dict[str, float] | None:
    """What an earlier sweep ``of`` this target and machine left; None where nothing of use is there: it is measured again."""
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, OverflowError):
        if path.stat().st_size > MOST_BYTES:
            return None
        found = json.loads(path.read_bytes())
        speeds = {k: float(speed) for k, speed in found["speeds"].items()}
        good = list(speeds) == [str(k) for k in MULTIPLES] and all(0 < speed <= 1 for speed in speeds.values())
        if good and max(speeds.values()) == 1 and all(found[key] == value for key, value in of.items()):
            return speeds
    return None


def _about_half(network: Network, round_to: int) -> Array:
    """Widths of two networks: [2, groups]. What one has below half its width, the other has above, by the draw: kernels take
    several blocks of channels at once, and how many are left over decides.
    """
    generator = np.random.default_rng(0)
    pairs = [_odd_multiples(group, network, round_to) for group in network.groups.prunable]
    return np.array([pair if generator.random() < 0.5 else pair[::-1] for pair in pairs], float).T


def _odd_multiples(group: ChannelGroup, network: Network, round_to: int) -> tuple[int, int]:
    """Of what a group may keep, the odd multiples of its step that are next to half its width, below and above."""
    allowed = network.allowed(group, round_to)
    step = allowed[1] - allowed[0] if len(allowed) > 2 else 1
    odd = [width for width in allowed[:-1] if width // step % 2] or allowed
    below = [width for width in odd if width <= group.width / 2] or odd[:1]
    above = [width for width in odd if width >= group.width / 2] or odd[-1:]
    return below[-1], above[0]


def cache_folder() -> Path:
    """Where measurements are kept between runs: $XDG_CACHE_HOME/vpdeploy, or ~/.cache/vpdeploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpdeploy"
