"""A proposer whose drafts are drawn from a known distribution."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deepspec.drafters.base import Draw, Observation, within
from deepspec.records import Proposal


class RandomProposer:
    """Draws every draft from a fixed distribution that has nothing to do with the target."""

    def __init__(self, vocabulary: int, block_size: int = 4, seed: int = 0) -> None:
        self.block_size = block_size
        self.logits = 2 * torch.randn(
            block_size, vocabulary, generator=torch.Generator().manual_seed(seed)
        )
        self.seen: list[Observation] = []

    def start(self, rows: int) -> None:
        self.rows = rows

    def select(self, rows: Tensor) -> None:
        self.rows = len(rows)

    def join(self, other: RandomProposer) -> None:
        self.rows += other.rows

    def observe(self, seen: Observation) -> None:
        assert seen.tokens.shape[0] == self.rows
        self.seen.append(seen)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        drawn = [draw(row.expand(len(anchors), -1)) for row in self.logits]
        tokens = torch.stack([token for token, _ in drawn], dim=1)
        if drawn[0][1] is None:
            return Proposal(tokens, None, None)
        return Proposal(tokens, torch.stack([p for _, p in drawn], dim=1), None)


class ReducedProposer(RandomProposer):
    """Draws from a fixed distribution over the tokens `ids` of the target's."""

    def __init__(self, ids: Tensor, vocabulary: int, block_size: int = 4) -> None:
        super().__init__(len(ids), block_size)
        self.ids, self.vocabulary = ids, vocabulary

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        return super().propose(anchors, positions, end, within(draw, self.ids, self.vocabulary))


class ConfidentProposer(RandomProposer):
    """Random drafts, with a confidence in each that depends on the token before it: a half or 0.8
    in the first draft, 0.9 or nothing in the next, and so on."""

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        proposal = super().propose(anchors, positions, end, draw)
        before = torch.cat((anchors[:, None], proposal.tokens[:, :-1]), dim=1)
        first = torch.arange(self.block_size) == 0
        sure, unsure = torch.where(first, 0.8, 0.9), torch.where(first, 0.5, 0.0)
        return replace(proposal, confidence=torch.where(before % 2 == 0, sure, unsure))
