"""What every drafter offers: a training forward, and a proposer face for the decoder.

Legend: B rows, T context tokens, N blocks, K block size, D hidden, L captured layers,
V vocabulary, V_draft tokens that can be drafted where these are fewer, R Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    the target computed them, `embedding` [V, D] the target's, frozen.

    With a `draft_vocab_size` it drafts so many of the target's tokens and no others: the first ones
    until `restrict` chooses them. `d2t` [V_draft] goes with the weights in the form that serving
    engines read: draft id i is the target's i + d2t[i].
    """

    config: Any
    d2t: Tensor | None
    in_fp32: tuple[str, ...] = ()  # parts of the names of what is served in fp32
    recomputed = False  # whether what goes through `through` is computed again in the backward

    def __init__(self, draft_vocab_size: int | None = None) -> None:
        super().__init__()
        offsets = None if draft_vocab_size is None else torch.zeros(draft_vocab_size).long()
        self.register_buffer("d2t", offsets)

    def to_serve(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Itself, rounded and moved as engines hold it: in `dtype`, but what is `in_fp32`."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and not any(part in name for part in self.in_fp32):
                tensor.data = tensor.data.to(dtype)
        return self.to(device)

    @property
    def vocabulary(self) -> Tensor | None:
        """[V_draft] the target's ids that can be drafted, ascending; None where all can."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def restrict(self, ids: Tensor) -> None:
        """Draft the target's tokens `ids` [V_draft], ascending, and no others."""
        assert self.d2t is not None
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))

    @property
    def bias_weight(self) -> Tensor | None:
        """[V or V_draft, R], turns a latent into a bias on the logits; None without such a head."""
        return None

    @property
    def compilable(self) -> list[nn.Module]:
        """What training.compile compiles, each for itself; empty where a kind has nothing."""
        return []

    def through(self, layer: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """`layer(states)`, of which only `states` are kept for the backward where `recomputed`."""
        if self.recomputed and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, states, use_reentrant=False))
        return layer(states)

    @property
    def latent_of_token(self) -> bool:
        """Whether a latent is a function of the previous token alone."""
        return False


@dataclass(frozen=True)
class Observation:
    """What the target computed in one forward, for the proposer to take in.

    `tokens` [B, Q] the forward's input; `context` [B, Q, L*D], or [B, Q, 0] for a proposer with
    `reads_features` false; `final` [B, Q, D]. Row b's entries
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


def greedy(logits: Tensor) -> tuple[Tensor, None]:
    """The sampling rule at temperature 0; see `Draw`."""
    return logits.argmax(-1), None


def within(draw: Draw, vocabulary: Tensor | None, size: int) -> Draw:
    """`draw` for logits [B, V_draft] of the target's tokens `vocabulary`; None: of all `size`.

    It draws among those and answers in the target's ids [B] and probabilities [B, V], 0 outside:
    so verification stays what it is, and exact.
    """
    if vocabulary is None:
        return draw

    def choose(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens, probabilities = draw(logits)
        if probabilities is not None:
            everywhere = probabilities.new_zeros(len(probabilities), size)
            probabilities = everywhere.index_copy_(1, vocabulary, probabilities)
        return vocabulary[tokens], probabilities

    return choose


class Proposer(Protocol):
    """A drafter inside the decoding loop. Rows are requests; each has its own length.

    For a proposer with an attribute `reads_features` that is false, the target captures no features
    while it decodes.
    """

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

    def join(self, other: Self) -> None:
        """Append the requests of another proposer of the same drafter, which is not used again."""
