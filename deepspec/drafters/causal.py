"""Autoregressive drafters of one decoder layer: what EAGLE-3 and MTP have in common.

The layer reads pairs. Pair t is the token x_{t+1} with the target's feature g_t, and stands at
position t; it attends to the true pairs before it. A block at anchor a starts from the pair
(x_a, g_{a-1}), which predicts x_{a+1}. Slot j > 0 is the pair of x_{a+j}, whose feature does not
exist yet, with the layer's own output of slot j - 1 in its place: in training as in decoding
(EAGLE-3's training-time test), only that decoding feeds back the sampled token.

No pair crosses the border of a sample. Token 0 is in no pair but the one of an anchor at position
0: its feature is zero and it sees nothing else. Legend: B rows, Q new tokens, T context tokens,
N blocks, K block size, D hidden size, W input of the attention, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.attention import block_attention, build_visibility
from deepspec.drafters.base import Drafter, DraftOutput, Draw, Observation, within
from deepspec.drafters.cache import RowKV
from deepspec.drafters.layers import Attend, Attention, Mlp
from deepspec.drafters.rotary import Rotary, Rotation
from deepspec.drafters.shape import DrafterShape, resolve_shape
from deepspec.errors import ConfigError
from deepspec.records import BlockBatch, Proposal, TargetFeatures


def resolve_layer(config: DrafterConfig, target: Any) -> dict[str, Any]:
    """The fields of DrafterShape for `target`; nulls taken from it. Raises ConfigError."""
    if config.num_layers != 1:
        raise ConfigError(
            f"drafter.num_layers={config.num_layers}, but drafter.kind={config.kind} is one "
            "decoder layer; set drafter.num_layers=1"
        )
    return resolve_shape(config, target)


class CausalDrafter(Drafter):
    """One decoder layer over pairs. A kind says what its features are, and how a pair is mixed.

    `qk_norm`: see `Attention`; `draft_vocab_size`: see `Drafter`.
    """

    def __init__(
        self,
        config: DrafterShape,
        attention_input: int,
        qk_norm: bool = True,
        draft_vocab_size: int | None = None,
    ) -> None:
        super().__init__(draft_vocab_size)
        self.config = config
        norm = partial(nn.RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, attention_input, qk_norm)
        self.mlp = Mlp(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.norm = norm()
        self.rotary = Rotary(
            config.head_dim, config.rope_parameters, config.max_position_embeddings
        )

    def fuse(self, features: TargetFeatures) -> Tensor:
        """What the target computed, [.., L*D] and [.., D] -> the feature of each pair [.., D]."""
        raise NotImplementedError

    def mix(self, embedded: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """A pair, each [.., D] -> the attention's input [.., W] and the residual [.., D]."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self.norm.weight.dtype

    def embed(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """[..] -> [.., D], by the target's `embedding` [V, D]."""
        return F.embedding(tokens, embedding).to(self.dtype)

    def keys_values(
        self, embedded: Tensor, feature: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [.., G, E] of true pairs, whose own output nobody needs."""
        return self.self_attn.keys_values(self.mix(embedded, feature)[0], rotation)

    def step(self, embedded: Tensor, feature: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Pairs [.., D] at `rotation` -> the layer's output [.., D]: the next slot's feature.

        What the LM head reads is `norm` of it.
        """
        inputs, residual = self.mix(embedded, feature)
        states = residual + self.self_attn(inputs, rotation, attend)
        return states + self.mlp(self.post_attention_layernorm(states))

    def forward(
        self,
        features: TargetFeatures,
        batch: BlockBatch,
        embedding: Tensor,
        attention: str | None = None,
    ) -> DraftOutput:
        """Training forward: K steps, each of all blocks of the pack; `embedding` [V, D] frozen.

        `attention`: the implementation, see `build_visibility`.
        """
        fused = self.fuse(features)
        # the last pair of a sample has the next sample's token: no block is far enough to see it
        tokens = self.embed(batch.tokens.roll(-1), embedding)
        context = self.keys_values(tokens, fused, self.rotary(batch.positions, self.dtype))
        first = batch.anchors - 1  # the anchor's pair; true pairs stand before it
        states = torch.where((first >= 0)[:, None], fused[(batch.rows - 1).clamp(min=0)], 0)
        states = states[:, None]  # [N, 1, D]
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """The newest slot of every block over the context and all its slots so far."""
            keys.append(key)
            values.append(value)
            seen = build_visibility(batch, attention, limits=first, queries=1, keys=len(keys))
            own = torch.cat(keys, dim=1), torch.cat(values, dim=1)
            return block_attention(query, *context, *own, seen)

        hidden = []
        for slot in range(batch.block_size):
            token = self.embed(batch.previous[:, slot : slot + 1], embedding)
            rotation = self.rotary((first + slot)[:, None], self.dtype)
            states = self.step(token, states, rotation, attend)
            hidden.append(states)
        return DraftOutput(self.norm(torch.cat(hidden, dim=1)), None, None)


class CausalProposer:
    """Such a drafter inside the decoding loop: K small forwards a round.

    Keeps keys and values of every true pair. Those of the slots are written behind them and
    overwritten by the next observation, so the mask is one comparison. `embedding` [V, D] and
    `head` are the target's, frozen; a drafter of fewer tokens takes their rows of the head.
    """

    def __init__(self, drafter: CausalDrafter, embedding: Tensor, head: Any) -> None:
        self.drafter = drafter
        self.block_size = drafter.config.block_size
        self._embedding = embedding
        self._vocabulary = drafter.vocabulary
        self._head = head if self._vocabulary is None else head.rows(self._vocabulary)
        config = drafter.config
        self._grouped = config.num_attention_heads != config.num_key_value_heads
        self._cache = RowKV()
        self._newest: Tensor | None = None  # [B, 1, D] the feature behind the last verified token

    def start(self, rows: int) -> None:
        """Forget everything and expect `rows` requests."""
        self._cache, self._newest = RowKV(rows), None

    def select(self, rows: Tensor) -> None:
        """Keep the requests `rows` [B'], in this order."""
        self._cache.select(rows)
        if self._newest is not None:
            self._newest = self._newest.index_select(0, rows)

    def join(self, other: CausalProposer) -> None:
        """Append the requests of `other`; see `Proposer.join`."""
        assert self._newest is not None
        assert other._newest is not None, "a prompt has at least one token"
        self._cache.join(other._cache)
        self._newest = torch.cat((self._newest, other._newest))

    def observe(self, seen: Observation) -> None:
        """Append the pairs that one target forward completes; see `Observation`.

        Its first token belongs to the feature before it; of its features, the last verified one
        waits for its token.
        """
        fused = self.drafter.fuse(TargetFeatures(seen.context, seen.final))
        row = torch.arange(fused.shape[0], device=fused.device)
        tokens, starts = seen.tokens, seen.starts
        if self._newest is None:  # all rows begin: token 0 is in no pair
            features, tokens = fused[:, :-1], tokens[:, 1:]
        else:
            features, starts = torch.cat((self._newest, fused[:, :-1]), dim=1), starts - 1
        self._newest = fused[row, seen.counts - 1][:, None]
        if tokens.shape[1]:
            offsets = torch.arange(tokens.shape[1], device=tokens.device)
            rotation = self.drafter.rotary(starts[:, None] + offsets, self.drafter.dtype)
            embedded = self.drafter.embed(tokens, self._embedding)
            keys, values = self.drafter.keys_values(embedded, features, rotation)
            self._write(keys, values, starts, seen.end - 1)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """Draft K tokens after `anchors` [B] at `positions` [B]; see `Proposer.propose`."""
        assert self._newest is not None, "a prompt has at least one token"
        draw = within(draw, self._vocabulary, self.drafter.config.vocab_size)
        states, previous = self._newest, anchors
        tokens, probabilities = [], []
        for slot in range(self.block_size):
            place = positions - 1 + slot  # of the pair of `previous`
            states = self.drafter.step(
                self.drafter.embed(previous, self._embedding)[:, None],
                states,
                self.drafter.rotary(place[:, None], self.drafter.dtype),
                partial(self._attend, place, end - 1 + slot),
            )
            previous, distribution = draw(self._head(self.drafter.norm(states))[:, 0])
            tokens.append(previous)
            if distribution is not None:
                probabilities.append(distribution)
        return Proposal(
            tokens=torch.stack(tokens, dim=1),
            probabilities=torch.stack(probabilities, dim=1) if probabilities else None,
            confidence=None,
        )

    def _attend(
        self, place: Tensor, end: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """One slot of each row, [B, 1, H, E], over all pairs up to its own at `place` [B]."""
        all_keys, all_values = self._write(keys, values, place, end)
        mask = None
        if len(place) > 1:  # one row ends exactly at its slot: nothing behind it to hide
            mask = torch.arange(end, device=place.device) <= place[:, None, None, None]
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            all_keys,
            all_values,
            attn_mask=mask,
            enable_gqa=self._grouped,
        )
        return attended.transpose(1, 2)

    def _write(
        self, keys: Tensor, values: Tensor, starts: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        return self._cache.write(keys.transpose(1, 2), values.transpose(1, 2), starts, end)
