"""DSpark inside the decoding loop: one parallel backbone pass, then K cheap sequential steps.

Legend: B rows, K block size, D hidden size, V vocabulary, R Markov rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.drafters.base import Draw, Observation, within
from deepspec.drafters.cache import RowKV
from deepspec.drafters.dspark.heads import draw_block
from deepspec.drafters.dspark.model import ContextKeysValues, DSparkDrafter
from deepspec.records import Proposal


class DSparkProposer:
    """Keeps a row of context keys and values for *every* verified position.

    `embedding` [V, D] and `head` are the target's, frozen; a drafter of fewer tokens takes their
    rows of the head. The block's own keys are written behind the context and overwritten by the
    next observation, so the mask is one comparison.
    """

    def __init__(self, drafter: DSparkDrafter, embedding: Tensor, head: Any) -> None:
        self.drafter = drafter
        self.block_size = drafter.config.block_size
        self._embedding = embedding
        self._vocabulary = drafter.vocabulary
        self._head = head if self._vocabulary is None else head.rows(self._vocabulary)
        self._caches: list[RowKV] = []
        self._offsets = torch.arange(self.block_size, device=embedding.device)
        config = drafter.config
        self._group = config.num_attention_heads // config.num_key_value_heads

    def start(self, rows: int) -> None:
        """Forget everything and expect `rows` requests."""
        self._caches = [RowKV(rows) for _ in self.drafter.layers]
        self._context_keys_values = ContextKeysValues(self.drafter)

    def select(self, rows: Tensor) -> None:
        """Keep the requests `rows` [B'], in this order."""
        for cache in self._caches:
            cache.select(rows)

    def join(self, other: DSparkProposer) -> None:
        """Append the requests of `other`; see `Proposer.join`."""
        for cache, joining in zip(self._caches, other._caches, strict=True):
            cache.join(joining)

    def observe(self, seen: Observation) -> None:
        """Append the context keys and values of one target forward; see `Observation`."""
        offsets = torch.arange(seen.tokens.shape[1], device=seen.tokens.device)
        pairs = self._context_keys_values(seen.context, seen.starts[:, None] + offsets)
        for cache, (keys, values) in zip(self._caches, pairs, strict=True):
            cache.write(keys, values, seen.starts, seen.end)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """Draft K tokens after `anchors` [B] at `positions` [B]; see `Proposer.propose`."""
        rows, size = anchors.shape[0], self.block_size
        last = end - 1 + size
        mask = None
        if rows > 1:  # one row ends exactly at its block: nothing behind it to hide
            limit = positions[:, None, None, None] + size
            mask = torch.arange(last, device=anchors.device) < limit

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            all_keys, all_values = self._caches[layer].write(
                keys.transpose(1, 2), values.transpose(1, 2), positions, last
            )
            attended = F.scaled_dot_product_attention(
                queries.transpose(1, 2),
                all_keys,
                all_values,
                attn_mask=mask,
                enable_gqa=self._group > 1,
            )
            return attended.transpose(1, 2)

        hidden = self.drafter.draft_hidden(
            self.drafter.inputs(anchors),
            positions[:, None] + self._offsets,
            self._embedding,
            attend,
        )
        draw = within(draw, self._vocabulary, self.drafter.config.vocab_size)
        return self._sample(hidden, anchors, draw)

    def _sample(self, hidden: Tensor, anchors: Tensor, draw: Draw) -> Proposal:
        """The heads' part; `hidden` [B, K, D]."""
        drawn = draw_block(self.drafter.markov_head, hidden, self._head(hidden), anchors, draw)
        confidence = None
        if self.drafter.confidence_head is not None:
            confidence = torch.sigmoid(self.drafter.confidence(hidden, drawn.embedded).float())
        return Proposal(drawn.tokens, drawn.probabilities, confidence)
