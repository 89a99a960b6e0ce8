"""Real proposers of known quality: rubbish, perfect, and a drawn one with a known distribution."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deepspec.drafters.base import Draw, Observation
from deepspec.records import Proposal
from deepspec.targets import Target


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

    def observe(self, seen: Observation) -> None:
        assert seen.tokens.shape[0] == self.rows
        self.seen.append(seen)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        drawn = [draw(row.expand(len(anchors), -1)) for row in self.logits]
        tokens = torch.stack([token for token, _ in drawn], dim=1)
        if drawn[0][1] is None:
            return Proposal(tokens, None, None)
        return Proposal(tokens, torch.stack([p for _, p in drawn], dim=1), None)


class PerfectProposer(RandomProposer):
    """Knows the target's greedy continuation; wrong from slot `good` on (None: never)."""

    def __init__(self, target: Target, block_size: int = 4, good: int | None = None) -> None:
        super().__init__(target.vocab_size, block_size)
        self.target = target
        self.good = block_size if good is None else good

    def start(self, rows: int) -> None:
        super().start(rows)
        self.history: list[list[int]] = [[] for _ in range(rows)]

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.history = [self.history[row] for row in rows.tolist()]

    def observe(self, seen: Observation) -> None:
        super().observe(seen)
        for row, count in enumerate(seen.counts.tolist()):
            assert seen.starts[row] == len(self.history[row])
            self.history[row] += seen.tokens[row, :count].tolist()

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        tokens = []
        for row, anchor in enumerate(anchors.tolist()):
            text = [*self.history[row], anchor]
            assert len(text) - 1 == positions[row]
            for slot in range(self.block_size):
                logits = self.target.model(torch.tensor([text])).logits[0, -1]
                choice = int(logits.argmax())
                text.append(choice if slot < self.good else (choice + 1) % logits.shape[0])
            tokens.append(text[-self.block_size :])
        return Proposal(torch.tensor(tokens), None, None)


class ConfidentProposer(RandomProposer):
    """Random drafts, with a confidence in each that depends on the token before it: a half or 0.8
    in the first draft, 0.9 or nothing in the next, and so on."""

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        proposal = super().propose(anchors, positions, end, draw)
        before = torch.cat((anchors[:, None], proposal.tokens[:, :-1]), dim=1)
        first = torch.arange(self.block_size) == 0
        sure, unsure = torch.where(first, 0.8, 0.9), torch.where(first, 0.5, 0.0)
        return replace(proposal, confidence=torch.where(before % 2 == 0, sure, unsure))
