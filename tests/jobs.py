"""A run small enough to be started, killed and launched in every way, and what all those share."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from deepspec.processes import die_with_parent
from deepspec.training.checkpoint import WEIGHTS, list_checkpoints

STEPS = 24
LAST = Path("checkpoints") / f"step-{STEPS:08d}" / WEIGHTS
HAVE_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
RECIPE = """\
defaults: [base, _self_]
target: {{path: {target}, dtype: float32, num_layer_ids: 3}}
data: {{path: [{prompts}], max_length: 128}}
regenerate: {{max_new_tokens: 24, batch_size: 4, temperature: 1.0}}
drafter: {{num_layers: 1, markov_rank: 8, block_size: 4}}
training:
  max_steps: {steps}
  epochs: 100
  batch_size: 4
  micro_batch_size: 2
  anchors_per_sample: 8
  precision: fp32
  save_every: 1
  evaluate_every: 5
  validation_samples: 2
engine: {{device: cpu}}
evaluation: {{enabled: false}}
"""


def write_recipe(folder: Path, target: Path) -> Path:
    """The recipe and its prompts, in `folder`."""
    prompts = folder / "prompts.jsonl"
    rows = ({"id": f"p{i}", "turns": [f"Say something about {i}."]} for i in range(14))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "short.yaml"
    path.write_text(RECIPE.format(target=target, prompts=prompts, steps=STEPS))
    return path


def train_command(
    recipe: Path, out: Path, *words: str, launcher: tuple[str, ...] = ()
) -> list[str]:
    """`deepspec train`, by the torchrun options `launcher` where there are any."""
    torchrun = ["-m", "torch.distributed.run", *launcher] if launcher else []
    command = [sys.executable, *torchrun, "-m", "deepspec", "train"]
    return [*command, f"recipe={recipe}", f"out={out}", *words]


def open_process(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """`command`, started, with all it says in one stream; it does not outlive the tests."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
        **options,
    )


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that have `folder`, or what lies in it, among their words."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


def all_gone(folder: Path, within: float = 20) -> bool:
    """Whether no process of `folder` is left in the end; those that nobody waited for count not."""
    deadline = time.monotonic() + within
    while left := processes_of(folder):
        if time.monotonic() > deadline:
            print("left:", *(process.cmdline() for process in left), sep="\n")
            return False
        time.sleep(0.02)
    return True


def kill_jobs(folder: Path) -> None:
    """What a test started and what works in its `folder`: no job that hangs outlives its test."""
    for process in {*psutil.Process().children(recursive=True), *processes_of(folder)}:
        with suppress(psutil.Error):  # it ends, or has ended, by itself
            if "deepspec" in process.cmdline():
                process.kill()


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL of a launcher and of what it launched, which would go on without it."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        with suppress(psutil.Error):
            one.kill()
    process.communicate()


def rank_of(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of `rank` under a launcher."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child
    raise AssertionError(f"no process has rank {rank}")


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until `step` is saved in the run folder `out`."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        found = list_checkpoints(out / "checkpoints")
        if found and int(found[-1].name.removeprefix("step-")) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"never got to step {step}: {process.communicate()[0]}")


def assert_same_weights(found: Path, expected: Path) -> None:
    """Up to the order of sums, which the number of processes changes."""
    wanted = load_file(expected)
    for key, tensor in load_file(found).items():
        scale = float(wanted[key].abs().max())
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-4, atol=1e-4 * scale)
