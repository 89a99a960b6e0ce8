"""Two hosts, each a network namespace with an address of its own, and a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.jobs import open_process

LAUNCHER = Path(__file__).resolve().parents[1] / "launch" / "torchrun.sh"


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


class Host:
    """One end of the cable."""

    def __init__(self, rank: int) -> None:
        self.rank, self.name = rank, f"deepspec-{os.getpid()}-{rank}"
        self.device, self.address = f"cable{rank}", f"10.87.0.{1 + rank}"

    def link(self, state: str) -> None:
        assert ip("-n", self.name, "link", "set", self.device, state).returncode == 0

    def train(self, first: Host, recipe: Path, out: Path, *words: str) -> subprocess.Popen[str]:
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
        return open_process([*command, str(LAUNCHER), str(recipe), f"out={out}", *words])


@contextmanager
def connected() -> Iterator[tuple[Host, Host]]:
    """Both, connected; gone afterwards with whatever still runs in them. Skips the test where
    namespaces cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: there is no `ip` program (iproute2)")
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
