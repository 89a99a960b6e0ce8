"""The drafter inside DeepSeek V4's checkpoints: three V4 layers over a block, and its heads.

Names are those of the `mtp.*` tensors, except that experts are stacked, that what only the first
or the last stage has stands beside the stages, and that `hc_attn_fn` is `hc_attn.fn`. Training
(`forward`) and decoding (`DSparkV4Proposer`) differ in where the context's latents come from and go
through the same `draft`. Legend: N blocks (in decoding, rows), K block size, T context tokens,
W window, J = W + K latents that a block sees, n streams, D hidden size, L captured layers,
E head dimension, R Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.base import Drafter, DraftOutput
from deepspec.drafters.dspark.heads import ConfidenceHead, MarkovHead
from deepspec.drafters.dspark_v4.attention import LatentAttention, See
from deepspec.drafters.dspark_v4.config import DSparkV4Config
from deepspec.drafters.dspark_v4.experts import MixtureOfExperts
from deepspec.drafters.dspark_v4.hyper import HyperConnection, HyperHead
from deepspec.drafters.rotary import Rotary, Rotation
from deepspec.records import BlockBatch, TargetFeatures


class Stage(nn.Module):
    """Attention and experts, each between hyper-connections."""

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        self.attn = LatentAttention(config)
        self.ffn = MixtureOfExperts(config)
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)

    def forward(self, streams: Tensor, rotation: Rotation, see: See) -> Tensor:
        """`streams` [N, K, n, D] -> [N, K, n, D]."""

        def attention(states: Tensor) -> Tensor:
            return self.attn(self.attn_norm(states), rotation, see)

        def experts(states: Tensor) -> Tensor:
            return self.ffn(self.ffn_norm(states))

        return self.hc_ffn(self.hc_attn(streams, attention), experts)


class DSparkV4Drafter(Drafter):
    """Stages, hyper-connection head, Markov head and confidence head."""

    config: DSparkV4Config
    in_fp32 = ("attn_sink", "gate.bias", "hc_")  # as in the published checkpoints

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        self.config = config
        size, rank = config.hidden_size, config.markov_rank
        self.main_proj = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.main_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.num_layers))
        self.hc_head = HyperHead(config)
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.markov_head = MarkovHead(size, config.vocab_size, rank)
        self.confidence_head = ConfidenceHead(size + rank, bias=False)
        self.rotary = Rotary(
            config.qk_rope_head_dim,
            {"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=0,  # plays no part in this type
        )
        for parameter in self.parameters():
            if parameter.ndim > 1:  # vectors have their start where they are made
                nn.init.normal_(parameter, std=config.initializer_range)
        # a zero bias on the logits at first; W2 learns from the first step
        nn.init.zeros_(self.markov_head.markov_w2.weight)
        nn.init.normal_(self.markov_head.markov_w1.weight, std=rank**-0.5)

    @property
    def draft_stages(self) -> list[Stage]:
        """The stages, first to last."""
        return [cast(Stage, stage) for stage in self.stages]

    @property
    def bias_weight(self) -> Tensor:
        """W2 [V, R]: turns a latent into a bias on the logits."""
        return self.markov_head.markov_w2.weight

    @property
    def latent_of_token(self) -> bool:
        """See `Drafter.latent_of_token`."""
        return self.markov_head.of_token

    def forward(
        self, features: TargetFeatures, batch: BlockBatch, embedding: Tensor
    ) -> DraftOutput:
        """Training forward: all blocks of the pack at once; `embedding` [V, D] frozen."""
        context = self.project(features.context)
        rotation = self.rotary(batch.positions, context.dtype)
        width = min(self.config.sliding_window, context.shape[0])
        before = torch.arange(-width, 0, device=context.device)
        there = F.pad(batch.anchors[:, None] + before >= 0, (0, batch.block_size), value=True)
        rows = (batch.rows[:, None] + before).clamp(min=0)

        def see(stage: int, own: Tensor) -> tuple[Tensor, Tensor]:
            latents = self.draft_stages[stage].attn.latent(context, rotation)
            return torch.cat((latents[rows], own), dim=1), there

        states = self.draft(batch.previous[:, 0], batch.anchors, embedding, see)
        latent, embedded = self.markov_head(states, batch.previous)
        return DraftOutput(self.norm(states), latent, self.confidence(states, embedded))

    def draft(
        self,
        anchors: Tensor,
        positions: Tensor,
        embedding: Tensor,
        see: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Blocks of anchor tokens `anchors` [N] at `positions` [N] -> states [N, K, D].

        `norm` of the states is the LM head's input; the confidence head reads them as they are.
        `see(stage, own)` adds the window of context to a block's own latents, as `See`.
        """
        offsets = torch.arange(self.config.block_size, device=positions.device)
        embedded = F.embedding(self.inputs(anchors), embedding).to(self.main_proj.weight.dtype)
        rotation = self.rotary(positions[:, None] + offsets, embedded.dtype)
        streams = embedded[..., None, :].expand(-1, -1, self.config.hc_mult, -1)
        for index, stage in enumerate(self.stages):
            run = partial(stage, rotation=rotation, see=partial(see, index))
            streams = self.through(run, streams)
        return self.hc_head(streams)

    def inputs(self, anchors: Tensor) -> Tensor:
        """Anchor tokens [N] -> a block's input tokens [N, K]: the anchor, then noise."""
        tokens = anchors.new_full((len(anchors), self.config.block_size), self.config.mask_token_id)
        tokens[:, 0] = anchors
        return tokens

    def project(self, context: Tensor) -> Tensor:
        """Target features [.., L*D] -> what the context's latents are made of [.., D]."""
        return self.main_norm(self.main_proj(context.to(self.main_proj.weight.dtype)))

    def confidence(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Confidence logits [..] from `states` [.., D] before `norm` and W1[x_{j-1}] [.., R]."""
        if self.config.confidence_detached:
            states, embedded = states.detach(), embedded.detach()
        return self.confidence_head(states, embedded)
