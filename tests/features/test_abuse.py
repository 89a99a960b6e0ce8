"""A feature server under abuse, on real sockets; each test ends with an honest answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import torch
from safetensors.torch import save

from deepspec.config.schema import ServeConfig
from deepspec.features import connections
from deepspec.features.turns import Turns
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import Target
from tests.features.test_remote import serving

IDS = torch.tensor([5, 6, 7, 8], dtype=torch.int32)
GOOD = {"input_ids": IDS, "lengths": torch.tensor([3, 1])}
SECONDS = 0.4
LIMITS = {"request_seconds": SECONDS, "max_body_mib": 1, "bodies_mib": 4}


def request(**changes: torch.Tensor | None) -> bytes:
    tensors = {**GOOD, **changes}
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FOUR = {"input_ids": entry("I32", [4], 0, 16), "lengths": entry("I32", [1], 16, 20)}
BAD = {
    **{
        f"lengths {name}": request(lengths=value)
        for name, value in {
            "float": torch.tensor([4.0]),
            "fraction": torch.tensor([1.5, 2.5]),
            "nan": torch.tensor([float("nan")]),
            "bool": torch.tensor([True] * 4),
            "0-dim": torch.tensor(4),
            "2-D": torch.tensor([[4]]),
            "complex": torch.tensor([4 + 0j]),
            "negative": torch.tensor([-1, 5]),
            "zero": torch.tensor([4, 0]),
            "overflow": torch.tensor([2**62, 2**62, 2**62, 2**62, 4]),
            "empty": torch.zeros(0, dtype=torch.int64),
            "uint8": torch.tensor([4], dtype=torch.uint8),
            "missing": None,
        }.items()
    },
    **{
        f"ids {name}": request(input_ids=value)
        for name, value in {
            "fraction": torch.tensor([1.9, 2.9, 3.2, 4.7]),
            "complex": torch.tensor([1 + 1j] * 4),
            "2-D": IDS[None],
            "bool": torch.tensor([True] * 4),
            "empty": IDS[:0],
            "missing": None,
            "large": torch.tensor([2**40, 1, 1, 1]),
            "negative": torch.tensor([-1, 1, 1, 1]),
        }.items()
    },
    "another tensor": request(more=torch.ones(1)),
    "mask of int8": request(loss_mask=torch.ones(4, dtype=torch.int8)),
    "mask of float": request(loss_mask=torch.ones(4)),
    "mask too short": request(loss_mask=torch.ones(3).bool()),
    "mask of twos": raw(
        {**FOUR, "loss_mask": entry("BOOL", [4], 20, 24)},
        bytes([5, 0, 0, 0] * 4 + [4, 0, 0, 0] + [2] * 4),
    ),
    "header beyond the body": raw(FOUR, length=2**40),
    "header of all bits": b"\xff" * 64,
    "header too long": raw(b" " * 5000 + json.dumps(FOUR).encode(), bytes(20)),
    "header deep": raw(b"[" * 4000),
    "header no JSON": raw(b"\x00" * 40),
    "overlap": raw({**FOUR, "lengths": entry("I32", [1], 12, 16)}, bytes(16)),
    "hole": raw({**FOUR, "lengths": entry("I32", [1], 20, 24)}, bytes(24)),
    "size of nothing": raw({**FOUR, "lengths": entry("I32", [0], 16, 16)}, bytes(16)),
    "shape that overflows": raw({**FOUR, "lengths": entry("I32", [2**40] * 2, 16, 20)}, bytes(20)),
    "dtype of torch's future": raw({**FOUR, "lengths": entry("F4", [8], 16, 20)}, bytes(20)),
    "dtype unknown": raw({**FOUR, "lengths": entry("X9", [1], 16, 20)}, bytes(20)),
    "too few bytes": b"\x01",
}  # fmt: skip


@pytest.fixture(scope="module")
def address(target: Target) -> Iterator[str]:
    with serving(target, ServeConfig(**LIMITS)) as url:
        yield url


def is_served(address: str, **options: object) -> bool:
    with httpx.Client(timeout=10, **options) as client:
        answer = client.post(f"{address}/v1/features", content=request())
    return answer.status_code == 200


def metrics(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


@contextmanager
def connected(
    address: str, sent: bytes = b"", source: str = "127.0.0.1"
) -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5, (source, 0)) as own:
        own.sendall(sent)
        yield own


def head(length: int, more: str = "") -> bytes:
    return (
        f"POST /v1/features HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()
    )


def until(happens: Callable[[], bool], seconds: float = 5) -> bool:
    last = time.monotonic() + seconds
    while not happens() and time.monotonic() < last:
        time.sleep(0.01)
    return happens()


def seconds_open(own: socket.socket, drip: bytes = b"") -> float:
    """Until the server closes; meanwhile `drip` is sent again and again."""
    begun = time.monotonic()
    own.settimeout(0.05)
    while time.monotonic() < begun + 5:
        try:
            if drip:
                own.sendall(drip)
            if not own.recv(2**16):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - begun


def test_malformed_requests_are_refused(address: str) -> None:
    with httpx.Client() as client:
        for name, body in BAD.items():
            answer = client.post(f"{address}/v1/features", content=body)
            assert answer.status_code == 400, name
            assert answer.text.isprintable(), name
            assert len(answer.text) < 500, name
    assert is_served(address)


def test_a_body_is_measured_before_it_is_read(address: str) -> None:
    for length, status in ((2**20 + 1, b"413"), (10**18, b"413"), (10**40, b"400")):
        with connected(address, head(length)) as own:
            assert own.recv(20).split()[1] == status
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with connected(address, chunked) as own:
        assert own.recv(20).split()[1] == b"411"
    for seconds in ("nan", "-1", "0", "soon"):
        headers = {"x-seconds-left": seconds}
        answer = httpx.post(f"{address}/v1/features", content=request(), headers=headers)
        assert answer.status_code == 400
    assert is_served(address)


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (b"POST /v1/feat", b""),
        (b"POST /v1/features HTTP/1.1\r\nX: ", b"x"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"G"),
        (head(900), b"x"),  # 408
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b"x"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b"x"),
        (b"\x00\xff garbage\r\n\r\n", b""),
    ],
    ids=[
        "nothing", "half a line", "slow headers", "idle", "a slow second", "slow body",
        "refused body", "unread body", "garbage",
    ],
)  # fmt: skip
def test_slow_clients_are_cut_off(address: str, sent: bytes, drip: bytes) -> None:
    with connected(address, sent) as own:
        assert seconds_open(own, drip) < 2 * SECONDS + 1.5
    assert is_served(address)


def test_slow_bodies_do_not_fill_the_queue(target: Target) -> None:
    config = ServeConfig(queue=2, **LIMITS | {"request_seconds": 2.0})
    with serving(target, config) as address, ExitStack() as held:
        slow = [held.enter_context(connected(address, head(1000) + b"abc")) for _ in range(32)]
        assert until(lambda: metrics(address)["deepspec_body_bytes"] == 3 * len(slow))
        assert is_served(address)
        assert metrics(address)["deepspec_waiting"] == 0


def test_bodies_have_a_budget(target: Target) -> None:
    """What two clients have sent leaves no room for a third until they have gone."""
    large = bytes(900_000)
    with serving(target, ServeConfig(**LIMITS | {"bodies_mib": 1})) as address:
        with connected(address, head(1_000_000) + large, "127.0.0.2"):
            assert until(lambda: metrics(address)["deepspec_body_bytes"] == len(large))
            answer = httpx.post(f"{address}/v1/features", content=large)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert is_served(address)  # it is small
        assert until(lambda: metrics(address)["deepspec_body_bytes"] == 0)
    with (  # of 4 MiB a client has a quarter
        serving(target, ServeConfig(**LIMITS)) as address,
        connected(address, head(1_000_000) + large, "127.0.0.2"),
    ):
        assert until(lambda: metrics(address)["deepspec_body_bytes"] == len(large))
        with connected(address, head(900_000), "127.0.0.2") as own:
            assert own.recv(20).split()[1] == b"503"
        answer = httpx.post(f"{address}/v1/features", content=large)
        assert answer.status_code == 400


def test_connections_are_limited(target: Target) -> None:
    config = ServeConfig(connections=5, connections_per_client=3, **LIMITS | {"request_seconds": 3})
    with serving(target, config) as address, ExitStack() as held:
        for _ in range(3):
            held.enter_context(connected(address, source="127.0.0.2"))
        with connected(address, source="127.0.0.2") as own:
            assert own.recv(20).split()[1] == b"503"
        assert is_served(address)
        assert metrics(address)['deepspec_lost_connections_total{reason="too many"}'] == 1
        for number in (3, 4):
            held.enter_context(connected(address, source=f"127.0.0.{number}"))
        with connected(address) as own:
            assert own.recv(20).split()[1] == b"503"
        held.close()
        assert until(lambda: is_served(address))


def test_an_answer_that_is_not_read_is_dropped(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = TargetFeatures(torch.zeros(4, 3_000_000), torch.zeros(4, 1))
    monkeypatch.setattr(target, "features", lambda *_: large)
    monkeypatch.setattr(connections, "BYTES_PER_SECOND", 2**30)
    with serving(target, ServeConfig(**LIMITS)) as address:
        body = request()
        with connected(address, head(len(body)) + body):
            lost = 'deepspec_lost_connections_total{reason="unread answer"}'
            assert until(lambda: metrics(address).get(lost) == 1)
        assert is_served(address)


@pytest.fixture
def slow(target: Target, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A target that computes nothing before this event."""
    compute, event = target.features, threading.Event()

    def wait(samples: list[Sample], all_finals: bool) -> TargetFeatures:
        event.wait(20)
        return compute(samples, all_finals)

    monkeypatch.setattr(target, "features", wait)
    return event


def test_requests_whose_client_has_gone_are_not_computed(
    target: Target, slow: threading.Event
) -> None:
    body = request()
    with serving(target, ServeConfig(**LIMITS)) as address:
        with ExitStack() as held:
            for count in range(1, 7):
                held.enter_context(connected(address, head(len(body)) + body))
                assert until(lambda: metrics(address)["deepspec_waiting"] == count)  # noqa: B023
        assert until(lambda: metrics(address)["deepspec_waiting"] == 1)  # it is computed already
        late = httpx.post(f"{address}/v1/features", content=body, headers={"x-seconds-left": "0.2"})
        assert late.status_code == 504
        slow.set()
        assert is_served(address)
        found = metrics(address)
        assert found["deepspec_tokens_total"] == 2 * len(IDS)
        assert found['deepspec_requests_total{status="499"}'] == 6


def test_a_flood_from_one_client_does_not_starve_others(
    target: Target, slow: threading.Event
) -> None:
    body = request()
    with serving(target, ServeConfig(queue=8, **LIMITS)) as address, ExitStack() as held:
        flood = [
            held.enter_context(connected(address, head(len(body)) + body, "127.0.0.2"))
            for _ in range(20)
        ]
        waiting = 'deepspec_requests_total{status="503"}'
        assert until(lambda: metrics(address).get(waiting) == 12)
        with connected(address, head(len(body)) + body) as honest:
            assert until(lambda: metrics(address)[waiting] == 13)
            slow.set()
            assert honest.recv(20).split()[1] == b"200"
        answers = [own.recv(20).split()[1] for own in flood]
        assert (answers.count(b"200"), answers.count(b"503")) == (7, 13)


def test_clients_are_served_in_turn() -> None:
    import asyncio

    async def order() -> list[str]:
        turns, names, served = Turns(7), {}, []
        for name in ("a1", "a2", "a3", "b1", "b2", "c1", "a4"):
            names[turns.join(name[0])] = name
        assert turns.join("a") is None  # full, and none has more
        extra = turns.join("d")  # in the place of a4
        names[extra] = "d1"
        gone = next(turn for turn, name in names.items() if name == "b1")
        turns.leave(gone)
        while len(turns):
            turn = next(turn for turn in names if turn.done() and names[turn] not in served
                        and turn.result())  # fmt: skip
            served.append(names[turn])
            turns.leave(turn)
        refused = [name for turn, name in names.items() if turn.done() and not turn.result()]
        assert refused == ["a4"]
        return served

    assert asyncio.run(order()) == ["a1", "a2", "b2", "c1", "d1", "a3"]
