"""EAGLE-3 (Li et al. 2025): a low, a middle and a high layer of the target, fused.

The layer's attention takes [embedding ; feature], each normed; its residual is the feature. Heads
are normed (q_norm, k_norm) as in the other drafters here, which EAGLE-3's own layer does not do:
compared is how they draft. Legend: see `causal`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from deepspec.drafters.causal import CausalDrafter
from deepspec.drafters.layers import initialise
from deepspec.drafters.shape import DrafterShape
from deepspec.records import TargetFeatures


class Eagle3Drafter(CausalDrafter):
    """Parameter names are those of EAGLE-3's layer. Reads whatever layers the target captures."""

    def __init__(self, config: DrafterShape) -> None:
        size = config.hidden_size
        super().__init__(config, attention_input=2 * size)
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.apply(partial(initialise, std=config.initializer_range))

    def fuse(self, features: TargetFeatures) -> Tensor:
        """The captured layers, projected."""
        return self.fc(features.context.to(self.dtype)).to(self.dtype)

    def mix(self, embedded: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """W = 2D."""
        pair = self.input_layernorm(embedded), self.hidden_norm(feature)
        return torch.cat(pair, dim=-1), feature
