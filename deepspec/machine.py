"""What this machine is: written into every report, and the first thing `deepspec doctor` shows."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from deepspec.errors import MissingDependencyError

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "hydra-core")


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def import_deepspeed(who: str, instead: str) -> None:
    """Import it for `who` wants it. Raises MissingDependencyError with what to do `instead`."""
    try:
        import deepspeed
    except ImportError as error:
        raise MissingDependencyError(
            f"{who} needs DeepSpeed; run: pip install 'deepspec[deepspeed]', or {instead}"
        ) from error
    # compiled for 20 s at the first start, needs a compiler and hangs on a stale lock
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory (GiB), accelerators, and versions of what computes."""
    import torch

    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in PACKAGES},
    }


def _processor() -> str:
    """The processor's name; `platform` does not know it on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
