"""Every kind of drafter inside the decoder changes not one token.

Greedy output is plain decoding's; sampled output has the target's distribution, by the chi-square
test of `test_lossless`, which rejects a decoder that is broken on purpose.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspec.config.schema import DrafterConfig
from deepspec.decoding import Decoder, DecodeResult, Sampling, plain_decode
from deepspec.decoding.exactness import first_difference
from deepspec.drafters.base import Drafter, Proposer
from deepspec.drafters.registry import drafter_kind, open_proposer
from deepspec.targets import FrozenHead, Target
from tests.conftest import make_model, make_tokenizer
from tests.decoding.chi_square import decode_counts, exact_joint, p_value
from tests.decoding.test_lossless import prompts_of

KINDS = {
    "eagle3": DrafterConfig(kind="eagle3", num_layers=1, block_size=3),
    "eagle3, fewer tokens": DrafterConfig(
        kind="eagle3", num_layers=1, block_size=3, qk_norm=False, draft_vocab_size=100
    ),
    "mtp": DrafterConfig(kind="mtp", num_layers=1, block_size=1),
    "mtp, three drafts": DrafterConfig(kind="mtp", num_layers=1, block_size=3),
    "ngram": DrafterConfig(kind="ngram", block_size=4),
}
IN_PARALLEL = {
    head: DrafterConfig(num_layers=2, block_size=3, markov_rank=6, markov_head=head)
    for head in ("vanilla", "gated", "rnn")
}


def drafter_of(config: DrafterConfig, target: Target) -> Drafter:
    """Untrained, with weights large enough for drafts that differ."""
    kind = drafter_kind(config.kind)
    torch.manual_seed(0)
    drafter = kind.build(kind.resolve(config, target)).eval()
    for weight in drafter.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    if drafter.d2t is not None:
        drafter.restrict(torch.randperm(260)[:100].sort().values)
    return drafter


def proposer_of(name: str, target: Target) -> Proposer:
    return open_proposer(KINDS[name].kind, drafter_of(KINDS[name], target), target)


@pytest.fixture(scope="module")
def plain(target: Target) -> tuple[list[int], DecodeResult]:
    """Stop tokens that are reached in the middle of outputs, and plain decoding's output."""
    prompts = prompts_of(5)
    free = plain_decode(target, prompts, Sampling(), 32, batch_size=5, stop_token_ids=[])
    stop = [free.completions[0].tokens[9], free.completions[1].tokens[5]]
    return stop, plain_decode(target, prompts, Sampling(), 32, batch_size=5, stop_token_ids=stop)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_greedy_is_plain_decoding(
    target: Target, plain: tuple[list[int], DecodeResult], name: str, batch: int
) -> None:
    stop, expected = plain
    decoder = Decoder(target, proposer_of(name, target), batch, stop)
    result = decoder.generate(prompts_of(5), Sampling(), 32)
    assert result.completions == expected.completions
    size = KINDS[name].block_size
    for trace in result.traces:
        assert trace.accepted <= trace.scheduled <= trace.proposed <= size
    proposed = {trace.proposed for trace in result.traces}
    if name == "ngram":
        assert {0, size} < proposed  # none, all, and something between
        assert any(trace.accepted for trace in result.traces)
    else:
        assert proposed == {size}
    assert any(trace.accepted < trace.scheduled for trace in result.traces)


@pytest.fixture(scope="module")
def half() -> Target:
    return Target(make_model().bfloat16(), make_tokenizer(), 3, "half")


@pytest.mark.parametrize("name", ["eagle3, fewer tokens", "mtp", *IN_PARALLEL])
def test_beside_a_bf16_target_a_drafter_is_served_in_bf16(
    half: Target, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No head is cast, and what comes out is plain decoding's but for near ties."""
    forward = FrozenHead.forward

    def watched(self: FrozenHead, hidden: Tensor) -> Tensor:
        assert hidden.dtype == self.weight.dtype == torch.bfloat16
        return forward(self, hidden)

    monkeypatch.setattr(FrozenHead, "forward", watched)
    config, prompts = (KINDS | IN_PARALLEL)[name], prompts_of(2)
    drafter = drafter_of(config, half)
    expected = plain_decode(half, prompts, Sampling(), 8, stop_token_ids=[]).completions
    decoder = Decoder(half, open_proposer(config.kind, drafter, half), 2, [])
    found = decoder.generate(prompts, Sampling(), 8).completions
    for prompt, plain, ours in zip(prompts, expected, found, strict=True):
        difference = first_difference(half, ours.request, prompt, plain.tokens, ours.tokens)
        assert difference is None or difference.explained
    assert decoder.generate(prompts, Sampling(1.0), 8).tokens == 16


def test_beside_an_fp32_target_nothing_is_rounded(target: Target) -> None:
    drafter = drafter_of(KINDS["eagle3, fewer tokens"], target)
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    open_proposer("eagle3", drafter, target)
    for name, tensor in drafter.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.8)], ids=["t1", "top_p"])
@pytest.mark.parametrize("name", ["eagle3", "mtp", "ngram"])
def test_sampled_output_has_the_targets_distribution(
    small: Target, name: str, sampling: Sampling
) -> None:
    counts = decode_counts(small, sampling, proposer=proposer_of(name, small))
    assert p_value(counts, exact_joint(small, [1, 4, 2, 5], sampling)) > 1e-3


def test_sampled_lookup_does_not_depend_on_batch_mates(target: Target) -> None:
    """Rows whose lookups find fewer drafts or none share a forward with rows that find all."""
    prompts, names = prompts_of(8), [f"r{i}" for i in range(8)]
    prompts = [prompt * 2 for prompt in prompts]
    outputs = [
        Decoder(target, proposer_of("ngram", target), batch, []).generate(
            prompts, Sampling(0.7), 16, seed=5, requests=names
        )
        for batch in (1, 3, 8)
    ]
    assert outputs[0].completions == outputs[1].completions == outputs[2].completions
    key = ["request", "round", "proposed", "scheduled", "accepted"]
    rounds = [
        sorted([getattr(trace, name) for name in key] for trace in output.traces)
        for output in outputs
    ]
    assert rounds[0] == rounds[1] == rounds[2]
