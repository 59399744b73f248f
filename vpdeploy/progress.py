"""What long work shows: a bar with the time left on a terminal, one plain line per epoch without one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Display:
    """Where stages say how far they are. ``quiet`` says nothing at all."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self._nested = False

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, items: Iterable[T], *, label: str, total: int | None) -> Iterator[Iterable[T]]:
        """Give ``items`` back so that walking over them moves a bar; the bar goes when the block ends."""
        if self.quiet or self._nested or not self.console.is_terminal:
            yield items
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._nested = True
        try:
            with Progress(*columns, console=self.console, transient=True) as progress:
                yield progress.track(items, total=total, description=label)
        finally:
            self._nested = False
