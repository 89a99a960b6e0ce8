"""Which of the job's processes this is, by the variables that every launcher sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta


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
