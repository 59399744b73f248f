"""How long an analysis may take, and how much memory: what does not end is refused with what was reached."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from vpdeploy.errors import SurgeryError

USUAL_GIB = 24.0
OWN_AT_REST = 10_000  # objects; Python 3.12 begins with a few hundred at rest, and who freezes their own has more
SHARE = 0.9  # of the machine's memory, where that is less


class LimitError(SurgeryError):
    """The analysis of a network took more than it may."""


def _usual_gib() -> float:
    return min(USUAL_GIB, SHARE * psutil.virtual_memory().total / 2**30)


@dataclass
class Limit:
    """``seconds`` from when an analysis begins, and ``gib`` of memory beyond what the process held then.

    Checked whenever a module is called: what one operation takes cannot be stopped. It begins at the first check, or when it
    is ``enforced``, each time anew.
    """

    seconds: float = 600.0
    gib: float = field(default_factory=_usual_gib)
    _began: tuple[float, int] | None = field(default=None, init=False, repr=False, compare=False)

    def check(self, where: str) -> None:
        """Raises: LimitError past either limit; ``where``: the module that is about to be called."""
        now, held = _now()
        began, held_then = self._began = self._began or (now, held)
        at = f", when {where or 'the network'} was called"
        if now - began > self.seconds:
            raise LimitError(self._told(f"{now - began:.0f} s", f"{self.seconds:g} s", at))
        grown = (held - held_then) / 2**30
        if grown > self.gib:
            raise LimitError(self._told(f"{grown:.1f} GiB", f"{self.gib:g} GiB", at))

    @contextmanager
    def enforced(self) -> Iterator[Limit]:
        """A limit of the same size that begins now. Where a timer can be had, one stops code without calls, too.

        That is in the main thread, on a system with such timers, where nobody else has set one.
        """
        with _old_objects_at_rest(), self._timed() as limit:
            yield limit

    @contextmanager
    def _timed(self) -> Iterator[Limit]:
        limit = Limit(self.seconds, self.gib)
        limit._began = _now()
        if sys.platform == "win32" or not _timer_is_free() or not 0 < self.seconds < threading.TIMEOUT_MAX:
            yield limit
            return

        def stop(*_: Any) -> None:
            raise LimitError(self._told(f"{self.seconds:.0f} s", f"{self.seconds:g} s", ""))

        signal.signal(signal.SIGALRM, stop)
        # Again each second: a network may catch what its parts raise, and we do where another way is left.
        signal.setitimer(signal.ITIMER_REAL, self.seconds, 1.0)
        try:
            yield limit
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _told(self, took: str, limit: str, at: str) -> str:
        return (
            f"the analysis was stopped after {took} (the limit is {limit}){at}; analyse at a smaller input (--size, "
            "input.canvas_size, a smaller example), or allow more (--limit-seconds and --limit-gib of vpdeploy inspect; "
            "limit=Limit(...) in Python)"
        )


@contextmanager
def _old_objects_at_rest() -> Iterator[None]:
    """torch alone is a million objects: the garbage collector would look through them all while networks are copied, for a
    quarter of the time.
    """
    mine = gc.get_freeze_count() < OWN_AT_REST
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


def _timer_is_free() -> bool:
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return False
    return signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not signal.getitimer(signal.ITIMER_REAL)[0]


def _now() -> tuple[float, int]:
    """Seconds by a clock, and bytes that the process holds."""
    return time.monotonic(), psutil.Process().memory_info().rss
