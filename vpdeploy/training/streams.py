"""Independent random streams, each derived from the seed, the stage, the epoch and what it is for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit seed that depends on every part, and on nothing else."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, stage: str, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(derive(seed, stage, epoch, purpose))


@contextmanager
def seeded(seed: int, stage: str, epoch: int) -> Iterator[None]:
    """Seed torch's global generators (dropout draws from them) for one epoch, and put them back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, stage, epoch, "global"))
        yield
