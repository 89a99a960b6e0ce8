"""The target's exact joint distribution over short outputs, and counts of decoded ones."""

from __future__ import annotations

import torch
from scipy.stats import chisquare

from deepspec.decoding import Decoder, Sampling
from deepspec.drafters.base import Proposer
from deepspec.targets import Target
from tests.decoding.proposers import RandomProposer

VOCABULARY, LENGTH, DRAWS = 7, 3, 4000


def exact_joint(target: Target, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """P(x_1..x_LENGTH) of the target behind `prompt`, [V ** LENGTH]."""
    joint = torch.ones(1, dtype=torch.float64)
    texts = [prompt]
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = target.model(torch.tensor(texts)).logits[:, -1]
        step = sampling.probabilities(logits).double()
        joint = (joint[:, None] * step).flatten()
        texts = [[*text, token] for text in texts for token in range(VOCABULARY)]
    return joint


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square with cells of fewer than 5 expected pooled; impossible cells must be empty."""
    expected = probabilities * counts.sum()
    assert not counts[probabilities == 0].any()
    large = expected >= 5
    observed = [*counts[large].tolist(), counts[~large].sum().item()]
    wanted = [*expected[large].tolist(), expected[~large].sum().item()]
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(chisquare(observed, wanted, sum_check=False).pvalue)


def decode_counts(
    target: Target, sampling: Sampling, schedule=None, proposer: Proposer | None = None
) -> torch.Tensor:
    prompt = [1, 4, 2, 5]
    proposer = proposer or RandomProposer(VOCABULARY, block_size=2)
    decoder = Decoder(target, proposer, 1000, [], schedule)
    names = [f"s{i}" for i in range(DRAWS)]
    result = decoder.generate([prompt] * DRAWS, sampling, LENGTH, requests=names)
    tokens = torch.tensor([completion.tokens for completion in result.completions])
    index = tokens @ torch.tensor([VOCABULARY**i for i in reversed(range(LENGTH))])
    return torch.bincount(index, minlength=VOCABULARY**LENGTH)
