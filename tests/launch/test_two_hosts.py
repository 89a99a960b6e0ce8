"""One of two hosts is cut off in the middle of a training. That closes no connection: all that
either side can notice is silence."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.training.checkpoint import list_checkpoints
from tests.hosts import Host, connected
from tests.jobs import HAVE_DEEPSPEED, LAST, STEPS, assert_same_weights, wait_for_step

PATIENCE = 30  # engine.timeout; the two must also start and compute a step within it
TEARDOWN = 30  # the trainers' own exit and torchrun's
pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with connected() as pair:
        yield pair


@pytest.mark.slow  # waits for timeouts
@pytest.mark.skipif(not HAVE_DEEPSPEED, reason="DeepSpeed is not installed")
def test_a_host_that_is_cut_off_ends_both_sides_and_the_same_command_goes_on(
    hosts: tuple[Host, Host], recipe: Path, quiet: Path, tmp_path: Path
) -> None:
    def start() -> list[subprocess.Popen[str]]:
        words = (recipe, tmp_path, f"engine.timeout={PATIENCE}")
        return [host.train(hosts[0], *words) for host in hosts]

    jobs = start()
    wait_for_step(tmp_path, 3, jobs[0])
    hosts[1].link("down")
    begun = time.monotonic()
    for rank, job in enumerate(jobs):
        output = job.communicate(timeout=PATIENCE + TEARDOWN)[0]
        print(f"node {rank} ended {time.monotonic() - begun:.1f} s after the cut")
        assert job.returncode != 0
        assert output.count(f"error: process {rank} of 2 lost contact with another one") == 1
        assert "the same command goes on from the last checkpoint" in output
        assert f"rank{rank}]: Traceback" not in output
    saved = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert int(saved.name.removeprefix("step-")) < STEPS

    hosts[1].link("up")
    jobs = start()
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert f"going on from {saved}" in outputs[0]
    assert_same_weights(tmp_path / LAST, quiet)
