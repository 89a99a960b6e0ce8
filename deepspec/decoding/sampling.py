"""The sampling rule: temperature, top-k, top-p; draws by inverse CDF from a row's own stream.

A row's random numbers depend on (seed, request) only, so its output does not depend on who shares
its batch. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.config.validation import LEAST_TEMPERATURE, is_temperature
from deepspec.decoding.transfers import upload
from deepspec.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep everything."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not is_temperature(self.temperature) or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"sampling needs a temperature of 0 or at least {LEAST_TEMPERATURE}, "
                f"0 < top_p <= 1 and top_k >= 0; found {self}"
            )

    @property
    def greedy(self) -> bool:
        """Whether the choice is an argmax."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """[.., V] logits -> the distribution that is sampled, fp32."""
        assert not self.greedy
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p  # the first is never outside
            probabilities = probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: weights [B, V] (any positive scale), `uniform` [B] in [0, 1) -> tokens [B].

    In fp64, so that rounding moves no more than 1e-12 of mass at any vocabulary; a token of weight
    zero is never drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return tokens.clamp_(max=probabilities.shape[-1] - 1)


class RandomRows:
    """One stream of uniforms a request."""

    def __init__(self, seed: int, requests: Sequence[str], device: torch.device) -> None:
        self._device = device
        self._generators = []
        for request in requests:
            digest = hashlib.blake2b(f"{seed}/{request}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            self._generators.append(generator)

    def uniforms(self, count: int) -> Tensor:
        """[B, count] in [0, 1)."""
        rows = [torch.rand(count, generator=g, dtype=torch.float64) for g in self._generators]
        return upload(torch.stack(rows), self._device)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._generators = [self._generators[row] for row in rows]

    def join(self, other: RandomRows) -> None:
        """Append the streams of `other`."""
        self._generators += other._generators
