"""Hostile clients of a feature server: python hostile.py PORT CLIENTS SECONDS

A process of its own, of the standard library alone, so that it takes no time from the honest ones.
Prints {kind: {what the client got: how often}} as JSON.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import sys
import time
from collections import Counter, defaultdict

VALID, WRONG = 40, 10**9
KINDS = ("slow headers", "slow body", "garbage", "too large", "abandoned", "wrong tokens", "gzip")
PAUSE = 0.5


def body(token: int) -> bytes:
    """A request by hand: 40 tokens in one sample."""
    header = json.dumps(
        {
            "input_ids": {"dtype": "I32", "shape": [40], "data_offsets": [0, 160]},
            "lengths": {"dtype": "I32", "shape": [1], "data_offsets": [160, 164]},
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<41i", *[token] * 40, 40)


def post(content: bytes, length: int | None = None, more: str = "") -> bytes:
    size = len(content) if length is None else length
    head = f"POST /v1/features HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n{more}\r\n"
    return head.encode() + content


FIRST = {
    "slow headers": b"POST /v1/features HTTP/1.1\r\nX: ",
    "slow body": post(b"abc", 1000),
    "garbage": bytes(range(256)) + b"\r\n\r\n",
    "too large": post(b"", 10**9) + bytes(10**5),
    "abandoned": post(body(VALID)),
    "wrong tokens": post(body(WRONG)),
    "gzip": post(gzip.compress(bytes(10**7)), more="Content-Encoding: gzip\r\n"),
}


async def attack(kind: str, port: int, source: str) -> str:
    """One connection; what the server answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        writer.write(FIRST[kind])
        await writer.drain()
        if kind == "abandoned":
            return "left"
        answer = asyncio.create_task(reader.read(20))
        while kind.startswith("slow") and not answer.done():
            writer.write(b"x")
            await asyncio.wait((answer,), timeout=0.2)
        got = (await asyncio.wait_for(answer, 30)).split()
        return got[1].decode() if len(got) > 1 else "closed"
    finally:
        writer.transport.abort()


async def client(number: int, port: int, last: float, got: dict[str, Counter[str]]) -> None:
    kind = KINDS[number % len(KINDS)]
    source = f"127.0.1.{1 + number % len(KINDS)}"
    while (left := last - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(left + 0.1):
                found = await attack(kind, port, source)
        except TimeoutError:
            return  # the end of the test, not the server's doing
        except OSError:
            found = "reset"
        got[kind][found] += 1
        await asyncio.sleep(PAUSE)


async def main(port: int, clients: int, seconds: float) -> None:
    got: dict[str, Counter[str]] = defaultdict(Counter)
    last = time.monotonic() + seconds
    await asyncio.gather(*(client(number, port, last, got) for number in range(clients)))
    print(json.dumps(got))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
