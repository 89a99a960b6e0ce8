"""Which of the job's processes this is, by the variables that every launcher sets."""

from __future__ import annotations

import os


def rank() -> int:
    """0 in the process that writes and prints; without a launcher there is no other."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Which of this machine's devices is ours."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Processes of the job, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))
