"""The simulator, held against a replay written by hand, and against what must be conserved."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from deepspec.errors import DataError
from deepspec.scheduling.calibration import Scaling, calibrated, survival
from deepspec.scheduling.drafting import DraftingPays
from deepspec.scheduling.schedulers import Algorithm1, FixedLength, Threshold
from deepspec.scheduling.throughput import Point, Throughput
from deepspec.serving.recording import Recording, read_recordings
from deepspec.serving.simulator import SimulatedLoop
from deepspec.serving.traffic import ClosedLoop, OpenLoop

TABLE = Throughput(
    (Point(1, 100.0, None, 0.002, 0.0001), Point(8, 80.0, None, 0.004, 0.0008), Point(64, 20.0))
)
FLAT = Throughput((Point(1, 100.0, None, 0.001, 0.0), Point(1000, 99.0, None, 0.001, 0.0)))
STEEP = Throughput((Point(1, 1000.0, None, 0.01, 0.001), Point(1000, 1.0, None, 10.0, 1.0)))


def recording(requests: int = 7, size: int = 4, seed: int = 0) -> Recording:
    """Requests of 1 to 30 tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 31, requests)
    count = rng.integers(1, 9, requests)
    confidence = rng.beta(4, 1, (count.sum(), size))
    alive = (rng.random(confidence.shape) < confidence).cumprod(axis=1).sum(axis=1)
    prompt = rng.integers(3, 20, requests)
    return Recording(
        size, survival(confidence), alive, np.cumsum(count) - count, count, prompt, tokens
    )


def test_equals_a_replay_by_hand() -> None:
    """Two users, a threshold, one request after the other as a person would go through them."""
    known, steps, least = recording(), 60, 0.5
    loop = SimulatedLoop(known, TABLE, ClosedLoop(2), Threshold(least))
    for _ in range(steps):
        loop.step()

    now, number, running, said, verified, rounds = 0.0, 0, {}, 0, 0, 0
    first_step = 0.0
    for step in range(steps):
        prompt_tokens = 0
        for _ in range(2 - len(running)):
            which = number % 7
            prompt_tokens += known.prompt[which]
            if known.tokens[which] > 1:
                running[number] = [known.tokens[which] - 1, 0]
            said += step > 0
            number += 1
        if prompt_tokens:
            now += 1 / TABLE.steps_per_second(prompt_tokens) + TABLE.observe_seconds(prompt_tokens)
        tokens = 0
        for request in list(running):
            left, had = running[request]
            which = request % 7
            row = known.first[which] + had % known.count[which]
            length = 0
            while length < min(4, left - 1) and known.survival[row, length] >= least:
                length += 1
            accepted = min(length, known.accepted[row])
            tokens += 1 + length
            said += (accepted + 1) * (step > 0)
            verified += length * (step > 0)
            rounds += step > 0
            running[request] = [left - accepted - 1, had + 1]
        if tokens:
            now += 1 / TABLE.steps_per_second(tokens) + TABLE.observe_seconds(tokens)
            now += TABLE.propose_seconds(len(running))
        running = {request: own for request, own in running.items() if own[0] > 0}
        first_step = first_step or now
    record = loop.meter.record("threshold", "d", 2, None)
    assert record.tokens == said
    assert record.seconds == pytest.approx(now - first_step)
    assert record.budget == pytest.approx(1 + verified / rounds)
    assert record.throughput == pytest.approx(said / (now - first_step))


@pytest.mark.parametrize("name", ["plain", "whole", "fixed", "algorithm1"])
@pytest.mark.parametrize("traffic", ["closed", "open"])
def test_every_request_says_all_its_tokens_once(name: str, traffic: str) -> None:
    known = recording()
    policy = {"fixed": FixedLength(2), "algorithm1": Algorithm1(TABLE)}.get(name)
    pays = DraftingPays(TABLE) if name == "algorithm1" else None
    arrivals = ClosedLoop(3) if traffic == "closed" else OpenLoop(20.0, 3)
    loop = SimulatedLoop(known, TABLE, arrivals, policy, pays, plain=name == "plain")
    said: dict[int, int] = {}
    count = loop.meter.step

    def counting(newcomers, began, now, requests, emitted, scheduled, accepted) -> None:
        assert now > began
        assert len(requests) <= 3
        said.update({new.number: 1 for new in newcomers})
        for request, tokens in zip(requests, emitted.tolist(), strict=True):
            said[request] += tokens
        assert (emitted == accepted + 1).all()
        assert (accepted <= scheduled).all()
        count(newcomers, began, now, requests, emitted, scheduled, accepted)

    loop.meter.step = counting  # type: ignore[method-assign]
    for _ in range(150):
        loop.step()
    assert sorted(said) == list(range(len(said)))
    unfinished = [n for n, tokens in said.items() if tokens != known.tokens[n % 7]]
    assert len(said) > 10
    assert len(unfinished) <= 3
    assert all(said[n] < known.tokens[n % 7] for n in unfinished)


@pytest.mark.parametrize(("table", "drafts"), [(FLAT, True), (STEEP, False)])
def test_algorithm1_drafts_where_that_pays_and_else_is_as_fast_as_plain(
    table: Throughput, drafts: bool
) -> None:
    known = recording(64, seed=1)
    throughput = {}
    for name in ("plain", "algorithm1"):
        pays = DraftingPays(table) if name == "algorithm1" else None
        policy = Algorithm1(table) if pays else None
        loop = SimulatedLoop(known, table, ClosedLoop(64), policy, pays, plain=pays is None)
        while loop.meter.seconds < 400 * float(table.seconds(64)):
            loop.step()
        record = loop.meter.record(name, "d", 64, None)
        throughput[name] = record.throughput
    assert (record.budget > 3) is drafts
    assert throughput["algorithm1"] > (1.5 if drafts else 0.97) * throughput["plain"]


def test_256_requests_are_simulated_faster_than_they_run() -> None:
    """A round of 256 requests of 16 drafts takes an engine tens of milliseconds."""
    known = recording(512, 16)
    loop = SimulatedLoop(known, TABLE, ClosedLoop(256), Algorithm1(TABLE), DraftingPays(TABLE))
    loop.step()
    begun = time.process_time()
    for _ in range(50):
        loop.step()
    assert (time.process_time() - begun) / 50 < 0.02


def write(path: Path, *rows: dict) -> Path:
    whole = {"proposed": 3, "scheduled": 3, "accepted": 1, "emitted": 2, "seconds": 0.1}
    lines = ({"round": 0, "confidences": [0.9, 0.5, 0.2], **whole, **row} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_recordings_are_read_by_drafter_and_request(tmp_path: Path) -> None:
    first = {"drafter": "dspark", "request": "a#0", "concurrency": 1}
    path = write(
        tmp_path / "t.jsonl",
        {**first, "position": 12, "accepted": 3, "emitted": 4},
        {**first, "position": 10},
        {**first, "position": 10, "concurrency": 8},  # the same text, cut short
        {**first, "position": 7, "request": "b#1"},
        {"drafter": "mtp", "request": "a#0", "position": 10, "proposed": 1, "scheduled": 1}
        | {"confidences": []},
    )
    scaling = Scaling((1.0, 2.0, 1.0), (0.0, 0.0, 1.0))
    found = read_recordings(path, scaling)
    dspark, mtp = found["dspark"], found["mtp"]
    assert dspark.accepted.tolist() == [1, 3, 1]
    assert (dspark.first.tolist(), dspark.count.tolist()) == ([0, 2], [2, 1])
    assert (dspark.prompt.tolist(), dspark.tokens.tolist()) == ([10, 7], [7, 3])
    expected = survival(calibrated(np.array([0.9, 0.5, 0.2]), scaling))
    np.testing.assert_allclose(dspark.survival[0], expected)
    assert (mtp.block_size, mtp.survival) == (1, None)


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    row = {"request": "a", "position": 3, "scheduled": 1}
    path = write(tmp_path / "t.jsonl", row, {**row, "position": 5})
    with pytest.raises(DataError, match=r"verified 1 of 3 drafts.*policy fixed"):
        read_recordings(path, None)
    write(path, row, {**row, "position": 5}, {**row, "position": 5})
    with pytest.raises(DataError, match="a has two rounds at position 5"):
        read_recordings(path, None)
    for text in ("", "{", '{"request": 1}\n'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"t\.jsonl"):
            read_recordings(path, None)
