"""What every drafter offers: a training forward, and a proposer face for the decoder.

Legend: B rows, T context tokens, N blocks, K block size, D hidden, L captured layers,
V vocabulary, R Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from deepspec.records import Proposal


@dataclass(frozen=True)
class DraftOutput:
    """A drafter's training forward.

    `hidden` [N, K, D] the draft head's input. Every sequential head adds a low-rank bias to the
    base logits, so it is given by its latent: logits = head(hidden) + latent @ bias_weight.T.
    `latent` [N, K, R] or None (rank 0); `confidence_logits` [N, K] or None.
    """

    hidden: Tensor
    latent: Tensor | None
    confidence_logits: Tensor | None


class Drafter(nn.Module):
    """A trainable drafter. `config` is its resolved shape (`block_size`, `target_layer_ids`,
    `to_dict`); forward(features, batch, embedding) gives a DraftOutput: `features` of the pack as
    the target computed them, `embedding` [V, D] the target's, frozen."""

    config: Any

    @property
    def bias_weight(self) -> Tensor | None:
        """[V, R], turns a latent into a bias on the logits; None without a sequential head."""
        return None


@dataclass(frozen=True)
class Observation:
    """What the target computed in one forward, for the proposer to take in.

    `tokens` [B, Q] the forward's input; `context` [B, Q, L*D]; `final` [B, Q, D]. Row b's entries
    stand at positions `starts[b] ..`, of which the first `counts[b]` are verified; the rest is
    rubbish that a later observation overwrites. `end` = max(starts) + Q, known on the host.
    """

    tokens: Tensor
    context: Tensor
    final: Tensor
    starts: Tensor
    counts: Tensor
    end: int


Draw = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""The decoder's sampling rule: logits [B, V] -> (tokens [B], probabilities [B, V]); the
probabilities are None at temperature 0, where a draft is a point mass."""


class Proposer(Protocol):
    """A drafter inside the decoding loop. Rows are requests; each has its own length."""

    block_size: int

    def start(self, rows: int) -> None:
        """Forget everything and expect `rows` requests."""

    def observe(self, seen: Observation) -> None:
        """Take in every verified position of one target forward."""

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """Draft after each row's anchor: token `anchors` [B] at `positions` [B].

        `end` = max(positions) + 1 on the host. Everything before the anchor has been observed.
        """

    def select(self, rows: Tensor) -> None:
        """Keep the requests `rows` [B'], in this order."""
