"""Feeds damaged input to a reader in a forked process, within a time and a memory."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10
BYTES = 2**31
ODD = (None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, "", "\0", "../x", [], {}, [[]], "\ud800")
PIECES = (
    b"[" * 5000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b"\0",
    b"\xff",
    b"NaN",
    b"-",
    b'"',
    b"}",
    b"\n",
)


@dataclass(frozen=True)
class Reader:
    """`read` takes a folder and the bytes to read; it may raise `allowed` alone. `valid`: inputs
    to damage."""

    read: Callable[[Path, bytes], object]
    valid: Sequence[bytes]
    allowed: Callable[[Exception], bool]


def damaged(draw: random.Random, valid: Sequence[bytes]) -> bytes:
    """One of `valid` with one to three faults: of its JSON value, where it is one, or its bytes."""
    raw = draw.choice(valid)
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.6:
            with suppress(ValueError, RecursionError):  # no JSON: its bytes are damaged alone
                raw = json.dumps(_value(draw, json.loads(raw))).encode()
        if draw.random() < 0.5:
            raw = _bytes(draw, raw, draw.choice(valid))
    return raw


def _value(draw: random.Random, value: Any) -> Any:
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if draw.random() < 0.15:
            del value[key]
        else:
            value[key] = _value(draw, value[key])
        return value
    return draw.choice((*ODD, [value], {"a": value}, str(value)))


def _bytes(draw: random.Random, raw: bytes, other: bytes) -> bytes:
    at, to = sorted(draw.randint(0, len(raw)) for _ in range(2))
    start = draw.randint(0, len(other))
    flipped = bytes([raw[at] ^ (1 << draw.randrange(8))]) if at < len(raw) else b"x"
    middle = draw.choice((b"", flipped, raw[at:to] * 2, draw.choice(PIECES), other[start:]))
    return raw[:at] + middle + raw[draw.choice((at, at + 1, to)) :]


def failures(reader: Reader, folder: Path, seed: int, seconds: float) -> list[str]:
    """Feed `reader` for `seconds`; return what went wrong, once a kind, with its smallest input.

    Inputs lie in `folder` as they are read, so one that ends the process is there too.
    """
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reading)
        try:
            lines = _feed(reader, folder, seed, seconds)
        except BaseException:  # of the harness
            lines = [traceback.format_exc()]
        os.write(writing, "\n".join(lines)[:60000].encode("utf-8", "replace"))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read().decode().splitlines()
    _, status = os.waitpid(pid, 0)
    if status:
        found.append(f"the process ended with status {status} at {folder / 'input'}")
    return found


def _feed(reader: Reader, folder: Path, seed: int, seconds: float) -> list[str]:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _late)
    draw, end = random.Random(seed), time.monotonic() + seconds
    smallest: dict[str, bytes] = {}
    while time.monotonic() < end:
        raw = damaged(draw, reader.valid)
        (folder / "input").write_bytes(raw)
        kind = _outcome(reader, folder, raw)
        if kind and len(raw) < len(smallest.get(kind, raw + b"x")):
            smallest[kind] = raw
    lines = []
    for number, (kind, raw) in enumerate(smallest.items()):
        file = folder / f"failing-{number}"
        file.write_bytes(raw)
        lines.append(f"{kind}: {file} ({raw[:120]!r})")
    return lines


def _outcome(reader: Reader, folder: Path, raw: bytes) -> str | None:
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(folder, raw)
    except Exception as error:
        if reader.allowed(error):
            return None
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _late(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")
