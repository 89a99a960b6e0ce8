"""EAGLE-3 (Li et al. 2025): a low, a middle and a high layer of the target, fused.

The layer's attention takes [embedding ; feature], each normed; its residual is the feature as it
is, and what a slot hands to the next is the layer's output before the last norm. The paper's layer
is Llama's; Qwen3's, whose heads are normed too, bears higher learning rates (`drafter.qk_norm`).
Engines compute both (`deepspec.export.eagle3`). Legend: see `causal`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from deepspec.drafters.causal import CausalDrafter
from deepspec.drafters.eagle3.config import Eagle3Config
from deepspec.drafters.layers import initialise
from deepspec.records import TargetFeatures


class Eagle3Drafter(CausalDrafter):
    """Parameter names are those of EAGLE-3's layer. Reads whatever layers the target captures."""

    def __init__(self, config: Eagle3Config) -> None:
        size = config.hidden_size
        super().__init__(config, 2 * size, config.qk_norm, config.draft_vocab_size)
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
