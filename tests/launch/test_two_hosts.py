"""Two hosts, each a network namespace with an address of its own, and a cable between them.

One is cut off in the middle of a training. That closes no connection: all that either side can
notice is silence.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.training.checkpoint import list_checkpoints
from tests.jobs import (
    HAVE_DEEPSPEED,
    LAST,
    STEPS,
    assert_same_weights,
    open_process,
    wait_for_step,
)

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"
PATIENCE = 30  # engine.timeout; the two must also start and compute a step within it
TEARDOWN = 30  # the trainers' own exit and torchrun's
pytestmark = pytest.mark.usefixtures("nothing_left")


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


class Host:
    """One end of the cable."""

    def __init__(self, rank: int) -> None:
        self.rank, self.name = rank, f"deepspec-{os.getpid()}-{rank}"
        self.device, self.address = f"cable{rank}", f"10.87.0.{1 + rank}"

    def link(self, state: str) -> None:
        assert ip("-n", self.name, "link", "set", self.device, state).returncode == 0

    def train(self, first: Host, recipe: Path, out: Path) -> subprocess.Popen[str]:
        """The command of the launchers' table, as this node of two."""
        environment = {
            "NODES": "2",
            "NODE_RANK": str(self.rank),
            "MASTER_ADDR": first.address,
            "PROCESSES": "1",
            "PYTHON": sys.executable,
            "GLOO_SOCKET_IFNAME": self.device,  # this machine's name is no address in a namespace
        }
        command = ["ip", "netns", "exec", self.name, "env"]
        command += [f"{key}={value}" for key, value in environment.items()]
        words = [str(recipe), f"out={out}", f"engine.timeout={PATIENCE}"]
        return open_process([*command, str(LAUNCHER), *words])


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Both, connected; gone afterwards with whatever still runs in them."""
    pair = Host(0), Host(1)
    first, second = pair
    try:
        for host in pair:
            made = ip("netns", "add", host.name)
            if made.returncode:
                pytest.skip(f"no network namespaces (they need root): {made.stderr.strip()}")
        ends = [first.device, "netns", first.name, "type", "veth"]
        ends += ["peer", "name", second.device, "netns", second.name]
        assert ip("link", "add", *ends).returncode == 0
        for host in pair:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.link("up")
        yield pair
    finally:
        for host in pair:
            for pid in ip("netns", "pids", host.name).stdout.split():
                os.kill(int(pid), 9)
            ip("netns", "del", host.name)


@pytest.mark.skipif(not HAVE_DEEPSPEED, reason="DeepSpeed is not installed")
def test_a_host_that_is_cut_off_ends_both_sides_and_the_same_command_goes_on(
    hosts: tuple[Host, Host], recipe: Path, quiet: Path, tmp_path: Path
) -> None:
    def start() -> list[subprocess.Popen[str]]:
        return [host.train(hosts[0], recipe, tmp_path) for host in hosts]

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
