"""Real processes, really killed: what is left must lead to the very weights of a quiet run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspec.training.checkpoint import WEIGHTS, list_checkpoints, read_checkpoint, read_tensors

STEPS = 24
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


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deepspec", "train", f"recipe={recipe}", f"out={out}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        found = list_checkpoints(out / "checkpoints")
        if found and int(found[-1].name.removeprefix("step-")) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"never got to step {step}: {process.communicate()[0]}")


def test_killed_at_any_moment_ends_with_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    quiet = start(recipe, tmp_path / "quiet")
    output = quiet.communicate(timeout=300)[0]
    assert quiet.returncode == 0, output

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

    name = Path("checkpoints") / f"step-{STEPS:08d}" / WEIGHTS
    assert (out / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
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
