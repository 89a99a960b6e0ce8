"""Decoding with fixed buffers and one width, as compiled forwards want it, and compiled in fact.

Compilation takes minutes; what it asks of cache, masks and drafter is the same without, so the
quick tests run the functions that would be compiled as they are.
"""

from __future__ import annotations

import pytest
import torch

from deepspec.checks.proposers import Rehearsed
from deepspec.decoding import ContinuousBatch, Decoder, Sampling, kv_cache, plain_decode
from deepspec.drafters.compiling import compiled
from deepspec.drafters.dspark import DSparkProposer
from deepspec.drafters.dspark import proposer as dspark
from deepspec.errors import TargetError
from deepspec.evaluation.profiling import Load, profile
from deepspec.targets import Target
from tests.decoding.test_lossless import prompts_of
from tests.export.conftest import make_drafter
from tests.targets.tiny import make_target

GREEDY = Sampling()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the functions that would have been compiled, once they are called."""
    called: set[str] = set()

    def plainly(function):
        def call(*args):
            called.add(function.__name__)
            return function(*args)

        return call

    monkeypatch.setattr(kv_cache, "compiled", plainly)
    monkeypatch.setattr(dspark, "compiled", plainly)
    return called


def check(target: Target, batch: int) -> None:
    """Rows of different lengths, that outgrow their first buffers, against plain decoding."""
    prompts = prompts_of(3)
    length = 64 - max(map(len, prompts)) + 2

    def plain(**options) -> list[tuple[int, ...]]:
        found = plain_decode(target, prompts, GREEDY, length + 4, stop_token_ids=[], **options)
        return [completion.tokens for completion in found.completions]

    expected = plain(batch_size=3)
    assert plain(batch_size=batch, compiled=True) == expected
    known = {tuple(prompt): more for prompt, more in zip(prompts, expected, strict=True)}
    drafter = make_drafter(target, "vanilla")
    untrained = DSparkProposer(drafter, target.embedding, target.head)
    for proposer in (untrained, Rehearsed(known, target.vocab_size, good=2)):
        decoder = Decoder(target, proposer, batch, [], compiled=True)
        result = decoder.generate(prompts, GREEDY, length)
        found = [completion.tokens for completion in result.completions]
        assert found == [tokens[:length] for tokens in expected]


def test_fixed_buffers_change_nothing(target: Target, uncompiled: set[str]) -> None:
    check(target, 3)
    assert uncompiled == {"_forward", "_greedy"}


def test_layers_that_share_the_keys_of_others_have_no_buffers(uncompiled: set[str]) -> None:
    target = make_target("gemma4_text")
    assert target.config.num_kv_shared_layers

    def plain(fixed: bool) -> list[tuple[int, ...]]:
        options = {"batch_size": 2, "stop_token_ids": [], "compiled": fixed}
        found = plain_decode(target, prompts_of(2), GREEDY, 5, **options)
        return [completion.tokens for completion in found.completions]

    assert plain(fixed=True) == plain(fixed=False)
    assert uncompiled == {"_forward"}


def test_the_same_drafts_with_fixed_buffers(target: Target, uncompiled: set[str]) -> None:
    """One row, and several; sampled, where the sequential head is not compiled."""
    drafter = make_drafter(target, "vanilla")
    sampling = Sampling(1.0, top_p=0.9)

    def accepted(batch: int, fixed: bool) -> list[tuple[str, int, int]]:
        proposer = DSparkProposer(drafter, target.embedding, target.head)
        decoder = Decoder(target, proposer, batch, [], compiled=fixed)
        traces = decoder.generate(prompts_of(2), sampling, 16).traces
        return [(trace.request, trace.accepted, trace.emitted) for trace in traces]

    for batch in (1, 2):
        assert accepted(batch, fixed=True) == accepted(batch, fixed=False)
    assert uncompiled == {"_forward", "_block"}


def test_rows_that_join_are_compiled_too(target: Target, uncompiled: set[str]) -> None:
    prompts = prompts_of(4)
    expected = plain_decode(target, prompts, GREEDY, 12, stop_token_ids=[])
    drafter = make_drafter(target, "vanilla")
    proposer = DSparkProposer(drafter, target.embedding, target.head)
    batch = ContinuousBatch(Decoder(target, proposer, 1, [], compiled=True), GREEDY, 12)
    ended = []
    for names in ("01", "23"):
        ended += batch.join(list(names), [prompts[int(name)] for name in names])
        ended += batch.round()[1]
    while len(batch):
        ended += batch.round()[1]
    found = {completion.request: completion.tokens for completion in ended}
    assert [found[name] for name in "0123"] == [each.tokens for each in expected.completions]
    assert uncompiled == {"_forward", "_greedy"}


def test_steps_are_profiled_as_they_are_decoded(target: Target, uncompiled: set[str]) -> None:
    drafter = make_drafter(target, "vanilla")
    for load, called in (
        (Load(2, 8, 2, 0.0), set()),
        (Load(2, 8, 2, 0.0, compiled=True), {"_forward", "_greedy"}),
    ):
        proposer = DSparkProposer(drafter, target.embedding, target.head)
        profile(target, proposer, load, [2, 4], {}, show=False)
        assert uncompiled == called


def test_fewer_drafts_than_the_block(target: Target) -> None:
    """A proposer that is told to draft two says the first two of those that it would say."""
    drafter = make_drafter(target, "vanilla")
    found = []
    for count in (2, drafter.config.block_size):
        proposer = DSparkProposer(drafter, target.embedding, target.head)
        proposer.block_size = count
        seen = []
        propose = proposer.propose

        def watched(*args, propose=propose, seen=seen):
            seen.append(propose(*args))
            return seen[-1]

        proposer.propose = watched
        Decoder(target, proposer, 2, []).generate(prompts_of(2), GREEDY, 8)
        found.append(seen[0])
    assert found[0].tokens.shape == (2, 2)
    assert torch.equal(found[0].tokens, found[1].tokens[:, :2])
    torch.testing.assert_close(found[0].confidence, found[1].confidence[:, :2])


def test_states_that_cannot_be_compiled_say_so(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "rollback", "snapshot")
    proposer = Rehearsed({}, target.vocab_size)
    with pytest.raises(TargetError, match=r"set decoding\.compile=false"):
        Decoder(target, proposer, 1, [], compiled=True).generate([[5, 6]], GREEDY, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_changes_nothing(target: Target) -> None:
    """One compilation a kind of shape: of one row and of several, and once more where buffers
    have grown."""
    try:
        check(target, 1)
        check(target, 3)
        assert torch._dynamo.utils.counters["graph_break"] == {}
    finally:
        compiled.cache_clear()
        torch._dynamo.reset()
