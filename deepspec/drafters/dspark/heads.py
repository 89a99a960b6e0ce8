"""The sequential heads: low-rank Markov bias and confidence (dspark.md, "Sequential heads").

Every kind turns (hidden, previous token, state) into a latent [.., R]; the bias on the logits is
`latent @ markov_w2.T`. Training runs a block's slots with the true previous tokens, decoding one
slot at a time with the sampled one; both go through `step`. Weight names are those of the flat
checkpoint layout. Legend: B rows, N blocks, K block size, D hidden size, R rank, V vocabulary,
V_draft tokens that can be drafted (V or fewer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.base import Draw


class MarkovHead(nn.Module):
    """Vanilla: B_j = W2 W1[x_{j-1}]; W1 [V, R] of any token, W2 [V_draft, R] of what is drafted."""

    of_token = True  # the latent depends on the previous token alone

    def __init__(
        self, hidden_size: int, vocab_size: int, rank: int, draft_vocab_size: int | None = None
    ) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size or vocab_size, bias=False)

    def step(
        self, hidden: Tensor, embedded: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One slot: `hidden` [.., D], `embedded` = W1[x_{j-1}] [.., R] -> (latent [.., R], state).

        `state` is None at a block's first slot.
        """
        return embedded, state

    def forward(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """All slots, teacher-forced: `hidden` [N, K, D], `previous` [N, K].

        Returns the latent and W1[x_{j-1}] (the confidence head reads the latter), [N, K, R] each.
        """
        embedded = self.markov_w1(previous)
        return self.step(hidden, embedded, None)[0], embedded


class GatedMarkovHead(MarkovHead):
    """B_j = W2 (sigmoid(W_g [h_j; W1[x_{j-1}]]) * W1[x_{j-1}])."""

    of_token = False

    def __init__(
        self, hidden_size: int, vocab_size: int, rank: int, draft_vocab_size: int | None = None
    ) -> None:
        super().__init__(hidden_size, vocab_size, rank, draft_vocab_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(
        self, hidden: Tensor, embedded: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `MarkovHead.step`."""
        gate = torch.sigmoid(self.gate_proj(torch.cat((hidden, embedded), dim=-1)))
        return gate * embedded, state


class RnnMarkovHead(MarkovHead):
    """(g, c, o) = W [s; W1[x_{j-1}]; h_j] + b; s' = g s + (1 - g) tanh(c); B_j = W2 tanh(o).

    g goes through a sigmoid; s is zero at the start of every block.
    """

    of_token = False

    def __init__(
        self, hidden_size: int, vocab_size: int, rank: int, draft_vocab_size: int | None = None
    ) -> None:
        super().__init__(hidden_size, vocab_size, rank, draft_vocab_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def step(
        self, hidden: Tensor, embedded: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `MarkovHead.step`."""
        if state is None:
            state = torch.zeros_like(embedded)
        joint = self.joint_proj(torch.cat((state, embedded, hidden), dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
        return torch.tanh(output), state

    def forward(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """See `MarkovHead.forward`; the slots of a block depend on each other here."""
        embedded = self.markov_w1(previous)
        state: Tensor | None = None
        latents = []
        for slot in range(hidden.shape[1]):
            latent, state = self.step(hidden[:, slot], embedded[:, slot], state)
            latents.append(latent)
        return torch.stack(latents, dim=1), embedded


class ConfidenceHead(nn.Module):
    """Logit of c_j = sigmoid(w [h_j ; W1[x_{j-1}]] + b): the draft survives, given those before."""

    def __init__(self, inputs: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1, bias=bias)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """`hidden` [.., D], `embedded` [.., R] or None -> logits [..]."""
        if embedded is not None:
            hidden = torch.cat((hidden, embedded), dim=-1)
        return F.linear(hidden, self.proj.weight, self.proj.bias).squeeze(-1)


@dataclass(frozen=True)
class Drawn:
    """A block's tokens [B, K], the distributions [B, K, V] they were drawn from (None where draws
    give none), and W1[x_{j-1}] [B, K, R] (None without a head)."""

    tokens: Tensor
    probabilities: Tensor | None
    embedded: Tensor | None


def draw_block(
    markov: MarkovHead | None, hidden: Tensor, base: Tensor, anchors: Tensor, draw: Draw
) -> Drawn:
    """Slots left to right: the drawn token biases the next slot's logits.

    `hidden` [B, K, D] and its logits `base` [B, K, V]; `anchors` [B] are the tokens before slot 0.
    """
    tokens, probabilities, embeddings = [], [], []
    previous, state = anchors, None
    for own, logits in zip(hidden.unbind(1), base.unbind(1), strict=True):
        if markov is not None:
            embedded = F.embedding(previous, markov.markov_w1.weight)
            latent, state = markov.step(own, embedded, state)
            logits = torch.addmm(logits, latent, markov.markov_w2.weight.T)
            embeddings.append(embedded)
        previous, distribution = draw(logits)
        tokens.append(previous)
        if distribution is not None:
            probabilities.append(distribution)
    return Drawn(
        tokens=torch.stack(tokens, dim=1),
        probabilities=torch.stack(probabilities, dim=1) if probabilities else None,
        embedded=torch.stack(embeddings, dim=1) if embeddings else None,
    )


MARKOV_KINDS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RnnMarkovHead,
}
