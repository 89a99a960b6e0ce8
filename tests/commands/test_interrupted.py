"""Real processes, really killed: what is left must lead to the very weights of a quiet run."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from deepspec.training.checkpoint import WEIGHTS, list_checkpoints, read_checkpoint, read_tensors

STEPS = 24
LAST = Path("checkpoints") / f"step-{STEPS:08d}" / WEIGHTS
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


@pytest.fixture(scope="module")
def recipe(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    prompts = folder / "prompts.jsonl"
    rows = ({"id": f"p{i}", "turns": [f"Say something about {i}."]} for i in range(14))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "short.yaml"
    path.write_text(RECIPE.format(target=target_folder, prompts=prompts, steps=STEPS))
    return path


def start(
    recipe: Path, out: Path, *words: str, processes: int | None = None
) -> subprocess.Popen[str]:
    """`deepspec train`, by torchrun where a number of processes is given."""
    launcher = [] if processes is None else ["-m", "torch.distributed.run", "--standalone"]
    if processes is not None:
        launcher += ["--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "deepspec", "train"]
    command += [f"recipe={recipe}", f"out={out}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A job that hangs fails its test, and does not outlive it."""
    yield
    for child in psutil.Process().children(recursive=True):
        if "deepspec" in child.cmdline():
            child.kill()


def rank_of(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of `rank` under torchrun."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no process has rank {rank}")


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        found = list_checkpoints(out / "checkpoints")
        if found and int(found[-1].name.removeprefix("step-")) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"never got to step {step}: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def quiet(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last weights of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("quiet")
    process = start(recipe, out)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return out / LAST


def test_killed_at_any_moment_ends_with_the_same_weights(
    recipe: Path, quiet: Path, tmp_path: Path
) -> None:
    out, rng = tmp_path / "killed", random.Random(0)
    for step in (3, 11, 18):
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


ENGINE = "zero3" if importlib.util.find_spec("deepspeed") else "zero0"


def test_a_job_of_several_processes_loses_one_and_goes_on_as_another(
    recipe: Path, quiet: Path, tmp_path: Path
) -> None:
    """SIGKILL of a rank ends the job and names it; SIGTERM of one makes all save; one finishes."""
    out, engine = tmp_path / "job", f"engine={ENGINE}"
    killed = start(recipe, out, engine, processes=2)
    wait_for_step(out, 4, killed)
    rank_of(killed, 1).send_signal(signal.SIGKILL)
    begun = time.monotonic()
    output = killed.communicate(timeout=60)[0]
    assert time.monotonic() - begun < 30
    assert killed.returncode != 0
    assert "rank      : 1" in output
    assert "SIGKILL" in output

    stopped = start(recipe, out, engine, processes=2)
    wait_for_step(out, 10, stopped)
    rank_of(stopped, 1).send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=60)[0]
    assert "exitcode  : 143" in output
    assert output.count("is saved and the same command goes on") == 1
    saved = read_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    assert 10 <= saved.step < STEPS
    assert f"{saved.folder} is saved" in output

    last = start(recipe, out)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert f"going on from {saved.folder}" in output
    expected = load_file(quiet)
    for key, tensor in load_file(out / LAST).items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-4 * scale)


LAUNCHERS = {
    "deepspeed": "--num_accelerators 2 --module",
    "accelerate": (
        "launch --use_deepspeed --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port 0 -m"
    ),
}


@pytest.mark.skipif(ENGINE == "zero0", reason="DeepSpeed is not installed")
@pytest.mark.parametrize("launcher", LAUNCHERS)
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
