"""The proof of losslessness.

Greedy: token by token against transformers' own `generate`, for proposers that are always, never
and sometimes right, at several batch sizes. Sampled: chi-square over thousands of seeds against
the target's exact joint distribution on a small vocabulary, which must also *reject* when the
residual sampling is broken on purpose.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deepspec.checks.proposers import Rehearsed
from deepspec.decoding import Decoder, Sampling, plain_decode, verification
from deepspec.decoding.exactness import first_difference
from deepspec.decoding.sampling import LEAST_TEMPERATURE, draw
from deepspec.drafters.dspark import DSparkProposer
from deepspec.errors import ConfigError
from deepspec.targets import Target
from tests.decoding import proposers
from tests.decoding.chi_square import VOCABULARY, decode_counts, exact_joint, p_value
from tests.decoding.proposers import RandomProposer, ReducedProposer
from tests.export.conftest import make_drafter

GREEDY = Sampling()


def prompts_of(count: int, vocabulary: int = 260) -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [
        torch.randint(4, vocabulary, (3 + 5 * (i % 4),), generator=g).tolist() for i in range(count)
    ]


def generate(target: Target, prompt: list[int], count: int, stop: list[int]) -> tuple[int, ...]:
    out = target.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=stop or None,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def known(target: Target) -> dict[tuple[int, ...], tuple[int, ...]]:
    """What follows each prompt, a block further than any test emits."""
    return {tuple(prompt): generate(target, prompt, 28, []) for prompt in prompts_of(9)}


@pytest.fixture(scope="module")
def stop(known: dict) -> list[int]:
    """Tokens that greedy decoding does reach, so that stopping in mid-block is exercised."""
    reached = list(known.values())
    return [reached[0][9], reached[1][5]]


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("quality", ["rubbish", "perfect", "half"])
def test_greedy_equals_generate(
    target: Target, known: dict, stop: list[int], batch: int, quality: str
) -> None:
    proposer = {
        "rubbish": lambda: RandomProposer(target.vocab_size),
        "perfect": lambda: Rehearsed(known, target.vocab_size),
        "half": lambda: Rehearsed(known, target.vocab_size, good=2),
    }[quality]()
    prompts = prompts_of(9)
    decoder = Decoder(target, proposer, batch, stop)
    result = decoder.generate(prompts, GREEDY, 24)
    for prompt, completion in zip(prompts, result.completions, strict=True):
        assert completion.tokens == generate(target, prompt, 24, stop)
        ended = completion.tokens[-1] in stop
        assert completion.finish_reason == ("stop" if ended else "length")
    accepted = {trace.accepted for trace in result.traces if trace.scheduled == 4}
    assert accepted == {"rubbish": {0}, "perfect": {4}, "half": {2}}[quality]


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_equals_generate_with_a_draft_vocabulary(target: Target, batch: int) -> None:
    """A drafter that knows but the tokens that the target says here, and one that knows others."""
    prompts = prompts_of(5)
    expected = [generate(target, prompt, 24, []) for prompt in prompts]
    said = torch.tensor(sorted({token for text in expected for token in text}))
    others = torch.tensor(sorted(set(range(260)) - set(said.tolist())))[: len(said)]
    drafter = make_drafter(target, "vanilla", draft_vocab_size=len(said))
    for ids in (said, others):
        drafter.restrict(ids)
        proposer = DSparkProposer(drafter, target.embedding, target.head)
        result = Decoder(target, proposer, batch, []).generate(prompts, GREEDY, 24)
        assert [completion.tokens for completion in result.completions] == expected
        accepted = sum(trace.accepted for trace in result.traces)
        assert (accepted > 0) == (ids is said)


def test_traces_account_for_every_token(target: Target, known: dict, stop: list[int]) -> None:
    decoder = Decoder(target, Rehearsed(known, target.vocab_size, good=3), 4, stop)
    result = decoder.generate(prompts_of(9), GREEDY, 24)
    for completion in result.completions:
        own = [trace for trace in result.traces if trace.request == completion.request]
        assert 1 + sum(trace.emitted for trace in own) == len(completion.tokens)
        assert [trace.round for trace in own] == list(range(len(own)))
    for trace in result.traces:
        assert trace.emitted <= trace.accepted + 1 <= trace.scheduled + 1 <= trace.proposed + 1


def test_plain_decoding_is_generate_too(target: Target, stop: list[int]) -> None:
    prompts = prompts_of(9)
    for batch in (1, 4):
        result = plain_decode(target, prompts, GREEDY, 24, batch_size=batch, stop_token_ids=stop)
        expected = [generate(target, prompt, 24, stop) for prompt in prompts]
        assert [completion.tokens for completion in result.completions] == expected


def test_outputs_end_where_the_targets_context_does(target: Target) -> None:
    """By row, as each has its own prompt; the first is as long as the context allows."""
    assert target.context_length == 512
    prompts = [[5] * 511, [5] * 505, [5] * 40]
    plain = plain_decode(target, prompts, GREEDY, 24, batch_size=3, stop_token_ids=[])
    proposer = RandomProposer(target.vocab_size, 4)
    drafted = Decoder(target, proposer, 2, []).generate(prompts, GREEDY, 24)
    for result in (plain, drafted):
        assert [len(completion.tokens) for completion in result.completions] == [1, 7, 24]
        assert [completion.finish_reason for completion in result.completions] == ["length"] * 3
    assert [c.tokens for c in drafted.completions] == [c.tokens for c in plain.completions]


def test_variable_schedules_change_nothing(target: Target, known: dict, stop: list[int]) -> None:
    lengths = itertools.cycle([0, 3, 1, 4, 2])

    def schedule(proposal, limits):
        return [next(lengths) for _ in range(len(proposal.tokens))]

    prompts = prompts_of(9)
    proposer = Rehearsed(known, target.vocab_size, good=3)
    decoder = Decoder(target, proposer, 4, stop, schedule)
    result = decoder.generate(prompts, GREEDY, 24)
    expected = [generate(target, prompt, 24, stop) for prompt in prompts]
    assert [completion.tokens for completion in result.completions] == expected
    assert {trace.scheduled for trace in result.traces} == {0, 1, 2, 3, 4}


def test_every_verified_position_is_observed(target: Target) -> None:
    """What the proposer is shown equals the features of one forward over the whole text."""
    proposer = RandomProposer(target.vocab_size)
    prompt = prompts_of(1)[0]
    result = Decoder(target, proposer, 1, []).generate([prompt], GREEDY, 12)
    text = prompt + list(result.completions[0].tokens)
    from deepspec.records import Sample

    whole = target.features([Sample(torch.tensor(text), torch.ones(len(text)).bool(), "x")])
    rows = [
        (int(seen.starts[0]) + i, seen.context[0, i])
        for seen in proposer.seen
        for i in range(int(seen.counts[0]))
    ]
    assert [position for position, _ in rows] == list(range(len(text) - 1))
    shown = torch.stack([context for _, context in rows])
    torch.testing.assert_close(shown, whole.context[:-1], rtol=1e-4, atol=1e-4)


def test_sampled_output_does_not_depend_on_batch_mates(target: Target) -> None:
    prompts, names = prompts_of(8), [f"r{i}" for i in range(8)]
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50)
    outputs = [
        Decoder(target, RandomProposer(target.vocab_size), batch, []).generate(
            prompts, sampling, 16, seed=5, requests=names
        )
        for batch in (1, 3, 8)
    ]
    tokens = [[completion.tokens for completion in output.completions] for output in outputs]
    assert tokens[0] == tokens[1] == tokens[2]


# ------------------------------------------------------------------------------------ chi-square


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(1.3, top_k=4)],
    ids=["t1", "top_p", "top_k"],
)
def test_sampled_output_has_the_targets_distribution(small: Target, sampling: Sampling) -> None:
    exact = exact_joint(small, [1, 4, 2, 5], sampling)
    assert p_value(decode_counts(small, sampling), exact) > 1e-3


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.3, top_k=4)], ids=["t1", "top_k"])
def test_a_draft_vocabulary_keeps_the_distribution(small: Target, sampling: Sampling) -> None:
    exact = exact_joint(small, [1, 4, 2, 5], sampling)
    proposer = ReducedProposer(torch.tensor([0, 3, 4, 6]), VOCABULARY, block_size=2)
    assert p_value(decode_counts(small, sampling, proposer=proposer), exact) > 1e-3


def test_drafts_that_hide_their_vocabulary_are_rejected(
    small: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the probabilities of the four tokens taken for those of the first four, drafts would
    be judged by the wrong ones."""

    def misplaced(draw, ids, size):
        def choose(logits):
            tokens, p = draw(logits)
            return ids[tokens], torch.nn.functional.pad(p, (0, size - len(ids)))

        return choose

    monkeypatch.setattr(proposers, "within", misplaced)
    proposer = ReducedProposer(torch.tensor([0, 3, 4, 6]), VOCABULARY, block_size=2)
    exact = exact_joint(small, [1, 4, 2, 5], Sampling(1.0))
    assert p_value(decode_counts(small, Sampling(1.0), proposer=proposer), exact) < 1e-6


def test_confidence_like_schedule_keeps_the_distribution(small: Target) -> None:
    """A schedule that depends on the round, not on the tokens it admits."""
    flip = itertools.cycle([[0, 2, 1], [1, 0, 2]])

    def schedule(proposal, limits):
        pattern = next(flip)
        return [pattern[row % 3] for row in range(len(proposal.tokens))]

    sampling = Sampling(1.0)
    exact = exact_joint(small, [1, 4, 2, 5], sampling)
    assert p_value(decode_counts(small, sampling, schedule), exact) > 1e-3


def test_broken_residual_is_rejected(small: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling from the target instead of the residual after a rejection is the classic mistake."""
    monkeypatch.setattr(verification, "residual", lambda target, draft: target)
    exact = exact_joint(small, [1, 4, 2, 5], Sampling(1.0))
    assert p_value(decode_counts(small, Sampling(1.0)), exact) < 1e-6


def test_temperatures_near_zero_are_refused() -> None:
    """A division by any other one stays finite."""
    for temperature in (1e-46, 1e-38, 1e-20, math.inf, math.nan, -1.0):
        with pytest.raises(ConfigError, match="a temperature of 0 or at least 1e-06"):
            Sampling(temperature)
    coldest = Sampling(LEAST_TEMPERATURE).probabilities(torch.tensor([-3e4, 3e4, 0.0]))
    assert coldest.tolist() == [0, 1, 0]


def test_draw_is_the_inverse_cdf() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 6.0, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 1 - 1e-12], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [1, 1, 3, 3]


def test_exactness_tells_rounding_from_error(target: Target) -> None:
    prompt = prompts_of(1)[0]
    expected = generate(target, prompt, 8, [])
    assert first_difference(target, "r", prompt, expected, expected) is None
    wrong = (*expected[:3], (expected[3] + 1) % 260, *expected[4:])
    difference = first_difference(target, "r", prompt, expected, wrong)
    assert difference.index == 3
    assert difference.gap > difference.noise
    assert not difference.explained


def test_outputs_may_part_at_the_first_token_behind_a_prompt_of_one(target: Target) -> None:
    difference = first_difference(target, "r", [5], [7, 8], [9, 8])
    assert difference.index == 0
    assert not difference.explained
