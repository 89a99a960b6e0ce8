"""DSpark inside the decoding loop: one parallel backbone pass, then K cheap sequential steps.

Legend: B rows, K block size, D hidden size, V vocabulary, R Markov rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.drafters.base import Draw, Observation, greedy, within
from deepspec.drafters.cache import RowKV
from deepspec.drafters.compiling import compiled
from deepspec.drafters.dspark.heads import draw_block
from deepspec.drafters.dspark.model import ContextKeysValues, DSparkDrafter
from deepspec.records import Proposal


class DSparkProposer:
    """Keeps a row of context keys and values for *every* verified position.

    `embedding` [V, D] and `head` are the target's, frozen; a drafter of fewer tokens takes their
    rows of the head. The block's own keys are written behind the context and overwritten by the
    next observation, so the mask is one comparison. `block_size` may be set lower than the
    drafter's: the backbone runs over whole blocks, the heads over what is drafted.
    """

    def __init__(self, drafter: DSparkDrafter, embedding: Tensor, head: Any) -> None:
        self.drafter = drafter
        self.block_size = drafter.config.block_size
        self._embedding = embedding
        self._vocabulary = drafter.vocabulary
        self._head = head if self._vocabulary is None else head.rows(self._vocabulary)
        self._caches: list[RowKV] = []
        self._compiled = False
        self._offsets = torch.arange(self.block_size, device=embedding.device)
        config = drafter.config
        self._group = config.num_attention_heads // config.num_key_value_heads

    def start(self, rows: int) -> None:
        """Forget everything and expect `rows` requests."""
        self._caches = [RowKV() for _ in self.drafter.layers]
        self._context_keys_values = ContextKeysValues(self.drafter)

    def select(self, rows: Tensor) -> None:
        """Keep the requests `rows` [B'], in this order."""
        for cache in self._caches:
            cache.select(rows)

    def observe(self, seen: Observation) -> None:
        """Append the context keys and values of one target forward; see `Observation`."""
        offsets = torch.arange(seen.tokens.shape[1], device=seen.tokens.device)
        pairs = self._context_keys_values(seen.context, seen.starts[:, None] + offsets)
        for cache, (keys, values) in zip(self._caches, pairs, strict=True):
            cache.write(keys, values, seen.starts, seen.end)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """Draft K tokens after `anchors` [B] at `positions` [B]; see `Proposer.propose`."""
        last = end - 1 + self.drafter.config.block_size
        if not self._compiled:
            return self._sample(*self._block(anchors, positions, last), anchors, draw)
        for cache in self._caches:
            cache.reserve(len(anchors), last)
        if draw is greedy:
            tokens, confidence = compiled(DSparkProposer._greedy)(self, anchors, positions)
            return Proposal(tokens, None, confidence)
        hidden, logits = compiled(DSparkProposer._block)(self, anchors, positions, None)
        return self._sample(hidden, logits, anchors, draw)

    def compile(self) -> None:
        """Run compiled from now on; of the sequential head only what is greedy."""
        self._compiled = True

    def _greedy(self, anchors: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens and confidence [B, K], by one graph."""
        proposal = self._sample(*self._block(anchors, positions, None), anchors, greedy)
        return proposal.tokens, proposal.confidence

    def _block(self, anchors: Tensor, positions: Tensor, last: int | None) -> tuple[Tensor, Tensor]:
        """Hidden states [B, K, D] and logits [B, K, V] of the slots that are drafted.

        `last`: the length of the longest row with its block; None attends over whole buffers, of
        whatever length.
        """
        rows, size = anchors.shape[0], self.drafter.config.block_size
        place = positions[:, None] + self._offsets
        limit = positions[:, None, None, None] + size

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            block, cache = (keys.transpose(1, 2), values.transpose(1, 2)), self._caches[layer]
            if last is None:
                all_keys, all_values = cache.write_fixed(*block, place)
            else:
                all_keys, all_values = cache.write(*block, positions, last)
            mask = None
            if rows > 1 or last is None:  # else the row ends at its block: nothing to hide
                mask = torch.arange(all_keys.shape[2], device=anchors.device) < limit
            attended = F.scaled_dot_product_attention(
                queries.transpose(1, 2),
                all_keys,
                all_values,
                attn_mask=mask,
                enable_gqa=self._group > 1,
            )
            return attended.transpose(1, 2)

        tokens = self.drafter.inputs(anchors)
        hidden = self.drafter.draft_hidden(tokens, place, self._embedding, attend)
        hidden = hidden[:, : self.block_size]
        return hidden, self._head(hidden)

    def _sample(self, hidden: Tensor, logits: Tensor, anchors: Tensor, draw: Draw) -> Proposal:
        """The sequential head's part; `hidden` [B, K, D], `logits` [B, K, V]."""
        draw = within(draw, self._vocabulary, self.drafter.config.vocab_size)
        drawn = draw_block(self.drafter.markov_head, hidden, logits, anchors, draw)
        confidence = None
        if self.drafter.confidence_head is not None:
            confidence = torch.sigmoid(self.drafter.confidence(hidden, drawn.embedded).float())
        return Proposal(drawn.tokens, drawn.probabilities, confidence)
