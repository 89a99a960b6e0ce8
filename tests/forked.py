"""Processes that are forked from one that has imported what they need.

They are processes as any other, with signals, an exit code and an output of their own; but one
starts in a tenth of a second, where importing PyTorch, transformers and DeepSpeed takes six.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from deepspec.cli import main
from deepspec.processes import die_with_parent

_STARTED: list[Forked] = []
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


class Forked:
    """`function(words)` in a process of its own, with the surface of a subprocess.Popen that has
    all it says in one stream."""

    def __init__(
        self, function: Callable[[list[str]], Any], words: list[str], **variables: str
    ) -> None:
        file, name = tempfile.mkstemp()
        self._output = os.fdopen(file)
        environment = {**os.environ, **variables}
        self._process = _CONTEXT.Process(target=_run, args=(function, words, environment, name))
        self._process.start()
        _STARTED.append(self)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it said, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        self._output.seek(0)
        return self._output.read(), None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        self._process.kill()


def _run(
    function: Callable[[list[str]], Any], words: list[str], environment: dict[str, str], output: str
) -> None:
    die_with_parent()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.unlink(output)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["deepspec", *words]
    function(words)


def command(*words: str, **variables: str) -> Forked:
    """`deepspec` with `words`."""
    return Forked(main, list(words), **variables)


def job(processes: int, function: Callable[[list[str]], Any], words: list[str]) -> list[Forked]:
    """Processes that find each other, with what a launcher would have set."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    numbers = [str(rank) for rank in range(processes)]
    return [Forked(function, words, RANK=rank, LOCAL_RANK=rank, **place) for rank in numbers]


def succeed(*processes: Forked, within: float = 300) -> str:
    """What the first one said, once all have ended well."""
    try:
        outputs = [process.communicate(timeout=within)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(outputs)[-5000:]
    return outputs[0]


def kill_all() -> None:
    """SIGKILL of what still runs."""
    while _STARTED:
        _STARTED.pop().kill()
