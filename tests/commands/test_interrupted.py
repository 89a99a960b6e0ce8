"""Real processes, really killed: what is left must lead to the very weights of a quiet run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspec.training.checkpoint import WEIGHTS, list_checkpoints, read_checkpoint, read_tensors
from tests.forked import Forked, command
from tests.jobs import (
    HAVE_DEEPSPEED,
    LAST,
    STEPS,
    assert_same_weights,
    open_process,
    rank_of,
    train_command,
    wait_for_step,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


def start(
    recipe: Path, out: Path, *words: str, processes: int | None = None
) -> subprocess.Popen[str] | Forked:
    """`deepspec train`, by torchrun where a number of processes is given."""
    if processes is None:
        return command("train", f"recipe={recipe}", f"out={out}", *words)
    launcher = ("--standalone", "--nproc-per-node", str(processes))
    return open_process(train_command(recipe, out, *words, launcher=launcher))


@pytest.mark.parametrize(
    "steps", [(3, 14), pytest.param((2, 7, 11, 15, 18), marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_ends_with_the_same_weights(
    steps: tuple[int, ...], recipe: Path, quiet: Path, tmp_path: Path
) -> None:
    out, rng = tmp_path / "killed", random.Random(0)
    for step in steps:
        process = start(recipe, out)
        wait_for_step(out, step, process)
        time.sleep(rng.uniform(0, 0.3))  # in a step, or in the middle of a save
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for folder in list_checkpoints(out / "checkpoints"):
            read_tensors(read_checkpoint(folder), WEIGHTS)  # whole, by its recorded hash
    last = start(recipe, out)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert "going on from" in output

    assert (out / LAST).read_bytes() == quiet.read_bytes()
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_signals_save_and_exit(recipe: Path, tmp_path: Path, number: int, code: int) -> None:
    process = start(recipe, tmp_path)
    wait_for_step(tmp_path, 2, process)
    os.kill(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert "Traceback" not in output
    saved = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert f"{saved.folder} is saved" in output
    assert 2 <= saved.step < STEPS


ENGINE = "zero3" if HAVE_DEEPSPEED else "zero0"


@pytest.mark.slow  # the short storm stops and resumes such a job too
def test_a_job_of_several_processes_stops_and_goes_on_as_another(
    recipe: Path, quiet: Path, tmp_path: Path
) -> None:
    """SIGTERM of one makes all save the same step; one process finishes it. (SIGKILL of a rank:
    tests/faults.)"""
    out, engine = tmp_path / "job", f"engine={ENGINE}"
    stopped = start(recipe, out, engine, processes=2)
    wait_for_step(out, 6, stopped)
    rank_of(stopped, 1).send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=60)[0]
    assert "exitcode  : 143" in output
    assert output.count("is saved and the same command goes on") == 1
    saved = read_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    assert 6 <= saved.step < STEPS
    assert f"{saved.folder} is saved" in output

    last = start(recipe, out)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert f"going on from {saved.folder}" in output
    assert_same_weights(out / LAST, quiet)


LAUNCHERS = {
    "deepspeed": "--num_accelerators 2 --module",
    "accelerate": (
        "launch --use_deepspeed --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port 0 -m"
    ),
}


@pytest.mark.slow  # torchrun is in the quick suite
@pytest.mark.skipif(not HAVE_DEEPSPEED, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_launchers(launcher: str, recipe: Path, tmp_path: Path) -> None:
    """torchrun is tested above; the others start the same two processes."""
    program = Path(sys.executable).with_name(launcher)
    words = [f"recipe={recipe}", f"out={tmp_path}", "engine=zero2", "training.max_steps=2"]
    command = [str(program), *LAUNCHERS[launcher].split(), "deepspec", "train", *words]
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"  # both start `python` from there
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checkpoint: ") == 1
    assert read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).step == 2
