"""Which of the job's processes this is, by the variables that every launcher sets."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

from deepspec.streams import tell

POLL = 0.5  # seconds between two looks at the launchers
# what torchrun, deepspeed, mpirun (Open MPI, MPICH) and srun set
MARKS = frozenset(
    ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
)
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def rank() -> int:
    """0 in the process that writes and prints; without a launcher there is no other."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Which of this machine's devices is ours."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Processes of the job, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def together() -> Iterator[Callable[[], None]]:
    """Work that is shared without an engine: yields `wait`, which returns once all have called it.

    However long one of them works, the others wait.
    """
    if world_size() == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield dist.barrier
    finally:
        dist.destroy_process_group()


def end_with_launchers() -> None:
    """End this process of a job within a second of the launcher that started it.

    A launcher that is killed stops nothing: its processes would go on unseen, and the same command
    would find the run folder in use. They exit without saving, because the others of the job may no
    longer take part in a save; every file is whole at any moment, so the same command goes on from
    the last checkpoint. Without a launcher there is nothing to watch: the shell that started a
    command may end before it.

    Linux can send a signal when a parent ends, but does so too when only the thread that started
    this process ends, and not when `deepspeed` ends, which starts its processes through another.
    """
    launchers = _launchers() if "RANK" in os.environ else set()
    if launchers:
        Thread(target=_exit_without, args=(launchers,), daemon=True).start()


def _launchers() -> set[int]:
    """The program that started this process, where the environment shows that it is a launcher, and
    those that were started to start it: their command lines end with its own (`deepspeed`).

    Not shells, which may end when they have started a job.
    """
    import psutil

    nearest, found = not MARKS.isdisjoint(os.environ), set()
    words = [word for word in sys.argv[1:] if not word.startswith("--local")]
    for pid in _ancestors():
        with suppress(psutil.Error):
            program, *others = psutil.Process(pid).cmdline() or [""]
            if Path(program).name.endswith("sh"):
                continue
            if nearest or (words and others[-len(words) :] == words):
                found.add(pid)
            nearest = False
    return found


def _ancestors() -> list[int]:
    """The process that started this one, that one's, and so on. By number: `psutil` tells processes
    apart by the time of their start, which a clock that is set changes."""
    import psutil

    found, pid = [], os.getppid()
    with suppress(psutil.NoSuchProcess):  # it has just ended
        while pid:
            found.append(pid)
            pid = psutil.Process(pid).ppid()
    return found


def _exit_without(launchers: set[int]) -> None:
    """Exit once one of `launchers` is gone."""
    while not (gone := launchers.difference(_ancestors())):
        time.sleep(POLL)
    line = (
        f"error: process {rank()} of {world_size()} ends because its launcher (process "
        f"{', '.join(map(str, gone))}) is gone; the same command goes on from what was saved"
    )
    # beside this thread: a terminal that is stopped, or another thread at a print, must not hold it
    last_words = Thread(target=tell, args=(line,), daemon=True)
    last_words.start()
    last_words.join(1.0)
    os._exit(1)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """In a new process (`preexec_fn`): SIGKILL when the thread that started it ends, however it
    ends. The same command, started again, would find its work still under way.

    Elsewhere than on Linux the lock of its folder reports it.
    """
    if _LIBC is not None:
        _LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL)
