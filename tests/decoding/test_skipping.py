"""Rounds without drafts change nothing that is said, and nothing that is drafted afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deepspec.decoding import ContinuousBatch, Decoder, Sampling
from deepspec.decoding.skipping import SkippingProposer
from deepspec.drafters.base import Draw, Proposer
from deepspec.records import Proposal
from deepspec.scheduling.drafting import NEEDED, DraftingPays
from deepspec.scheduling.schedulers import Algorithm1, ConfidenceSchedule
from deepspec.scheduling.throughput import Point, Throughput
from deepspec.targets import Target
from tests.decoding.chi_square import DRAWS, LENGTH, VOCABULARY, exact_joint, p_value
from tests.decoding.proposers import ConfidentProposer
from tests.decoding.test_lossless import prompts_of
from tests.serving.proposers import PROPOSERS

Drafts = dict[tuple[str, int], list[int]]


class Watched:
    """Keeps what was drafted behind each anchor, by row."""

    def __init__(self, inner: Proposer, seen: list[tuple[list[int], list[list[int]]]]) -> None:
        self.block_size, self._inner, self._seen = inner.block_size, inner, seen

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def join(self, other: Watched) -> None:
        self._inner.join(other._inner)

    def __copy__(self) -> Watched:
        import copy

        return Watched(copy.copy(self._inner), self._seen)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        proposal = self._inner.propose(anchors, positions, end, draw)
        self._seen.append((positions.tolist(), proposal.tokens.tolist()))
        return proposal


@pytest.mark.parametrize("name", ["dspark", "eagle3", "ngram"])
def test_drafts_behind_skipped_rounds_are_those_of_a_drafter_that_saw_everything(
    target: Target, name: str
) -> None:
    """Requests join and leave before, during and behind the skipped rounds; all is verified one
    draft at most, so that the anchors of both runs are the same."""
    skipped = {3, 4, 5, 8, 9, 12}
    texts: list[list[tuple[str, int, int]]] = []
    drafted: list[dict[tuple[str, int], list[int]]] = []
    for skip in (set(), skipped):
        rounds = iter(range(100))
        seen: list[tuple[list[int], list[list[int]]]] = []
        inner = Watched(PROPOSERS[name](target), seen)
        proposer = SkippingProposer(inner, lambda rows, r=rounds, s=skip: next(r) not in s)
        decoder = Decoder(target, proposer, 1, [], lambda proposal, limits: [0] * len(limits))
        batch = ContinuousBatch(decoder, Sampling(), 9)
        prompts = prompts_of(8)
        joins = {0: [0, 1, 2], 4: [3], 5: [4, 5], 10: [6], 11: [7]}
        text, drafts = [], {}
        for number in range(14):
            if new := joins.get(number):
                batch.join([str(i) for i in new], [prompts[i] for i in new])
            traces, _ = batch.round()
            text += [(trace.request, trace.position, trace.emitted) for trace in traces]
            if number not in skip:
                positions, tokens = seen[-1]
                assert positions == [trace.position for trace in traces]
                drafts |= {
                    (trace.request, trace.position): own
                    for trace, own in zip(traces, tokens, strict=True)
                }
            assert {trace.proposed > 0 for trace in traces} <= (
                {False} if number in skip else {True, False} if name == "ngram" else {True}
            )
        texts.append(text)
        drafted.append(drafts)
    assert texts[0] == texts[1]
    assert len(drafted[1]) > 15
    assert drafted[1].items() <= drafted[0].items()


def pays_by(plain: float, drafting: float) -> DraftingPays:
    """A step takes `plain` seconds a token, drafting `drafting` a request."""
    points = (Point(1, 1 / plain, None, drafting, 0.0), Point(100, 1 / (100 * plain), None))
    return DraftingPays(Throughput(points))


def test_drafting_pays_where_a_step_is_flat_and_not_where_it_is_linear() -> None:
    survival = np.tile([0.8, 0.6], (2 * NEEDED, 1))
    flat = DraftingPays(Throughput((Point(1, 10.0, None, 0.05), Point(500, 9.9, None, 0.05))))
    linear = pays_by(0.001, 0.001)
    for pays in (flat, linear):
        assert pays(4)  # until something is known
        pays.saw(survival)
    assert flat(4)
    assert not linear(4)
    dear = DraftingPays(Throughput((Point(1, 10.0, None, 0.2), Point(500, 9.9, None, 0.2))))
    dear.saw(survival)
    assert not dear(4)  # 2.4 tokens in 0.3 s against 1 in 0.1


def test_its_best_throughput_is_that_of_a_naive_search() -> None:
    rng = np.random.default_rng(0)
    survival = rng.random((40, 5)).cumprod(axis=1)
    table = Throughput((Point(1, 50.0, None, 0.004, 0.001), Point(60, 20.0, None, 0.02, 0.01)))
    pays = DraftingPays(table)
    pays.saw(survival)
    entries = sorted(survival.flatten().tolist(), reverse=True)
    best = 0.0
    for count in range(1, len(entries) + 1):
        tokens = 40 + count
        seconds = table.seconds(tokens) + table.observe_seconds(tokens) + table.propose_seconds(40)
        best = max(best, (40 + sum(entries[:count])) / float(seconds))
    assert pays._expected(40) == pytest.approx(best)


@pytest.mark.parametrize("seed", [1])
def test_sampled_output_has_the_targets_distribution(small: Target, seed: int) -> None:
    """With rounds left out by confidences that depend on tokens, the chi-square test holds."""
    sampling, prompt = Sampling(1.0), [1, 4, 2, 5]
    # a step whose cost is about what drafts bring: the choice goes one way and the other
    table = Throughput((Point(100, 4.0, None, 0.01), Point(300, 2.2, None, 0.01)))
    choices: list[bool] = []

    class Fickle(DraftingPays):
        """Goes by the last round alone, and leaves out one round at a time."""

        def __call__(self, rows: int) -> bool:
            last = np.concatenate(self._seen)[-rows:] if self._seen else np.ones((1, 1))
            choices.append(bool(self._skipped) or last.mean() > 0.54)
            self._skipped = not choices[-1]
            return choices[-1]

    proposer = ConfidentProposer(VOCABULARY, block_size=2)
    schedule = ConfidenceSchedule(Algorithm1(table), None, Fickle(table))
    decoder = Decoder(small, proposer, 50, [], schedule)
    names = [f"s{i}" for i in range(DRAWS)]
    result = decoder.generate([prompt] * DRAWS, sampling, LENGTH + 1, seed, names)
    assert 0.2 < np.mean(choices) < 0.8
    assert {trace.proposed for trace in result.traces} == {0, 2}
    tokens = torch.tensor([completion.tokens[:LENGTH] for completion in result.completions])
    index = tokens @ torch.tensor([VOCABULARY**i for i in reversed(range(LENGTH))])
    counts = torch.bincount(index, minlength=VOCABULARY**LENGTH)
    assert p_value(counts, exact_joint(small, prompt, sampling)) > 1e-3
