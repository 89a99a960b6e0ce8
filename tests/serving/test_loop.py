"""The serving loop: what requests say does not depend on who runs beside them, nobody is lost, and
what is counted is what was said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepspec.checks.proposers import Rehearsed
from deepspec.decoding import ContinuousBatch, Decoder, NoDrafts, Sampling, plain_decode
from deepspec.scheduling.schedulers import (
    Algorithm1,
    Asynchronous,
    ConfidenceSchedule,
    FixedLength,
    Policy,
    Threshold,
)
from deepspec.serving.loop import Loop, Prompt
from deepspec.serving.traffic import ClosedLoop, OpenLoop, Traffic
from deepspec.targets import Target
from tests.decoding.proposers import RandomProposer
from tests.decoding.test_lossless import prompts_of
from tests.decoding.test_schedules import STEEP
from tests.serving.proposers import PROPOSERS

LIMIT = 10
SAMPLED = Sampling(1.0, top_k=50)


def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", tokens) for i, tokens in enumerate(prompts_of(9))]


def stop_tokens(target: Target) -> list[int]:
    """Tokens that greedy decoding reaches, so that requests end at different times."""
    said = plain_decode(target, prompts_of(2), Sampling(), LIMIT, stop_token_ids=[])
    return [said.completions[0].tokens[5], said.completions[1].tokens[8]]


def run(loop: Loop, requests: int) -> dict[str, tuple[int, ...]]:
    """Until so many have ended: what each said."""
    while len(loop.completions) < requests:
        loop.step()
    names = [completion.request for completion in loop.completions]
    assert len(set(names)) == len(names)
    return {completion.request: completion.tokens for completion in loop.completions}


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_outputs_are_those_of_each_request_alone(
    target: Target, name: str, sampling: Sampling
) -> None:
    """Requests that join at random times, of different lengths, and leave at different times."""
    stop = stop_tokens(target)
    proposer = PROPOSERS[name](target)
    rng = np.random.default_rng(1)
    batch = ContinuousBatch(Decoder(target, proposer, 1, stop), sampling, LIMIT, seed=7)
    waiting = [(f"{turn}{prompt.request}", prompt) for turn in "ab" for prompt in prompts()[:6]]
    asked = dict(waiting)
    said: dict[str, tuple[int, ...]] = {}
    while waiting or len(batch):
        count = min(len(waiting), int(rng.integers(0, 4)))
        joining, waiting = waiting[:count], waiting[count:]
        ended = []
        if joining:
            ended += batch.join([each for each, _ in joining], [p.tokens for _, p in joining])
        if len(batch):
            ended += batch.round()[1]
        said |= {completion.request: completion.tokens for completion in ended}
    assert said.keys() == asked.keys()
    alone = Decoder(target, PROPOSERS[name](target), 1, stop)
    tokens = [prompt.tokens for prompt in asked.values()]
    expected = alone.generate(tokens, sampling, LIMIT, 7, list(asked))
    assert [said[each] for each in asked] == [each.tokens for each in expected.completions]
    if name == "plain" or sampling.greedy:
        plain = plain_decode(target, tokens, sampling, LIMIT, 7, list(asked), 4, stop)
        assert [said[each] for each in asked] == [each.tokens for each in plain.completions]


class WithConfidence(RandomProposer):
    """Claims something else of each draft in every round."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.rng = torch.Generator().manual_seed(0)

    def propose(self, *args):
        proposal = super().propose(*args)
        shape = tuple(proposal.tokens.shape)
        return replace(proposal, confidence=torch.rand(shape, generator=self.rng) ** 0.5)


@pytest.mark.parametrize(
    "policy",
    [FixedLength(2), Threshold(0.5), Algorithm1(STEEP), Asynchronous(STEEP)],
    ids=["fixed", "threshold", "algorithm1", "async"],
)
@pytest.mark.parametrize("traffic", [ClosedLoop(3), OpenLoop(100.0, 3)], ids=["closed", "open"])
def test_every_policy_says_what_plain_decoding_says(
    target: Target, policy: Policy, traffic: Traffic
) -> None:
    decoder = Decoder(target, WithConfidence(target.vocab_size), 1, [], ConfidenceSchedule(policy))
    said = run(Loop(decoder, type(traffic)(*_arguments(traffic)), prompts(), Sampling(), LIMIT), 12)
    tokens = prompts_of(9)
    expected = plain_decode(target, tokens, Sampling(), LIMIT, stop_token_ids=[], batch_size=4)
    for request, found in said.items():
        number = int(request.partition("#")[2])
        assert found == expected.completions[number % 9].tokens


def _arguments(traffic: Traffic) -> tuple[float, ...]:
    return (3,) if isinstance(traffic, ClosedLoop) else (100.0, 3)


def test_counts_are_conserved(target: Target) -> None:
    known = {
        tuple(prompt): tuple(completion.tokens)
        for prompt, completion in zip(
            prompts_of(9),
            plain_decode(target, prompts_of(9), Sampling(), 28, stop_token_ids=[]).completions,
            strict=True,
        )
    }
    decoder = Decoder(target, Rehearsed(known, target.vocab_size, good=2), 1, [])
    loop = Loop(decoder, ClosedLoop(4), prompts(), Sampling(), LIMIT)
    loop.step()
    before = len(loop.traces)
    said = run(loop, 10)
    numbers = sorted(int(name.partition("#")[2]) for name in said)
    running = {trace.request for trace in loop.traces} - said.keys()
    assert len(running) <= 4
    assert sorted(numbers + [int(name.partition("#")[2]) for name in running]) == list(
        range(len(said) + len(running))
    )
    for name, tokens in said.items():
        own = [trace for trace in loop.traces if trace.request == name]
        assert 1 + sum(trace.emitted for trace in own) == len(tokens) == LIMIT
    record = loop.meter.record("fixed", "rehearsed", 4, None)
    counted = loop.traces[before:]
    newcomers = len(said) + len(running) - 4
    assert record.tokens == sum(trace.emitted for trace in counted) + newcomers
    mean = np.mean([(trace.accepted + 1, trace.scheduled + 1) for trace in counted], axis=0)
    assert (record.accepted_length, record.budget) == pytest.approx(tuple(mean))
    assert record.throughput == record.tokens / record.seconds
    assert record.rounds == len({trace.round for trace in counted})


def test_a_request_waits_while_others_run(target: Target) -> None:
    """Much more than one request can use: those behind it wait, and begin in order."""
    loop = Loop(Decoder(target, NoDrafts(), 1, []), OpenLoop(1e5, 2), prompts(), Sampling(), 4)
    said = run(loop, 6)
    assert [int(name.partition("#")[2]) // 2 for name in said] == [0, 0, 1, 1, 2, 2]
    record = loop.meter.record("plain", "", 2, 1e5)
    assert record.wait_p90 > record.wait_p50 > 0


def test_arrivals_come_at_their_rate() -> None:
    traffic = OpenLoop(20.0, 10**6, seed=3)
    times = [arrival.time for arrival in traffic.take(500.0, 0)]
    assert times == sorted(times)
    gaps = np.diff([0.0, *times])
    assert len(times) == pytest.approx(20 * 500, rel=4 / np.sqrt(20 * 500))  # four sigma
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential
    again = OpenLoop(20.0, 10**6, seed=3)
    assert [a.time for a in again.take(500.0, 0)] == times
    assert traffic.next_time() > 500.0
