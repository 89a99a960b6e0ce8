"""Decoding with each scheduler changes not one token, and a scheduler that peeks is caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepspec.checks.proposers import Rehearsed
from deepspec.decoding import Decoder, Sampling
from deepspec.records import Proposal
from deepspec.scheduling.calibration import Floats
from deepspec.scheduling.schedulers import (
    Algorithm1,
    Asynchronous,
    ConfidenceSchedule,
    FixedLength,
    Ints,
    Policy,
    Threshold,
)
from deepspec.scheduling.throughput import Point, Throughput
from deepspec.targets import Target
from tests.decoding.chi_square import DRAWS, LENGTH, VOCABULARY, exact_joint, p_value
from tests.decoding.proposers import ConfidentProposer
from tests.decoding.test_lossless import generate, prompts_of

# a second draft pays where the first alone does not: what tempts a scheduler to look ahead
TEMPTING = Throughput((Point(1, 1.0), Point(2, 0.6), Point(3, 0.55)))
STEEP = Throughput((Point(4, 10.0), Point(8, 9.0), Point(20, 3.0)))


def global_search(survival: Floats, limits: Ints) -> Ints:
    """The best of all lengths by the confidences of the same step."""
    policy = Asynchronous(TEMPTING)
    for _ in range(2):
        policy(survival, limits)
    return policy(survival, limits)


def alone(policy: Policy) -> Policy:
    """Every row as if it were the only one: then its own tokens count for most."""

    def each(survival: Floats, limits: Ints) -> Ints:
        pairs = zip(survival, limits, strict=True)
        return np.array([policy(row[None], np.array([limit]))[0] for row, limit in pairs])

    return each


Continuations = dict[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def known(target: Target) -> Continuations:
    """What the target says behind each prompt, by Transformers' own `generate`."""
    return {tuple(prompt): generate(target, prompt, 16, []) for prompt in prompts_of(6)}


class WithConfidence(Rehearsed):
    """Right twice a block; says something else of each row and draft in every round."""

    def start(self, rows: int) -> None:
        super().start(rows)
        self.rng = np.random.default_rng(rows)

    def propose(self, *args):
        proposal = super().propose(*args)
        shape = tuple(proposal.tokens.shape)
        return replace(proposal, confidence=torch.from_numpy(self.rng.random(shape) ** 0.5))


@pytest.mark.parametrize(
    "policy",
    [FixedLength(2), Threshold(0.5), Algorithm1(STEEP), Asynchronous(STEEP)],
    ids=["fixed", "threshold", "algorithm1", "async"],
)
def test_greedy_equals_generate(target: Target, known: Continuations, policy: Policy) -> None:
    proposer = WithConfidence(known, target.vocab_size, good=2)
    decoder = Decoder(target, proposer, 4, [], ConfidenceSchedule(policy))
    result = decoder.generate(list(known), Sampling(), 16)
    assert [completion.tokens for completion in result.completions] == list(known.values())
    scheduled = {trace.scheduled for trace in result.traces}
    assert max(scheduled) == 2 if isinstance(policy, FixedLength) else len(scheduled) > 2
    assert all(len(trace.confidences) == 4 for trace in result.traces)


def test_a_batch_does_not_inherit_the_budget_of_another(
    target: Target, known: Continuations
) -> None:
    """What a small batch left for `async` to verify would be little for the next one."""
    proposer = WithConfidence(known, target.vocab_size, good=2)
    used, new = (
        Decoder(target, proposer, 4, [], ConfidenceSchedule(Asynchronous(STEEP))) for _ in range(2)
    )
    used.generate(list(known)[:1], Sampling(), 16)
    again, fresh = (each.generate(list(known)[:4], Sampling(), 16) for each in (used, new))
    lengths = [[trace.scheduled for trace in result.traces] for result in (again, fresh)]
    assert lengths[0] == lengths[1]
    assert lengths[0][:8] == [4] * 8  # two rounds of four rows


def test_a_schedule_is_told_what_each_row_can_use(target: Target, known: Continuations) -> None:
    seen: list[list[int]] = []

    def schedule(proposal: Proposal, limits: Sequence[int]) -> Sequence[int]:
        seen.append(list(limits))
        return limits

    proposer = Rehearsed(known, target.vocab_size)
    Decoder(target, proposer, 2, [], schedule).generate(list(known)[:2], Sampling(), 8)
    assert seen == [[4, 4], [1, 1]]  # the first token, 5 more, and 2 that are left


@pytest.fixture(scope="module")
def p_of(small: Target) -> Callable[[Policy], float]:
    """The p-value of outputs that were decoded with a policy."""
    sampling, prompt = Sampling(1.0), [1, 4, 2, 5]
    exact = exact_joint(small, prompt, sampling)

    def p(policy: Policy) -> float:
        proposer = ConfidentProposer(VOCABULARY, block_size=2)
        decoder = Decoder(small, proposer, 1000, [], ConfidenceSchedule(policy))
        names = [f"s{i}" for i in range(DRAWS)]
        # one token more than is counted, so that a round can use both drafts; the streams of seed 0
        # are one sample in thousands, for plain decoding too, those of others are as they should be
        result = decoder.generate([prompt] * DRAWS, sampling, LENGTH + 1, 1, names)
        assert len({trace.scheduled for trace in result.traces}) > 1
        tokens = torch.tensor([completion.tokens[:LENGTH] for completion in result.completions])
        index = tokens @ torch.tensor([VOCABULARY**i for i in reversed(range(LENGTH))])
        return p_value(torch.bincount(index, minlength=VOCABULARY**LENGTH), exact)

    return p


@pytest.mark.parametrize(
    "policy",
    [
        FixedLength(1),
        Threshold(0.6),
        Algorithm1(Throughput((Point(1000, 2.0), Point(3000, 1.2)))),
        Asynchronous(Throughput((Point(1000, 2.0), Point(3000, 1.2)))),
        alone(Algorithm1(TEMPTING)),
        alone(Threshold(0.6)),
    ],
    ids=["fixed", "threshold", "algorithm1", "async", "algorithm1 alone", "threshold alone"],
)
def test_sampled_output_has_the_targets_distribution(
    p_of: Callable[[Policy], float], policy: Policy
) -> None:
    assert p_of(policy) > 1e-3


def test_looking_ahead_is_rejected(p_of: Callable[[Policy], float]) -> None:
    """What the paper's appendix warns of, in the decoder itself."""
    assert p_of(alone(global_search)) < 1e-6
