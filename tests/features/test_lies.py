"""A trainer's side, against servers that lie: typed errors, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import math
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import torch
from safetensors.torch import save

from deepspec.errors import ServerError
from deepspec.features.remote import LONGEST_REST, RemoteTarget, _pause
from deepspec.http_answers import shown
from deepspec.records import Sample
from tests.features.evil import Answer, lying, response
from tests.features.test_remote import client

WEIGHTS, WIDTH, LAYERS, TOKENS = "0123", 8, [0, 2], 5
DESCRIPTION = {
    "identity": {"weights": WEIGHTS},
    "layer_ids": LAYERS,
    "hidden_size": WIDTH,
    "dtype": "float32",
}
TRUE = {"context": torch.ones(TOKENS, len(LAYERS) * WIDTH), "final": torch.ones(TOKENS, WIDTH)}
SAMPLES = [Sample(torch.arange(TOKENS), torch.ones(TOKENS, dtype=torch.bool), "0")]
OWN = {"x_target_weights": WEIGHTS}


@contextmanager
def remote(answer: Answer, **options: object) -> Iterator[RemoteTarget]:
    with lying(json.dumps(DESCRIPTION).encode(), answer) as address:
        opened = client(address, **{"patience": 0.3, "timeout": 5, **options})
        yield opened
        opened.close()


def sends(data: bytes) -> Answer:
    return lambda own: own.sendall(data)


def answer(**changes: torch.Tensor | None) -> bytes:
    tensors = {**TRUE, **changes}
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_true_answer_is_taken() -> None:
    """The liar's own machinery works, so that the refusals below are of the lies."""
    with remote(sends(response(answer(), **OWN))) as target:
        features = target.features(SAMPLES)
    assert torch.equal(features.context, TRUE["context"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (answer(final=None), "something else"),
        (answer(final=TRUE["final"][1:]), "something else"),
        (answer(more=torch.zeros(1)), "something else"),
        (answer(context=TRUE["context"].to(torch.complex64)), "something else.*complex64"),
        (answer(context=TRUE["context"].half()), "something else"),
        (answer(context_scale=torch.ones(TOKENS, 2)), "something else"),
        (answer(context=TRUE["context"][None]), "something else"),
        (answer() + bytes(2**16), "the answer has more"),
        (bytes(100), "something else"),
        (b"\xff" * 100, "something else"),
        (b"", "something else"),
    ],
)
def test_features_must_be_what_was_asked_for(body: bytes, said: str) -> None:
    with remote(sends(response(body, **OWN))) as target, pytest.raises(ServerError, match=said):
        target.features(SAMPLES)


def test_compressed_answers_are_refused_unread() -> None:
    """Two gigabytes of zeros, in two megabytes."""
    member = gzip.compress(bytes(2**26))
    bomb = response(b"", length=32 * len(member), content_encoding="gzip", **OWN) + member * 32
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with remote(sends(bomb)) as target, pytest.raises(ServerError, match="compressed"):
        target.features(SAMPLES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB: 64 MiB


def test_answers_without_an_end_are_not_read_to_it() -> None:
    def endless(own: socket.socket) -> None:
        own.sendall(response(b"", Content_Length="", transfer_encoding="chunked", **OWN))
        while True:
            own.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")

    with remote(endless) as target, pytest.raises(ServerError, match="the answer has more"):
        target.features(SAMPLES)


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nX: ", response(b"", length=900, **OWN)])
def test_a_dripping_answer_has_one_time_limit(begin: bytes) -> None:
    def drip(own: socket.socket) -> None:
        own.sendall(begin)
        while True:
            own.sendall(b"x")
            time.sleep(0.05)

    begun = time.monotonic()
    with (
        remote(drip, timeout=0.3) as target,
        pytest.raises(ServerError, match=r"no whole answer in 0\.3 s"),
    ):
        target.features(SAMPLES)
    assert time.monotonic() - begun < 3


def test_an_answer_longer_or_shorter_than_it_says() -> None:
    """Longer: what follows is not taken for the next answer. Shorter: asked again."""
    false = response(answer(context=2 * TRUE["context"]), **OWN)
    true = response(answer(), Connection="keep-alive", **OWN)
    with remote(sends(true + false)) as target:
        for _ in range(3):
            assert torch.equal(target.features(SAMPLES).context, TRUE["context"])
    short = response(answer(), length=2000, **OWN)
    with remote(sends(short)) as target, pytest.raises(ServerError, match="RemoteProtocolError"):
        target.features(SAMPLES)


def test_errors_are_shown_in_one_short_line_without_control_characters() -> None:
    text = b"\x1b[2J\x1b]0;title\x07\xe2\x80\xae gone \r\n" * 1000
    for status in ("400 Bad", "503 Busy"):
        with (
            remote(sends(response(text, status, content_type="text/plain;charset=zlib"))) as target,
            pytest.raises(ServerError) as caught,
        ):
            target.features(SAMPLES)
        said = str(caught.value)
        assert said.isprintable()
        assert len(said) < 1500
        assert r"\x1b[2J" in said
    assert shown("plain\n  words") == "plain words"
    assert shown("é") == "é"


@pytest.mark.parametrize(
    ("given", "expected"),
    [("1e18", LONGEST_REST), ("inf", LONGEST_REST), ("nan", 1), ("-5", 0), ("2.5", 2.5), ("x", 1)],
)
def test_a_server_does_not_choose_its_rest_freely(given: str, expected: float) -> None:
    found = _pause(httpx.Response(503, headers={"Retry-After": given}))
    assert math.isclose(found, expected)
    with (
        remote(sends(response(b"later", "503 Busy", Retry_After=given))) as target,
        pytest.raises(ServerError, match=r"no feature server has answered.*HTTP 503 later"),
    ):
        target.features(SAMPLES)


def test_a_large_error_page_of_a_proxy_is_an_error_that_passes() -> None:
    for more in ({}, {"content_encoding": "gzip"}):
        page = response(b"<html>" * 10_000, "502 Bad Gateway", **more)
        with remote(sends(page)) as target, pytest.raises(ServerError, match="no feature server"):
            target.features(SAMPLES)


def test_redirects_are_not_followed() -> None:
    moved = response(b"", "307 Moved", Location="http://127.0.0.1:9/v1/features")
    with (
        remote(sends(moved)) as target,
        pytest.raises(ServerError, match=r"HTTP 307.*features\.servers"),
    ):
        target.features(SAMPLES)


@pytest.mark.parametrize(
    "description",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b"[]",
        b"\xff{}",
        b'{"hidden_size": ' + b"9" * 5000 + b"}",
        b" " * 2**21,
        *(
            json.dumps(DESCRIPTION | change).encode()
            for change in (
                {"hidden_size": "8"},
                {"hidden_size": 0},
                {"hidden_size": 2**60},
                {"hidden_size": 8.5},
                {"layer_ids": []},
                {"layer_ids": [0.5]},
                {"layer_ids": 3},
                {"dtype": "complex64"},
                {"identity": {}},
                {"identity": {"weights": 1}},
                {"identity": None},
            )
        ),
        json.dumps({"identity": {"weights": "0"}}).encode(),
    ],
)
def test_descriptions_are_held_against_their_types(description: bytes) -> None:
    with (
        lying(description, sends(b"")) as address,
        pytest.raises(ServerError, match="no feature server has answered") as caught,
    ):
        client(address, patience=1e-9)
    assert len(str(caught.value)) < 1000
