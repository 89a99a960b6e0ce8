"""Honest clients of a server beside hostile ones: answered as fast, and the server does not grow.

The slow test prints the table: pytest -s -m slow tests/features/test_siege.py
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save

from deepspec.config.schema import ServeConfig
from deepspec.targets import Target
from tests.features import hostile
from tests.features.test_remote import (  # noqa: F401
    StartServers,
    recipe,
    serving,
    start_servers,
)

IDS = torch.arange(40, dtype=torch.int32)
EVERY = 8.0  # seconds between the requests of one of a hundred: far from what two cores can
BODY = save({"input_ids": IDS, "lengths": torch.tensor([len(IDS)])})


async def honest(address: str, clients: int, seconds: float, every: float) -> list[float]:
    """Seconds of each answer; `clients` ask each `every` seconds, from addresses of their own."""
    found: list[float] = []

    async def ask(number: int) -> None:
        source = httpx.AsyncHTTPTransport(local_address=f"127.0.2.{number + 1}")
        async with httpx.AsyncClient(timeout=30, transport=source) as http:
            await ask_by(http, number)

    async def ask_by(http: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(every * number / clients)
        for _ in range(max(1, round(seconds / every))):
            begun = time.monotonic()
            while True:
                answer = await http.post(f"{address}/v1/features", content=BODY)
                if answer.status_code != 503:
                    break
                await asyncio.sleep(1)  # as it is told to; this counts as time without an answer
            assert answer.status_code == 200, answer.text
            found.append(time.monotonic() - begun)
            await asyncio.sleep(max(0, begun + every - time.monotonic()))

    await asyncio.gather(*map(ask, range(clients)))
    return found


def besieged(
    address: str, clients: int, seconds: float, every: float
) -> tuple[list[float], dict[str, dict[str, int]]]:
    """As `honest`, beside as many hostile clients; what those got."""
    words = [address.rsplit(":", 1)[1], str(clients), str(seconds)]
    command = [sys.executable, str(Path(hostile.__file__)), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attackers:
        found = asyncio.run(honest(address, clients, seconds, every))
        output, _ = attackers.communicate(timeout=60)
    assert attackers.returncode == 0
    return found, json.loads(output)


def refused(got: dict[str, dict[str, int]]) -> None:
    """Each kind of attack was made, and none was answered with features."""
    assert set(got) >= {"garbage", "too large", "abandoned", "wrong tokens", "gzip"}
    for kind, answers in got.items():
        assert "200" not in answers, kind
        assert "500" not in answers, kind


def test_a_short_siege(target: Target) -> None:
    with serving(target, ServeConfig(request_seconds=0.5)) as address:
        asyncio.run(honest(address, 7, 1, 0.25))
        found, got = besieged(address, 14, 2, 0.5)
    refused(got)
    assert set(got) == set(hostile.KINDS)
    assert len(found) == 14 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "seconds"), [(100, 60.0)])
def test_a_siege_of_two_hundred(
    start_servers: StartServers, clients: int, seconds: float  # noqa: F811
) -> None:  # fmt: skip
    ((process, address),) = start_servers(1)
    server = psutil.Process(process.pid)
    asyncio.run(honest(address, clients, EVERY, EVERY))
    alone = asyncio.run(honest(address, clients, seconds / 2, EVERY))
    before = server.memory_info().rss
    found, got = besieged(address, clients, seconds, EVERY)
    after = server.memory_info().rss
    again = asyncio.run(honest(address, clients, seconds / 2, EVERY))
    print()
    for name, times in (("alone", alone), ("under attack", found), ("alone again", again)):
        tenth = statistics.quantiles(times, n=20)
        print(f"{name:14}{len(times):6} answers  median {1e3 * tenth[9]:6.1f} ms"
              f"  p95 {1e3 * tenth[18]:6.1f} ms")  # fmt: skip
    print(f"RSS           {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
    for kind, answers in sorted(got.items()):
        print(f"{kind:14}{answers}")
    refused(got)
    assert statistics.median(found) < 2 * statistics.median(alone) + 0.005
    assert after - before < 64 * 2**20
