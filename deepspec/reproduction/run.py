"""Runs a plan's jobs as processes of their own, so many at a time.

The folder is the state: `done/NAME.json` says that a job is complete, and what was cut goes on by
its own means when it is started again. `logs/NAME.log` has what a job said.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deepspec.atomic import write_text
from deepspec.config.places import PATHS, same_place
from deepspec.config.values import read_value
from deepspec.errors import ConfigError, Interrupted
from deepspec.json_files import read_json
from deepspec.outputs import FOLDER, REPRODUCTION, claim, hold, make_folder
from deepspec.processes import die_with_parent
from deepspec.reproduction.board import Board
from deepspec.reproduction.jobs import Job
from deepspec.reproduction.plan import Plan

POLL = 0.1  # seconds
PATIENCE = 60.0  # seconds that a job has to save and leave


@contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Make the folder and keep it against other processes. Raises ConfigError or InUseError."""
    claim(out, REPRODUCTION)
    make_folder(out)
    with hold(out, FOLDER):
        yield


@dataclass(frozen=True)
class Running:
    """A job's process, when it was started, and whether it began anew."""

    job: Job
    process: subprocess.Popen[bytes]
    begun: float
    fresh: bool


class Runner:
    """The jobs of `plan`: which are done, which failed, and `run`, which does what is missing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.done = {job.name for job in plan.jobs if self._is_done(job)}
        self.failed: dict[str, Path] = {}  # job -> its log
        self._running: list[Running] = []
        self._stopped: int | None = None

    @property
    def missing(self) -> list[Job]:
        """In the plan's order."""
        return [job for job in self.plan.jobs if job.name not in self.done]

    def run(self, board: Board, finished: Callable[[Job], None]) -> None:
        """Run what is missing; `finished` is told of each job that ends well.

        A job that fails is left out, with those that need it. Raises Interrupted on SIGINT and
        SIGTERM, once the jobs under way have saved and left.
        """
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._stopped is None and (self._start() or self._running):
                board.show(self.missing, self._running)
                time.sleep(POLL)
                for job, seconds, fresh in self._reap():
                    if job.name in self.failed:
                        board.failed(job, self.failed[job.name])
                    else:
                        board.finished(job, seconds, fresh)
                        finished(job)
        finally:
            self._leave()
            board.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._stopped is not None:
            raise Interrupted(self._stopped, str(self.plan.out))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = number

    def _start(self) -> bool:
        """Start what may; whether something was started, or can be later."""
        busy = {running.job.name for running in self._running}
        waiting = [
            job for job in self.missing if job.name not in busy and job.name not in self._hopeless()
        ]
        for job in waiting:
            if len(self._running) >= self.plan.config.reproduce.jobs:
                break
            if any(running.job.alone for running in self._running):
                break
            if not self.done.issuperset(job.needs):
                continue
            if job.alone:
                if not self._running:
                    self._launch(job)
                break  # what stands behind it would keep it waiting
            self._launch(job)
        return bool(waiting)

    def _hopeless(self) -> set[str]:
        """Jobs that failed, and those that need them."""
        lost = set(self.failed)
        for job in self.plan.jobs:  # what is needed stands before what needs it
            if lost.intersection(job.needs):
                lost.add(job.name)
        return lost

    def _launch(self, job: Job) -> None:
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        fresh = not log.exists()
        environment = dict(os.environ)
        if not job.alone:
            environment["OMP_NUM_THREADS"] = "1"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "deepspec", *job.words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for us, who pass it on
                preexec_fn=die_with_parent,
            )
        self._running.append(Running(job, process, time.monotonic(), fresh))

    def _reap(self) -> list[tuple[Job, float, bool]]:
        """Those that have ended: (job, seconds, whether it began anew)."""
        ended = [running for running in self._running if running.process.poll() is not None]
        self._running = [running for running in self._running if running not in ended]
        found = []
        for running in ended:
            job, seconds = running.job, time.monotonic() - running.begun
            if running.process.returncode == 0:
                self._mark_done(job, seconds)
                self.done.add(job.name)
            else:
                self.failed[job.name] = self._log(job)
            found.append((job, seconds, running.fresh))
        return found

    def _leave(self) -> None:
        """Ask what runs to save and leave; after a while, make it."""
        for running in self._running:
            running.process.terminate()
        deadline = time.monotonic() + PATIENCE
        for running in self._running:
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, deadline - time.monotonic()))
            running.process.kill()
            running.process.wait()
        self._running = []

    def _log(self, job: Job) -> Path:
        return self.plan.out / "logs" / f"{job.name}.log"

    def _marker(self, job: Job) -> Path:
        return self.plan.out / "done" / f"{job.name}.json"

    def _is_done(self, job: Job) -> bool:
        try:
            found = read_json(self._marker(job), ConfigError, "the job is run again")
        except (FileNotFoundError, ConfigError):
            return False
        return same_command(found.get("words"), job.words)

    def _mark_done(self, job: Job, seconds: float) -> None:
        marker = self._marker(job)
        marker.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"words": job.words, "seconds": round(seconds, 1)}, indent=2)
        write_text(marker, text + "\n")


def same_command(before: Any, words: Sequence[str]) -> bool:
    """Whether the words `before` make the same command. A path written in another way is the
    same."""
    if not isinstance(before, list) or len(before) != len(words):
        return False
    return all(
        one == other or _same_path(one, other) for one, other in zip(before, words, strict=True)
    )


def _same_path(one: Any, other: str) -> bool:
    key = other.partition("=")[0]
    if key not in (*PATHS, "recipe") or not str(one).startswith(f"{key}="):
        return False
    return same_place(read_value(one), read_value(other))
