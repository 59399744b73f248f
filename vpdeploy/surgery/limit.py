"""How long an analysis may take, and how much memory: what does not end is refused with what was reached."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil

from vpdeploy.errors import SurgeryError


class LimitError(SurgeryError):
    """The analysis of a network took more than it may."""


@dataclass(frozen=True)
class Limit:
    """``seconds`` from when it is made, and ``gib`` of memory beyond what the process held then.

    Checked whenever a module is called: what one operation takes cannot be stopped.
    """

    seconds: float = 600.0
    gib: float = 24.0
    _began: float = field(default_factory=time.monotonic)
    _held: int = field(default_factory=lambda: psutil.Process().memory_info().rss)

    def check(self, where: str) -> None:
        """Raises: LimitError past either limit; ``where``: the module that is about to be called."""
        took = time.monotonic() - self._began
        if took > self.seconds:
            raise LimitError(self._told(f"{took:.0f} s", f"{self.seconds:g} s", where))
        grown = (psutil.Process().memory_info().rss - self._held) / 2**30
        if grown > self.gib:
            raise LimitError(self._told(f"{grown:.1f} GiB", f"{self.gib:g} GiB", where))

    def _told(self, took: str, limit: str, where: str) -> str:
        return (
            f"the analysis was stopped after {took} (the limit is {limit}), when {where or 'the network'} was called; "
            "analyse at a smaller input (--size, input.canvas_size), or give more (find_groups(..., limit=Limit(...)))"
        )
