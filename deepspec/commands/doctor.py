"""Say what this machine has, what would fail, and how to mend it.

Exits with 2 when something that every run needs is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SETTINGS = "none"
EXAMPLES = """\
  deepspec doctor
"""
HAS_CONFIG = False


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, note (something optional is not there) or fault."""

    what: str
    found: str
    state: str = "ok"
    mend: str = ""


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Print a table of findings; exit with 2 when there is a fault."""
    from rich.table import Table
    from rich.text import Text

    from deepspec.errors import ConfigError
    from deepspec.streams import visible
    from deepspec.terminal import Terminal

    if settings:
        raise ConfigError(f"deepspec doctor takes no settings; found {' '.join(settings)}")
    findings = [*_machine(), *_optional(), *_network(), *_data()]
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "to mend it"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "fault": "red"}
    for finding in findings:
        state = Text(finding.state, colours[finding.state])
        table.add_row(state, *map(visible, (finding.what, finding.found, finding.mend)))
    Terminal().print(table)
    if any(finding.state == "fault" for finding in findings):
        sys.exit(2)


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    from deepspec.machine import PACKAGES, describe_machine, installed_version

    machine = describe_machine()
    yield Finding("python", machine["python"])
    yield Finding("processor", f"{machine['processor']}, {machine['cores']} cores")
    free = psutil.virtual_memory().available / 2**30
    low = free < 2
    yield Finding(
        "memory",
        f"{machine['memory_gib']} GiB, {free:.1f} GiB free",
        "note" if low else "ok",
        "recipe=tiny wants 2 GiB: close something" if low else "",
    )
    disk = shutil.disk_usage(".").free / 2**30
    yield Finding(
        "disk here",
        f"{disk:.1f} GiB free",
        "note" if disk < 1 else "ok",
        "checkpoints need room: set out= to another disk" if disk < 1 else "",
    )
    for package in PACKAGES:
        version = installed_version(package)
        mend = "" if version else f"pip install {package}"
        yield Finding(package, version or "missing", "ok" if version else "fault", mend)
    if torch.cuda.is_available():
        for name in machine["accelerators"]:
            yield Finding("accelerator", name)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("bf16", "native" if bf16 else "emulated", "ok" if bf16 else "note")
    else:
        built = torch.version.cuda
        yield Finding(
            "accelerator",
            "none that torch sees",
            "note",
            f"torch is built for CUDA {built}: check the driver with nvidia-smi"
            if built
            else "this torch is a CPU build, enough for recipe=tiny",
        )


def _optional() -> Iterator[Finding]:
    from deepspec.machine import installed_version

    wanted = {
        "deepspeed": "ZeRO engines: pip install 'deepspec[deepspeed]'",
        "wandb": "tracking.trackers=[wandb]: pip install 'deepspec[wandb]'",
        "uvicorn": "deepspec serve-target: pip install 'deepspec[serve]'",
        "tensorboard": "tracking.trackers=[tensorboard]: pip install 'deepspec[tensorboard]'",
    }
    for package, purpose in wanted.items():
        version = installed_version(package)
        present = version is not None and importlib.util.find_spec(package) is not None
        yield Finding(
            package,
            version or "not installed",
            "ok" if present else "note",
            "" if present else f"only for {purpose}",
        )
    compiler = shutil.which("c++") or shutil.which("g++")
    yield Finding(
        "C++ compiler",
        compiler or "none",
        "ok" if compiler else "note",
        "" if compiler else "only for torch.compile and DeepSpeed: install g++",
    )


def _network() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    from deepspec.hub import look_at_hub

    hub, mend = look_at_hub(), ""
    if constants.is_offline_mode():
        mend = "unset HF_HUB_OFFLINE to fetch targets and benchmarks"
    elif not hub.answers:
        mend = "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 takes what is cached at once"
    yield Finding(
        "hub",
        f"{hub.found}, cache in {constants.HF_HUB_CACHE}",
        "ok" if hub.answers else "note",
        mend,
    )
    token = get_token() is not None
    yield Finding(
        "hub token",
        "present" if token else "none",
        "ok" if token else "note",
        "" if token else "only for gated models: run hf auth login",
    )
    if os.environ.get("WANDB_MODE", "") == "online":
        yield Finding("wandb", "WANDB_MODE=online", "note", "without a network a run waits for it")


def _data() -> Iterator[Finding]:
    from deepspec.config.resources import resource

    for name in ("recipes", "configs", "data/tiny_target/model.safetensors", "data/prompts"):
        present = resource(name).exists()
        yield Finding(
            name,
            str(resource(name)) if present else "missing",
            "ok" if present else "fault",
            "" if present else "the installation is incomplete: install deepspec again",
        )
