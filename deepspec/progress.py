"""Progress of long work: a live bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from deepspec.processes import rank
from deepspec.streams import tell, visible
from deepspec.terminal import Terminal

T = TypeVar("T")
LINE_SECONDS = 10.0


class Progress:
    """`with Progress("train", total, "steps") as progress: progress.advance(1, "loss 2.3")`."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, show: bool = True):
        self._label, self._total, self._unit = label, total, unit
        self._done = self._first = done
        self._show = show and rank() == 0
        self._bar: RichProgress | None = None
        self._begun = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._begun = self._printed = time.monotonic()
        if self._show and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
                console=Terminal(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._label, total=self._total, completed=self._done, note=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Units a second since the start of this run."""
        return (self._done - self._first) / max(time.monotonic() - self._begun, 1e-9)

    def advance(self, count: int, note: str = "") -> None:
        """`count` more units are done; `note` says what is worth seeing."""
        self._done += count
        if not self._show:
            return
        rate = f"{self.rate:.3g} {self._unit}/s"
        note = f"{note}  {rate}" if note else rate
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=visible(note))
            return
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS or self._done >= self._total:
            self._printed = now
            left = (self._total - self._done) / max(self.rate, 1e-9)
            tell(
                f"{self._label}: {self._done}/{self._total} {self._unit}  {note}  {left:.0f} s left"
            )


def track(
    items: Iterable[T], label: str, total: int, unit: str, *, show: bool = True
) -> Iterator[T]:
    """Iterate with progress."""
    with Progress(label, total, unit, show=show) as progress:
        for item in items:
            yield item
            progress.advance(1)


def say(line: str) -> None:
    """A line about the work, once, beside the progress; results go to standard output."""
    if rank() == 0:
        tell(line)


@functools.cache
def say_once(line: str) -> None:
    """`say`, for what a process would find out again each time that it opens a target."""
    say(line)
