"""What this machine is: written into every report, and the first thing `deepspec doctor` shows."""

from __future__ import annotations

import functools
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from deepspec.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
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


# dense bf16, operations a second by a part of the name (from the makers' data sheets)
GPU_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The most operations per second of `device`: of a GPU by its maker, None for others and for
    fp32; of processors as `processor_flops` measures it."""
    import torch

    if device.type == "cpu":
        return processor_flops()
    name = torch.cuda.get_device_name(device)
    known = (peak for part, peak in GPU_PEAKS.items() if part in name)
    return next(known, None) if precision == "bf16" else None


def processor_flops(size: int = 512) -> float:
    """Measure the operations per second of a matrix product on the processors (fp32, a moment): too
    few while other work uses them."""
    import torch

    matrix = torch.ones(size, size)
    best = math.inf
    for _ in range(12):  # each so short that one of them has the processor for itself
        begun = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


@functools.cache
def lacks_bf16() -> bool:
    """Whether this machine's processors emulate bfloat16, which takes several times as long as
    float32. False where the system does not list their features."""
    flags = _cpuinfo("flags") or _cpuinfo("Features")  # x86, ARM
    return flags is not None and not BF16_FLAGS & set(flags.split())


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
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str | None:
    """The value of `key` for the first processor in Linux's list; None where there is none."""
    if not CPUINFO.is_file():
        return None
    for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
