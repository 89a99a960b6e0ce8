"""The V4 drafter inside the decoding loop.

Legend: B rows, K block size, W window, E head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec.drafters.base import Draw, Observation
from deepspec.drafters.cache import RowKV
from deepspec.drafters.dspark.heads import draw_block
from deepspec.drafters.dspark_v4.model import DSparkV4Drafter
from deepspec.records import Proposal


class DSparkV4Proposer:
    """Keeps a latent a stage for every verified position, and drafts over the last W of a row.

    `embedding` [V, D] and `head` are the target's, frozen. The block's own latents are written
    behind the context and overwritten by the next observation.
    """

    def __init__(self, drafter: DSparkV4Drafter, embedding: Tensor, head: nn.Module) -> None:
        self.drafter = drafter
        self.block_size = drafter.config.block_size
        self._embedding = embedding
        self._head = head
        self._caches: list[RowKV] = []

    def start(self, rows: int) -> None:
        """Forget everything and expect `rows` requests."""
        self._caches = [RowKV(rows) for _ in self.drafter.stages]

    def select(self, rows: Tensor) -> None:
        """Keep the requests `rows` [B'], in this order."""
        for cache in self._caches:
            cache.select(rows)

    def join(self, other: DSparkV4Proposer) -> None:
        """Append the requests of `other`; see `Proposer.join`."""
        for cache, joining in zip(self._caches, other._caches, strict=True):
            cache.join(joining)

    def observe(self, seen: Observation) -> None:
        """Append the latents of one target forward; see `Observation`."""
        offsets = torch.arange(seen.tokens.shape[1], device=seen.tokens.device)
        context = self.drafter.project(seen.context)
        rotation = self.drafter.rotary(seen.starts[:, None] + offsets, context.dtype)
        for index, stage in enumerate(self.drafter.draft_stages):
            self._write(index, stage.attn.latent(context, rotation), seen.starts, seen.end)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """Draft K tokens after `anchors` [B] at `positions` [B]; see `Proposer.propose`."""
        width = min(self.drafter.config.sliding_window, end - 1)
        around = torch.arange(-width, self.block_size, device=anchors.device)
        columns = positions[:, None] + around
        there = columns >= 0
        columns = columns.clamp(min=0)[..., None]

        def see(stage: int, own: Tensor) -> tuple[Tensor, Tensor]:
            latents = self._write(stage, own, positions, end - 1 + self.block_size)
            return latents.gather(1, columns.expand(-1, -1, latents.shape[-1])), there

        states = self.drafter.draft(anchors, positions, self._embedding, see)
        hidden, markov = self.drafter.norm(states), self.drafter.markov_head
        drawn = draw_block(markov, hidden, self._head(hidden), anchors, draw)
        assert drawn.embedded is not None
        confidence = torch.sigmoid(self.drafter.confidence(states, drawn.embedded).float())
        return Proposal(drawn.tokens, drawn.probabilities, confidence)

    def _write(self, stage: int, latents: Tensor, starts: Tensor, end: int) -> Tensor:
        """`latents` [B, Q, E] from `starts` on; all below `end` [B, end, E]."""
        keys = latents[:, None]  # one head; values are the keys, and kept once
        return self._caches[stage].write(keys, keys[..., :0], starts, end)[0][:, 0]
