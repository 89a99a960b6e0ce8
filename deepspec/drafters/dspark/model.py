"""The DSpark drafter: a block-parallel backbone over the target's features, and its heads.

Parameter names are those of the flat checkpoint layout. The frozen embedding and LM head belong to
the target and are passed in, so only trainable parameters live here. Training (`forward`) and
decoding (`ContextKeysValues`, `draft_hidden`) go through the same layers; a test compares them.
Legend: B rows, Q new context tokens, T context tokens, N blocks, K block size, D hidden size,
L captured layers, H heads, G key/value heads, E head dimension, R Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.attention import Visibility, block_attention, build_visibility
from deepspec.drafters.base import Drafter, DraftOutput
from deepspec.drafters.dspark.config import DSparkConfig
from deepspec.drafters.dspark.heads import MARKOV_KINDS, ConfidenceHead, MarkovHead
from deepspec.drafters.layers import Attend, Attention, Mlp, initialise
from deepspec.drafters.rotary import Rotary, Rotation, rotate
from deepspec.records import BlockBatch, TargetFeatures


class DraftLayer(nn.Module):
    """Pre-norm transformer layer. The context enters as keys and values only, un-normed here:
    it was normed once by `hidden_norm` and is the same for every layer."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, states: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """`states` [.., K, D] -> [.., K, D]."""
        states = states + self.self_attn(self.input_layernorm(states), rotation, attend)
        return states + self.mlp(self.post_attention_layernorm(states))


class DSparkDrafter(Drafter):
    """Backbone, Markov head and confidence head (dspark.md). Rank 0 without confidence: DFlash."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config.draft_vocab_size)
        self.config = config
        size, rank = config.hidden_size, config.markov_rank
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.markov_head: MarkovHead | None = None
        if rank:
            self.markov_head = MARKOV_KINDS[config.markov_head](
                size, config.vocab_size, rank, config.draft_vocab_size
            )
        self.confidence_head: ConfidenceHead | None = None
        if config.confidence_head:
            self.confidence_head = ConfidenceHead(
                size + (rank if config.confidence_with_markov else 0)
            )
        self.rotary = Rotary(
            config.head_dim, config.rope_parameters, config.max_position_embeddings
        )
        self.apply(partial(initialise, std=config.initializer_range))
        if self.markov_head is not None:
            # A zero bias makes the untrained drafter a DFlash one; W2 learns from the first step.
            nn.init.zeros_(self.markov_head.markov_w2.weight)
            nn.init.normal_(self.markov_head.markov_w1.weight, std=rank**-0.5)

    @property
    def draft_layers(self) -> list[DraftLayer]:
        """The decoder layers, first to last."""
        return [cast(DraftLayer, layer) for layer in self.layers]

    @property
    def compilable(self) -> list[nn.Module]:
        """See `Drafter.compilable`."""
        return list(self.layers)

    @property
    def bias_weight(self) -> Tensor | None:
        """W2 [V_draft, R]: turns a latent into a bias on the logits; None at rank 0."""
        return None if self.markov_head is None else self.markov_head.markov_w2.weight

    @property
    def latent_of_token(self) -> bool:
        """See `Drafter.latent_of_token`."""
        return self.markov_head is not None and self.markov_head.of_token

    def forward(
        self,
        features: TargetFeatures,
        batch: BlockBatch,
        embedding: Tensor,
        visibility: Visibility | None = None,
    ) -> DraftOutput:
        """Training forward: all blocks of the pack at once; `embedding` [V, D] frozen."""
        visibility = visibility or build_visibility(batch)
        offsets = torch.arange(batch.block_size, device=batch.anchors.device)
        states = F.embedding(self.inputs(batch.previous[:, 0]), embedding).to(self.fc.weight.dtype)
        projected = self.project(features.context)
        context_rotation = self.rotary(batch.positions, states.dtype)
        block_rotation = self.rotary(batch.anchors[:, None] + offsets, states.dtype)

        def run(layer: DraftLayer, states: Tensor) -> Tensor:
            past = layer.self_attn.keys_values(projected, context_rotation)

            def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                return block_attention(queries, *past, keys, values, visibility)

            return cast(Tensor, layer(states, block_rotation, attend))

        for layer in self.draft_layers:
            states = self.through(partial(run, layer), states)
        return self.heads(self.norm(states), batch.previous)

    def heads(self, hidden: Tensor, previous: Tensor) -> DraftOutput:
        """Teacher-forced heads: `hidden` [N, K, D], `previous` [N, K]."""
        latent = embedded = confidence = None
        if self.markov_head is not None:
            latent, embedded = self.markov_head(hidden, previous)
        if self.confidence_head is not None:
            confidence = self.confidence(hidden, embedded)
        return DraftOutput(hidden, latent, confidence)

    def confidence(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """Confidence logits [..] from `hidden` [.., D] and W1[x_{j-1}] [.., R]."""
        assert self.confidence_head is not None
        if self.config.confidence_detached:
            hidden = hidden.detach()
            embedded = None if embedded is None else embedded.detach()
        return self.confidence_head(
            hidden, embedded if self.config.confidence_with_markov else None
        )

    def inputs(self, anchors: Tensor) -> Tensor:
        """Anchor tokens [N] -> a block's input tokens [N, K]: the anchor, then masks."""
        tokens = anchors.new_full((len(anchors), self.config.block_size), self.config.mask_token_id)
        tokens[:, 0] = anchors
        return tokens

    def project(self, context: Tensor) -> Tensor:
        """Target features [.., L*D] -> what every layer's keys and values are made of [.., D]."""
        return self.hidden_norm(self.fc(context.to(self.fc.weight.dtype)))

    def draft_hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        embedding: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Decoding: one block a row, `tokens` [B, K] at `positions` [B, K] -> hidden [B, K, D].

        `attend(layer, queries, keys, values)` adds the cached context to the block's own keys.
        """
        states = F.embedding(tokens, embedding).to(self.fc.weight.dtype)
        rotation = self.rotary(positions, states.dtype)
        for index, layer in enumerate(self.draft_layers):

            def attend_layer(
                queries: Tensor, keys: Tensor, values: Tensor, index: int = index
            ) -> Tensor:
                return attend(index, queries, keys, values)

            states = layer(states, rotation, attend_layer)
        return self.norm(states)


class ContextKeysValues:
    """Decoding: the context's keys and values for all layers by one product and one norm.

    The context reaches every layer in the same form, so the layers' weights can be stacked. They
    are copied here: weights that change later ask for a new one.
    """

    def __init__(self, drafter: DSparkDrafter) -> None:
        self._drafter = drafter
        attentions = [layer.self_attn for layer in drafter.draft_layers]
        weights = [weight for a in attentions for weight in (a.k_proj.weight, a.v_proj.weight)]
        self._weight = torch.cat(weights)  # [layers * 2 * G * E, D]
        self._norm = torch.stack([a.k_norm.weight for a in attentions])[:, None]  # [layers, 1, E]
        self._shape = (len(attentions), 2, -1, drafter.config.head_dim)

    def __call__(self, context: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features [B, Q, L*D] at `positions` [B, Q] -> a layer's (keys, values).

        Each [B, G, Q, E], as `RowKV.write` takes them.
        """
        projected = self._drafter.project(context)
        keys, values = F.linear(projected, self._weight).unflatten(-1, self._shape).unbind(-3)
        eps = self._drafter.config.rms_norm_eps
        keys = F.rms_norm(keys, keys.shape[-1:], eps=eps) * self._norm
        rotation = self._drafter.rotary(positions[..., None], projected.dtype)  # over the layers
        keys, values = rotate(keys, rotation).transpose(1, 3), values.transpose(1, 3)
        return list(zip(keys.unbind(2), values.unbind(2), strict=True))
