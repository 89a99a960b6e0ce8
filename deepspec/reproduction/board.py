"""How far a reproduction is: a line a job that starts or ends, and the time left now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from deepspec.progress import say
from deepspec.reproduction.estimate import makespan
from deepspec.reproduction.jobs import Job

if TYPE_CHECKING:
    from deepspec.reproduction.run import Running

LINE_SECONDS = 30.0


class Board:
    """`scale`: seconds on this machine for one of a job's `work`, until jobs have shown it."""

    def __init__(self, total: int, at_once: int, scale: float) -> None:
        self.total, self.at_once, self.scale = total, at_once, scale
        self._worked = self._taken = 0.0
        self._shown = 0.0
        self._status = Console(stderr=True).status("") if sys.stderr.isatty() else None
        if self._status is not None:
            self._status.start()

    def show(self, missing: Sequence[Job], running: Sequence[Running]) -> None:
        """What runs and how long all of it will take, every now and then."""
        now = time.monotonic()
        if now - self._shown < (1.0 if self._status else LINE_SECONDS) or not running:
            return
        self._shown = now
        names = ", ".join(f"{each.job.name} ({minutes(now - each.begun)})" for each in running)
        line = (
            f"reproduce: {self.total - len(missing)}/{self.total} jobs done, now {names}; about "
            f"{minutes(self._left(missing, running, now))} left"
        )
        if self._status is not None:
            self._status.update(line)
        else:
            say(line)

    def _left(self, missing: Sequence[Job], running: Sequence[Running], now: float) -> float:
        begun = {each.job.name: each.begun for each in running}
        rest = []
        for job in missing:
            spent = (now - begun[job.name]) / self.scale if job.name in begun else 0.0
            rest.append(replace(job, work=max(0.0, job.work - spent)))
        return self.scale * makespan(rest, self.at_once)

    def finished(self, job: Job, seconds: float, fresh: bool) -> None:
        """A job took so long; `fresh`: all of it, and not the rest of one that was cut."""
        if fresh:
            self._worked += job.work
            self._taken += seconds
            self.scale = self._taken / max(self._worked, 1e-9)
        say(f"reproduce: {job.name} done in {minutes(seconds)}")

    def failed(self, job: Job, log: Path) -> None:
        """A job failed; the end of its log says why."""
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line for line in lines if line.strip()][-3:]
        say(f"reproduce: {job.name} failed, see {log}")
        for line in said:
            say(f"  {line}")

    def close(self) -> None:
        """Give the terminal back."""
        if self._status is not None:
            self._status.stop()


def minutes(seconds: float) -> str:
    """65.2 -> 1 min 5 s."""
    whole = round(seconds)
    if whole >= 600:
        return f"{whole / 60:.0f} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
